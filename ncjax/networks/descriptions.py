"""Check the description of a data set on disk before TFDS reads it.

TFDS imports the module of every class that `features.json` names, from the current folder
too. A description that comes from elsewhere could so run any code.
"""

import functools
import importlib.util
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FEATURES = "features.json"
_INFO = "dataset_info.json"
# The keys that name a class: two spellings of one field, and the one of older versions.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_MOST_BYTES = 64 * 2**20  # of a description; it is usually a few kB
_DATA_DIR = "~/tensorflow_datasets"  # TFDS's default
_DEPTH = 3  # of the files of a set: config/version/file


def check(data_dir: str | None, name: str) -> None:
    """Check the files of a set: every version of it, before TFDS looks for one.

    Args:
      data_dir: TFDS's data directory; if None, its default.
      name: name of the set.

    Raises:
      OSError: a description names a class that is no feature of TFDS, is too large or too
        deep, or a file is a named pipe, a socket or a device.
    """
    _check_package(Path(data_dir or os.environ.get("TFDS_DATA_DIR") or _DATA_DIR))
    for folder in {f for root in _roots(data_dir) for f in _folders(root, name)}:
        for path in _files(folder, _DEPTH):
            check_regular(path)
            if path.name in (_FEATURES, _INFO):
                _check_classes(path)


def data_root(data_dir: str | None) -> Path:
    """Return TFDS's data directory, by default the one that the environment names."""
    return _roots(data_dir)[0]


def _roots(data_dir: str | None) -> list[Path]:
    """Return TFDS's data directory; by default the one of now and the one at its import."""
    import tensorflow_datasets as tfds

    at_import = tfds.core.constants.DATA_DIR
    default = (os.environ.get("TFDS_DATA_DIR") or at_import, at_import)
    return [Path(root).expanduser() for root in ([data_dir] if data_dir else default)]


def check_regular(path: Path) -> None:
    """Raise OSError if `path` is a named pipe, a socket or a device, which may hang."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # reading it gives the error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(
            f"{path} is a named pipe, a socket or a device: expected a regular file"
        )


def _check_package(data_dir: Path) -> None:
    """Raise OSError if `import tensorflow_datasets` would run the data directory.

    Both are usually called tensorflow_datasets, and Python searches the current folder
    first.
    """
    data_dir = data_dir.expanduser().resolve()
    spec = importlib.util.find_spec("tensorflow_datasets")
    package = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if package and data_dir in (package, package.parent):
        raise OSError(
            f"{data_dir} would be imported as the package tensorflow_datasets: start "
            "Python in another folder"
        )


def _folders(root: Path, name: str) -> list[Path]:
    """Return the folders of a set; TFDS takes `MyDigits` and `my_digits` for one name."""
    wanted = name.lower().replace("_", "")
    try:
        return [p for p in root.iterdir() if p.name.lower().replace("_", "") == wanted]
    except OSError:
        return []  # TFDS says what is missing


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the files below a folder, down to a depth."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return  # TFDS says what is missing
    for entry in entries:
        if not entry.is_dir():
            yield entry
        elif depth > 1:
            yield from _files(entry, depth - 1)


def _check_classes(path: Path) -> None:
    """Raise OSError if a description names a class that is no feature of TFDS."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError(f"{path} is larger than {_MOST_BYTES >> 20} MB: no description is")
    try:
        description = json.loads(content.decode(errors="surrogateescape"))
        if path.name == _INFO and isinstance(description, dict):
            description = description.get("features")
        names = set(_class_names(description))
    except RecursionError:
        raise OSError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError:
        return  # TFDS reads JSON by the same parser and says what is wrong
    for name in sorted(names - _features()):
        raise OSError(
            f"{path} names the class {name[:100]!r}: expected a feature of TFDS, such as "
            "'tensorflow_datasets.core.features.image_feature.Image'; no other code is run"
        )


def _class_names(content: Any) -> Iterator[str]:
    """Yield the names of classes at any depth, and within JSON that is held as text."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _CLASS_KEYS and isinstance(value, str):
                yield value
            else:
                yield from _class_names(value)
    elif isinstance(content, list):
        for value in content:
            yield from _class_names(value)
    elif isinstance(content, str) and content.lstrip()[:1] in ("{", "["):
        try:
            nested = json.loads(content)
        except ValueError:
            return
        yield from _class_names(nested)


@functools.cache
def _features() -> frozenset[str]:
    """Return the names of TFDS's feature classes, and the names that it used earlier."""
    import tensorflow_datasets as tfds

    base = tfds.features.FeatureConnector
    found = [value for value in vars(tfds.features).values() if isinstance(value, type)]
    classes: list[Any] = [c for c in found if issubclass(c, base)]
    names = {f"{c.__module__}.{c.__name__}" for c in classes}
    return frozenset(names.union(*(c.ALIASES for c in classes)))
