r"""All metrics but NC4 in one pass over the samples.

Beside the statistics by class (`ncjax.statistics`), one pass keeps the within-class scatter
$S_W = \sum_i (h_i - \bar h_{y_i})(h_i - \bar h_{y_i})^\top$, a (d, d) matrix. It gives
$\operatorname{Tr}(\Sigma_W \Sigma_B^+) = \operatorname{Tr}(T S_W T^\top) K / N$ with the
whitening T of the class means. A batch adds $\sum_i (h_i - m_{y_i})(h_i - m'_{y_i})^\top$,
with the class means m before the batch and m' after it: a sum of differences, so that an
offset of the features costs no digits.

Source of the update: Welford (1962); Chan, Golub, LeVeque (1983).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.metrics import collapse, statistics
from ncjax.metrics.collapse import CollapseMetrics
from ncjax.metrics.inputs import check_batch
from ncjax.metrics.statistics import ClassStatistics
from ncjax.numerics import at_unit_scale, matmul, power_of_two
from ncjax.types import Array


class OnePass(NamedTuple):
    """Sums over the samples of one pass."""

    first: ClassStatistics
    within: Array | None  # (d, d)  within-class scatter S_W; None: not kept
    norm: Array  # ()  mean of |h| over the samples
    outside: Array  # ()  samples left out because their label lies outside [0, K)


def init(num_classes: int, dim: int, dtype=jnp.float32, *, scatter: bool = True) -> OnePass:
    """Return `OnePass` of no sample, with a (d, d) scatter or without.

    Raises:
      ValueError: as in `ncjax.statistics.init`.
    """
    first = statistics.init(num_classes, dim, dtype)
    return OnePass(
        first=first,
        within=jnp.zeros((dim, dim), first.anchor.dtype) if scatter else None,
        norm=jnp.zeros((), first.anchor.dtype),
        outside=jnp.zeros((), statistics.count_dtype()),
    )


def update(
    state: OnePass, features: Array, labels: Array, mask: Array | None = None
) -> OnePass:
    """Add a batch, features (B, d) and labels (B,); arguments as in `statistics.update`."""
    (num_classes, dim), dtype = state.first.anchor.shape, state.first.anchor.dtype
    features, labels, mask = check_batch(features, labels, mask, dim)
    if not features.shape[0]:
        return state
    known = (labels >= 0) & (labels < num_classes)
    kept = jnp.ones_like(known) if mask is None else mask
    valid = known & kept
    zero = jnp.zeros((), features.dtype)
    features = jnp.where(valid[:, None], features, zero).astype(dtype)
    labels = jnp.where(valid, labels, 0)
    first, before = statistics.add(state.first, features, labels, valid)
    return OnePass(
        first=first,
        within=_grown(state, first, before, features, labels, valid),
        norm=_mean_norm(state, features, valid),
        outside=state.outside + jnp.sum(kept & ~known, dtype=state.outside.dtype),
    )


def _grown(state: OnePass, first, before, features, labels, valid) -> Array | None:
    """Return the within-class scatter with a batch added."""
    if state.within is None:
        return None
    after = statistics.deviations(first, features, labels)
    # A class that is new has no mean before; any will do.
    before = jnp.where((state.first.counts[labels] > 0)[:, None], before, after)
    before = jnp.where(valid[:, None], before, 0)
    return state.within + matmul(before.T, after)


def _mean_norm(state: OnePass, features: Array, valid: Array) -> Array:
    dtype = features.dtype
    seen = statistics.total(state.first.counts, dtype)
    new = jnp.sum(valid, dtype=jnp.int32).astype(dtype)
    scale = power_of_two(features)  # of the squares, which may leave the dtype
    norms = jnp.linalg.norm(features / scale, axis=1)
    gap = scale * jnp.sum(norms) - new * state.norm
    return state.norm + gap / jnp.maximum(seen + new, 1)


def norm_range(dtype) -> tuple[float, float]:
    """Return the mean norms of features between which squares of deviations fit `dtype`."""
    limits = jnp.finfo(dtype)
    eps = float(limits.eps)
    return float(limits.tiny) ** 0.5 / eps, float(limits.max) ** 0.5 * eps**0.5


def merge(one: OnePass, other: OnePass) -> OnePass:
    """Return the sums over the union of two disjoint sets of samples."""
    dtype = one.first.anchor.dtype
    counts = [statistics.total(state.first.counts, dtype) for state in (one, other)]
    share = counts[1] / jnp.maximum(counts[0] + counts[1], 1)
    within = None
    if one.within is not None and other.within is not None:
        shift = statistics.mean_shift(one.first, other.first)
        sizes = [state.first.counts.astype(dtype) for state in (one, other)]
        weight = sizes[0] * (sizes[1] / jnp.maximum(sizes[0] + sizes[1], 1))
        between = matmul(shift.T * weight[None], shift)
        within = one.within + other.within + between
    return OnePass(
        first=statistics.merge(one.first, other.first),
        within=within,
        norm=one.norm + share * (other.norm - one.norm),
        outside=one.outside + other.outside,
    )


def all_merge(state: OnePass, axis_name: str) -> OnePass:
    """Merge over the devices of a mapped axis (`jax.shard_map`)."""
    dtype = state.first.anchor.dtype
    first = statistics.all_merge(state.first, axis_name)
    within = state.within
    if within is not None:
        shift = statistics.mean_shift(first, state.first)
        weight = state.first.counts.astype(dtype)
        between = matmul(shift.T * weight[None], shift)
        within = jax.lax.psum(within + between, axis_name)
    local = statistics.total(state.first.counts, dtype)
    samples = jnp.maximum(statistics.total(first.counts, dtype), 1)
    return OnePass(
        first=first,
        within=within,
        norm=jax.lax.psum(local * state.norm, axis_name) / samples,
        outside=jax.lax.psum(state.outside, axis_name),
    )


def metrics(
    state: OnePass,
    W: Array,
    *,
    min_count: int | None = None,
    pairs: tuple[Array, ...] | None = None,
    whitening: Array | None = None,
) -> CollapseMetrics:
    """Return `CollapseMetrics` with NaN for `ncc_mismatch` and `accuracy`.

    `within_class_variation` is NaN too if no scatter was kept. The same holds if
    `min_count` leaves out a class with different samples, because the scatter is a sum over
    all classes. All forms of NC1 are NaN if `norm_range` does not hold the mean norm.

    Args:
      state: sums over all samples.
      W: (K, d) classifier.
      min_count: classes measured, as in `ncjax.statistics.measured_classes`.
      pairs: `collapse.pair_metrics` of the same arguments, if they are known.
      whitening: `whitening` of `ncjax.statistics.reference`, if it is known.

    Raises:
      ValueError: as in `ncjax.statistics.measured_classes`.
    """
    found = collapse.metrics_of_means(state.first, at_unit_scale(W), min_count, pairs)
    least, most = norm_range(state.norm.dtype)
    fits = (state.norm > least) & (state.norm < most)
    found = found._replace(
        within_class_quotient=jnp.where(fits, found.within_class_quotient, jnp.nan),
        cdnv=jnp.where(fits, found.cdnv, jnp.nan),
    )
    if state.within is None:
        return found
    if whitening is None:
        whitening = whitening_of(state.first, min_count)
    measured = statistics.measured_classes(state.first, min_count)
    samples = statistics.total(state.first.counts, whitening.dtype, measured)
    variation = jnp.sum(matmul(whitening, state.within) * whitening) / samples
    variation = jnp.where(fits, variation, jnp.nan)
    if measured is not None:
        others = jnp.where(measured, 0, state.first.scatter)
        variation = jnp.where(jnp.any(others > 0), jnp.nan, variation)
    return found._replace(within_class_variation=variation)


def whitening_of(first: ClassStatistics, min_count: int | None = None) -> Array:
    """Return `whitening` (r, d) of `ncjax.statistics.reference`."""
    return statistics.reference(first, min_count=min_count, distances=False).whitening
