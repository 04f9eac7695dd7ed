r"""Margins and losses of a linear classifier on features, published with collapse metrics.

The margin of a sample is its own logit minus the largest other logit. Notation and
conventions are those in `ncjax.variants`, which re-exports these functions.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_nonnegative
from ncjax.metrics import measures, statistics
from ncjax.metrics.inputs import check_features
from ncjax.metrics.whitening import whiten
from ncjax.numerics import matmul, power_of_two
from ncjax.peeled.logits import least_of_others, margins_of_samples
from ncjax.peeled.losses import softmax_cross_entropy
from ncjax.types import Array


def logit_margins(
    features: Array, labels: Array, W: Array, b: Array | None = None
) -> Array:
    r"""Return $z_{i, y_i} - \max_{k \ne y_i} z_{ik}$ (N,), negative for an error."""
    features, labels, W, b = _classified(features, labels, W, b)
    return _least_margin(_logits(features, W, b), labels)


def cosine_margins(
    features: Array,
    labels: Array,
    W: Array,
    *,
    centring: str = "sample_mean",
    centred_product: bool = True,
) -> Array:
    r"""Return margins (N,) of the cosines of $h_i - h_G$ and $w_k - \bar w$.

    $s_{i, y_i} - \max_{k \ne y_i} s_{ik}$ with
    $s_{ik} = (w_k - \bar w)^\top (h_i - h_G) / (|w_k - \bar w|\, |h_i - h_G|)$.

    Args:
      features: (N, d).
      labels: (N,) integers in [0, K).
      W: (K, d).
      centring: definition of $h_G$, "class_mean" or "sample_mean".
      centred_product: False uses $w_k^\top h_i$ as numerator and centres only the norms, as
        the code of Zhou et al. (2022) does.

    Raises:
      ValueError: shapes, dtypes or values do not fit, or centring is unknown.

    Source: Zhou et al. (2022), "Are all losses created equal".
    """
    features, labels, W, _ = _classified(features, labels, W)
    first_pass = statistics.class_statistics(features, labels, W.shape[0])
    means = statistics.centred_means(first_pass, centring)
    centred = statistics.deviations(first_pass, features, labels) + means[labels]
    centred_W = measures.centre_rows(W)
    # No cosine depends on the scale of a row, whose square may overflow.
    scale, scale_W = power_of_two(centred, axis=1), power_of_two(centred_W, axis=1)
    centred, centred_W = centred / scale, centred_W / scale_W
    if centred_product:
        product = _logits(centred, centred_W)
    else:
        product = _logits(features / scale, W / scale_W)
    norms = jnp.linalg.norm(centred, axis=1, keepdims=True)
    scores = product / norms / jnp.linalg.norm(centred_W, axis=1)[None]
    return _least_margin(scores, labels)


def mean_cross_entropy(
    features: Array, labels: Array, W: Array, b: Array | None = None
) -> Array:
    r"""$\tfrac1N \sum_i \log(1 + \sum_{k \ne y_i} e^{z_{ik} - z_{i, y_i}})$, a scalar.

    By `ncjax.losses.softmax_cross_entropy`, which keeps the digits of small losses.
    """
    features, labels, W, b = _classified(features, labels, W, b)
    return jnp.mean(softmax_cross_entropy(_logits(features, W, b), labels))


def mean_squared_error(
    features: Array, labels: Array, W: Array, b: Array | None = None
) -> Array:
    r"""$\tfrac1N \sum_i |z_i - e_{y_i}|^2$, summed over classes and with no factor 1/2."""
    features, labels, W, b = _classified(features, labels, W, b)
    targets = jax.nn.one_hot(labels, W.shape[0], dtype=W.dtype)
    return jnp.mean(jnp.sum((_logits(features, W, b) - targets) ** 2, axis=1))


class SquaredErrorParts(NamedTuple):
    """Parts of half the squared error with weight decay. Scalars."""

    nc1: Array  # within-class variation of the least-squares classifier's logits
    nc23: Array  # deviation of the class means from a simplex ETF
    perpendicular: Array  # deviation of the classifier from the least-squares classifier


def squared_error_parts(
    features: Array,
    labels: Array,
    W: Array,
    b: Array | None = None,
    *,
    weight_decay: float = 5e-4,
) -> SquaredErrorParts:
    r"""Split $\tfrac12$ MSE $+ \tfrac\lambda2 |\tilde W|_F^2$, $\lambda$ = half the decay.

    With $\tilde M = [\bar H, 1]$ (K, d + 1), $\tilde W = [W, b]$, $\tilde\Sigma_W$ with a
    row and column of zeros, $A = \tilde\Sigma_W + \tfrac1K \tilde M^\top \tilde M + \lambda
    I$ and $W_{LS} = \tfrac1K \tilde M A^+$:
    $\tfrac12 \operatorname{Tr} W_{LS} (\tilde\Sigma_W + \lambda I) W_{LS}^\top$,
    $\tfrac1{2K} |\tilde M W_{LS}^\top - I|_F^2$ and
    $\tfrac12 \operatorname{Tr} (\tilde W - W_{LS}) A (\tilde W - W_{LS})^\top$.
    For classes of equal size the parts sum to the loss. Without a bias, $\tilde M = \bar H$
    and $\tilde W = W$. $A = F^\top F$ is never formed: its pseudo-inverse comes from the
    singular values of F, which holds all of $\Sigma_W$.

    Args:
      features: (N, d).
      labels: (N,) integers in [0, K).
      W: (K, d).
      b: (K,) bias; None for a classifier without bias.
      weight_decay: $2 \lambda$, not negative. At 0, A may be singular; $W_{LS}$ is then the
        least-squares classifier of the smallest norm.

    Raises:
      ValueError: shapes, dtypes or values do not fit, or weight_decay is negative.

    Source: Han, Papyan, Donoho (2022), "Neural collapse under MSE loss", Section 2.
    """
    check_nonnegative("weight_decay", weight_decay)
    features, labels, W, b = _classified(features, labels, W, b)
    first_pass = statistics.class_statistics(features, labels, W.shape[0])
    samples, size, decay = features.shape[0], W.shape[0], weight_decay / 2
    deviation = statistics.deviations(first_pass, features, labels) / math.sqrt(samples)
    means = statistics.class_means(first_pass)
    if b is not None:
        deviation = jnp.pad(deviation, ((0, 0), (0, 1)))
        means = jnp.pad(means, ((0, 0), (0, 1)), constant_values=1)
        W = jnp.concatenate([W, b[:, None]], axis=1)
    ridge = math.sqrt(decay) * jnp.eye(W.shape[1], dtype=W.dtype)
    _, root = whiten(jnp.concatenate([deviation, means / math.sqrt(size), ridge]))
    least = matmul(matmul(means / size, root.T), root)
    noise = matmul(least, deviation.T)
    fit = matmul(means, least.T) - jnp.eye(size, dtype=W.dtype)
    gap = W - least
    by_factor = [matmul(gap, deviation.T), matmul(gap, means.T) / math.sqrt(size)]
    return SquaredErrorParts(
        nc1=(jnp.sum(noise**2) + decay * jnp.sum(least**2)) / 2,
        nc23=jnp.sum(fit**2) / (2 * size),
        perpendicular=(
            sum(jnp.sum(part**2) for part in by_factor) + decay * jnp.sum(gap**2)
        )
        / 2,
    )


def _classified(features, labels, W, b=None):
    """Return checked features, labels, classifier and bias, features in W's dtype."""
    features, labels, W, b = check_features(features, labels, W, b)
    return features.astype(W.dtype), labels, W, b


def _logits(features, W, b=None):
    product = matmul(features, W.T)
    return product if b is None else product + b[None]


def _least_margin(scores: Array, labels: Array) -> Array:
    """Own score minus the best other one (N,), of scores (N, K)."""
    return least_of_others(*margins_of_samples(scores, labels))
