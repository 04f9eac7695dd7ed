"""Standard streams and limits of the process, before JAX is imported."""

import os
import sys
import threading

try:
    import resource
except ModuleNotFoundError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Least limits under which JAX starts and computes small things: it was measured to use
# 2.4 GB of address space, 1.0 GB of it data, 10 files and 31 threads on two cores.
_ADDRESSES, _ADDRESSES_OF_CORE = 3.0e9, 0.1e9  # bytes
_DATA, _DATA_OF_CORE = 1.2e9, 0.05e9  # bytes
_STACK = 1e6  # bytes
_FILES = 64
_THREADS, _THREADS_OF_CORE = 16, 8


def open_streams() -> None:
    """Open the null device in place of each standard stream that is closed, as by `2>&-`.

    Otherwise the next file that the process opens takes the number of the stream, and
    messages are written into that file.
    """
    for number, (name, mode) in enumerate(
        (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
    ):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def lacking() -> str:
    """Return which limit of the process is too low for JAX, and the remedy; "" if none."""
    if resource is None:
        return ""
    cores = os.cpu_count() or 1
    for kind, command, what, least in (
        (resource.RLIMIT_AS, "v", "memory", _ADDRESSES + cores * _ADDRESSES_OF_CORE),
        (resource.RLIMIT_DATA, "d", "memory", _DATA + cores * _DATA_OF_CORE),
        (resource.RLIMIT_STACK, "s", "stack", _STACK),
        (resource.RLIMIT_NOFILE, "n", "number of open files", _FILES),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and limit < least:
            unit = "" if kind == resource.RLIMIT_NOFILE else " bytes"
            return (
                f"the {what} of this process is limited to {limit}{unit} (ulimit "
                f"-{command}), and JAX needs at least {least:.0f} here: raise the limit"
            )
    count = _THREADS + cores * _THREADS_OF_CORE
    started = _threads(count)
    if started < count:
        return (
            f"this process can start {started} threads, and JAX needs about {count} here: "
            "raise the limit of processes (ulimit -u), or of the container"
        )
    return ""


def _threads(count: int) -> int:
    """Start up to `count` threads at once, end them, and return how many did start."""
    end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    finally:  # also on Ctrl-C: Python waits for threads before it exits
        end.set()
    for thread in started:
        thread.join()
    return len(started)
