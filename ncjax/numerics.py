"""Products in full precision, and the scale of arrays as a power of two."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Array = jax.Array


def matmul(left: ArrayLike, right: ArrayLike) -> Array:
    """Return `left @ right` in the precision of the dtype.

    By default JAX rounds float32 factors to bfloat16 on a TPU, and to 10 bits on a GPU.
    """
    return jnp.matmul(left, right, precision="highest")


def dot(left: ArrayLike, right: ArrayLike) -> Array:
    """Return the dot product in the precision of the dtype, as `matmul` does."""
    return jnp.dot(left, right, precision="highest")


def einsum(subscripts: str, *operands: ArrayLike) -> Array:
    """Return the sum over repeated subscripts in the precision of the dtype."""
    return jnp.einsum(subscripts, *operands, precision="highest")


def tensordot(left: ArrayLike, right: ArrayLike, axes) -> Array:
    """Return the product summed over `axes` in the precision of the dtype."""
    return jnp.tensordot(left, right, axes, precision="highest")


def root(x: Array) -> Array:
    """Return the square root of `x` >= 0, with slope 0 at 0 instead of infinity."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def on_device(value: ArrayLike, dtype) -> Array:
    """Return `value` as an array; a number or NumPy array is transferred explicitly.

    `jnp.asarray` would transfer implicitly, which `jax.transfer_guard("disallow")` forbids.
    """
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return jax.device_put(np.asarray(value, dtype))


def power_of_two(arrays, axis: int | None = None) -> Array:
    """Return the largest power of two that is at most max |entry|; 1/2 for zeros.

    Division by it is exact, and squares of the quotients neither overflow nor underflow.

    Args:
      arrays: a floating array, or a pytree of arrays that get one common scale.
      axis: reduce along this axis alone, so that each slice gets its own scale; None
        reduces over all entries.

    Returns:
      Scalar, or with `axis` an array of length 1 along it. A constant to derivatives.
    """
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(arrays)]
    kept = axis is not None
    # max and min instead of max |x|: jaxlib before 0.10.2 stored |x| as an array.
    ends = [x.max(axis=axis, keepdims=kept) for x in leaves]
    ends += [-x.min(axis=axis, keepdims=kept) for x in leaves]
    largest = reduce(jnp.maximum, ends)
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones((), largest.dtype), exponent - 1)


def at_unit_scale(arrays, axis: int | None = None):
    """Return `arrays` divided by their `power_of_two`."""
    scale = power_of_two(arrays, axis)
    return jax.tree.map(lambda leaf: leaf / scale, arrays)
