"""The arithmetic of `ncjax.peeled` on params that are checked already.

The public functions of the same names in `geometry` and `losses` hold the equations, check
their arguments and call these; other modules of the library call these directly.

`weights` (K, n) multiply the loss of each sample; None is 1 everywhere and adds nothing to
a program. The rows of H with weight 0 must be zero (`weights.without_left_out`).
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp

from ncjax.numerics import einsum, matmul
from ncjax.peeled.logits import least_of_others, log_odds_of_error, margins_of_params
from ncjax.singular import singular_values
from ncjax.types import Array, DeepParams, Params

# Below _SMALL the next term of log log1p(e^a) = a - e^a/2 + ... is less than one rounding
# of `a` in float32 and float64, and e^a is far from underflow.
_SMALL = -30.0


def squared_norm(params: Params | DeepParams) -> Array:
    """`|Z|²`, the sum over all factors, a scalar."""
    return reduce(jnp.add, (jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)))


def balance(params: Params) -> Array:
    """`Wᵀ W - Σ h hᵀ`, (d, d)."""
    W, H = params
    gram = einsum("kid,kie->de", H, H)
    return matmul(W.T, W) - gram


def balances(params: DeepParams) -> tuple[Array, ...]:
    """`W_1ᵀ W_1 - Σ h hᵀ` and all `W_(l+1)ᵀ W_(l+1) - W_l W_lᵀ`, (d_l, d_l) from l = 0."""
    layers, H = params
    pairs = zip(layers[1:], layers[:-1], strict=True)
    above = [matmul(W.T, W) - matmul(below, below.T) for W, below in pairs]
    return balance(Params(layers[0], H)), *above


def separation_value(
    params: Params | DeepParams, weights: Array | None = None
) -> float | Array:
    """`v(n)`, the least `|Z|²/2` at margins of 1, for n_k samples of positive weight."""
    num_classes, per_class, _ = params.H.shape
    if weights is None:
        return (num_classes - 1) * math.sqrt(per_class)
    counts = jnp.sum((weights > 0).astype(weights.dtype), axis=1)
    # Singular values of diag(n)^(1/2) P, where P projects on the vectors that sum to zero:
    # the squares would lose the digits of small classes beside large ones.
    centring = jnp.eye(num_classes, dtype=counts.dtype) - 1 / num_classes
    return jnp.sum(singular_values(jnp.sqrt(counts)[:, None] * centring))


def least_margin(params: Params, weights: Array | None = None) -> Array:
    """`q_min` over the samples of positive weight, a scalar."""
    least = least_of_others(*margins_of_params(params))
    if weights is not None:
        least = jnp.where(weights > 0, least, jnp.max(least))
    return jnp.min(least)


def cross_entropy(params: Params, weights: Array | None = None) -> Array:
    """`L`, a scalar."""
    losses = jax.nn.softplus(_log_odds_of_error(params))
    return jnp.sum(losses if weights is None else weights * losses)


def log_loss(
    params: Params, weights: Array | None = None, gamma: float | Array | None = None
) -> Array:
    """`log L` of cross entropy, or of the focal loss with `gamma`; a scalar."""
    return log_sum(log_losses(_log_odds_of_error(params), gamma), weights)


def log_cross_entropy(params: Params, weights: Array | None = None) -> Array:
    """`log L`, a scalar."""
    return log_loss(params, weights)


def log_losses(a: Array, gamma: float | Array | None) -> Array:
    """`log ℓ` of log odds of error: ℓ = (1-p)^γ log(1 + e^a), 1 - p = sigmoid(a)."""
    log_losses = log_softplus(a)
    return log_losses if gamma is None else log_losses + gamma * jax.nn.log_sigmoid(a)


def log_sum(logarithms: Array, weights: Array | None) -> Array:
    """`log Σ weights · exp(logarithms)`, a scalar."""
    if weights is None:
        return jax.nn.logsumexp(logarithms)
    counted = weights > 0
    logarithms = logarithms + _log_weights(weights)
    # Not -inf for the samples left out: see the note on placeholders in `logits`.
    lowest = jax.lax.stop_gradient(jnp.min(logarithms))
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(counted, logarithms, lowest)))
    exponents = jnp.where(counted, logarithms - highest, 0)
    return jnp.log(jnp.sum(jnp.exp(exponents), where=counted)) + highest


def _log_weights(weights: Array) -> Array:
    """`log weights`, with 0 for a weight of 0."""
    return jnp.log(jnp.where(weights > 0, weights, 1))


def _log_odds_of_error(params: Params) -> Array:
    """`a_ki = logsumexp over j != k of (w_j - w_k)·h_ki`, (K, n)."""
    return log_odds_of_error(*margins_of_params(params))


@jax.custom_jvp
def log_softplus(a: Array) -> Array:
    """`log log(1 + e^a)`, elementwise."""
    small = a < _SMALL
    safe = jnp.where(small, 0.0, a)
    return jnp.where(small, a - jnp.exp(a) / 2, jnp.log(jax.nn.softplus(safe)))


@log_softplus.defjvp
def _log_softplus_jvp(primals, tangents):
    (a,), (tangent,) = primals, tangents
    value = log_softplus(a)
    # d/da log softplus(a) = sigmoid(a) / softplus(a), as a difference of logarithms.
    return value, jnp.exp(jax.nn.log_sigmoid(a) - value) * tangent


def error_slopes(
    params: Params, weights: Array | None = None, gamma: float | Array | None = None
) -> tuple[Array, Array, Array]:
    """`log L` (), slopes `P` (K, n, K) and `right` (K, n), the fields of `ErrorSlopes`.

    With `gamma` they are slopes of the focal loss.
    """
    all_margins, others = margins_of_params(params)
    # Infinities stay within compiled programs. Other forms round the flow differently.
    highest = jnp.max(jnp.where(others, -all_margins, -jnp.inf), axis=-1, keepdims=True)
    shares = jnp.where(others, jnp.exp(-all_margins - highest), 0)
    total = jnp.sum(shares, axis=-1)
    highest = highest[..., 0]
    log_odds = highest + jnp.log(total)
    log_total = log_sum(log_losses(log_odds, gamma), weights)
    log_any = jax.nn.softplus(log_odds)
    exponents = highest - log_any - log_total
    if gamma is not None:
        exponents = exponents + _log_focus(log_odds, gamma)
    if weights is None:
        scale = jnp.exp(exponents)
    else:
        # The loss of a sample left out may be any multiple of the loss of the others.
        counted = weights > 0
        exponents = jnp.where(counted, exponents + _log_weights(weights), 0)
        scale = jnp.where(counted, jnp.exp(exponents), 0)
    own = -total * scale
    P = jnp.where(others, shares * scale[..., None], own[..., None])
    return log_total, P, jnp.exp(-log_any)


def _log_focus(a: Array, gamma: float | Array) -> Array:
    """Log of the focal loss's slope over the cross entropy's, at log odds `a`.

    The slope in `a` is `(1-p)^γ ((1-p) + γ p log(1 + e^a))`, for cross entropy `1-p`.
    """
    log_wrong = jax.nn.log_sigmoid(a)
    quotient = jnp.exp(log_softplus(a) - jax.nn.softplus(a) - log_wrong)
    return gamma * log_wrong + jnp.log1p(gamma * quotient)
