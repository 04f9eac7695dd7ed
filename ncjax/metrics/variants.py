r"""Published variants of the collapse metrics in `ncjax.metrics`.

Each function is one formula of one source; `docs/conventions.md` lists the codebases that
report it. If a variant is a mean, a standard deviation or a maximum over classes, pairs or
samples, the function returns the array and leaves the last step to the caller.

Notation: features $h_i$ (N, d) with labels $y_i$ (N,), class means $\bar h_k$ of $n_k$
samples, deviations $\delta_i = h_i - \bar h_{y_i}$, global mean $h_G$, centred class means
$M$ (K, d), classifier rows $w_k$ (K, d) and bias $b$ (K,), logits $z_i = W h_i + b$.
`centring` defines $h_G$: with "class_mean" it is the mean of the class means, with
"sample_mean" the mean of all samples. Functions of features need the data set in one piece;
functions of statistics stream (`ncjax.statistics`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array
from ncjax.checks import check_choice
from ncjax.metrics import measures, statistics
from ncjax.metrics.classifier import SquaredErrorParts as SquaredErrorParts
from ncjax.metrics.classifier import cosine_margins as cosine_margins
from ncjax.metrics.classifier import logit_margins as logit_margins
from ncjax.metrics.classifier import mean_cross_entropy as mean_cross_entropy
from ncjax.metrics.classifier import mean_squared_error as mean_squared_error
from ncjax.metrics.classifier import squared_error_parts as squared_error_parts
from ncjax.metrics.directions import KERNELS as KERNELS
from ncjax.metrics.directions import Moments as Moments
from ncjax.metrics.directions import one_vs_rest_distances as one_vs_rest_distances
from ncjax.metrics.directions import uniformity_kernel as uniformity_kernel
from ncjax.metrics.directions import uniformity_moments as uniformity_moments
from ncjax.metrics.inputs import (
    check_centres,
    check_classifier,
    check_features,
    check_rows,
    check_samples,
    known_labels,
)
from ncjax.metrics.statistics import ClassStatistics, Comparison
from ncjax.metrics.whitening import whiten
from ncjax.numerics import at_unit_scale, matmul, power_of_two, widen
from ncjax.singular import singular_values
from ncjax.types import Array

WEIGHTINGS = ("sample", "class")


# NC1: variability collapse


def within_class_variation(
    features: Array,
    labels: Array,
    num_classes: int,
    *,
    centring: str = "class_mean",
    weighting: str = "sample",
    per_class: bool = True,
    min_count: int | None = None,
) -> Array:
    r"""$\operatorname{Tr}(\Sigma_W \Sigma_B^+) / K$, a scalar.

    Args:
      features: (N, d).
      labels: (N,) integers in [0, K).
      num_classes: K.
      centring: global mean in $\Sigma_B$; "class_mean" in Papyan et al. (2020),
        "sample_mean" in Zhu et al. (2021).
      weighting: "sample" for $\Sigma_W = \tfrac1N \sum_i \delta_i \delta_i^\top$ with
        $\delta_i = h_i - \bar h_{y_i}$; "class" for the mean of the class covariances.
        They differ if classes differ in size.
      per_class: divide by K, as Zhu et al. (2021) do and Papyan et al. (2020) do not.
      min_count: classes measured, as in `ncjax.collapse_metrics_from_features`; K is their
        number.

    Raises:
      ValueError: shapes, dtypes or values do not fit, or a name is unknown.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    seen = _compare_with_means(features, labels, num_classes, centring, min_count)
    return _variation(seen, weighting, per_class, min_count)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _variation(seen: Comparison, weighting, per_class, min_count) -> Array:
    """Return the trace of `within_class_variation` from the second pass."""
    dtype, counts = seen.whitened_scatter.dtype, seen.counts
    measured = None if min_count is None else counts > 0
    if weighting == "sample":
        samples = statistics.total(counts, dtype)
        over_classes = jnp.sum(seen.whitened_scatter) / samples
    else:
        counts = counts if measured is None else jnp.maximum(counts, 1)
        by_class = seen.whitened_scatter / counts.astype(dtype)
        over_classes = jnp.mean(by_class, where=measured)
    if per_class:
        return over_classes
    size = jnp.sum(jnp.ones_like(counts), dtype=jnp.int32, where=measured)
    return size.astype(dtype) * over_classes


def variability_collapse_index(
    features: Array,
    labels: Array,
    num_classes: int,
    *,
    centring: str = "sample_mean",
    min_count: int | None = None,
) -> Array:
    r"""VCI, $1 - \operatorname{Tr}(\Sigma_T^+ \Sigma_B) / \min(d, K - 1)$, a scalar.

    $\Sigma_T = \Sigma_W + \Sigma_B = A^\top A$, with the factor
    $A = [\Delta / \sqrt N;\; M / \sqrt K]$ (N + K, d), $\Delta$ the deviations. With the
    singular value decomposition $A = U S V^\top$ the trace is the squared norm of the last
    K rows of $U$, so that no squared matrix is inverted. `min_count` as in
    `within_class_variation`.

    Source: Xu, Liu (2023), "Quantifying the variability collapse of neural networks".
    """
    features, labels = _samples(features, labels, num_classes, min_count)
    features = at_unit_scale(features)
    first_pass = statistics.class_statistics(features, labels, num_classes)
    measured = statistics.measured_classes(first_pass, min_count)
    deviation = statistics.deviations(first_pass, features, labels)
    if measured is not None:
        deviation = jnp.where(measured[labels][:, None], deviation, 0)
    means = statistics.about_mean(first_pass, centring, measured)
    # N and K of the classes measured.
    samples, size = (
        jnp.sum(array, dtype=jnp.int32, where=measured).astype(means.dtype)
        for array in (first_pass.counts, jnp.ones_like(first_pass.counts))
    )
    parts = deviation / jnp.sqrt(samples), means / jnp.sqrt(size)
    left, _ = whiten(jnp.concatenate(parts))
    trace = jnp.sum(left[len(features) :] ** 2)
    return 1 - trace / jnp.minimum(features.shape[1], size - 1)


def nuclear_over_frobenius(
    features: Array, labels: Array, num_classes: int, *, min_count: int | None = None
) -> Array:
    r"""$|H_k|_* / |H_k|_F$ (K,) of the features $H_k$ (n_k, d) of each class, not centred.

    The nuclear norm $|\cdot|_*$ is the sum of the singular values. The quotient is 1 if the
    features of a class are parallel, and NaN if they are all zero. Its mean over classes is
    the nuclear norm metric of Zhou et al. (2022), the mean of its square the numerical rank
    of the "guiding" codebase. `labels` must be concrete (not traced by `jax.jit`), because
    they fix the shapes of the K decompositions. With `min_count`, classes of fewer samples
    are NaN.
    """
    given = labels
    features, labels = _samples(features, labels, num_classes, min_count)
    targets = known_labels(given, labels)
    features = at_unit_scale(features)
    counts = np.bincount(targets, minlength=num_classes)
    order = np.argsort(targets, kind="stable")
    ends = np.cumsum(counts)
    quotients = jnp.zeros(num_classes, features.dtype)
    least = 1 if min_count is None else min_count
    for height, classes in _by_size(counts, least).items():
        # Sample numbers of each class, filled up with N.
        rows = np.full((len(classes), height), targets.size, np.int32)
        for row, k in zip(rows, classes, strict=True):
            row[: counts[k]] = order[ends[k] - counts[k] : ends[k]]
        quotients = quotients.at[classes].set(_nuclear_quotients(features, rows))
    return jnp.where(counts >= least, quotients, jnp.nan)


def _by_size(counts: np.ndarray, least: int) -> dict[int, np.ndarray]:
    """Return the classes of at least `least` samples by size, rounded to a power of two."""
    heights = np.maximum(2 ** np.ceil(np.log2(np.maximum(counts, 1))).astype(int), 8)
    kept = counts >= least
    return {
        int(height): np.flatnonzero(kept & (heights == height))
        for height in np.unique(heights[kept])
    }


@jax.jit
def _nuclear_quotients(features: Array, rows: Array) -> Array:
    """Return the quotients (m,) of m classes with samples `rows` (m, n), one at a time.

    A number beyond the samples is a row of zeros, which leaves the singular values alone.
    """

    def of_one(numbers):
        group = features.at[numbers].get(mode="fill", fill_value=0)
        singular = singular_values(group)
        return jnp.sum(singular) / jnp.linalg.norm(singular)

    return jax.lax.map(of_one, rows)


def average_squared_norm(
    first_pass: ClassStatistics,
    centring: str = "sample_mean",
    *,
    min_count: int | None = None,
) -> Array:
    r"""$\tfrac1K \sum_k \tfrac1{n_k} \sum_{y_i = k} |h_i - h_G|^2$, a scalar.

    Source: Fang, He, Long, Su (2021), who bound it by $E_H$ in the layer-peeled model.
    """
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, centring, measured)
    variance = statistics.class_variances(first_pass, measured)
    return jnp.mean(variance + jnp.sum(means**2, axis=1), where=measured)


# NC3, NC4: the classifier and the class means


def mean_logits_norm(
    first_pass: ClassStatistics,
    W: Array,
    b: Array | None = None,
    centring: str = "sample_mean",
) -> Array:
    r"""Return $|W h_G + b|$, a scalar, zero if the bias cancels the global mean.

    For `W` (K, d) and `b` (K,); None for a classifier without bias. $h_G$ is the mean of
    the classes that have samples.

    Source: Zhu et al. (2021), NC3.

    Raises:
      ValueError: a shape does not fit, or centring is unknown.
    """
    W, b = check_classifier(W, b, first_pass.anchor.shape)
    centre = statistics.global_mean(first_pass, centring)
    product = matmul(W.astype(centre.dtype), centre)
    if b is not None:
        product = product + b.astype(centre.dtype)
    return jnp.linalg.norm(product)


def nearest_centre_accuracy(
    features: Array,
    labels: Array,
    num_classes: int,
    *,
    centres: Array | None = None,
    min_count: int | None = None,
) -> Array:
    """Return the share of samples whose nearest class centre belongs to their own class.

    `centres` (K, d) and `min_count` as in `ncjax.collapse_metrics_from_features`; the
    centres are the class means by default.
    """
    seen = _compare_with_means(
        features, labels, num_classes, "class_mean", min_count, centres
    )
    return _nearest_centre_share(seen, min_count)


@partial(jax.jit, static_argnums=1)
def _nearest_centre_share(seen: Comparison, min_count: int | None) -> Array:
    dtype = seen.whitened_scatter.dtype
    right = statistics.total(seen.counts - seen.ncc_errors, dtype)
    share = right / statistics.total(seen.counts, dtype)
    complete = jnp.all(seen.counts > 0) | (min_count is not None)
    return jnp.where(complete, share, jnp.nan)


def ncc_agreement(
    features: Array,
    labels: Array,
    W: Array,
    b: Array | None = None,
    *,
    centres: Array | None = None,
    min_count: int | None = None,
) -> Array:
    """Return the share (K,) of each class on which classifier and nearest centre agree.

    `centres` (K, d) and `min_count` as in `ncjax.collapse_metrics_from_features`; a class
    that is not measured is NaN. The mean of the shares weights classes equally;
    `1 - CollapseMetrics.ncc_mismatch` weights samples equally.
    """
    features, labels, W, b = check_features(features, labels, W, b, min_count=min_count)
    centres = None if centres is None else check_centres(centres, W.shape)
    seen = _compare(features, labels, W.shape[0], "class_mean", min_count, centres, W, b)
    return statistics.fraction(seen.counts - seen.mismatches, seen.counts, W.dtype)


def ood_cosines(means: Array, ood_mean: Array) -> Array:
    r"""Return $|\cos(\bar h_k, o)|$ (K,), with o the mean of out-of-distribution features.

    Args:
      means: (K, d) class means, not centred: `statistics.class_means(first_pass)`.
      ood_mean: (d,) global mean of out-of-distribution (OOD) features.
        `statistics.global_mean` of their statistics weights their classes equally,
        `jnp.mean(features, axis=0)` weights samples equally.

    Raises:
      ValueError: a shape or dtype does not fit.

    Source: Ammar et al. (2024), "NECO: neural collapse based out-of-distribution
    detection", NC5, who report the mean.
    """
    (means,) = check_rows(means)
    ood_mean = as_array("ood_mean", ood_mean)
    if ood_mean.shape != means.shape[1:]:
        raise ValueError(f"expected ood_mean {means.shape[1:]}, got {ood_mean.shape}")
    other = jnp.broadcast_to(ood_mean, means.shape)
    return jnp.abs(measures.row_cosines(means, other))


def _samples(features, labels, num_classes, min_count=None):
    """Return checked features, in the dtype of the computation, and checked labels."""
    features, labels = check_samples(features, labels, num_classes, min_count)
    return widen(features), labels


def _compare_with_means(
    features, labels, num_classes, centring, min_count, centres=None
) -> Comparison:
    features, labels = _samples(features, labels, num_classes, min_count)
    if centres is not None:
        centres = check_centres(centres, (num_classes, features.shape[1]))
    return _compare(features, labels, num_classes, centring, min_count, centres)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _compare(
    features, labels, num_classes, centring, min_count, centres=None, W=None, b=None
) -> Comparison:
    """Run both passes on the whole data; centred means replace a missing classifier."""
    # No result depends on the scale of features and b, or of W and b; squares may overflow.
    features = widen(features)
    scale = power_of_two(features)
    features = features / scale
    if W is not None:
        W, b = at_unit_scale((W, None if b is None else b / scale))
    if centres is not None:
        centres = centres.astype(features.dtype) / scale
    first_pass = statistics.class_statistics(features, labels, num_classes)
    against = statistics.reference(
        first_pass, centring, centres=centres, min_count=min_count
    )
    empty = statistics.init_comparison(num_classes, first_pass.anchor.dtype)
    W = against.centred if W is None else W
    return statistics.compare(empty, first_pass, against, features, labels, W, b)
