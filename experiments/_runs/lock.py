"""A lock on a run folder, released by the kernel when its process ends or is killed.

It is written by hand because filelock does not tell who holds a lock, leaves the file
behind, and fails on a disk that answers ENOLCK.
"""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from experiments._runs import reading
from experiments._runs.errors import BadUse

LOCK = ".lock"
# Errors of a disk without locks.
_NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder` with a file `.lock` that names this process while it is locked.

    The kernel keeps the lock (flock) and releases it when the process ends or is killed;
    a file that a killed process leaves behind locks nothing. On NFS the lock holds between
    hosts if the server supports locks. If the disk supports none, warn and continue.

    Raises:
      BadUse: another run holds the lock, the file cannot be created, or it is a link, a
        named pipe, a socket or a device.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with contextlib.suppress(OSError):  # a full disk is reported by the next write
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        path.unlink(
            missing_ok=True
        )  # while locked, or it might be the file of the next run
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Lock the file that now has the name `path`, and return its descriptor."""
    while True:
        try:
            descriptor = reading.open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise BadUse(f"cannot lock {path}: {error.strerror}") from None
        try:
            _lock(descriptor, path)
            own = os.fstat(descriptor)
            if own.st_nlink > 1:
                raise BadUse(f"cannot lock {path}: the file has another name too")
            if os.path.lexists(path) and os.path.samestat(os.lstat(path), own):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile: try again


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
