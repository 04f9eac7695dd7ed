"""Cross entropy in margin form: of the layer-peeled model at any norm, and of a network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_params
from ncjax.numerics import einsum
from ncjax.types import Array, Params

# Below this the next term of log log1p(e^a) = a - e^a/2 + ... is under one rounding
# of `a` in float32 and float64 alike, and e^a is far from underflow in both. In float16
# it would underflow, and one rounding of `a` is larger.
_SMALL, _SMALL_FLOAT16 = -30.0, -8.0
# From this size of W on it is transposed by itself: XLA's product with a transposed right
# factor takes three times as long within a loop on CPU, its copy next to nothing.
_LARGE = 2**14


def cross_entropy(params: Params) -> Array:
    r"""Cross entropy, a sum over samples.

    $$\mathcal L(Z) = \sum_{k,i} \log\Bigl(1 + \sum_{j \ne k} e^{-m_{kij}}\Bigr),
    \qquad m_{kij} = (w_k - w_j)^\top h_{k,i}$$

    The margin form keeps every digit where `logsumexp(logits) - logit` returns 0. The
    value underflows once the least margin passes 708 (float64) or 87 (float32): use
    `log_cross_entropy` there.

    Args:
      params: `W` (K, d) and `H` (K, n, d).

    Returns:
      Scalar, `(K n) log K` at the origin.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Ji et al. (ICLR 2022), equation (1).

    >>> import jax.numpy as jnp, ncjax
    >>> params = ncjax.Params(jnp.zeros((3, 2)), jnp.zeros((3, 4, 2)))
    >>> round(float(ncjax.cross_entropy(params)), 4)  # 12 log 3
    13.1833
    """
    return jnp.sum(jax.nn.softplus(_log_odds_of_error(params)))


def log_cross_entropy(params: Params) -> Array:
    r"""Natural logarithm of `cross_entropy`, finite and exact at any norm.

    With $a_{ki} = \log \sum_{j \ne k} e^{-m_{kij}}$, the log odds of an error,

    $$\log \mathcal L = \operatorname{logsumexp}_{k,i} \log\log(1 + e^{a_{ki}}).$$

    Nothing underflows: a loss of `exp(-1e6)` gives -1e6, with gradient $\nabla
    \mathcal L / \mathcal L$ correct to rounding, in float32 as in float64. NaN only where
    a logit itself is beyond the largest number of the dtype.

    Args:
      params: `W` (K, d) and `H` (K, n, d).

    Returns:
      Scalar, `log(K n log K)` at the origin.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Ji et al. (ICLR 2022), equation (1); the logarithmic form is ncjax's.

    >>> import jax.numpy as jnp, ncjax
    >>> etf = ncjax.simplex_etf(3, 2)
    >>> far = ncjax.Params(1e3 * etf, 1e3 * etf[:, None])  # margins of 1.5e6
    >>> round(float(ncjax.log_cross_entropy(far)) / 1e6, 4)
    -1.5
    """
    return jax.nn.logsumexp(log_softplus(_log_odds_of_error(params)))


@jax.custom_jvp
def log_softplus(a: Array) -> Array:
    r"""$\log\log(1 + e^a)$, elementwise, without underflow: `a` for very negative `a`."""
    small = a < (_SMALL_FLOAT16 if a.dtype == jnp.float16 else _SMALL)
    safe = jnp.where(small, 0.0, a)
    return jnp.where(small, a - jnp.exp(a) / 2, jnp.log(jax.nn.softplus(safe)))


@log_softplus.defjvp
def _log_softplus_jvp(primals, tangents):
    (a,), (tangent,) = primals, tangents
    value = log_softplus(a)
    # d/da log softplus(a) = sigmoid(a) / softplus(a), as a difference of logarithms.
    return value, jnp.exp(jax.nn.log_sigmoid(a) - value) * tangent


class ErrorSlopes(NamedTuple):
    """The loss and its slopes in the logits, for `L` of any size."""

    log_loss: Array  # ()
    P: Array  # (K, n, K)  ∇ℓ_ki / L in the logits of sample (k, i); rows sum to 0
    right: Array  # (K, n)     softmax weight of the own class


def error_slopes(params: Params) -> ErrorSlopes:
    r"""Slopes of every sample's loss in its logits, relative to the whole loss.

    $$P_{kij} = \frac{1}{\mathcal L} \frac{\partial \ell_{ki}}{\partial z_{kij}}
    = \frac{p_{kij} - \delta_{jk}}{\mathcal L}, \qquad
    \nabla_W \log \mathcal L = \sum_{k,i} P_{ki} h_{ki}^\top, \quad
    \nabla_{h_{ki}} \log \mathcal L = W^\top P_{ki}$$

    All in logarithms until the last, so that nothing of the order of 1 is lost where the
    loss is e^-1000000; `p_k - 1` is the sum of the others, not a difference.

    Args:
      params: `W` (K, d) and `H` (K, n, d).

    Returns:
      `ErrorSlopes`.
    """
    differences, others = _logit_differences(params)
    highest = jnp.max(jnp.where(others, differences, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(others, jnp.exp(differences - highest), 0)
    total = jnp.sum(weights, axis=-1)
    highest = highest[..., 0]
    log_odds = highest + jnp.log(total)
    log_loss = jax.nn.logsumexp(log_softplus(log_odds))
    log_any = jax.nn.softplus(log_odds)
    scale = jnp.exp(highest - log_any - log_loss)
    own = -total * scale
    return ErrorSlopes(
        log_loss=log_loss,
        P=jnp.where(others, weights * scale[..., None], own[..., None]),
        right=jnp.exp(-log_any),
    )


def _log_odds_of_error(params: Params) -> Array:
    """`a_ki = logsumexp over j != k of (w_j - w_k)·h_ki`, (K, n)."""
    differences, others = _logit_differences(params)
    return jax.nn.logsumexp(differences, axis=-1, where=others)


def _logit_differences(params: Params) -> tuple[Array, Array]:
    """`(w_j - w_k)·h_ki`, (K, n, K), and where j != k, (K, 1, K)."""
    W, H = check_params(params)
    # A common offset of the rows of W, which no margin sees, would cost digits.
    W = W - W[:1]
    transposed = W.T
    if W.size >= _LARGE:
        transposed = jax.lax.optimization_barrier(transposed)
    logits = einsum("kid,dj->kij", H, transposed)
    own = einsum("kid,kd->ki", H, W)
    others = ~jnp.eye(W.shape[0], dtype=bool)[:, None, :]
    return logits - own[..., None], others


def softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    r"""Cross entropy of a network's logits, sample by sample.

    $$\ell_a = \log\Bigl(1 + \sum_{j \ne y_a} e^{z_{aj} - z_{a y_a}}\Bigr)$$

    In margin form, whose value and gradient keep their digits where margins are large, as
    they are long after the training error is zero.

    Args:
      logits: (N, K) floating.
      labels: (N,) integers in [0, K).

    Returns:
      (N,) array.

    >>> import jax.numpy as jnp
    >>> from ncjax import losses
    >>> far = losses.softmax_cross_entropy(jnp.array([[40.0, 0.0]]), jnp.array([0]))
    >>> bool(abs(far[0] / jnp.exp(-40.0) - 1) < 1e-5)
    True
    """
    labels = labels.astype(jnp.int32)  # in a narrow type the class numbers would wrap
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    others = labels[:, None] != jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    return jax.nn.softplus(jax.nn.logsumexp(logits - own, axis=1, where=others))
