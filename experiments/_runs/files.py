"""Write files whole or not at all: JSON with a digest, CSV, tables; read JSON."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._runs import reading
from experiments._runs.errors import BadUse

_DIGEST = "sha256"  # in a sealed file: the digest of all other entries
_PART_SUFFIX = ".part"  # ends the names of files that are being written
_MOST_JSON = 256 * 2**20  # bytes of config.json and summary.json
_MOST_CSV = 2**30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    Raises:
      OSError: the file cannot be written; the old one stays.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=_PART_SUFFIX, delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        temporary.replace(path)
    except BaseException as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: OSError) -> OSError:
    """Return an error that says which file could not be written, why, and what to do."""
    advice = "; free some space" if error.errno in _DISK_FULL else ""
    return OSError(f"cannot write {path}: {error.strerror or error}{advice}")


def sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove the temporary files of runs that were killed while writing."""
    for name in names:
        for path in folder.glob(f".{name}.*{_PART_SUFFIX}"):
            if path.is_symlink() or not path.is_dir():
                path.unlink()


def write_files(stem: Path, contents: Mapping[str, bytes]) -> None:
    """Write a file for each suffix, such as the results of `plotting.render`."""
    for suffix, content in contents.items():
        write_atomically(stem.with_suffix(suffix), content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, with null for NaN and infinity."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its digest, which `read_json` checks."""
    stored = json.loads(json.dumps(_finite(content), allow_nan=False))
    write_json(path, stored | {_DIGEST: _digest(stored)})


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, without its digest.

    Raises:
      BadUse: the file holds no object, the digest differs, or it is no regular file.
      OSError: the file cannot be read.
    """
    text = reading.read_bytes(path, _MOST_JSON)
    try:
        content = json.loads(text.decode())
        # Files of earlier versions have no digest.
        fits = _DIGEST not in content or content.pop(_DIGEST) == _digest(content)
    except (ValueError, TypeError, AttributeError, RecursionError):
        content, fits = None, False
    if not isinstance(content, dict):
        raise BadUse(f"{path} is damaged")
    if not fits:
        raise BadUse(
            f"{path} is damaged: its {_DIGEST} does not fit (if you edited the file, "
            "remove that entry)"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finite(content: Any) -> Any:
    """Replace every float that JSON cannot hold by None."""
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is no regular file of a sensible size.

    Raises:
      OSError: the file cannot be read.
    """
    try:
        with reading.opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (BadUse, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def write_csv(path: Path, log_times: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns (S, T) as rows of seed, log_t and values to nine digits."""
    rows = [
        {"seed": seed, "log_t": log_t} | dict(zip(columns, values, strict=True))
        for seed, series in enumerate(zip(*columns.values(), strict=True))
        for log_t, values in zip(log_times, zip(*series, strict=True), strict=True)
    ]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, floats to nine digits."""
    write_atomically(path, csv_of(rows))


def read_rows(path: Path, kinds: Mapping[str, Callable]) -> list[dict[str, Any]]:
    """Return the rows of a CSV file, none if there is no file.

    Args:
      path: the file.
      kinds: what reads a column, by name; other columns hold floats.

    Raises:
      BadUse: the file is damaged.
    """
    if not os.path.lexists(path):
        return []
    try:
        content = reading.read_bytes(path, _MOST_CSV)
        file = io.StringIO(content.decode(), newline="")
        return [
            {name: kinds.get(name, float)(value) for name, value in row.items()}
            for row in csv.DictReader(file, strict=True)
        ]
    except BadUse:
        raise
    except (ValueError, LookupError, TypeError, csv.Error, OSError):
        raise BadUse(f"{path} is damaged") from None


def csv_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as the content of a CSV file, which is empty without rows."""
    if not rows:
        return b""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def write_table(stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as `stem`.csv and as a Markdown table `stem`.md."""
    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0])]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    # A reader of the table is shown a dash; the CSV keeps NaN.
    lines += [["-" if cell == "nan" else cell for cell in row] for row in cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_files(stem, {".csv": csv_of(rows), ".md": text.encode()})


def _cell(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)
