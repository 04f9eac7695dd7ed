"""Products in full precision, and the scale of arrays as a power of two."""

from functools import reduce

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array


def matmul(left: ArrayLike, right: ArrayLike) -> Array:
    """Return `left @ right` in the precision of the dtype.

    JAX by default rounds factors in float32 to bfloat16 on a TPU, and to 10 bits on a GPU.
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


def power_of_two(arrays, axis: int | None = None) -> Array:
    """Return the power of two next to the largest absolute entry; 1/2 for zeros.

    Division by it rounds nothing, and squares of the quotients neither overflow nor vanish.

    Args:
      arrays: a floating array or a pytree of some, taken together.
      axis: each slice along it by itself; None takes all entries.

    Returns:
      Scalar, or with `axis` an array that has length 1 there. Not differentiated.
    """
    leaves = [jax.lax.stop_gradient(leaf) for leaf in jax.tree.leaves(arrays)]
    kept = axis is not None
    # Not the maximum of |x|: before jaxlib 0.10.2 that was an array of its own.
    ends = [x.max(axis=axis, keepdims=kept) for x in leaves]
    ends += [-x.min(axis=axis, keepdims=kept) for x in leaves]
    largest = reduce(jnp.maximum, ends)
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones((), largest.dtype), exponent - 1)


def at_unit_scale(arrays, axis: int | None = None):
    """Return `arrays` divided by their `power_of_two`."""
    scale = power_of_two(arrays, axis)
    return jax.tree.map(lambda leaf: leaf / scale, arrays)
