"""Collapse metrics NC1 to NC4, by one formula for the layer-peeled model and networks.

NC1, variability collapse: the features of a class approach their class mean. NC2: the
centred class means approach a simplex ETF, K vectors of equal norm and equal pairwise
angles. NC3, self-duality: the classifier approaches the centred class means, up to scale.
NC4: the classifier decides like the nearest class centre (NCC).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax import sizes
from ncjax.checks import check_integer, concrete
from ncjax.metrics import measures, statistics
from ncjax.metrics.inputs import check_centres, check_classifier, check_features
from ncjax.metrics.statistics import ClassStatistics, Comparison, Reference
from ncjax.metrics.tiles import FEW_CLASSES, TILE, mean_over_pairs
from ncjax.numerics import at_unit_scale, power_of_two
from ncjax.peeled.weights import check_point
from ncjax.types import Array, Params

# Bytes on CPU of one chunk of features with its distances to the centres, in float32.
_CHUNK_BYTES = 2**21
# Samples of a chunk if there are many classes: its logits by tile are 16 MB of float32.
_LARGE_CHUNK = 4096


class CollapseMetrics(NamedTuple):
    r"""Neural collapse in numbers; all but `accuracy` tend to zero. Scalars.

    $\bar h_k$ is the mean of the features $h_i$ of class k, $h_G$ the mean of the class
    means, and $M$ (K, d) has the centred class means $\bar h_k - h_G$ as rows.
    $\Sigma_W = \tfrac1N \sum_i (h_i - \bar h_{y_i})(h_i - \bar h_{y_i})^\top$ is the
    within-class covariance and $\Sigma_B = \tfrac1K M^\top M$ the between-class covariance.
    The raw classifier has rows $w_k$; the centred classifier has rows $w_k - \bar w$, with
    $\bar w$ their mean. CDNV is the class-distance normalised variance, $v_k$ the mean of
    $|h_i - \bar h_k|^2$ over class k.
    """

    within_class_variation: Array  # NC1  Tr(Σ_W Σ_B⁺) / K
    within_class_quotient: Array  # NC1  Tr Σ_W / Tr Σ_B
    cdnv: Array  # NC1  mean over pairs of (v_j + v_k) / (2 |h̄_j - h̄_k|²)
    mean_norm_variation: Array  # NC2  std/mean of |h̄_k - h_G|, ddof 1
    classifier_norm_variation: Array  # NC2  of |w_k|
    centred_classifier_norm_variation: Array  # NC2  of |w_k - w̄|
    mean_cosine_deviation: Array  # NC2  mean over pairs |cos + 1/(K-1)| of h̄_k - h_G
    classifier_cosine_deviation: Array  # NC2  of w_k
    centred_classifier_cosine_deviation: Array  # NC2  of w_k - w̄
    etf_gram_error: Array  # NC2  |M Mᵀ/|M Mᵀ|_F - ETF|_F
    self_duality: Array  # NC3  |W/|W|_F - M/|M|_F|_F
    centred_self_duality: Array  # NC3  of the centred classifier
    product_etf_error: Array  # NC3  |W Mᵀ/|W Mᵀ|_F - ETF|_F
    ncc_mismatch: Array  # NC4  share where classifier and nearest centre disagree
    accuracy: Array  # share of samples that the classifier gets right


def collapse_metrics(params: Params, weights=None) -> CollapseMetrics:
    r"""Return collapse metrics of the layer-peeled model.

    Row `H[k, i]` is the feature vector of sample i of class k.

    Args:
      params: `W` (K, d) and `H` (K, n, d).
      weights: (K, n) or (K,) weights of the samples or classes, not negative. Samples of
        weight 0 are left out; all others count alike. None is 1 everywhere.

    Returns:
      `CollapseMetrics` of scalars, float32 for half precision. A metric that is undefined
      (equal class means, W = 0) is NaN.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Ji et al. (ICLR 2022), Figure 2; Papyan, Han, Donoho (2020).

    >>> import ncjax
    >>> collapsed = ncjax.block_saddle(1, 4, per_class=2, dim=4)
    >>> bool(ncjax.collapse_metrics(collapsed).self_duality < 1e-6)
    True
    """
    params, weights = check_point(params, weights)
    return _metrics_of_params(params, None if weights is None else weights > 0)


@jax.jit
def _metrics_of_params(params: Params, counted: Array | None) -> CollapseMetrics:
    """Return the metrics of the samples that are `counted` (K, n), None for all."""
    # No metric depends on the scale, whose square may overflow.
    W, H = (at_unit_scale(leaf) for leaf in params)
    num_classes, per_class, dim = H.shape
    if counted is None:
        anchor, mask = H[:, 0], None
        counts = jnp.full(num_classes, per_class, statistics.count_dtype())
    else:
        first = jnp.argmax(counted, axis=1)[:, None, None]
        anchor, mask = jnp.take_along_axis(H, first, axis=1)[:, 0], counted[..., None]
        counts = jnp.sum(counted, axis=1, dtype=statistics.count_dtype())
    offset = jnp.mean(H - anchor[:, None], axis=1, where=mask)
    deviation = (H - anchor[:, None]) - offset[:, None]
    first_pass = ClassStatistics(
        counts=counts,
        anchor=anchor,
        offset=offset,
        scatter=jnp.sum(deviation**2, axis=(1, 2), where=mask),
    )
    second_pass = statistics.compare(
        statistics.init_comparison(num_classes, H.dtype),
        first_pass,
        statistics.reference(first_pass),
        H.reshape(-1, dim),
        jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), per_class),
        W,
        mask=None if counted is None else counted.reshape(-1),
    )
    return _metrics(first_pass, second_pass, W, None)


def collapse_metrics_from_features(
    features,
    labels,
    W,
    b=None,
    *,
    num_classes: int | None = None,
    centres=None,
    min_count: int | None = None,
    chunk_size: int | None = None,
) -> CollapseMetrics:
    r"""Return collapse metrics of a network's last layer on a data set.

    The features are read twice, chunk by chunk; memory beyond the features is bounded by
    the chunk. If the features do not fit into memory, stream them with `ncjax.statistics`.

    Args:
      features: (N, d) floating, the input of the last layer: JAX, NumPy or PyTorch. Half
        precision is computed in float32.
      labels: (N,) integers in [0, K), of every class one at least if `min_count` is None.
      W: (K, d) weight of the last layer; the logits are `features @ W.T + b`.
      b: (K,) bias; None for a layer without bias.
      num_classes: K; if given, W must have K rows.
      centres: (K, d) class centres of NC4. On a test split pass the class means of the
        training split, as the literature does: `statistics.class_means`. A row with
        NaN or infinity is no centre. None takes the class means of the samples themselves.
      min_count: None requires a sample of every class. A number m, at least 1, measures the
        classes with at least m samples. The other classes enter no mean, no singular value
        and no pair, of the classifier neither; their samples are left out. The classifier
        itself still decides among all K classes.
      chunk_size: samples in a chunk, at most N. If None, a chunk takes a few MB on a CPU,
        and up to 256 MB on an accelerator.

    Returns:
      `CollapseMetrics` of scalars. A metric that is undefined (equal class means, W = 0) is
      NaN.

    Raises:
      ValueError: shapes or dtypes do not fit, or (outside jit) labels lie out of range, a
        class has no sample, or a value is NaN or infinite.

    Source: Papyan, Han, Donoho (2020).

    >>> import numpy as np, ncjax
    >>> rng = np.random.default_rng(0)
    >>> labels, means = np.arange(60) % 3, rng.normal(size=(3, 5))
    >>> features = means[labels] + 1e-3 * rng.normal(size=(60, 5))
    >>> metrics = ncjax.collapse_metrics_from_features(features, labels, means)
    >>> bool(metrics.within_class_variation < 1e-4)
    True
    """
    features, labels, W, b = check_features(features, labels, W, b, num_classes, min_count)
    samples, dim = features.shape
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, least=1)
    centres = None if centres is None else check_centres(centres, W.shape)
    # Programs one after another hold fewer arrays (K, d) at once than one program for all.
    measure: Callable[..., CollapseMetrics] = _metrics_in_chunks
    if W.shape[0] > FEW_CLASSES:
        measure = _in_chunks

    def size_on(platform: str) -> int:
        return min(chunk_size or _chunk_size(W.shape[0], dim, platform), samples)

    def in_chunks_of(size: int, *arrays) -> CollapseMetrics:
        return measure(*arrays, size, min_count)

    return sizes.at_size(in_chunks_of, size_on, features, labels, W, b, centres)


def _chunk_size(num_classes: int, dim: int, platform: str) -> int:
    """Return the samples of a chunk on a platform, for features in float32."""
    if num_classes <= FEW_CLASSES:
        numbers = sizes.chunk_bytes(platform, _CHUNK_BYTES) // 4
        # At least as many samples as classes, because each chunk costs a few (K, d).
        return max(num_classes, numbers // (dim + num_classes))
    # A tile of TILE classes is read again for each chunk of samples.
    numbers = sizes.chunk_bytes(platform, 8 * _CHUNK_BYTES) // 4
    by_tile = _LARGE_CHUNK if platform == "cpu" else numbers // TILE
    return max(1, min(by_tile, numbers // dim))


def _in_chunks(features, labels, W, b, centres, chunk_size, min_count):
    scale, W, b = _at_unit_scale(features, W, b)
    samples = features, labels, scale
    first_pass = _first_pass(samples, W, chunk_size)
    centres = None if centres is None else centres / scale
    against = _reference(first_pass, centres, min_count)
    second_pass = _second_pass(samples, W, b, first_pass, against, chunk_size)
    pairs = _pair_metrics(first_pass, W, min_count)
    return _metrics(first_pass, second_pass, W, min_count, pairs)


_metrics_in_chunks = jax.jit(_in_chunks, static_argnums=(5, 6))


@jax.jit
def _at_unit_scale(features, W, b):
    """Return a scale of the features, and W and b for features divided by it.

    No metric depends on the scale of features and b, or of W and b; squares may overflow.
    """
    scale = power_of_two(features).astype(W.dtype)
    return scale, *at_unit_scale((W, None if b is None else b / scale))


@partial(jax.jit, static_argnums=2)
def _first_pass(samples, W, chunk_size) -> ClassStatistics:
    num_classes, dim = W.shape
    empty = statistics.init(num_classes, dim, W.dtype)
    return _fold(statistics.update, empty, samples, chunk_size)


@partial(jax.jit, static_argnums=2)
def _reference(first_pass, centres, min_count) -> Reference:
    return statistics.reference(first_pass, centres=centres, min_count=min_count)


@partial(jax.jit, static_argnums=5)
def _second_pass(samples, W, b, first_pass, against, chunk_size) -> Comparison:
    def compare(state, features, labels, mask):
        return statistics.compare(state, first_pass, against, features, labels, W, b, mask)

    empty = statistics.init_comparison(W.shape[0], W.dtype)
    return _fold(compare, empty, samples, chunk_size)


def _fold(take, state, samples, chunk_size: int):
    """Return `state` after `take` of every chunk of the samples."""
    features, labels, scale = samples
    size = len(features)

    def body(state, chunk):
        # The last chunk starts early enough to fit; repeated samples are masked.
        start = jnp.minimum(chunk * chunk_size, size - chunk_size)
        mask = start + jnp.arange(chunk_size) >= chunk * chunk_size
        rows, targets = (
            jax.lax.dynamic_slice_in_dim(array, start, chunk_size)
            for array in (features, labels)
        )
        return take(state, rows.astype(scale.dtype) / scale, targets, mask), None

    return jax.lax.scan(body, state, jnp.arange(-(-size // chunk_size)))[0]


def metrics_from_statistics(
    first_pass: ClassStatistics,
    second_pass: Comparison,
    W: Array,
    *,
    min_count: int | None = None,
) -> CollapseMetrics:
    """Return collapse metrics from both passes of `ncjax.statistics` and W (K, d).

    The second pass must use `statistics.reference(first_pass)`, with the same `min_count`,
    and must read the same samples, in any order.

    Args:
      first_pass: statistics of all samples.
      second_pass: comparison of all samples.
      W: (K, d) classifier.
      min_count: classes measured, as in `statistics.measured_classes`.

    Raises:
      ValueError: `W` is not (K, d), the second pass read other samples than the first, or
        as in `statistics.measured_classes`. Under jit the metrics of the second pass are
        NaN if it read other samples.
    """
    W, _ = check_classifier(W, None, first_pass.anchor.shape)
    measured = statistics.measured_classes(first_pass, min_count)
    same = statistics.same_samples(first_pass, second_pass, measured)
    known = concrete(same)
    if known is not None and not known:
        raise ValueError(
            "the second pass must read the samples of the first, got class counts "
            f"{np.asarray(second_pass.counts)} after {np.asarray(first_pass.counts)}: read "
            "both in full, without a dropped batch, and with one min_count"
        )
    metrics = _metrics(first_pass, second_pass, W, min_count)
    return metrics._replace(
        **{name: jnp.where(same, getattr(metrics, name), jnp.nan) for name in _SECOND_PASS}
    )


# Fields of `CollapseMetrics` that come from the second pass.
_SECOND_PASS = ("within_class_variation", "ncc_mismatch", "accuracy")


@partial(jax.jit, static_argnums=3)
def _metrics(
    first_pass: ClassStatistics,
    second_pass: Comparison,
    W: Array,
    min_count: int | None,
    pairs: tuple[Array, ...] | None = None,
) -> CollapseMetrics:
    dtype = first_pass.anchor.dtype
    complete = jnp.all(first_pass.counts > 0) | (min_count is not None)
    samples = statistics.total(second_pass.counts, dtype)

    def share(sums):
        return jnp.where(complete, statistics.total(sums, dtype) / samples, jnp.nan)

    return metrics_of_means(first_pass, W, min_count, pairs)._replace(
        within_class_variation=jnp.sum(second_pass.whitened_scatter) / samples,
        ncc_mismatch=share(second_pass.mismatches),
        accuracy=1 - share(second_pass.errors),
    )


def metrics_of_means(
    first_pass: ClassStatistics,
    W: Array,
    min_count: int | None = None,
    pairs: tuple[Array, ...] | None = None,
) -> CollapseMetrics:
    """Return the metrics that the first pass and W (K, d) give; the others are NaN.

    Args:
      first_pass: statistics of all samples.
      W: (K, d) classifier.
      min_count: classes measured, as in `statistics.measured_classes`.
      pairs: `pair_metrics` of the same arguments, if they are known.
    """
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, "class_mean", measured)
    chex.assert_equal_shape([W, means])
    W = W.astype(means.dtype)
    centred_W = measures.centre_rows(W, measured)
    unknown = jnp.full((), jnp.nan, means.dtype)
    if pairs is None:
        pairs = pair_metrics(first_pass, W, min_count)
    return CollapseMetrics(
        within_class_variation=unknown,
        within_class_quotient=within_class_quotient(first_pass, min_count=min_count),
        cdnv=pairs[0],
        mean_norm_variation=measures.norm_variation(means, mask=measured),
        classifier_norm_variation=measures.norm_variation(W, mask=measured),
        centred_classifier_norm_variation=measures.norm_variation(centred_W, mask=measured),
        mean_cosine_deviation=pairs[1],
        classifier_cosine_deviation=pairs[2],
        centred_classifier_cosine_deviation=pairs[3],
        etf_gram_error=measures.etf_gram_error(means, measured),
        self_duality=measures.self_duality(W, means, mask=measured),
        centred_self_duality=measures.self_duality(centred_W, means, mask=measured),
        product_etf_error=measures.product_etf_error(W, means, measured),
        ncc_mismatch=unknown,
        accuracy=unknown,
    )


def pair_metrics(
    first_pass: ClassStatistics,
    W: Array,
    min_count: int | None = None,
    axis_name: str | None = None,
) -> tuple[Array, ...]:
    """Return CDNV and the cosine deviations of means, W and centred W, by one pass.

    All pairs of classes are visited tile by tile. Inside `jax.shard_map` the devices of
    the axis `axis_name` divide the tiles among them.
    """
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, "class_mean", measured)
    W = W.astype(means.dtype)
    variance = statistics.class_variances(first_pass, measured)
    matrices = [
        measures.nonzero_rows(rows, measured)
        for rows in (means, W, measures.centre_rows(W, measured))
    ]
    simplex = measures.simplex_cosine(means, measured)

    def of_tile(left, right, counted):
        (rows, variance), (others, other_variance) = left, right
        distances = measures.tile_squared_distances(rows[0], others[0], counted)
        deviations = [
            jnp.abs(measures.tile_cosines(*pair) - simplex)
            for pair in zip(rows, others, strict=True)
        ]
        return _normalised_variance(variance, other_variance, distances, 1), *deviations

    return mean_over_pairs(of_tile, (matrices, variance), measured, axis_name)


_pair_metrics = jax.jit(pair_metrics, static_argnums=2)


def within_class_quotient(
    first_pass: ClassStatistics,
    centring: str = "class_mean",
    *,
    min_count: int | None = None,
) -> Array:
    r"""$\operatorname{Tr} \Sigma_W / \operatorname{Tr} \Sigma_B$, a scalar.

    Args:
      first_pass: statistics of all samples.
      centring: global mean in $\Sigma_B$, as in `ncjax.statistics.centred_means`.
      min_count: classes measured, as in `ncjax.statistics.measured_classes`.
    """
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, centring, measured)
    samples = statistics.total(first_pass.counts, means.dtype, measured)
    within = jnp.sum(first_pass.scatter, where=measured) / samples
    return within / jnp.mean(jnp.sum(means**2, axis=1), where=measured)


def class_distance_normalised_variance(
    first_pass: ClassStatistics, power: int = 1, *, min_count: int | None = None
) -> Array:
    r"""CDNV, the mean over pairs of $(v_j + v_k) / (2 |\bar h_j - \bar h_k|^{2 p})$.

    Args:
      first_pass: statistics of all samples; $v_k$ is the mean of $|h - \bar h_k|^2$ over
        class k.
      power: p, 1 in the source; other codebases also use 2.
      min_count: classes measured, as in `ncjax.statistics.measured_classes`.

    Source: Galanti, György, Hutter (2022), equation (1).
    """
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, "class_mean", measured)
    variance = statistics.class_variances(first_pass, measured)
    means = measures.nonzero_rows(means, measured)

    def of_tile(left, right, counted):
        distances = measures.tile_squared_distances(left[0], right[0], counted)
        return _normalised_variance(left[1], right[1], distances, power)

    return mean_over_pairs(of_tile, (means, variance), measured)


def _normalised_variance(left: Array, right: Array, distances: Array, power: int) -> Array:
    """Return CDNV (t, u) of pairs from variances (t,), (u,) and squared distances."""
    return (left[:, None] + right[None]) / (2 * distances**power)
