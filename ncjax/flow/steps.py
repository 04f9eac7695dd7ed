"""Sizes of steps in x: the first, the least, and the norm that judges an error."""

import jax.numpy as jnp

from ncjax.peeled.kernels import squared_norm
from ncjax.types import Array

# The controller corrects the first step within a few trials; diffrax's own guess would
# turn a start of NaN into a step of NaN, which never ends.
_FIRST = 0.1
# The steps of the implicit solver do not shrink with time.
_FIRST_IMPLICIT = 0.01


def first_explicit_step(x_start: Array, x_last: Array) -> Array:
    """Return the first step of an explicit solver, whose steps shrink with time."""
    return _FIRST * jnp.exp(-x_start)


def first_implicit_step(x_start: Array, x_last: Array) -> Array:
    """Return the first step of the implicit solver, which does not pass the end."""
    step = jnp.minimum(_FIRST_IMPLICIT, x_last - x_start)
    return jnp.where(step > 0, step, first_explicit_step(x_start, x_last))


def least_step(x_start: Array, x_last: Array) -> Array:
    """Return the least step that the dtype resolves, at most the length of the solve."""
    least = 16 * float(jnp.finfo(x_last.dtype).eps) * jnp.maximum(1, x_last)
    return jnp.where(x_last > x_start, jnp.minimum(least, x_last - x_start), least)


def finite_or_infinite_norm(error) -> Array:
    """Return the root mean square, infinity for NaN: an overflowing step is rejected."""
    mean = squared_norm(error) / sum(leaf.size for leaf in error)
    norm = jnp.where(mean > 0, jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
    return jnp.where(jnp.isnan(mean), jnp.inf, norm)
