"""Fail early if a run cannot fit into the memory of the machine or of its devices."""

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


def check_devices(needed: float, flags: str, available: int | None) -> None:
    """Raise BadUse if more bytes are needed on each device than a device has.

    Args:
      needed: a lower bound on the bytes on each device.
      flags: as in `check`.
      available: the bytes of the smallest device; None if it has no memory of its own, as a
        CPU.
    """
    if available is not None and needed > available:
        raise BadUse(
            f"this needs at least {needed / 1e9:.3g} GB of memory on each device, and a "
            f"device has {available / 1e9:.3g} GB: give smaller {flags}"
        )


def total() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
