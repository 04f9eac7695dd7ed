"""Products in full precision, half precision, and the scale of arrays as a power of two."""

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


def widen(arrays):
    """Return floating arrays in float32 if they are in half precision, else as they are.

    Half precision (float16, bfloat16 and narrower) only stores numbers: its sums overflow
    at 65504 or keep three digits. Derivatives come back in the dtype of `arrays`.

    Args:
      arrays: a floating array, or a pytree of arrays.
    """
    return jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf.dtype)), arrays)


def wide_dtype(dtype) -> jnp.dtype:
    """Return the dtype of the computation: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def power_of_two(arrays, axis: int | None = None) -> Array:
    """Return the largest power of two that is at most max |entry|; 1/2 for zeros.

    Division by it is exact, and squares of the quotients neither overflow nor underflow.
    It is at least the least normal number, because XLA reads smaller numbers as 0.

    Args:
      arrays: a floating array, or a pytree of arrays that get one common scale.
      axis: reduce along this axis alone, so that each slice gets its own scale; None
        reduces over all entries.

    Returns:
      Scalar, or with `axis` an array of length 1 along it. A constant to derivatives.
    """
    largest = _largest(arrays, axis)
    half = jnp.asarray(0.5, largest.dtype)
    is_number = (largest > 0) & (largest < jnp.inf)
    return jnp.where(is_number, _two_to(_exponent(largest), largest.dtype), half)


def at_unit_scale(arrays, axis: int | None = None):
    """Return `arrays` divided by their `power_of_two`."""
    scale = power_of_two(arrays, axis)
    return jax.tree.map(lambda leaf: leaf / scale, arrays)


def root_of_scale(array: ArrayLike, degree: int = 2) -> Array:
    """Return the largest power of two whose power p = degree is at most max |entry|.

    p divisions by it are exact and leave entries below 2^p. The power p of `r` scales a
    product of p arrays, and `r` itself its root of degree p, without rounding.

    Returns:
      Scalar; the root of the least normal number if all entries are 0. A constant to
      derivatives.
    """
    largest = _largest(array, None)
    return _two_to(_exponent(largest) // degree, largest.dtype)


def _exponent(x: Array) -> Array:
    """Return the integer part of log2(x) for x >= 0, at least that of the least normal.

    Read from the bits of x: `jnp.frexp` and `jnp.ldexp` are forty operations to compile.
    """
    limits, integer = jnp.finfo(x.dtype), _integer_of_bits(x.dtype)
    exponent = jax.lax.bitcast_convert_type(x, integer) >> limits.nmant
    return jnp.maximum(exponent - limits.maxexp + 1, limits.minexp)


def _two_to(exponent: Array, dtype) -> Array:
    """Return 2^exponent for exponents of normal numbers."""
    limits = jnp.finfo(dtype)
    bits = (exponent + limits.maxexp - 1) << limits.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)


def _integer_of_bits(dtype) -> np.dtype:
    """Return the signed integer type with as many bits as a floating type."""
    return np.dtype(f"int{jnp.finfo(dtype).bits}")


def _largest(arrays, axis: int | None) -> Array:
    """Return max |entry|."""
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(arrays)]
    kept = axis is not None
    # max and min instead of max |x|: jaxlib before 0.10.2 stored |x| as an array.
    ends = [x.max(axis=axis, keepdims=kept) for x in leaves]
    ends += [-x.min(axis=axis, keepdims=kept) for x in leaves]
    return reduce(jnp.maximum, ends)
