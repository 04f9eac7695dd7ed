"""Apply a function to a batch a few images at a time, so its memory stays in the cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ncjax.types import Array


def map_groups(
    fn: Callable[..., Array], each: int, *arrays: Array, abreast: int = 1
) -> Array:
    """Return `fn(*arrays)` of a function of single images, `each` images at a time.

    XLA may run `abreast` groups side by side.
    """
    groups = _grouped(each, arrays)
    if len(groups[0]) == 1:
        return fn(*arrays)
    _, result = jax.lax.scan(
        lambda _, group: (None, fn(*group)), None, groups, unroll=abreast
    )
    return result.reshape(-1, *result.shape[2:])[: len(arrays[0])]


def sum_groups(fn: Callable[..., Array], each: int, *arrays: Array) -> Array:
    """Return `fn(*arrays)`, a sum over images that is 0 at zeros, `each` at a time."""
    groups = _grouped(each, arrays)
    if len(groups[0]) == 1:
        return fn(*arrays)
    first = fn(*(group[0] for group in groups))
    rest = tuple(group[1:] for group in groups)
    return jax.lax.scan(lambda total, group: (total + fn(*group), None), first, rest)[0]


def _grouped(each: int, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Reshape arrays (B, ...) to (groups, B', ...), B' <= `each`; zeros fill the end."""
    count = len(arrays[0])
    groups = max(1, math.ceil(count / max(1, each)))
    size = math.ceil(count / groups)
    missing = groups * size - count
    return tuple(
        jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))).reshape(
            groups, size, *array.shape[1:]
        )
        for array in arrays
    )
