"""Read arrays from .npz files, .npy files and folders, without unpickling anything."""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from ncjax.command.output import BadUse

_EXAMPLE = "np.savez('features.npz', features=features, labels=labels, W=W, b=b)"
_NPY, _ZIP = b"\x93NUMPY", b"PK"
_DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError)


class Arrays:
    """Arrays by name, each read when it is asked for; `name` is for messages."""

    def __init__(self, name: str, readers: dict[str, Callable[[], np.ndarray]]):
        self.name = name
        self.keys = tuple(readers)
        self._readers = readers

    def get(self, key: str) -> np.ndarray | None:
        """Return an array, or None if there is none of this name."""
        return self[key] if key in self.keys else None

    def __getitem__(self, key: str) -> np.ndarray:
        """Return an array.

        Raises:
          BadUse: there is none of this name, or it cannot be read.
        """
        if key not in self._readers:
            given = ", ".join(self.keys[:8]) or "none"
            raise BadUse(f"{self.name}: no array {key!r}, only {given}; write {_EXAMPLE}")
        try:
            return _checked(self.name, key, self._readers[key]())
        except ValueError as error:
            if isinstance(error, BadUse):
                raise
            raise BadUse(_unreadable(f"{self.name}: {key}", error)) from error
        except _DAMAGE as error:
            raise BadUse(
                f"{self.name}: {key} cannot be read ({error}); write it anew"
            ) from (error)

    def nested(self, folder: str) -> dict[str, np.ndarray]:
        """Return the arrays `folder/NAME` by NAME, in the order of the file."""
        prefix = f"{folder}/"
        return {k.removeprefix(prefix): self[k] for k in self.keys if k.startswith(prefix)}


def from_path(path: str) -> Arrays:
    """Return the arrays of a .npz file, or of a folder of .npy files.

    Raises:
      BadUse: there is no such file, or it is of another kind.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _from_folder(path)
    if path == "-" or (os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)):
        raise BadUse(
            f"{path} is a pipe, which ncjax cannot read; save the arrays in a file"
        )
    start = _first_bytes(path)
    if start.startswith(_NPY):
        raise BadUse(
            f"{path} holds one array; pass --features={path} --labels=FILE --W=FILE"
        )
    if not start.startswith(_ZIP):
        raise BadUse(f"{path} is neither .npz nor .npy; write {_EXAMPLE}")
    if not zipfile.is_zipfile(path):
        raise BadUse(f"{path} is damaged: its end is missing; write it anew")
    archive = np.load(path, allow_pickle=False)
    if "data.pkl" in {name.rpartition("/")[2] for name in archive.files}:
        raise BadUse(
            f"{path} is a file of PyTorch, which ncjax does not unpickle; torch.load it, "
            f"write {_EXAMPLE}"
        )
    return Arrays(path, {key: _member(archive, key) for key in archive.files})


def from_files(paths: dict[str, str]) -> Arrays:
    """Return the arrays of one .npy file each, memory-mapped, by name."""
    paths = {key: os.path.expanduser(path) for key, path in paths.items()}
    for path in paths.values():
        if not _first_bytes(path).startswith(_NPY):
            raise BadUse(f"{path} is no .npy file; write it by np.save({path!r}, array)")
    name = ", ".join(paths.values())
    return Arrays(name, {key: _mapped(path) for key, path in paths.items()})


def _from_folder(path: str) -> Arrays:
    names = sorted(os.listdir(path))
    files = {n[:-4]: os.path.join(path, n) for n in names if n.endswith(".npy")}
    if not files:
        raise BadUse(
            f"{path}: a folder without .npy files, expected features.npy, labels.npy"
        )
    return Arrays(path, {key: _mapped(file) for key, file in files.items()})


def _member(archive, key: str) -> Callable[[], np.ndarray]:
    return lambda: archive[key]


def _mapped(path: str) -> Callable[[], np.ndarray]:
    return lambda: np.load(path, mmap_mode="r", allow_pickle=False)


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(_NPY))
    except FileNotFoundError:
        raise BadUse(f"{path} does not exist{_nearby(path)}") from None
    except OSError as error:
        raise BadUse(f"{path} cannot be read: {error.strerror}") from error


def _nearby(path: str) -> str:
    """Return the data files beside a path that does not exist, for a message."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"; nor does the folder {folder}"
    names = [n for n in sorted(os.listdir(folder)) if n.endswith((".npz", ".npy"))]
    return (
        f"; {folder} has {_some(names)}"
        if names
        else f"; {folder} has no .npz or .npy file"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _checked(name: str, key: str, array) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise BadUse(f"{name}: {key} is no array; write {_EXAMPLE}")
    if array.dtype.kind == "V":  # NumPy has no bfloat16
        raise BadUse(
            f"{name}: {key} has the dtype {array.dtype}, raw bytes, as np.save writes "
            f"bfloat16; save {key}.astype(np.float32)"
        )
    return array


def _unreadable(name: str, error: ValueError) -> str:
    if "allow_pickle" in str(error):
        return (
            f"{name} holds Python objects, which ncjax does not unpickle; save an array of "
            "numbers, by np.asarray(array, float) or np.asarray(labels, int)"
        )
    return f"{name} cannot be read ({error}); write it anew"
