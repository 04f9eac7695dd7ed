"""One run in a folder at a time, by a lock that goes with its process, killed or not."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from experiments._runs.errors import BadUse

LOCK = ".lock"
# What a disk without locks answers.
_NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, a file `.lock` that names this process while it is held.

    The lock is the kernel's (flock): it is gone when the process is, even if killed, and
    the file that is then left behind locks nothing. On NFS it holds between hosts if the
    server keeps locks; where the disk has none, this warns and goes on.

    Raises:
      BadUse: another run holds it, or the file cannot be made.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with contextlib.suppress(OSError):  # a courtesy; a full disk is told soon enough
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: not that of the next run
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor of the locked file `path`, the one that has this name now."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BadUse(f"cannot lock {path}: {error.strerror}") from None
        try:
            _lock(descriptor, path)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it since: once more


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCK_ERRORS:
            warnings.warn(
                f"{path.parent} is on a disk without locks: start no second run there",
                stacklevel=2,
            )
        elif error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            raise BadUse(
                f"{str(path.parent)!r} is in use by another run, {holder or 'just begun'}: "
                "wait for its end, or give another --workdir"
            ) from None
        else:
            raise
