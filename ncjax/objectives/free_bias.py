"""The best bias at given W and H: the slopes of the loss then sum to zero over samples."""

import jax
import jax.numpy as jnp

from ncjax.numerics import einsum
from ncjax.peeled import samples
from ncjax.peeled.weights import weighted
from ncjax.types import Array, BiasedParams

# Newton's method in K unknowns: iterations, and the shares of a step that are tried.
_ITERATIONS = 20
_SHARES = tuple(2.0**-k for k in range(8))


def with_best_bias(objective, params: BiasedParams, weights: Array | None) -> BiasedParams:
    """Return the point with the bias that minimises the loss, without its decay.

    Args:
      objective: cross entropy, with or without label smoothing, or squared error.
      params: point that is checked already.
      weights: (K, n) weights or None.
    """
    step = _squared_error_step if objective.loss == "squared_error" else _newton_step
    iterations = 2 if objective.loss == "squared_error" else _ITERATIONS

    def improve(_, b):
        return step(objective, params._replace(b=b), weights)

    return params._replace(b=jax.lax.fori_loop(0, iterations, improve, params.b))


def class_slopes(objective, params, weights: Array | None) -> Array:
    """Return the slopes of the loss in the bias, `Σ_a G_a` (K,)."""
    return jnp.sum(objective.slopes(params, weights), axis=(0, 1))


def total_weight(params, weights: Array | None) -> Array:
    """Return the sum of the weights, N without weights."""
    ones = jnp.ones(params.H.shape[:2], params.H.dtype)
    return jnp.sum(weighted(ones, weights))


def _squared_error_step(objective, params: BiasedParams, weights) -> Array:
    """The loss is a parabola in b with curvature `Σ ω`."""
    slopes = class_slopes(objective, params, weights)
    return params.b - slopes / total_weight(params, weights)


def _newton_step(objective, params: BiasedParams, weights) -> Array:
    """Return the candidate with the smallest slopes.

    A share of Newton's step always lowers them. Where the softmax is saturated, the
    curvature vanishes, and the logarithm of target over found probabilities is better.
    """
    b = params.b
    slopes = class_slopes(objective, params, weights)
    probabilities = jax.nn.softmax(samples.logits_of(params))
    found = probabilities if weights is None else weights[..., None] * probabilities
    curvature = _laplacian(found, probabilities)
    newton = -jnp.linalg.solve(curvature, slopes)
    newton = jnp.where(jnp.isfinite(newton), newton, 0)
    totals = jnp.sum(found, axis=(0, 1))
    tiny = float(jnp.finfo(b.dtype).tiny)
    scaling = jnp.log(jnp.maximum(totals - slopes, tiny) / jnp.maximum(totals, tiny))
    shares = jnp.asarray(_SHARES, b.dtype)
    tried = b[None] + jnp.concatenate([jnp.outer(shares, newton), scaling[None]])

    def size(b):
        return jnp.sum(class_slopes(objective, params._replace(b=b), weights) ** 2)

    sizes = jax.lax.map(size, tried)
    return tried[jnp.argmin(jnp.where(jnp.isfinite(sizes), sizes, jnp.inf))]


def _laplacian(found: Array, probabilities: Array) -> Array:
    """Return `Σ ω (diag(p) - p pᵀ)` plus a multiple of 1 1ᵀ, on which the sum is 0.

    The entries off the diagonal keep their digits where p is near 0 or 1, and the
    diagonal is minus their sum.

    Args:
      found: `ω p`, (K, n, K).
      probabilities: p, (K, n, K).
    """
    products = einsum("kij,kil->jl", found, probabilities)
    pairs = jnp.where(jnp.eye(len(products), dtype=bool), 0, products)
    degrees = jnp.sum(pairs, axis=1)
    return jnp.diag(degrees) - pairs + jnp.max(degrees)
