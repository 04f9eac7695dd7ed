"""The command `ncjax`: measure, compare, certify, flow.

Arguments are parsed before JAX is imported, so that help and errors of use come at once.
Data goes to stdout; notes, warnings and errors go to stderr, each in one line.
"""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from ncjax.command import arguments, system
from ncjax.command.output import BadUse, note

# A shell gives the exit codes of SIGINT and SIGPIPE; argparse gives 2 for bad use.
DONE, FAILED, BAD_USE, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
_MESSAGE_LIMIT = 300  # characters of a message of another library


def console() -> None:
    """Run the command on `sys.argv` and end the process with its exit code."""
    system.open_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a letter of the output
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = main()
    if code:
        os._exit(code)  # an ordinary exit writes to a closed pipe, or stops XLA amid work
    sys.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
      argv: arguments after the program name; None takes `sys.argv[1:]`.

    Returns:
      0 done, 1 failed, 2 bad use, 130 interrupted, 141 the reader of stdout has gone.
    """
    shows_traceback = False
    try:
        options = arguments.parse(sys.argv[1:] if argv is None else argv)
        if options is not None:
            shows_traceback = options.traceback
            _run(options)
        print(end="", flush=True)
    except BrokenPipeError:
        return NO_READER
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:
        if shows_traceback:
            traceback.print_exception(error)
        return _fail(error)
    return DONE


def _run(options) -> None:
    if lacking := system.lacking():
        raise BadUse(lacking)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: note(
            f"warning: {message}"
        )
        importlib.import_module(f"ncjax.command.{options.command}").run(options)


def _fail(error: Exception) -> int:
    """Print an error in one line and return its exit code."""
    message = " ".join(str(error).split())
    if not isinstance(error, BadUse | OSError | ModuleNotFoundError):
        first = next(iter(str(error).strip().splitlines()), "")[:_MESSAGE_LIMIT]
        kind = type(error).__name__
        message = f"{kind}: {first}" if first else kind
        message += " (--traceback shows where)"
    note(f"error: {message}")
    return BAD_USE if isinstance(error, BadUse) else FAILED
