r"""Split a lack of self-duality into its causes: unequal multipliers, and history.

The gradient of the loss by the classifier is $-\partial \mathcal L / \partial w_k = \sum_j
A_{kj} m_j$ at collapsed features, with $A_{kk} = \sum_j \lambda_{kj}$ and $A_{kj} =
-\lambda_{jk}$ for $j \ne k$. Here $m_j$ is the mean of class j, and the multiplier
$\lambda_{kj} \ge 0$ is the sum, over the samples of class k, of the softmax weight of class
j. At a KKT point of the separation problem W is proportional to $A M$. If all multipliers
are equal as well, W is proportional to the centred means: this is self-duality.

So a network can fall short of self-duality for two reasons. Its multipliers differ. And W
is not proportional to today's $A M$, because the flow adds up $A M$ over the past, and the
means have turned since.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.metrics.inputs import check_features
from ncjax.metrics.measures import centre_rows, self_duality
from ncjax.metrics.peeling import slopes
from ncjax.metrics.statistics import centred_means, class_statistics
from ncjax.metrics.whitening import whiten
from ncjax.numerics import at_unit_scale, matmul
from ncjax.peeled.logits import margins_of_samples, without_offset
from ncjax.types import Array


class DualityParts(NamedTuple):
    """The causes of a lack of self-duality. Scalars, all 0 at collapse of the flow."""

    multiplier_variation: Array  # std / mean of λ_kj over the pairs j != k
    multiplier_duality: Array  # self-duality of -∂L/∂W in place of W: 0 for equal λ
    multiplier_distance: Array  # |W/|W| - G/|G||, G = -∂L/∂W, W centred: 0 at a KKT point
    outside_means: Array  # share |W - W P| / |W|, P onto the span of the centred means


def duality_parts(features, labels, W, b=None) -> DualityParts:
    r"""Split the distance from self-duality into unequal multipliers and history.

    By the triangle inequality the centred self-duality is at most `multiplier_duality +
    multiplier_distance`. The first is due to multipliers that differ between pairs of
    classes, the second to the past of W. `outside_means` is the part of W that no
    multipliers could give with today's means.

    Args:
      features: (N, d) floating, the input of the last layer.
      labels: (N,) integers in [0, K), every class at least once.
      W: (K, d) weight of the last layer.
      b: (K,) bias; none if None.

    Returns:
      `DualityParts` of scalars, in the dtype of the features, float32 for half precision;
      NaN where W or its gradient is zero.

    Raises:
      ValueError: as in `ncjax.collapse_metrics_from_features`.

    Source: the KKT conditions of Ji et al. (ICLR 2022), Theorem 3.2; the split is ncjax's.

    >>> import jax.numpy as jnp, ncjax
    >>> etf = ncjax.simplex_etf(3, 4)
    >>> parts = ncjax.duality_parts(etf, jnp.arange(3), etf)
    >>> bool(max(parts) < 1e-6)
    True
    """
    return _duality_parts(*check_features(features, labels, W, b))


@jax.jit
def _duality_parts(features, labels, W, b) -> DualityParts:
    num_classes = W.shape[0]
    features, W = features.astype(W.dtype), without_offset(W)
    logits = matmul(features, W.T)
    if b is not None:
        logits = logits + (b - b[:1])[None]
    margins, others = margins_of_samples(logits, labels)
    _, weights = slopes(margins, others)
    own = jnp.sum(weights, axis=1, keepdims=True)
    gradient = matmul(jnp.where(others, -weights, own).T, at_unit_scale(features))
    multipliers = jax.ops.segment_sum(weights, labels, num_classes)
    pairs = ~jnp.eye(num_classes, dtype=bool)
    mean, deviation = (f(multipliers, where=pairs) for f in (jnp.mean, jnp.std))
    means = at_unit_scale(
        centred_means(class_statistics(features, labels, num_classes), "class_mean")
    )
    centred = at_unit_scale(centre_rows(W))
    left, right = whiten(means)
    inside = matmul(matmul(matmul(centred, right.T), left.T), means)
    return DualityParts(
        multiplier_variation=deviation / mean,
        multiplier_duality=self_duality(gradient, means),
        multiplier_distance=self_duality(centred, gradient),
        outside_means=jnp.linalg.norm(centred - inside) / jnp.linalg.norm(centred),
    )
