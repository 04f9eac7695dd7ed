"""Time calls on a device, and measure the rates that the device reaches."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds of a call."""

    seconds: float  # median of the repeats
    first: float  # of the first call, which compiles


def timed(call: Callable[[], Any], repeats: int = 3) -> tuple[Any, Timing]:
    """Call once to compile, then `repeats` times; wait for the device after each call.

    Returns:
      The last result, and the seconds.
    """
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return result, Timing(statistics.median(seconds[1:]), seconds[0])


def costs(timing: Timing) -> dict[str, float | None]:
    """Return the seconds of compilation and the peak of the device's memory so far."""
    return {
        "compile_s": max(timing.first - timing.seconds, 0.0),
        "peak_GiB": peak_memory(),
    }


def peak_memory() -> float | None:
    """Return the largest memory of the first device so far, in GiB; None on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def product_rate(dtype, size: int, repeats: int = 5) -> float:
    """Return the FLOP/s of the product of two random matrices (size, size).

    It is the practical peak of the device, at JAX's default precision: on an NVIDIA GPU
    float32 products are computed in TF32.
    """
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    _, timing = timed(lambda: multiply(left, right), repeats)
    return 2 * size**3 / timing.seconds


def memory_rate(size: int, repeats: int = 5) -> float:
    """Return the bytes per second that the device reads and writes, on `size` bytes."""
    array = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    _, timing = timed(lambda: add(array), repeats)
    return 2 * array.nbytes / timing.seconds
