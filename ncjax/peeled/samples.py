r"""Losses of single samples, from margins or logits, and their logarithms.

$a_{ki} = \log \sum_{j \ne k} e^{-m_{kij}}$ are the log odds of an error, and $p_{ki} = 1 /
(1 + e^{a_{ki}})$ is the softmax probability of the own class. Arrays are (K, n, K) for
margins and logits, `others` (K, 1, K) masks j != k, and every loss is (K, n).
"""

import jax
import jax.numpy as jnp

from ncjax.numerics import einsum
from ncjax.peeled.kernels import log_losses, log_softplus
from ncjax.peeled.logits import log_odds_of_error, margins_of_params
from ncjax.types import Array, BiasedParams, Params


def logits_of(params: Params | BiasedParams) -> Array:
    """`w_j·h_ki + b_j`, (K, n, K)."""
    logits = einsum("kid,jd->kij", params.H, params.W)
    return logits + params.b[None, None] if isinstance(params, BiasedParams) else logits


def margins_of(params: Params | BiasedParams) -> tuple[Array, Array]:
    """`(w_k - w_j)·h_ki + b_k - b_j` (K, n, K) and the mask of j != k."""
    margins, others = margins_of_params(Params(params.W, params.H))
    if isinstance(params, BiasedParams):
        margins = margins + (params.b[:, None] - params.b[None])[:, None]
    return margins, others


def cross_entropy(margins: Array, others: Array) -> Array:
    """`log(1 + e^a)`."""
    return jax.nn.softplus(log_odds_of_error(margins, others))


def smoothed_cross_entropy(margins: Array, others: Array, smoothing) -> Array:
    """`log(1 + e^a) + (alpha / K) Σ_{j != k} m_j`."""
    pull = jnp.sum(jnp.where(others, margins, 0), axis=-1) / margins.shape[-1]
    return cross_entropy(margins, others) + smoothing * pull


def focal(margins: Array, others: Array, gamma) -> Array:
    """`(1 - p)^gamma log(1 + e^a)`."""
    a = log_odds_of_error(margins, others)
    return jnp.exp(gamma * jax.nn.log_sigmoid(a)) * jax.nn.softplus(a)


def squared_error(logits: Array, others: Array) -> Array:
    """`|z - e_k|² / 2`."""
    return jnp.sum((logits - jnp.where(others, 0, 1)) ** 2, axis=-1) / 2


def log_cross_entropy(margins: Array, others: Array) -> Array:
    """Logarithm of `cross_entropy`, without underflow."""
    return log_softplus(log_odds_of_error(margins, others))


def log_focal(margins: Array, others: Array, gamma) -> Array:
    """Logarithm of `focal`, without underflow."""
    return log_losses(log_odds_of_error(margins, others), gamma)
