r"""Describe how features change over the depth of a network.

The rank of the features of one layer, the law of data separation over all layers, and the
tunnel: the last layers, which compress the features and add little accuracy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array
from ncjax.checks import check_positive
from ncjax.numerics import at_unit_scale, widen
from ncjax.singular import singular_values
from ncjax.types import Array

# Masarczyk et al. (2023), for the rank and for the start of the tunnel.
RANK_THRESHOLD = 1e-3
TUNNEL_SHARE = 0.95


class FeatureRank(NamedTuple):
    r"""Ranks of centred features X (N, d), whose i-th singular value is $s_i$. Scalars."""

    numerical_rank: Array  # number of s_i² above a threshold times s_1² (int32)
    stable_rank: Array  # |X|_F² / |X|_2² = Σ s_i² / s_1²
    effective_rank: Array  # exp of the entropy of s_i / Σ s_j


class SeparationLaw(NamedTuple):
    r"""Least-squares line $\log D_l \approx a + l \log \rho$ over the depth l. Scalars."""

    slope: Array  # log ρ
    intercept: Array  # a, the logarithm of D at depth 0
    decay_ratio: Array  # ρ, the factor of D per layer
    r_squared: Array  # R², 1 if all points lie on the line


class Tunnel(NamedTuple):
    """The last layers of a network, from the first one that is accurate enough. Scalars."""

    start: Array  # index of the first layer of the tunnel (int32)
    length: Array  # number of layers of the tunnel (int32)
    rank_ratio: Array  # rank of the last layer over the rank at the start


def feature_rank(features: Array, *, threshold: float = RANK_THRESHOLD) -> FeatureRank:
    r"""Return ranks of `features` (N, d) about their mean, from their singular values.

    The eigenvalues of the sample covariance are $s_i^2 / N$, so the numerical rank is the
    number of eigenvalues above `threshold` times the largest one. No (d, d) matrix is
    formed. If all samples are equal, the numerical rank is 0 and the others are NaN.

    Args:
      features: (N, d) floating.
      threshold: share of the largest eigenvalue.

    Raises:
      ValueError: features are not floating (N, d), or threshold is not positive.

    Source: Masarczyk et al. (2023), "The tunnel effect", for the numerical rank with
    threshold 1e-3; Roy, Vetterli (2007) for the effective rank.
    """
    check_positive("threshold", threshold)
    features = as_array("features", features)
    if features.ndim != 2 or not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(
            f"expected floating features (N, d), got {features.dtype} {features.shape}"
        )
    return _feature_rank(features, float(threshold))


@partial(jax.jit, static_argnums=1)
def _feature_rank(features: Array, threshold: float) -> FeatureRank:
    # Differences from one sample first, so that an offset costs no digits.
    features = at_unit_scale(widen(features))
    features = features - features[:1]
    features = at_unit_scale(features - jnp.mean(features, axis=0, keepdims=True))
    # LAPACK takes a tall matrix several times as fast as a wide one.
    tall = features if features.shape[0] >= features.shape[1] else features.T
    singular = singular_values(tall)
    squares = singular**2
    shares = singular / jnp.sum(singular)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(shares), shares))
    return FeatureRank(
        numerical_rank=jnp.sum(squares > threshold * squares[0], dtype=jnp.int32),
        stable_rank=jnp.sum(squares) / squares[0],
        effective_rank=jnp.exp(entropy),
    )


def separation_law(fuzziness: Array, depths: Array | None = None) -> SeparationLaw:
    r"""Fit the law of data separation, $D_l = \rho^l D_0$, to the layers of a network.

    The law says that every layer of a trained network multiplies the separation fuzziness D
    by the same factor $\rho$. Layers whose D is zero, infinite or NaN are left out. With
    fewer than two layers left, all fields are NaN; `r_squared` is NaN too if all D are
    equal.

    Args:
      fuzziness: (L,) D of each layer, `LayerMetrics.fuzziness`.
      depths: (L,) depth l of each layer; None counts from 0.

    Raises:
      ValueError: shapes do not fit.

    Source: He, Su (PNAS 2023), "A law of data separation in deep learning".

    >>> from ncjax.metrics import depth
    >>> round(float(depth.separation_law([8.0, 4.0, 2.0, 1.0]).decay_ratio), 6)
    0.5
    """
    fuzziness = _layers("fuzziness", fuzziness)
    counted = np.arange(fuzziness.size)
    depths = _layers("depths", counted if depths is None else depths, fuzziness)
    return _separation_law(fuzziness, depths.astype(fuzziness.dtype))


@jax.jit
def _separation_law(fuzziness: Array, depths: Array) -> SeparationLaw:
    kept = (fuzziness > 0) & (fuzziness < jnp.inf)
    logs = jnp.log(jnp.where(kept, fuzziness, 1))
    mean_depth, mean_log = (jnp.mean(x, where=kept) for x in (depths, logs))
    x, y = (jnp.where(kept, a, 0) for a in (depths - mean_depth, logs - mean_log))
    slope = jnp.sum(x * y) / jnp.sum(x**2)
    residual = jnp.where(kept, y - slope * x, 0)
    return SeparationLaw(
        slope=slope,
        intercept=mean_log - slope * mean_depth,
        decay_ratio=jnp.exp(slope),
        r_squared=1 - jnp.sum(residual**2) / jnp.sum(y**2),
    )


def find_tunnel(accuracies: Array, ranks: Array, *, share: float = TUNNEL_SHARE) -> Tunnel:
    r"""Find the tunnel: the layers from which on the accuracy is nearly the last layer's.

    It starts at the first layer from which on every layer has at least `share` times the
    accuracy of the last one. Inside it the rank falls, so `rank_ratio` is below 1.

    Args:
      accuracies: (L,) accuracy of a classifier on each layer. `ncjax.layerwise` takes the
        nearest class centre (NCC); the source trains linear probes.
      ranks: (L,) numerical rank of each layer.
      share: of the accuracy of the last layer, in (0, 1].

    Returns:
      `Tunnel`. If the last accuracy is NaN, its length is 0, its start L, and the ratio is
      NaN.

    Raises:
      ValueError: shapes do not fit, or share is not in (0, 1].

    Source: Masarczyk et al. (NeurIPS 2023), "The tunnel effect: building data
    representations in deep neural networks".
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    accuracies = _layers("accuracies", accuracies)
    ranks = _layers("ranks", ranks, accuracies)
    return _find_tunnel(accuracies, ranks, float(share))


@partial(jax.jit, static_argnums=2)
def _find_tunnel(accuracies: Array, ranks: Array, share: float) -> Tunnel:
    size = accuracies.size
    reached = accuracies >= share * accuracies[-1]
    length = jnp.sum(jnp.cumprod(reached[::-1], dtype=jnp.int32), dtype=jnp.int32)
    start = size - length
    ranks = ranks.astype(accuracies.dtype)
    ratio = ranks[-1] / ranks[jnp.minimum(start, size - 1)]
    return Tunnel(start, length, jnp.where(length > 0, ratio, jnp.nan))


def _layers(name: str, values, like: Array | None = None) -> Array:
    """Return numbers (L,) as an array, floating unless they go with the layers of `like`.

    Raises:
      ValueError: they are not one number for each layer.
    """
    array = as_array(name, values)
    expected = "(L,) with L at least 1" if like is None else str(like.shape)
    if (
        array.ndim != 1
        or not array.size
        or (like is not None and array.shape != like.shape)
    ):
        raise ValueError(f"expected {name} {expected}, got {array.shape}")
    is_floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array if is_floating or like is not None else array.astype(float)
