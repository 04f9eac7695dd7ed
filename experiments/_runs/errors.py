"""Errors raised by checks: the message stands alone, without type or traceback."""

import contextlib
from collections.abc import Iterator


class BadUse(ValueError):
    """A setting, or a folder, with which nothing can be done: exit code 2."""


class RunFailed(RuntimeError):
    """A run that cannot come to its end, for the reason in the message: exit code 1."""


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Turn a ValueError into `BadUse`: for calls of a library that check the settings."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # one of its kinds, such as JSONDecodeError
            raise
        raise BadUse(str(error)) from error
