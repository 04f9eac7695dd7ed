"""Stream statistics of features by class, exact to rounding in float32.

Two passes read the data. The first keeps the count, mean and scatter (the sum of squared
distances to the mean) of each class. The second knows the means and projects every sample
on their span. It finds the nearest class centre, the classifier's decision and the whitened
variation: the deviation from the class mean in units of the spread of the class means. No
matrix is larger than a batch of samples or K x d; none is d x d. Up to 2048 classes, arrays
of K x K and of a batch by K are used too. Beyond, all runs in tiles of 1024 classes, and a
batch touches only the rows of the classes that it holds.

A mean is kept as an anchor, the first sample seen of the class, plus the mean offset from
it. Differences of neighbouring floating-point numbers are exact, so features keep their
digits even 10^4 away from the origin, or if they vary by 1e-7 of their mean.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array
from ncjax.checks import (
    check_choice,
    check_integer,
    check_sizes,
    concrete,
    float_dtype,
)
from ncjax.metrics import measures
from ncjax.metrics.inputs import (
    check_batch,
    check_centres,
    check_classifier,
    check_counts,
)
from ncjax.metrics.tiles import FEW_CLASSES, largest_product, squared_differences
from ncjax.metrics.whitening import whiten
from ncjax.numerics import matmul, wide_dtype
from ncjax.types import Array

CENTRINGS = ("class_mean", "sample_mean")


class ClassStatistics(NamedTuple):
    """First pass: counts, means and scatters of K classes."""

    counts: Array  # (K,)    samples seen, of `count_dtype`
    anchor: Array  # (K, d)  first sample seen of each class, 0 if none
    offset: Array  # (K, d)  class mean minus anchor
    scatter: Array  # (K,)    sum over samples of |h - class mean|²


class Reference(NamedTuple):
    """Class means for the second pass to compare samples with; made by `reference`."""

    centred: Array  # (K, d)  class means minus the global mean
    centres: Array  # (K, d)  centres of NC4 minus the global mean
    distances: Array | None  # (K, K)  squared distances of class means (rows) to centres
    whitening: Array  # (r, d)  T with |T x|² = xᵀ Σ_B⁺ x / K, r at most K - 1
    measured: Array | None  # (K,)  classes measured, None for all
    candidates: Array | None  # (K,)  classes that have a centre, None for all


class Comparison(NamedTuple):
    """Second pass: sums over the samples seen of each of K classes."""

    counts: Array  # (K,)  samples seen, of `count_dtype`
    scatter: Array  # (K,)  sum of |h - class mean|², as in the first pass
    whitened_scatter: Array  # (K,)  sum of δᵀ Σ_B⁺ δ / K, δ = h - class mean
    mismatches: Array  # (K,)  classifier and nearest class mean disagree
    errors: Array  # (K,)  classifier is wrong
    ncc_errors: Array  # (K,)  nearest class mean is wrong


def count_dtype() -> np.dtype:
    """Return the dtype of counts: uint32, which ends at 4.29e9 samples of a class.

    With x64 it is uint64.
    """
    return jax.dtypes.canonicalize_dtype(np.uint64)


def init(num_classes: int, dim: int, dtype=jnp.float32) -> ClassStatistics:
    """Return `ClassStatistics` of no sample, the neutral element of `merge`.

    Raises:
      ValueError: num_classes is below 2, dim is below 1, or dtype is not floating.
    """
    check_sizes(num_classes=num_classes, dim=dim)
    dtype = float_dtype(dtype)
    return ClassStatistics(
        counts=jnp.zeros(num_classes, count_dtype()),
        anchor=jnp.zeros((num_classes, dim), dtype),
        offset=jnp.zeros((num_classes, dim), dtype),
        scatter=jnp.zeros(num_classes, dtype),
    )


def class_statistics(features: Array, labels: Array, num_classes: int) -> ClassStatistics:
    """Return `ClassStatistics` of a data set in one piece, features (N, d), labels (N,).

    Computed in the dtype of the features, or in float32 for half precision. Samples with a
    label outside [0, K) are left out.

    Raises:
      ValueError: a shape, dtype or size does not fit.
    """
    check_sizes(num_classes=num_classes)
    features, labels, _ = check_batch(features, labels)
    return _class_statistics(features, labels, num_classes)


@partial(jax.jit, static_argnums=2)
def _class_statistics(features, labels, num_classes: int) -> ClassStatistics:
    empty = init(num_classes, features.shape[1], wide_dtype(features.dtype))
    return update(empty, features, labels)


def update(
    statistics: ClassStatistics, features: Array, labels: Array, mask: Array | None = None
) -> ClassStatistics:
    """Add a batch to the statistics.

    Args:
      statistics: statistics of the samples before.
      features: (B, d), cast to the dtype of the statistics. The caller may overwrite the
        memory of a NumPy array or PyTorch tensor once the call has returned.
      labels: (B,) integers in [0, K); samples with any other label are left out. Inside
        `jax.jit` JAX has turned labels beyond int32 into others before, unless x64 is on.
      mask: (B,) booleans; samples at False are left out, even if they hold NaN.

    Returns:
      `ClassStatistics` of the samples before and the batch. Any order and grouping of the
      samples gives the same result to rounding. A batch of no sample changes nothing.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    (num_classes, dim), dtype = statistics.anchor.shape, statistics.anchor.dtype
    features, labels, mask = check_batch(features, labels, mask, dim)
    if not features.shape[0]:
        return statistics
    valid, features, labels = _valid(features, labels, mask, num_classes, dtype)
    return add(statistics, features, labels, valid)[0]


def add(statistics, features, labels, valid) -> tuple[ClassStatistics, Array]:
    """Add a checked batch; also return its deviations (B, d) from the old class means.

    With fewer samples than K, only rows of the batch's classes are read and set. They are
    read once, so that a program may set them in place.

    Args:
      statistics: statistics of the samples before.
      features: (B, d), of the dtype of the statistics.
      labels: (B,) int32 in [0, K).
      valid: (B,) booleans; samples at False are left out.
    """
    num_classes, batch = statistics.counts.shape[0], features.shape[0]
    if num_classes <= batch:
        new = merge(statistics, _of_batch(features, labels, valid, num_classes))
        return new, deviations(statistics, features, labels)
    classes, places = batch_classes(labels, valid, num_classes)
    old = jax.tree.map(lambda rows: rows[jnp.minimum(classes, num_classes - 1)], statistics)
    merged = merge(old, _of_batch(features, places, valid, batch))
    new = jax.tree.map(
        lambda rows, row: rows.at[classes].set(row, mode="drop"), statistics, merged
    )
    return new, deviations(old, features, places)


def _of_batch(features, labels, valid, num_classes: int) -> ClassStatistics:
    """Return the statistics of a batch, for any number of classes up to its size."""
    count = _class_counts(valid, labels, num_classes)
    order = jnp.arange(features.shape[0], dtype=jnp.int32)
    last = features.shape[0] - 1
    first = jax.ops.segment_min(jnp.where(valid, order, last), labels, num_classes)
    anchor = jnp.where((count > 0)[:, None], features[jnp.minimum(first, last)], 0)
    from_anchor = features - anchor[labels]
    total = _class_sums(from_anchor, labels, valid, num_classes)
    offset = total / jnp.maximum(count, 1)[:, None].astype(features.dtype)
    squares = jnp.sum((from_anchor - offset[labels]) ** 2, axis=1)
    scatter = _class_sums(squares, labels, valid, num_classes)
    return ClassStatistics(count, anchor, offset, scatter)


def batch_classes(labels: Array, valid: Array, num_classes: int) -> tuple[Array, Array]:
    """Return the classes (B,) of a batch, each once and then K, and places (B,) in them.

    `classes[places[i]]` is the label of sample i, or K if the sample is not valid.
    """
    labels = jnp.where(valid, labels, num_classes)
    order = jnp.argsort(labels)
    ordered = labels[order]
    is_new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    place = jnp.cumsum(is_new, dtype=jnp.int32) - 1
    classes = jnp.full_like(labels, num_classes).at[place].set(ordered)
    return classes, jnp.zeros_like(labels).at[order].set(place)


def _class_counts(which: Array, labels: Array, num_classes: int) -> Array:
    """Return how many samples of each class are in `which` (B, ...): (K, ...)."""
    return jax.ops.segment_sum(which.astype(count_dtype()), labels, num_classes)


def _class_sums(rows: Array, labels: Array, valid: Array, num_classes: int) -> Array:
    """Return the sum (K, ...) of the rows (B, ...) of each class.

    On CPU these are B additions in order. On other platforms the additions would run in any
    order, so there a product with the memberships takes 2 B K operations per column, up to
    2048 classes.
    """
    if num_classes > FEW_CLASSES:
        return _segment_sums(rows, labels, valid, num_classes)
    on_cpu, elsewhere = (
        partial(each, num_classes=num_classes) for each in (_segment_sums, _product_sums)
    )
    return jax.lax.platform_dependent(rows, labels, valid, cpu=on_cpu, default=elsewhere)


def _segment_sums(rows: Array, labels: Array, valid: Array, num_classes: int) -> Array:
    """Return the sums of `_class_sums` by B additions."""
    labels = jnp.where(valid, labels, num_classes)
    return jax.ops.segment_sum(rows, labels, num_classes)


def _product_sums(rows: Array, labels: Array, valid: Array, num_classes: int) -> Array:
    """Return the sums of `_class_sums` by a product with the memberships."""
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    members = (labels[:, None] == classes[None]) & valid[:, None]
    return matmul(members.T.astype(rows.dtype), rows)


def merge(first: ClassStatistics, second: ClassStatistics) -> ClassStatistics:
    r"""Return the statistics of the union of two disjoint sets of samples.

    The scatter of a class is $s_1 + s_2 + |\Delta|^2 n_1 n_2 / (n_1 + n_2)$, with $\Delta$
    the difference of its two means.

    Source: Chan, Golub, LeVeque (1983), equation (2.1).
    """
    dtype = first.anchor.dtype
    count = first.counts + second.counts
    share = fraction(second.counts, jnp.maximum(count, 1), dtype)
    second_only = (first.counts == 0)[:, None]
    shift = mean_shift(first, second)
    weight = first.counts.astype(dtype) * share
    return ClassStatistics(
        counts=count,
        anchor=jnp.where(second_only, second.anchor, first.anchor),
        offset=jnp.where(second_only, second.offset, first.offset + share[:, None] * shift),
        scatter=first.scatter + second.scatter + weight * jnp.sum(shift**2, axis=1),
    )


def mean_shift(first: ClassStatistics, second: ClassStatistics) -> Array:
    """Return the class means of `second` minus those of `first` (K, d), by differences.

    A row is 0 if one of the two has no sample of the class.
    """
    both = ((first.counts > 0) & (second.counts > 0))[:, None]
    gap = second.anchor - first.anchor
    return jnp.where(both, (gap + second.offset) - first.offset, 0)


def all_merge(statistics: ClassStatistics, axis_name: str) -> ClassStatistics:
    """Merge over the devices of a mapped axis (`jax.shard_map`), by two sums of (K, d)."""
    dtype = statistics.anchor.dtype
    device = jax.lax.axis_index(axis_name)
    absent = jax.lax.axis_size(axis_name)
    # The anchor of a class comes from the first device that has seen it.
    owner = jax.lax.pmin(jnp.where(statistics.counts > 0, device, absent), axis_name)
    owned = jnp.where((owner == device)[:, None], statistics.anchor, 0)
    anchor = jax.lax.psum(owned, axis_name)
    count = jax.lax.psum(statistics.counts, axis_name)
    local = statistics.counts.astype(dtype)
    from_anchor = (statistics.anchor - anchor) + statistics.offset
    total = jax.lax.psum(local[:, None] * from_anchor, axis_name)
    offset = total / jnp.maximum(count, 1)[:, None].astype(dtype)
    shift = jnp.where((statistics.counts > 0)[:, None], from_anchor - offset, 0)
    local_scatter = statistics.scatter + local * jnp.sum(shift**2, axis=1)
    return ClassStatistics(
        count, anchor, offset, scatter=jax.lax.psum(local_scatter, axis_name)
    )


def measured_classes(
    statistics: ClassStatistics, min_count: int | None = None
) -> Array | None:
    """Return the mask (K,) of the classes that a metric measures, or None for all.

    A metric of some classes is the metric of a problem that has no others: they enter no
    mean, no singular value and no pair.

    Args:
      statistics: statistics of all samples.
      min_count: None measures all K classes. A number m, at least 1, measures the classes
        with at least m samples.

    Raises:
      ValueError: min_count is out of range, or (outside jit) fewer than two classes are
        measured, or a class has no sample and min_count is None. Under jit a metric of a
        class without samples is NaN.
    """
    counts = statistics.counts
    if min_count is not None:
        check_integer("min_count", min_count, least=1)
    known = concrete(counts)
    if known is not None:
        check_counts(known, min_count)
    return None if min_count is None else counts >= min_count


def class_means(statistics: ClassStatistics) -> Array:
    """Return class means (K, d), NaN for a class without samples.

    They are rounded to the dtype, so their differences lose digits: see `centred_means`.
    """
    seen = (statistics.counts > 0)[:, None]
    return jnp.where(seen, statistics.anchor + statistics.offset, jnp.nan)


def global_mean(statistics: ClassStatistics, centring: str = "class_mean") -> Array:
    """Return the global mean $h_G$ (d,) of the classes seen, as in `centred_means`."""
    shares = _shares(statistics, centring, statistics.counts > 0)
    return _origin(statistics) + matmul(shares, _from_origin(statistics))


def centred_means(
    statistics: ClassStatistics, centring: str = "class_mean", min_count: int | None = None
) -> Array:
    r"""Return class means minus the global mean, $\bar h_k - h_G$ (K, d).

    Computed from differences alone, so that an offset of the features costs no digits.

    Args:
      statistics: statistics of all samples.
      centring: "class_mean" if $h_G$ is the mean of the class means (Papyan et al., 2020),
        "sample_mean" if it is the mean of all samples (Zhu et al., 2021).
      min_count: classes that enter $h_G$, as in `measured_classes`. The rows of the others
        are NaN.

    Raises:
      ValueError: centring is neither, or as in `measured_classes`.
    """
    measured = measured_classes(statistics, min_count)
    centred = about_mean(statistics, centring, measured)
    return centred if measured is None else jnp.where(measured[:, None], centred, jnp.nan)


def about_mean(statistics: ClassStatistics, centring: str, measured: Array | None) -> Array:
    """Return `centred_means` of the measured classes; the rows of the others are 0.

    The row of a measured class without samples is NaN.
    """
    rows = _from_origin(statistics)
    rows = rows - matmul(_shares(statistics, centring, measured), rows)[None]
    if measured is None:
        return jnp.where((statistics.counts > 0)[:, None], rows, jnp.nan)
    return jnp.where(measured[:, None], rows, 0)


def _origin(statistics: ClassStatistics) -> Array:
    """Return the anchor (d,) of the first class seen."""
    return statistics.anchor[jnp.argmax(statistics.counts > 0)]


def _from_origin(statistics: ClassStatistics) -> Array:
    """Return the class means (K, d) minus `_origin`, any numbers for classes not seen."""
    return (statistics.anchor - _origin(statistics)[None]) + statistics.offset


def class_variances(statistics: ClassStatistics, measured: Array | None) -> Array:
    r"""Return the mean of $|h - \bar h_k|^2$ over each class (K,), 0 if not measured."""
    counts, scatter = statistics.counts, statistics.scatter
    if measured is not None:
        counts, scatter = jnp.where(measured, counts, 1), jnp.where(measured, scatter, 0)
    return scatter / counts.astype(scatter.dtype)


def deviations(statistics: ClassStatistics, features: Array, labels: Array) -> Array:
    r"""Return each sample minus its class mean, $h_i - \bar h_{y_i}$ (N, d)."""
    features, labels = as_array("features", features), as_array("labels", labels)
    return (features - statistics.anchor[labels]) - statistics.offset[labels]


def reference(
    statistics: ClassStatistics,
    centring: str = "class_mean",
    *,
    centres: Array | None = None,
    min_count: int | None = None,
    distances: bool = True,
) -> Reference:
    r"""Return the class means and their whitening, for the second pass.

    Whitening is the linear map T with $|T x|^2 = x^\top \Sigma_B^+ x / K$: it measures x in
    units of the spread of the class means. With $M$ the centred class means,
    $\Sigma_B = M^\top M / K$ and $M = U S V^\top$, it is $S^{-1} V^\top$. It comes from the
    singular values of $M$, not of $\Sigma_B$, whose condition number is the square: if the
    spreads of the means differ by 500, rounding errors grow by 500 and not by 500².

    Args:
      statistics: statistics of all samples.
      centring: global mean in $\Sigma_B$, as in `centred_means`.
      centres: (K, d) class centres of NC4, for example `class_means` of the training split
        where the statistics are of a test split. A row with NaN or infinity is no centre.
        None takes the class means of the samples themselves.
      min_count: classes measured, as in `measured_classes`; K is their number.
      distances: False leaves out the (K, K) distances of means and centres. They are also
        left out beyond 2048 classes: `compare` then finds the nearest centre in tiles.

    Raises:
      ValueError: centring is unknown, the shape of centres does not fit, or as in
        `measured_classes`.
    """
    measured = measured_classes(statistics, min_count)
    shares = _shares(statistics, centring, measured)
    centred = about_mean(statistics, centring, measured)
    whitening = _whitening(centred, shares)
    candidates, about = measured, centred
    if centres is not None:
        candidates, about = _centres_about_mean(statistics, centring, measured, centres)
    kept = distances and centred.shape[0] <= FEW_CLASSES
    between = None
    if kept and centres is None:
        between = measures.distances_of_rows(centred)
    elif kept:
        between = squared_distances(centred, about)
    return Reference(centred, about, between, whitening, measured, candidates)


def _centres_about_mean(statistics, centring, measured, centres) -> tuple[Array, Array]:
    """Return the mask (K,) of finite rows of `centres`, and these minus the global mean."""
    centres = check_centres(centres, statistics.anchor.shape)
    candidates = jnp.all(jnp.isfinite(centres), axis=1)
    shares = _shares(statistics, centring, measured)
    mean = matmul(shares, _from_origin(statistics))
    rows = (centres.astype(mean.dtype) - _origin(statistics)[None]) - mean[None]
    return candidates, jnp.where(candidates[:, None], rows, 0)


def squared_distances(rows: Array, others: Array | None = None) -> Array:
    """Return squared distances (K, J) of `rows` (K, d) to `others` (J, d), by differences.

    None for `others` takes the rows themselves. The Gram form `|a|² + |b|² - 2 a·b` is
    faster but loses the digits of close pairs.
    """
    rows = as_array("rows", rows)
    return squared_differences(rows, rows if others is None else as_array("others", others))


def init_comparison(num_classes: int, dtype=jnp.float32) -> Comparison:
    """Return a `Comparison` of no sample."""
    # Arrays of their own, so that a program may take the memory of each.
    dtypes = (count_dtype(), dtype, dtype, *(count_dtype(),) * 3)
    return Comparison(*(jnp.zeros(num_classes, dtype) for dtype in dtypes))


def compare(
    comparison: Comparison,
    statistics: ClassStatistics,
    against: Reference,
    features: Array,
    labels: Array,
    W: Array,
    b: Array | None = None,
    mask: Array | None = None,
) -> Comparison:
    r"""Second pass: add a batch to the comparison.

    With $\delta = h - \bar h_y$ and centres $c_j$, which are the class means by default,
    $|h - c_j|^2 = |\delta|^2 + 2 \delta^\top (\bar h_y - c_j) + |\bar h_y - c_j|^2$.
    It does not depend on the origin. Comparisons of disjoint samples add, so across devices
    use `jax.lax.psum`. Samples of classes that `against` does not measure are left out. The
    classifier always decides among all K classes.

    Args:
      comparison: comparison of the samples before.
      statistics: statistics of all samples, the result of the first pass.
      against: `reference(statistics)`.
      features: (B, d).
      labels: (B,) integers in [0, K); samples with any other label are left out, as in
        `update`.
      W: (K, d) classifier.
      b: (K,) bias; None for a classifier without bias.
      mask: (B,) booleans; samples at False are left out.

    Returns:
      `Comparison` of the samples before and the batch.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    (num_classes, dim), dtype = statistics.anchor.shape, statistics.anchor.dtype
    features, labels, mask = check_batch(features, labels, mask, dim)
    W, b = check_classifier(W, b, (num_classes, dim))
    if not features.shape[0]:
        return comparison
    valid, features, labels = _valid(features, labels, mask, num_classes, dtype)
    if against.measured is not None:
        valid = valid & against.measured[labels]
    deviation = deviations(statistics, features, labels)
    nearest = _nearest_centre(against, deviation, labels)
    decided = _decision(features, W.astype(dtype), None if b is None else b.astype(dtype))
    whitened = matmul(deviation, against.whitening.T)
    squares = [jnp.sum(rows**2, axis=1) for rows in (deviation, whitened)]
    sums = _class_sums(jnp.stack(squares, axis=1), labels, valid, num_classes)
    scatter, whitened_scatter = sums.T

    which = jnp.stack(
        [valid, decided != nearest, decided != labels, nearest != labels], axis=1
    )
    counts, mismatches, errors, ncc_errors = _class_counts(
        which & valid[:, None], labels, num_classes
    ).T
    return Comparison(
        counts=comparison.counts + counts,
        scatter=comparison.scatter + scatter,
        whitened_scatter=comparison.whitened_scatter + whitened_scatter,
        mismatches=comparison.mismatches + mismatches,
        errors=comparison.errors + errors,
        ncc_errors=comparison.ncc_errors + ncc_errors,
    )


def _nearest_centre(against: Reference, deviation: Array, labels: Array) -> Array:
    """Return the nearest centre (B,) of samples with deviations from their class means."""
    if against.distances is None:
        return _nearest_in_tiles(against, deviation, labels)
    projected = matmul(deviation, against.centres.T)
    # The constant of a sample does not matter, but this one makes the sum small.
    own = jnp.take_along_axis(projected, labels[:, None], axis=1)
    to_centres = 2 * (own - projected) + against.distances[labels]
    if against.candidates is not None:
        far = float(jnp.finfo(deviation.dtype).max)
        to_centres = jnp.where(against.candidates[None], to_centres, far)
    return jax.lax.argmin(to_centres, 1, jnp.int32)


def _nearest_in_tiles(against: Reference, deviation: Array, labels: Array) -> Array:
    r"""Return the nearest centre (B,) without an array (B, K).

    The largest $x^\top c_j - |c_j|^2 / 2$, with x the sample minus the global mean, loses
    digits if centres are close. The centre of the own class takes part again in the exact
    form: $|x - c_j|^2 - |x - c_y|^2 = 2 u^\top v + |v|^2$ with $u = x - c_y$ and
    $v = c_y - c_j$.
    """
    centres = against.centres
    means = against.centred[labels]
    half_squares = -jnp.sum(centres**2, axis=1) / 2
    nearest = largest_product(deviation + means, centres, half_squares, against.candidates)
    u, v = deviation + (means - centres[labels]), centres[labels] - centres[nearest]
    excess = jnp.sum(v * (2 * u + v), axis=1)
    own = (excess > 0) | ((excess == 0) & (labels < nearest))
    if against.candidates is not None:
        own = own & against.candidates[labels]
    return jnp.where(own, labels, nearest)


def _decision(features: Array, W: Array, b: Array | None) -> Array:
    """Return the class (B,) of the largest logit."""
    if W.shape[0] > FEW_CLASSES:
        offset = jnp.zeros(W.shape[0], W.dtype) if b is None else b
        return largest_product(features, W, offset)
    logits = matmul(features, W.T)
    return jax.lax.argmax(logits if b is None else logits + b[None], 1, jnp.int32)


def same_samples(
    statistics: ClassStatistics, comparison: Comparison, measured: Array | None
) -> Array:
    """Return whether the second pass read the samples of the measured classes alone.

    Counts must be equal, and scatters up to the square root of a rounding.
    """
    expected = statistics.counts
    if measured is not None:
        expected = jnp.where(measured, expected, 0)
    counts = comparison.counts == expected
    first, second = statistics.scatter, comparison.scatter
    limits = jnp.finfo(first.dtype)
    smallest = float(limits.tiny) * statistics.counts.astype(first.dtype)
    allowed = float(limits.eps) ** 0.5 * jnp.maximum(first, second) + smallest
    differ = jnp.abs(first - second) > allowed
    if measured is not None:
        differ = differ & measured
    return jnp.all(counts & ~differ)


def _shares(statistics: ClassStatistics, centring: str, measured: Array | None) -> Array:
    """Return the weight (K,) of each class mean in the global mean of those measured."""
    check_choice("centring", centring, CENTRINGS)
    count, dtype = statistics.counts, statistics.anchor.dtype
    weights = (
        count.astype(dtype) if centring == "sample_mean" else (count > 0).astype(dtype)
    )
    if measured is not None:
        weights = jnp.where(measured, weights, 0)
    return weights / jnp.sum(weights)


def _whitening(centred: Array, shares: Array) -> Array:
    """Return the whitening of `reference` of the centred means (K, d).

    Their rows M, weighted by the shares, sum to zero, so M has rank K - 1 at most. That
    null direction is removed exactly, so that no singular value is rounding error alone.
    Equal means span no direction to measure in: the whitening is NaN.
    """
    have_spread = jnp.any(centred != 0)
    return jnp.where(have_spread, whiten(complement(shares, centred))[1], jnp.nan)


def complement(weights: Array, rows: Array) -> Array:
    """Return the rows (K, d) in a basis (K - 1, K) of the complement of `weights` (K,).

    The weights are not negative. The basis holds all rows but the first of the Householder
    reflection that maps the weights to the first axis. The reflection is applied, not
    formed.
    """
    chex.assert_rank(weights, 1)
    normal = (weights / jnp.linalg.norm(weights)).at[0].add(1)
    along = matmul(normal, rows) * (2 / jnp.sum(normal**2))
    return rows[1:] - normal[1:, None] * along[None]


def fraction(part: Array, whole: Array, dtype) -> Array:
    """Return the quotient of two counts in `dtype`; JAX divides int32 in float32."""
    return part.astype(dtype) / whole.astype(dtype)


def total(counts: Array, dtype, where: Array | None = None) -> Array:
    """Return the sum of counts in `dtype`: a sum of integers would stop at 2^32."""
    return jnp.sum(counts.astype(dtype), where=where)


def _valid(features, labels, mask, num_classes, dtype):
    """Return which samples (B,) count, and features and labels with 0 in the other rows.

    Labels are int32, because class numbers would wrap in a narrower type.
    """
    valid = (labels >= 0) & (labels < num_classes)
    if mask is not None:
        valid = valid & mask
    zero = jnp.zeros((), features.dtype)
    features = jnp.where(valid[:, None], features, zero).astype(dtype)
    return valid, features, jnp.where(valid, labels, 0)
