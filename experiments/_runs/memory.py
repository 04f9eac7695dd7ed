"""Fail early if a run cannot fit into memory."""

import os

from experiments._runs.errors import BadUse


def check(needed: float, flags: str) -> None:
    """Raise BadUse if more bytes are needed than this machine has.

    Args:
      needed: a lower bound on the bytes, so that no run is refused that would fit.
      flags: the flags that would make the run smaller.
    """
    if needed > total():
        raise BadUse(
            f"this needs at least {needed / 1e9:.3g} GB of memory, and the machine has "
            f"{total() / 1e9:.3g} GB: give smaller {flags}"
        )


def total() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
