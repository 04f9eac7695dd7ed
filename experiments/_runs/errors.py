"""Errors whose message suffices: the command line shows no type and no traceback."""

import contextlib
from collections.abc import Iterator

_MESSAGE_LIMIT = 300  # characters of a message of another library


class BadUse(ValueError):
    """A setting is out of range, or a folder cannot be used: exit code 2."""


class RunFailed(RuntimeError):
    """A run cannot finish, for a reason that the message gives: exit code 1."""


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Turn a ValueError of a library that checks the settings into `BadUse`."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # a subclass, such as JSONDecodeError
            raise
        raise BadUse(str(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether NumPy, Python or XLA could not allocate memory."""
    exhausted = str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and exhausted)


def first_line(error: BaseException, limit: int | None = _MESSAGE_LIMIT) -> str:
    """Return the first line of the message of an error, or its first `limit` characters."""
    return next(iter(str(error).strip().splitlines()), "")[:limit]
