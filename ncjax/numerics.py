"""The scale of arrays as a power of two: to divide by it rounds nothing."""

from functools import reduce

import jax
import jax.numpy as jnp

Array = jax.Array


def power_of_two(arrays, axis: int | None = None) -> Array:
    """Power of two next to the largest entry in size, a half for zeros.

    Squares of what is divided by it neither overflow nor vanish.

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
    """`arrays` over their `power_of_two`."""
    scale = power_of_two(arrays, axis)
    return jax.tree.map(lambda leaf: leaf / scale, arrays)
