"""Choose the size of a step: of a CPU's cache, or a share of an accelerator's memory.

The devices that hold the arrays decide the platform. Under `jax.jit` it is known only when
the program is lowered: the program holds both sizes, and lowering keeps one.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

# Bytes of the largest array of a step on an accelerator. A step holds about four of them.
CHUNK_BYTES = 2**26


def platform_of(*arrays) -> str | None:
    """Return the platform that computes with these arrays, None if one of them is traced.

    It is the platform of the first JAX array, such as "cpu" or "gpu". NumPy arrays go to
    the default device.
    """
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    on_devices = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    first = on_devices[0] if on_devices else jax.device_put(np.zeros((), np.int32))
    return next(iter(first.sharding.device_set)).platform


def chunk_bytes(platform: str | None, on_cpu: int) -> int:
    """Return the bytes of the largest array of a step: `on_cpu`, or more elsewhere."""
    return on_cpu if platform in ("cpu", None) else max(on_cpu, CHUNK_BYTES)


def host_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(devices: Iterable[jax.Device]) -> int | None:
    """Return the bytes of the smallest of these devices of this process.

    None if one does not report its memory: a CPU, whose devices share the host's.
    """
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit]
    return min(known) if known and len(known) == len(limits) else None


def at_size(function: Callable, size_on: Callable[[str], int], *arrays) -> Any:
    """Return `function(size, *arrays)` at the size for the platform that computes it.

    Args:
      function: its first argument is a number that decides shapes.
      size_on: function from the name of a platform to that number; all but "cpu" share one.
      arrays: pytrees of arrays.
    """
    platform = platform_of(*arrays)
    if platform is not None:
        return function(size_on(platform), *arrays)
    on_cpu, elsewhere = size_on("cpu"), size_on("gpu")
    if on_cpu == elsewhere:
        return function(on_cpu, *arrays)
    return jax.lax.platform_dependent(
        *arrays, cpu=partial(function, on_cpu), default=partial(function, elsewhere)
    )
