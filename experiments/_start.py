"""Errors at the start of a command, before its own command line can report them."""

import os
import sys
from types import TracebackType

from ncjax.command import system

# Beginnings of the environment variables that libraries read while they are imported.
_PREFIXES = ("JAX_", "XLA_", "MPL", "TQDM_")
_BAD_USE, _INTERRUPTION = 2, 130  # exit codes
_MESSAGE_LIMIT = 300  # characters of a message of another library


def is_command() -> bool:
    """Return whether `python -m` is about to run a module of this package."""
    return sys.argv[:1] == ["-m"]  # Python puts the path of the module here afterwards


def prepare() -> None:
    """Open closed streams, refuse limits that are too low for JAX, shorten errors.

    An error that ends the process is printed in one line; with --traceback all of it.
    """
    system.open_streams()
    sys.excepthook = _print
    if lacking := system.lacking():
        print(f"error: {lacking}", file=sys.stderr)
        sys.exit(_BAD_USE)


def _print(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the error, and exit.

    The code is 2 if an environment variable or a matplotlibrc is the cause, 130 after an
    interruption, which prints nothing, and else 1.
    """
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    if _is_interruption(error):
        sys.exit(_INTERRUPTION)
    text = next(iter(str(error).strip().splitlines()), "")
    causes = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) and _is_quoted(value, text)
    ]
    if issubclass(kind, UnicodeError) and _passes(trace, "matplotlib"):
        causes = ["a matplotlibrc"]
    message = f"{', '.join(causes) or kind.__name__}: {text[:_MESSAGE_LIMIT]}"
    print(f"error: {message} (--traceback shows where)", file=sys.stderr)
    sys.exit(_BAD_USE if causes else 1)


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is the cause: extensions in C turn it into an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_quoted(value: str, text: str) -> bool:
    return f"'{value}'" in text or f'"{value}"' in text


def _passes(trace: TracebackType | None, package: str) -> bool:
    """Return whether the error passed through code of the package."""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == package:
            return True
        trace = trace.tb_next
    return False
