"""Open files of a folder that others may have made: regular files of a sensible size.

A named pipe keeps its reader waiting, a device has no end, and a link leads out of the
folder.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments._runs.errors import BadUse, first_line

MOST_BYTES = 4 * 2**30
MOST_OF_PATH = 5000  # characters; Linux allows 4096 bytes
# No link is followed, nothing waits, no terminal is taken over, no child inherits it.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {*b"\t\n"}, "?")
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """Return the descriptor of a regular file; with `os.O_CREAT` it may be new.

    Raises:
      BadUse: it is a link, a named pipe, a socket or a device.
      OSError: it is a folder or cannot be opened.
    """
    with contextlib.suppress(FileNotFoundError):
        _check(path, os.lstat(path).st_mode)  # first, because opening may change a device
    descriptor = os.open(path, flags | _FLAGS, mode)
    try:
        _check(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def opened(path: Path, limit: int = MOST_BYTES) -> io.BufferedReader:
    """Open a regular file of at most `limit` bytes to read.

    Raises:
      BadUse: it is another kind of file, or larger.
      OSError: it is a folder or cannot be opened.
    """
    file = os.fdopen(open_regular(path), "rb")
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        file.close()
        raise BadUse(f"{path} has {size:,} bytes: expected at most {limit:,}")
    return file


def read_bytes(path: Path, limit: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
      BadUse: it is another kind of file, or larger.
      OSError: it cannot be read.
    """
    with opened(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it has grown, or is of a file system without sizes
        raise BadUse(f"{path} is too large: expected at most {limit:,} bytes")
    return content


def check_tree(path: Path) -> None:
    """Check that `path` and all below are regular files and folders; it may be missing.

    Call this before a library reads files by their names.

    Raises:
      BadUse: there is a link, a named pipe, a socket or a device.
    """
    for found in _walk(path):
        try:
            mode = os.lstat(found).st_mode
        except FileNotFoundError:  # a run that goes on removes its older checkpoints
            continue
        if not stat.S_ISDIR(mode):
            _check(found, mode)


def _walk(path: Path) -> Iterator[Path]:
    """Yield `path` and all below it; follow no link."""
    if os.path.lexists(path):
        yield path
    if not path.is_symlink():
        for root, folders, names in os.walk(path):
            yield from (Path(root, name) for name in (*folders, *names))


def _check(path: Path, mode: int) -> None:
    """Raise an error that names the kind of a file that is not regular."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise BadUse(f"{path} is {kind}: expected a regular file in its place")


def shown(value: Any, limit: int = 500) -> str:
    """Return a text to show: shortened, and with `?` for what a terminal or UTF-8 refuses.

    Names of files may hold any bytes, also those that command a terminal, and JSON half a
    character.
    """
    text = str(value)
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text.encode(errors="replace").decode().translate(_CONTROLS)


def reason(error: Exception) -> str:
    """Return one short line on an error of any kind."""
    first = first_line(error, None)
    known = isinstance(error, BadUse | OSError)
    kind = "" if known else type(error).__name__
    return shown(": ".join(filter(None, (kind, first))), 300)
