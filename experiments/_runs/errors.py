"""Errors whose message suffices: the command line shows no type and no traceback."""

import contextlib
from collections.abc import Iterator


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
