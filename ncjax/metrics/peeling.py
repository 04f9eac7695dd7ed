r"""A network's last layer as a point of the layer-peeled model.

Features $h_a$ with labels and the classifier $w_k$, $b_k$ of any network are a point
$Z = (W, H)$ of the model. A bias is one more coordinate of $w_k$, in which every feature
is 1.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_integer, check_params
from ncjax.metrics.inputs import check_features, known_labels
from ncjax.numerics import at_unit_scale, matmul, power_of_two, root_of_scale, widen
from ncjax.peeled.kernels import log_softplus
from ncjax.peeled.logits import (
    least_of_others,
    log_odds_of_error,
    margins_of_samples,
    without_offset,
)
from ncjax.types import Array, Params

# Below this log L the slopes of the loss are divided by L: float32 holds the quotients.
_LARGE_LOG_LOSS = 60.0


class LastLayer(NamedTuple):
    r"""Loss, margin and alignment of a last layer. Scalars.

    The smallest class has $n$ samples. The least margin $q_{\min} = \min_{a, j \ne y_a}
    (w_{y_a} - w_j)^\top h_a$ is negative if a sample is misclassified.
    """

    loss: Array  # cross entropy, mean over samples
    log_loss: Array  # log of the cross entropy, summed over samples
    least_margin: Array  # q_min
    margin_ratio: Array  # 2 (K-1) √n q_min / |Z|², at most 1
    balanced_margin_ratio: Array  # (K-1) √n q_min / (|W| |H|), at most 1
    kkt_angle: Array  # √(1-β²), β = <Z, -∇L> / (|Z| |∇L|)
    balanced_kkt_angle: Array  # kkt_angle of (c W, H / c), c² = |H| / |W|


def last_layer(features, labels, W, b=None) -> LastLayer:
    r"""Measure loss, margin ratio and KKT alignment of a last layer on all its samples.

    $$\frac{2 (K-1) \sqrt n\, q_{\min}}{|W|_F^2 + |H|_F^2} \le
    \frac{(K-1) \sqrt n\, q_{\min}}{|W|_F |H|_F} \le 1, \qquad
    \beta = \frac{\langle Z, -\nabla \mathcal L \rangle}{|Z|\, |\nabla \mathcal L|}$$

    for $q_{\min} > 0$. Theorem 3.1 bounds the first ratio for classes of $n$ samples, and
    larger classes only add to $|H|_F$. The second ratio is the first one at
    $(c W, H / c)$ with $c^2 = |H|_F / |W|_F$, which has the same logits. It does not depend
    on how the network splits the scale between W and H, a choice that can dominate the
    first ratio. The second angle is balanced in the same way. All are computed in the log
    domain, so the angles stay exact when the loss underflows.

    Args:
      features: (N, d) floating, the input of the last layer.
      labels: (N,) integers in [0, K), every class at least once.
      W: (K, d) weight of the last layer.
      b: (K,) bias; none if None.

    Returns:
      `LastLayer` of scalars, in the dtype of the features, float32 for half precision.
      NaN if a ratio or an angle is not defined (W = 0, or all features 0; the ratios also,
      under jit, if a class has no sample). W and the features may have any scales at which
      the logits are finite.

    Raises:
      ValueError: as in `ncjax.collapse_metrics_from_features`.

    Source: Ji et al. (ICLR 2022), Theorems 3.1 and 3.2.

    >>> import jax.numpy as jnp, ncjax
    >>> etf = ncjax.simplex_etf(3, 4)
    >>> layer = ncjax.last_layer(etf, jnp.arange(3), etf)
    >>> round(float(layer.margin_ratio), 4)
    1.0
    """
    return _last_layer(*check_features(features, labels, W, b))


@jax.jit
def _last_layer(features, labels, W, b) -> LastLayer:
    H, W = _with_bias(features.astype(W.dtype), W, b)
    num_classes, (samples, dim) = W.shape[0], H.shape
    chex.assert_shape([labels, W], [(samples,), (num_classes, dim)])
    # Squares and products are taken at unit scale: W = r_W² U and H = r_H² V.
    r_W, r_H = root_of_scale(W), root_of_scale(H)
    U, V = W / r_W / r_W, H / r_H / r_H
    root = r_W * r_H
    unit_margins, others = margins_of_samples(matmul(V, without_offset(U).T), labels)
    log_loss, weights = slopes(unit_margins * root * root, others)
    inner = 2 * jnp.sum(weights * unit_margins)  # <Z, -∇L>
    total = jnp.sum(weights, axis=1, keepdims=True)
    by_logits = jnp.where(others, weights, -total)
    chex.assert_shape(by_logits, (samples, num_classes))
    gradient = matmul(by_logits.T, V), matmul(by_logits, U)
    norm_W, norm_H = jnp.linalg.norm(U), jnp.linalg.norm(V)
    scale = jnp.sqrt(norm_H / norm_W)
    # Shares of the two scales in the larger one.
    larger = jnp.maximum(r_W, r_H)
    s_W, s_H = (r_W / larger) ** 2, (r_H / larger) ** 2
    norm = jnp.hypot(s_W * norm_W, s_H * norm_H)
    counts = jnp.bincount(labels, length=num_classes)
    least = jnp.min(least_of_others(unit_margins, others))
    fewest = jnp.min(counts).astype(W.dtype)
    # No bound holds for a class without samples, which only a traced call can have.
    factor = (num_classes - 1) * jnp.sqrt(jnp.where(fewest > 0, fewest, jnp.nan))
    return LastLayer(
        loss=jnp.exp(log_loss - math.log(samples)),
        log_loss=log_loss,
        least_margin=least * root * root,
        margin_ratio=2 * factor * (least * s_W * s_H) / norm**2,
        balanced_margin_ratio=factor * least / (norm_W * norm_H),
        kkt_angle=_angle(
            s_W * U, s_H * V, s_H * gradient[0], s_W * gradient[1], inner * s_W * s_H
        ),
        balanced_kkt_angle=_angle(
            scale * U, V / scale, gradient[0] / scale, scale * gradient[1], inner
        ),
    )


def slopes(margins: Array, others: Array) -> tuple[Array, Array]:
    """Return log L, and the slopes (N, K) of L in the logits of the other classes.

    The slopes are known up to a common factor, and are 0 at j = y_a.
    They come from logarithms, because L may underflow.
    """
    log_odds = log_odds_of_error(margins, others)
    log_loss = jax.nn.logsumexp(log_softplus(log_odds))
    # No slope exceeds 1: at a large L the quotients by L would underflow.
    divisor = jnp.minimum(log_loss, _LARGE_LOG_LOSS)
    exponents = -margins - jax.nn.softplus(log_odds)[:, None] - divisor
    weights = jnp.where(others, jnp.exp(jnp.where(others, exponents, 0)), 0)
    return log_loss, at_unit_scale(weights)


def _angle(W, H, gradient_W, gradient_H, inner) -> Array:
    """Return the sine of the angle between Z and -∇L: the part of Z orthogonal to ∇L.

    √(1-β²) would lose all digits near β = 1.
    """
    unit = power_of_two((gradient_W, gradient_H))
    gradient_W, gradient_H, inner = gradient_W / unit, gradient_H / unit, inner / unit
    gradient_norm = jnp.hypot(jnp.linalg.norm(gradient_W), jnp.linalg.norm(gradient_H))
    norm = jnp.hypot(jnp.linalg.norm(W), jnp.linalg.norm(H))
    along = inner / gradient_norm / norm
    orthogonal_W = W / norm + along / gradient_norm * gradient_W
    orthogonal_H = H / norm + along / gradient_norm * gradient_H
    return jnp.hypot(jnp.linalg.norm(orthogonal_W), jnp.linalg.norm(orthogonal_H))


def balance_norms(params: Params) -> Params:
    r"""Return $(c W, H / c)$ with $c^2 = |H|_F / |W|_F$: equal norms, the same logits.

    Of all ways to split the scale of a last layer between W and H, this one has the least
    $|Z|$, so it is the only one that can be optimal.

    Args:
      params: `W` (K, d) and `H` (K, n, d), neither zero.

    Returns:
      `Params`, float32 for half precision.

    Raises:
      ValueError: shapes or dtypes do not fit, or (outside jit) W or H is zero.
    """
    params = widen(check_params(params))
    roots = [root_of_scale(leaf) for leaf in params]
    W, H = (leaf / root / root for leaf, root in zip(params, roots, strict=True))
    norms = jnp.linalg.norm(W), jnp.linalg.norm(H)
    for name, norm in zip("WH", norms, strict=True):
        if not isinstance(norm, jax.core.Tracer) and norm == 0:
            raise ValueError(f"expected W and H that are not zero, got {name} = 0")
    scale, root = jnp.sqrt(norms[1] / norms[0]), roots[0] * roots[1]
    return Params(W=scale * W * root, H=H / scale * root)


def peel(features, labels, W, b=None, *, per_class: int | None = None) -> Params:
    """Return a network's last layer as `Params`, with equally many samples of each class.

    Args:
      features: (N, d) floating, the input of the last layer.
      labels: (N,) integers in [0, K), every class at least once.
      W: (K, d) weight of the last layer.
      b: (K,) bias; none if None. It becomes coordinate d of W, and H is 1 there.
      per_class: n; the first n samples of each class are taken. None takes the size of
        the smallest class.

    Returns:
      `Params` with `W` (K, d) and `H` (K, n, d), where d is one larger with a bias; float32
      for half precision.

    Raises:
      ValueError: as in `ncjax.collapse_metrics_from_features`, a class has fewer than
        `per_class` samples, or the labels are unknown, as under `jax.jit`.

    >>> import jax.numpy as jnp, ncjax
    >>> etf = ncjax.simplex_etf(3, 4)
    >>> ncjax.peel(jnp.tile(etf, (5, 1)), jnp.arange(15) % 3, etf).H.shape
    (3, 5, 4)
    """
    given = labels
    features, labels, W, b = check_features(features, labels, W, b)
    targets = known_labels(given, labels)
    features, W = _with_bias(features.astype(W.dtype), W, b)
    counts = np.bincount(targets, minlength=W.shape[0])
    if per_class is None:
        per_class = int(counts.min())
    check_integer("per_class", per_class, least=1)
    if counts.min() < per_class:
        raise ValueError(
            f"per_class is {per_class} but class {counts.argmin()} has {counts.min()} "
            "samples"
        )
    # A stable sort keeps the order of the samples within a class.
    order = np.argsort(targets, kind="stable")
    starts = np.cumsum(counts) - counts
    index = order[starts[:, None] + np.arange(per_class)[None]]
    return Params(W=W, H=features[index])


def _with_bias(features: Array, W: Array, b: Array | None) -> tuple[Array, Array]:
    """Return features and classifier with the bias as one more coordinate."""
    if b is None:
        return features, W
    ones = jnp.ones((features.shape[0], 1), features.dtype)
    return (
        jnp.concatenate([features, ones], axis=1),
        jnp.concatenate([W, b[:, None]], axis=1),
    )
