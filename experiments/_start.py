"""Errors at the start of a command, before its own command line can report them."""

import os
import sys
from types import TracebackType

# Beginnings of the environment variables that libraries read while they are imported.
_PREFIXES = ("JAX_", "XLA_", "MPL")
_MESSAGE_LIMIT = 300  # characters of a message of another library


def is_command() -> bool:
    """Return whether `python -m` is about to run a module of this package."""
    return sys.argv[:1] == ["-m"]  # Python puts the path of the module here afterwards


def shorten_errors() -> None:
    """Print an error that ends the process in one line; with --traceback print it all."""
    sys.excepthook = _print


def _print(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the error, and exit: 2 if an environment variable is the cause, else 1."""
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    text = next(iter(str(error).strip().splitlines()), "")
    causes = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) and _is_quoted(value, text)
    ]
    message = f"{', '.join(causes) or kind.__name__}: {text[:_MESSAGE_LIMIT]}"
    print(f"error: {message} (--traceback shows where)", file=sys.stderr)
    sys.exit(2 if causes else 1)


def _is_quoted(value: str, text: str) -> bool:
    return f"'{value}'" in text or f'"{value}"' in text
