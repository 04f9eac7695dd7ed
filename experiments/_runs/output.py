"""Lines for the person or the program that reads stderr."""

import contextlib
import sys


def note(text: str) -> None:
    """Print lines to stderr, if anything still reads them."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
