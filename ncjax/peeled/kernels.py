"""The arithmetic of `ncjax.peeled` on params that are checked already.

The public functions of the same names in `geometry` and `losses` hold the equations, check
their arguments and call these; other modules of the library call these directly.
"""

import jax
import jax.numpy as jnp

from ncjax.numerics import einsum, matmul
from ncjax.peeled.logits import least_of_others, log_odds_of_error, margins_of_params
from ncjax.types import Array, Params

# Below _SMALL the next term of log log1p(e^a) = a - e^a/2 + ... is less than one rounding
# of `a` in float32 and float64, and e^a is far from underflow.
_SMALL = -30.0


def squared_norm(params: Params) -> Array:
    """`|W|² + |H|²`, a scalar."""
    return jnp.sum(params.W**2) + jnp.sum(params.H**2)


def balance(params: Params) -> Array:
    """`Wᵀ W - Σ h hᵀ`, (d, d)."""
    W, H = params
    gram = einsum("kid,kie->de", H, H)
    return matmul(W.T, W) - gram


def least_margin(params: Params) -> Array:
    """`q_min`, a scalar."""
    return jnp.min(least_of_others(*margins_of_params(params)))


def cross_entropy(params: Params) -> Array:
    """`L`, a scalar."""
    return jnp.sum(jax.nn.softplus(_log_odds_of_error(params)))


def log_cross_entropy(params: Params) -> Array:
    """`log L`, a scalar."""
    return jax.nn.logsumexp(log_softplus(_log_odds_of_error(params)))


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


def error_slopes(params: Params) -> tuple[Array, Array, Array]:
    """`log L` (), slopes `P` (K, n, K) and `right` (K, n), the fields of `ErrorSlopes`."""
    all_margins, others = margins_of_params(params)
    # Infinities stay within compiled programs. Other forms round the flow differently.
    highest = jnp.max(jnp.where(others, -all_margins, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(others, jnp.exp(-all_margins - highest), 0)
    total = jnp.sum(weights, axis=-1)
    highest = highest[..., 0]
    log_odds = highest + jnp.log(total)
    log_loss = jax.nn.logsumexp(log_softplus(log_odds))
    log_any = jax.nn.softplus(log_odds)
    scale = jnp.exp(highest - log_any - log_loss)
    own = -total * scale
    P = jnp.where(others, weights * scale[..., None], own[..., None])
    return log_loss, P, jnp.exp(-log_any)
