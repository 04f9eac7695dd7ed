"""Sizes of steps: the first, the least, tolerances, and the norm that judges an error."""

import jax
import jax.numpy as jnp

from ncjax.checks import check_positive
from ncjax.numerics import at_unit_scale, power_of_two
from ncjax.peeled.kernels import squared_norm
from ncjax.types import Array, DeepParams, Params

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
    leaves = jax.tree.leaves(error)
    mean = sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    norm = jnp.where(mean > 0, jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
    return jnp.where(jnp.isnan(mean), jnp.inf, norm)


def relative_tolerance(rtol, dtype):
    """Return `rtol`, or the default for None; raise ValueError if it is not positive."""
    if rtol is None:
        return 1e-8 if dtype == jnp.float64 else 1e-6
    check_positive("rtol", rtol, dtype)
    return rtol


def tolerances(
    params: Params | DeepParams, weights: Array | None, rtol, atol
) -> tuple[Array, Array]:
    """Return the relative and the absolute tolerance of a step, in the dtype of params.

    Entries of samples that are left out lower the norm of the error. The tolerances are
    lowered by the same factor.

    Args:
      params: `Params` or `DeepParams`, a start that is checked already.
      weights: (K, n) weights or None.
      rtol: relative tolerance.
      atol: absolute tolerance; None takes `rtol`, times the root mean square of the entries
        if that is below 1.

    Raises:
      ValueError: atol is not positive.
    """
    if atol is not None:
        check_positive("atol", atol)
    dtype = params.W.dtype
    relative = jnp.asarray(rtol, dtype)
    share = _share_of_entries(params, weights)
    absolute = _absolute_tolerance(params, relative, share) if atol is None else atol
    if share is not None:
        relative, absolute = relative * jnp.sqrt(share), absolute * jnp.sqrt(share)
    return relative, jnp.asarray(absolute, dtype)


def _share_of_entries(params, weights: Array | None) -> Array | None:
    """Return the share of entries of samples with positive weight and of layers, or None.

    None is a share of 1.
    """
    if weights is None:
        return None
    left_out, dim = jnp.sum(weights == 0), params.H.shape[-1]
    rows = sum(leaf.size for leaf in jax.tree.leaves(params)) / dim
    return 1 - left_out.astype(weights.dtype) / rows


def _absolute_tolerance(params, rtol, share: Array | None) -> Array:
    """Return `rtol`, times the root mean square of the entries if that is below 1."""
    params = jax.lax.stop_gradient(params)
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    mean = squared_norm(at_unit_scale(params)) / entries
    mean = mean if share is None else mean / share
    size = power_of_two(params) * jnp.sqrt(mean)
    return jnp.maximum(rtol * jnp.minimum(size, 1), float(jnp.finfo(size.dtype).tiny))
