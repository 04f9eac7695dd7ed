"""Refuse at once what no memory could hold."""

import os

from experiments._runs.errors import BadUse


def check(needed: float, flags: str) -> None:
    """Raise BadUse if more bytes are needed than this machine has.

    Args:
      needed: bytes at the very least, so that nothing is refused that would run.
      flags: what to make smaller.
    """
    if needed > total():
        raise BadUse(
            f"this needs at least {needed / 1e9:.3g} GB of memory, and the machine has "
            f"{total() / 1e9:.3g} GB: give smaller {flags}"
        )


def total() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
