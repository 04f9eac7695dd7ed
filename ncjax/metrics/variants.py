r"""Published variants of the collapse metrics, beside those of `ncjax.metrics`.

Each function is one formula of one source; `docs/metrics.md` says which codebase reports
which. Where a variant is a mean, a standard deviation or a maximum over classes, pairs or
samples, the function returns the array and leaves the last step to the caller.

Notation: features $h_i$ (N, d) with labels $y_i$ (N,), class means $\bar h_k$ of $n_k$
samples, global mean $h_G$, classifier rows $w_k$ (K, d) and bias $b$ (K,), logits
$z_i = W h_i + b$. `centring` says what $h_G$ is: "class_mean" the mean of the class means,
"sample_mean" that of all samples. Functions that take features want the data set in one
piece; those that take statistics stream (`ncjax.statistics`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_choice
from ncjax.metrics import measures, statistics
from ncjax.metrics.classifier import SquaredErrorParts as SquaredErrorParts
from ncjax.metrics.classifier import cosine_margins as cosine_margins
from ncjax.metrics.classifier import logit_margins as logit_margins
from ncjax.metrics.classifier import mean_cross_entropy as mean_cross_entropy
from ncjax.metrics.classifier import mean_squared_error as mean_squared_error
from ncjax.metrics.classifier import squared_error_parts as squared_error_parts
from ncjax.metrics.inputs import (
    check_classifier,
    check_features,
    check_rows,
    check_samples,
    computing_dtype,
)
from ncjax.metrics.statistics import ClassStatistics, Comparison
from ncjax.numerics import matmul
from ncjax.types import Array

WEIGHTINGS = ("sample", "class")
KERNELS = ("distance", "log", "riesz")


# NC1: variability collapse


def within_class_variation(
    features: Array,
    labels: Array,
    num_classes: int,
    *,
    centring: str = "class_mean",
    weighting: str = "sample",
    per_class: bool = True,
) -> Array:
    r"""$\operatorname{Tr}(\Sigma_W \Sigma_B^+) / K$, a scalar.

    Args:
      features: (N, d).
      labels: (N,) integers in [0, K).
      num_classes: K.
      centring: global mean that $\Sigma_B$ is taken about; "class_mean" in Papyan et al.
        (2020), "sample_mean" in Zhu et al. (2021).
      weighting: "sample" for $\Sigma_W = \tfrac1N \sum_i \delta_i \delta_i^\top$ with
        $\delta_i = h_i - \bar h_{y_i}$; "class" for the mean over classes of their
        covariances. They differ where classes differ in size.
      per_class: divide by K, as Zhu et al. (2021) do and Papyan et al. (2020) plot not.

    Raises:
      ValueError: shapes, dtypes, values or names do not fit.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    seen = _compare_with_means(features, labels, num_classes, centring)
    dtype = seen.whitened_scatter.dtype
    if weighting == "sample":
        samples = jnp.sum(seen.counts, dtype=jnp.int32).astype(dtype)
        over_classes = jnp.sum(seen.whitened_scatter) / samples
    else:
        over_classes = jnp.mean(seen.whitened_scatter / seen.counts.astype(dtype))
    return over_classes if per_class else num_classes * over_classes


def variability_collapse_index(
    features: Array, labels: Array, num_classes: int, *, centring: str = "sample_mean"
) -> Array:
    r"""VCI, $1 - \operatorname{Tr}(\Sigma_T^+ \Sigma_B) / \min(d, K - 1)$, a scalar.

    $\Sigma_T = \Sigma_W + \Sigma_B$. The factor $A = [\Delta / \sqrt N;\; M / \sqrt K]$
    (N + K, d) of $\Sigma_T = A^\top A$ has a singular value decomposition $U S V^\top$,
    and the trace is the squared norm of the last K rows of $U$: no square is inverted.

    Source: Xu, Liu (2023), "Quantifying the variability collapse of neural networks".
    """
    first_pass, features, labels = _first_pass(features, labels, num_classes)
    samples, dim = features.shape
    deviation = statistics.deviations(first_pass, features, labels) / math.sqrt(samples)
    means = statistics.centred_means(first_pass, centring) / math.sqrt(num_classes)
    factor = jnp.concatenate([deviation, means])
    left, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
    cutoff = max(factor.shape) * jnp.finfo(factor.dtype).eps * jnp.max(singular)
    trace = jnp.sum(jnp.where(singular > cutoff, jnp.sum(left[samples:] ** 2, axis=0), 0))
    return 1 - trace / min(dim, num_classes - 1)


def nuclear_over_frobenius(features: Array, labels: Array, num_classes: int) -> Array:
    r"""$|H_k|_* / |H_k|_F$ (K,) of the features $H_k$ (n_k, d) of each class, not centred.

    1 if the features of a class are parallel, NaN if they are all zero. Its mean over
    classes is the nuclear norm metric of Zhou et al. (2022), the mean of its square the
    numerical rank of the guided codebase. `labels` must be concrete: they fix the shapes
    of the K decompositions.
    """
    features, labels = _samples(features, labels, num_classes)
    targets = np.asarray(labels)
    counts = np.bincount(targets, minlength=num_classes)
    order = np.argsort(targets, kind="stable")
    place = np.arange(targets.size) - np.repeat(np.cumsum(counts) - counts, counts)
    # Rows of zeros leave the singular values as they are.
    groups = jnp.zeros((num_classes, counts.max(), features.shape[1]), features.dtype)
    groups = groups.at[targets[order], place].set(features[order])
    singular = _singular_values(groups)
    return jnp.sum(singular, axis=1) / jnp.linalg.norm(singular, axis=1)


@jax.jit
def _singular_values(groups: Array) -> Array:
    """Of each of K matrices, one after the other."""
    return jax.lax.map(lambda rows: jnp.linalg.svd(rows, compute_uv=False), groups)


def average_squared_norm(
    first_pass: ClassStatistics, centring: str = "sample_mean"
) -> Array:
    r"""$\tfrac1K \sum_k \tfrac1{n_k} \sum_{y_i = k} |h_i - h_G|^2$, a scalar.

    Source: Fang, He, Long, Su (2021), the constraint $E_H$ of the layer-peeled model.
    """
    means = statistics.centred_means(first_pass, centring)
    variance = first_pass.scatter / first_pass.counts.astype(means.dtype)
    return jnp.mean(variance + jnp.sum(means**2, axis=1))


# NC2: the directions of the class means


def uniformity_kernel(rows: Array, kernel: str, exponent: float | None = None) -> Array:
    r"""Kernel of the distances of unit rows, $g(|v_j/|v_j| - v_k/|v_k||)$, K(K-1)/2 pairs.

    Args:
      rows: (K, d), for the source the centred class means.
      kernel: "distance" for $g(r) = r$, "log" for $\log(1/r)$, "riesz" for
        $\operatorname{sign}(s)\, r^{-s}$.
      exponent: s of the Riesz kernel, d - 2 if None.

    Raises:
      ValueError: kernel is none of these.

    Source: Liu et al. (2023), "Generalizing and decoupling neural collapse via
    hyperspherical uniformity gap". They report mean and variance over pairs.
    """
    check_choice("kernel", kernel, KERNELS)
    unit = measures.unit_rows(rows)
    squares = statistics.squared_distances(unit)
    distances = jnp.sqrt(squares[np.triu_indices(len(unit), k=1)])
    if kernel == "distance":
        return distances
    if kernel == "log":
        return -jnp.log(distances)
    power = float(unit.shape[1] - 2 if exponent is None else exponent)
    return math.copysign(1.0, power) * distances**-power


def one_vs_rest_distances(W: Array) -> np.ndarray:
    r"""Distance (K,) of each unit row of `W` to the convex hull of the other unit rows.

    $\min_{u \ge 0,\, \sum u = 1} |\hat w_k - \sum_{j \ne k} u_j \hat w_j|$. The minimiser
    is, up to its sum, that of $|\sum_j u_j (\hat w_j - \hat w_k)|^2 + (\sum_j u_j - 1)^2$
    over $u \ge 0$: non-negative least squares, solved exactly by an active set. Computed
    in float64 outside JAX, to 1e-13 of the distance unless that is itself near zero.

    Source: Jiang et al. (2024), "Generalized neural collapse for a large number of
    classes", GNC2; they report the smallest. Lawson, Hanson (1974), chapter 23.

    Raises:
      ValueError: W is not (K, d) with K at least 2, or a row is zero or not finite.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # half a second

    unit = np.asarray(W, np.float64)
    if unit.ndim != 2 or len(unit) < 2:
        raise ValueError(f"expected W (K, d) with K at least 2, got {unit.shape}")
    bad = np.flatnonzero(~np.isfinite(unit).all(axis=1) | ~unit.any(axis=1))
    if bad.size:
        raise ValueError(f"rows of W must be finite and not zero, got {unit[bad[0]]}")
    unit = unit / np.abs(unit).max(axis=1, keepdims=True)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    # Rows in a basis of their span: d may be larger than K.
    rows = np.linalg.qr(unit.T)[1].T

    def distance(k):
        gaps = np.delete(rows, k, axis=0) - rows[k]
        system = np.vstack([gaps.T, np.ones(len(gaps))])
        weights, _ = nnls(system, np.eye(len(system))[-1])
        return np.linalg.norm(weights @ gaps) / weights.sum()

    return np.array([distance(k) for k in range(len(rows))])


# NC3, NC4: the classifier and the class means


def mean_logits_norm(
    first_pass: ClassStatistics,
    W: Array,
    b: Array | None,
    centring: str = "sample_mean",
) -> Array:
    r"""$|W h_G + b|$, zero where the bias takes off the global mean.

    Source: Zhu et al. (2021), NC3; `W` (K, d), `b` (K,), a scalar.
    """
    W, b = check_classifier(W, b, first_pass.anchor.shape)
    centre = statistics.global_mean(first_pass, centring)
    product = matmul(W.astype(centre.dtype), centre)
    if b is not None:
        product = product + b.astype(centre.dtype)
    return jnp.linalg.norm(product)


def nearest_centre_accuracy(features: Array, labels: Array, num_classes: int) -> Array:
    """Share of samples whose nearest class mean is that of their own class, a scalar."""
    seen = _compare_with_means(features, labels, num_classes, "class_mean")
    right = jnp.sum(seen.counts - seen.ncc_errors, dtype=jnp.int32)
    samples = jnp.sum(seen.counts, dtype=jnp.int32)
    return statistics.fraction(right, samples, seen.whitened_scatter.dtype)


def ncc_agreement(
    features: Array, labels: Array, W: Array, b: Array | None = None
) -> Array:
    """Share (K,) of each class on which classifier and nearest class mean agree.

    Its mean weighs classes equally, `1 - CollapseMetrics.ncc_mismatch` samples.
    """
    features, labels, W, b = check_features(features, labels, W, b)
    seen = _compare(features, labels, W.shape[0], "class_mean", W, b)
    return statistics.fraction(seen.counts - seen.mismatches, seen.counts, W.dtype)


def ood_cosines(means: Array, ood_mean: Array) -> Array:
    r"""$|\cos(\bar h_k, o)|$ (K,), class means not centred, o the mean of other data.

    Args:
      means: (K, d), `statistics.class_means(first_pass)`.
      ood_mean: (d,) global mean of out-of-distribution features:
        `statistics.global_mean` of their statistics averages over the classes that they
        hold, `jnp.mean(features, axis=0)` over samples.

    Source: Ammar et al. (2024), "NECO: neural collapse based out-of-distribution
    detection", NC5. They report the mean.
    """
    (means,) = check_rows(means)
    other = jnp.broadcast_to(ood_mean, means.shape)
    return jnp.abs(measures.row_cosines(means, other))


def _samples(features, labels, num_classes):
    """Checked features in the dtype of the computation, and labels."""
    features, labels = check_samples(features, labels, num_classes)
    return features.astype(computing_dtype(features.dtype)), labels


def _first_pass(features, labels, num_classes):
    features, labels = _samples(features, labels, num_classes)
    first_pass = statistics.class_statistics(features, labels, num_classes)
    return first_pass, features, labels


def _compare_with_means(features, labels, num_classes, centring) -> Comparison:
    features, labels = _samples(features, labels, num_classes)
    return _compare(features, labels, num_classes, centring)


@partial(jax.jit, static_argnums=(2, 3))
def _compare(features, labels, num_classes, centring, W=None, b=None) -> Comparison:
    """Both passes in one piece; centred means stand in for a missing classifier."""
    first_pass = statistics.class_statistics(features, labels, num_classes)
    against = statistics.reference(first_pass, centring)
    empty = statistics.init_comparison(num_classes, first_pass.anchor.dtype)
    W = against.centred if W is None else W
    return statistics.compare(empty, first_pass, against, features, labels, W, b)
