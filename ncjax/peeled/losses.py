"""Cross entropy in margin form, of the layer-peeled model and of a network's logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.arrays import as_array, narrow_labels, read_array
from ncjax.checks import check_label_range
from ncjax.numerics import widen
from ncjax.peeled import kernels
from ncjax.peeled.alternatives import focal_loss as focal_loss
from ncjax.peeled.alternatives import log_focal_loss as log_focal_loss
from ncjax.peeled.alternatives import smoothed_cross_entropy as smoothed_cross_entropy
from ncjax.peeled.alternatives import squared_error as squared_error
from ncjax.peeled.logits import log_odds_of_error, own_and_others
from ncjax.peeled.points import check_factors
from ncjax.types import Array, DeepParams, Params


def cross_entropy(params: Params | DeepParams, weights=None) -> Array:
    r"""Cross entropy, a sum over samples.

    $$\mathcal L(Z) = \sum_{k,i} \omega_{ki}
    \log\Bigl(1 + \sum_{j \ne k} e^{-m_{kij}}\Bigr),
    \qquad m_{kij} = (w_k - w_j)^\top h_{k,i}$$

    The margin form keeps all digits, where `logsumexp(logits) - logit` returns 0 once
    margins pass 35. The value underflows when the least margin exceeds 708 (float64) or 87
    (float32): use `log_cross_entropy` there.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: $\omega$, (K, n) for samples or (K,) for classes, not negative. Weight 0
        leaves a sample out, so that classes may differ in size (`ncjax.sample_weights`).
        None is 1 everywhere.

    Returns:
      Scalar, `(K n) log K` at the origin without weights; float32 for half precision.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Ji et al. (ICLR 2022), equation (1).

    >>> import jax.numpy as jnp, ncjax
    >>> params = ncjax.Params(jnp.zeros((3, 2)), jnp.zeros((3, 4, 2)))
    >>> round(float(ncjax.cross_entropy(params)), 4)  # 12 log 3
    13.1833
    """
    return kernels.cross_entropy(*check_factors(params, weights))


def log_cross_entropy(params: Params | DeepParams, weights=None) -> Array:
    r"""Natural logarithm of `cross_entropy`, finite and exact at any norm.

    With $a_{ki} = \log \sum_{j \ne k} e^{-m_{kij}}$, the log odds of an error,

    $$\log \mathcal L = \operatorname{logsumexp}_{k,i}
    \bigl( \log \omega_{ki} + \log\log(1 + e^{a_{ki}}) \bigr).$$

    Nothing underflows: a loss of `exp(-1e6)` gives -1e6, and the gradient $\nabla
    \mathcal L / \mathcal L$ is correct to rounding, in float32 and float64. The result is
    NaN only if a logit overflows.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: $\omega$, as in `cross_entropy`.

    Returns:
      Scalar, `log(K n log K)` at the origin without weights; float32 for half precision.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Ji et al. (ICLR 2022), equation (1); the logarithmic form is ncjax's.

    >>> import jax.numpy as jnp, ncjax
    >>> etf = ncjax.simplex_etf(3, 2)
    >>> far = ncjax.Params(1e3 * etf, 1e3 * etf[:, None])  # margins of 1.5e6
    >>> round(float(ncjax.log_cross_entropy(far)) / 1e6, 4)
    -1.5
    """
    return kernels.log_cross_entropy(*check_factors(params, weights))


def log_softplus(a: Array) -> Array:
    r"""$\log\log(1 + e^a)$, elementwise, without underflow: `a` for very negative `a`.

    Half precision is computed in float32, which the result has.

    Raises:
      ValueError: `a` is not an array of numbers.
    """
    return kernels.log_softplus(widen(as_array("a", a)))


class ErrorSlopes(NamedTuple):
    """Logarithm of the loss and its relative slopes in the logits, for `L` of any size."""

    log_loss: Array  # ()
    P: Array  # (K, n, K)  ω_ki ∇ℓ_ki / L in the logits of sample (k, i); rows sum to 0
    right: Array  # (K, n)     softmax weight of the own class


def error_slopes(params: Params | DeepParams, weights=None) -> ErrorSlopes:
    r"""Slopes of every sample's loss in its logits, relative to the whole loss.

    $$P_{kij} = \frac{\omega_{ki}}{\mathcal L} \frac{\partial \ell_{ki}}{\partial z_{kij}}
    = \omega_{ki} \frac{p_{kij} - \delta_{jk}}{\mathcal L}, \qquad
    \nabla_W \log \mathcal L = \sum_{k,i} P_{ki} h_{ki}^\top, \quad
    \nabla_{h_{ki}} \log \mathcal L = W^\top P_{ki}$$

    Exponentials are taken last, so that slopes of order 1 keep their digits at a loss of
    e^-1000000. `p_k - 1` is minus the sum of the other probabilities, without cancellation.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: $\omega$, as in `cross_entropy`.

    Returns:
      `ErrorSlopes`, float32 for half precision.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.
    """
    return ErrorSlopes(*_error_slopes(*check_factors(params, weights)))


# Compiled, so that `jax_debug_infs` does not report its placeholders.
_error_slopes = jax.jit(kernels.error_slopes)


def softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    r"""Cross entropy of a network's logits, sample by sample.

    $$\ell_a = \log\Bigl(1 + \sum_{j \ne y_a} e^{z_{aj} - z_{a y_a}}\Bigr)$$

    In margin form the value and its gradient keep their digits at large margins, which a
    network reaches long after its training error is zero.

    A logit of `-inf` masks its class: the class adds nothing, and its derivative is 0. The
    loss is `+inf` if the own class is masked.

    Args:
      logits: (N, K) floating, K at least 2.
      labels: (N,) integers in [0, K).

    Returns:
      (N,) array, float32 for half precision. Under jit, where labels have no values to
      check, it is NaN for a label out of range.

    Raises:
      ValueError: shapes or dtypes do not fit, or (outside jit) a label is out of range.

    >>> import jax.numpy as jnp
    >>> from ncjax import losses
    >>> far = losses.softmax_cross_entropy(jnp.array([[40.0, 0.0]]), jnp.array([0]))
    >>> bool(abs(far[0] / jnp.exp(-40.0) - 1) < 1e-5)
    True
    """
    logits, labels = _check_logits(logits, labels)
    own, others = own_and_others(logits, labels)
    # The largest finite number stands in for the margin over a masked class: its
    # exponential is 0 as well, and its derivatives are 0 instead of NaN.
    limits = jnp.finfo(logits.dtype)
    lowest, largest = float(limits.min), float(limits.max)
    margins = own - jnp.where(logits < lowest, lowest, logits)
    margins = jnp.where(margins > largest, largest, margins)
    return jax.nn.softplus(log_odds_of_error(margins, others))


def _check_logits(logits, labels) -> tuple[Array, Array]:
    """Return logits, in float32 at least, and int32 labels, K for a label out of range.

    Raises:
      ValueError: as `softmax_cross_entropy`.
    """
    logits, labels = as_array("logits", logits), read_array("labels", labels)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits (N, K) with K >= 2, got {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    samples, num_classes = logits.shape
    if labels.shape != (samples,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"expected labels of integers ({samples},), got {labels.dtype} {labels.shape}"
        )
    check_label_range(labels, num_classes)
    labels = narrow_labels(labels)
    inside = (labels >= 0) & (labels < num_classes)
    return widen(logits), jnp.where(inside, labels, num_classes)
