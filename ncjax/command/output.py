"""Write data to stdout, notes to stderr, figures to files that do not exist yet."""

import contextlib
import importlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

FORMATS = (".png", ".pdf", ".svg")
_QUIET_SECONDS, _STEP_SECONDS = 2.0, 0.5


class BadUse(ValueError):
    """Arguments or input that the command cannot use: exit code 2."""


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn a ValueError of the library about the input from `source` into `BadUse`."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # a subclass, such as UnicodeError
            raise
        raise BadUse(f"{source}: {error}") from error


def note(text: str) -> None:
    """Print a line to stderr, if anything still reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON, with null in place of NaN and infinity."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plot(path: str | None, overwrite: bool) -> None:
    """Raise BadUse if the figure cannot be written to `path`, before any work."""
    if path is None:
        return
    folder, name = os.path.split(path)
    if os.path.splitext(name)[1].lower() not in FORMATS:
        raise BadUse(
            f"--plot={path}: expected a file name that ends in {', '.join(FORMATS)}"
        )
    if folder and not os.path.isdir(folder):
        raise BadUse(f"--plot={path}: there is no folder {folder}; make it first")
    if os.path.exists(path) and not overwrite:
        raise BadUse(f"--plot={path}: the file exists; add --overwrite to replace it")
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise BadUse("--plot needs matplotlib: pip install 'ncjax[experiments]'") from None
    except Exception as error:  # its environment variables, or a broken matplotlibrc
        reason = " ".join(str(error).split())
        raise BadUse(f"--plot: Matplotlib does not start: {reason}") from error


def save_plot(figure, path: str) -> None:
    """Write a figure to `path`, whole or not at all, and note where it is.

    Raises:
      OSError: the file cannot be written; an old one stays.
    """
    from ncjax import plotting

    content, part = io.BytesIO(), f"{path}.part"
    with plotting.style():
        kind = os.path.splitext(path)[1][1:]
        figure.savefig(content, format=kind, dpi=200, bbox_inches="tight")
    try:
        with open(part, "wb") as file:
            file.write(content.getvalue())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    note(f"figure: {path}")


class Progress:
    """Shows the share of the work done on a terminal, after two seconds of work."""

    def __init__(self, title: str):
        self._title = title
        self._next = time.monotonic() + _QUIET_SECONDS
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`, at most twice a second."""
        if not sys.stderr.isatty():
            return
        if done < total and time.monotonic() >= self._next:
            self._next = time.monotonic() + _STEP_SECONDS
            self._shown = True
            share = done / total
            print(f"\r{self._title}: {share:4.0%}", end="", file=sys.stderr, flush=True)
        if done == total and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
