"""Losses beside the cross entropy: label smoothing, focal loss, squared error."""

import jax
import jax.numpy as jnp

from ncjax.checks import check_nonnegative
from ncjax.peeled import samples
from ncjax.peeled.kernels import log_sum
from ncjax.peeled.points import check_factors
from ncjax.peeled.weights import weighted
from ncjax.types import Array, DeepParams, Params


def smoothed_cross_entropy(
    params: Params | DeepParams, smoothing: float, weights=None
) -> Array:
    r"""Cross entropy with label smoothing, a sum over samples.

    $$\sum_{k,i} \omega_{ki} \Bigl( \log\bigl(1 + \sum_{j \ne k} e^{-m_{kij}}\bigr)
    + \frac{\alpha}{K} \sum_{j \ne k} m_{kij} \Bigr)$$

    This is the cross entropy of the softmax against the targets $(1 - \alpha)\, e_k +
    \tfrac{\alpha}{K} \mathbf 1$, in margin form. Its minimum over the margins is positive,
    so it needs no logarithm.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      smoothing: $\alpha$ in [0, 1).
      weights: (K, n) or (K,) weights $\omega$, see `sample_weights`; 1 if None.

    Returns:
      Scalar, float32 for half precision.

    Raises:
      ValueError: shapes or dtypes do not fit, or smoothing is out of range.

    Source: Szegedy et al. (CVPR 2016); Zhou et al. (NeurIPS 2022) for the collapse.
    """
    _check_smoothing(smoothing)
    params, weights = check_factors(params, weights)
    losses = samples.smoothed_cross_entropy(*samples.margins_of(params), smoothing)
    return jnp.sum(weighted(losses, weights))


def focal_loss(params: Params | DeepParams, gamma: float, weights=None) -> Array:
    r"""Focal loss, a sum over samples.

    $$-\sum_{k,i} \omega_{ki}\, (1 - p_{ki})^\gamma \log p_{ki}, \qquad
    p_{ki} = \frac{1}{1 + \sum_{j \ne k} e^{-m_{kij}}}$$

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      gamma: $\gamma \ge 0$; 0 is the cross entropy.
      weights: (K, n) or (K,) weights $\omega$, see `sample_weights`; 1 if None.

    Returns:
      Scalar, float32 for half precision. It underflows at large margins: use
      `log_focal_loss` there.

    Raises:
      ValueError: shapes or dtypes do not fit, or gamma is negative.

    Source: Lin et al. (ICCV 2017); Zhou et al. (NeurIPS 2022) for the collapse.
    """
    check_nonnegative("gamma", gamma)
    params, weights = check_factors(params, weights)
    losses = samples.focal(*samples.margins_of(params), gamma)
    return jnp.sum(weighted(losses, weights))


def log_focal_loss(params: Params | DeepParams, gamma: float, weights=None) -> Array:
    r"""Natural logarithm of `focal_loss`, finite and exact at any norm.

    With the log odds of an error $a_{ki} = \log \sum_{j \ne k} e^{-m_{kij}}$ and the
    logistic function $\sigma$ it is

    $$\operatorname{logsumexp}_{k,i} \bigl( \log \omega_{ki} + \gamma \log \sigma(a_{ki})
    + \log\log(1 + e^{a_{ki}}) \bigr).$$

    Args, errors: as `focal_loss`.
    """
    check_nonnegative("gamma", gamma)
    params, weights = check_factors(params, weights)
    logs = samples.log_focal(*samples.margins_of(params), gamma)
    return log_sum(logs, weights)


def squared_error(params: Params | DeepParams, weights=None) -> Array:
    r"""Half the squared distance of the logits to one-hot labels, a sum over samples.

    $$\frac12 \sum_{k,i} \omega_{ki} |W h_{k,i} - e_k|^2$$

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: (K, n) or (K,) weights $\omega$, see `sample_weights`; 1 if None.

    Returns:
      Scalar, float32 for half precision.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Mixon, Parshall, Pi (2020); Han, Papyan, Donoho (ICLR 2022).
    """
    params, weights = check_factors(params, weights)
    losses = samples.squared_error(samples.logits_of(params), samples.margins_of(params)[1])
    return jnp.sum(weighted(losses, weights))


def _check_smoothing(smoothing) -> None:
    """Raise ValueError if `smoothing` is known and not in [0, 1)."""
    if not isinstance(smoothing, jax.core.Tracer) and not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
