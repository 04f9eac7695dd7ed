"""Collapse metrics NC1 to NC4, by one formula for the layer-peeled model and networks.

NC1, variability collapse: the features of a class approach their class mean. NC2: the
centred class means approach a simplex ETF, K vectors of equal norm and equal pairwise
angles. NC3, self-duality: the classifier approaches the centred class means, up to scale.
NC4: the classifier decides like the nearest class centre (NCC).
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_integer, check_params
from ncjax.metrics import measures, statistics
from ncjax.metrics.inputs import check_classifier, check_features, computing_dtype
from ncjax.metrics.statistics import ClassStatistics, Comparison
from ncjax.numerics import at_unit_scale, power_of_two
from ncjax.types import Array, Params

# Elements of one chunk of features with its distances to the centres: 2 MB of float32.
_CHUNK_ELEMENTS = 2**19


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


def collapse_metrics(params: Params) -> CollapseMetrics:
    r"""Return collapse metrics of the layer-peeled model.

    Row `H[k, i]` is the feature vector of sample i of class k.

    Args:
      params: `W` (K, d) and `H` (K, n, d).

    Returns:
      `CollapseMetrics` of scalars, float32 for half precision. A metric that is undefined
      (equal class means, W = 0) is NaN.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Ji et al. (ICLR 2022), Figure 2; Papyan, Han, Donoho (2020).

    >>> import ncjax
    >>> collapsed = ncjax.block_saddle(1, 4, per_class=2, dim=4)
    >>> bool(ncjax.collapse_metrics(collapsed).self_duality < 1e-6)
    True
    """
    W, H = check_params(params)
    dtype = computing_dtype(W.dtype)
    return _metrics_of_params(Params(W.astype(dtype), H.astype(dtype)))


@jax.jit
def _metrics_of_params(params: Params) -> CollapseMetrics:
    # No metric depends on the scale, whose square may overflow.
    W, H = (at_unit_scale(leaf) for leaf in params)
    num_classes, per_class, dim = H.shape
    anchor = H[:, 0]
    offset = jnp.mean(H - anchor[:, None], axis=1)
    deviation = (H - anchor[:, None]) - offset[:, None]
    first_pass = ClassStatistics(
        counts=jnp.full(num_classes, per_class, jnp.int32),
        anchor=anchor,
        offset=offset,
        scatter=jnp.sum(deviation**2, axis=(1, 2)),
    )
    second_pass = statistics.compare(
        statistics.init_comparison(num_classes, H.dtype),
        first_pass,
        statistics.reference(first_pass),
        H.reshape(-1, dim),
        jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), per_class),
        W,
    )
    return _metrics(first_pass, second_pass, W)


def collapse_metrics_from_features(
    features,
    labels,
    W,
    b=None,
    *,
    num_classes: int | None = None,
    chunk_size: int | None = None,
) -> CollapseMetrics:
    r"""Return collapse metrics of a network's last layer on a data set.

    The features are read twice, chunk by chunk; memory beyond the features is bounded by
    the chunk. If the features do not fit into memory, stream them with `ncjax.statistics`.

    Args:
      features: (N, d) floating, the input of the last layer: JAX, NumPy or PyTorch. Half
        precision is computed in float32.
      labels: (N,) integers in [0, K), every class at least once.
      W: (K, d) weight of the last layer; the logits are `features @ W.T + b`.
      b: (K,) bias; None for a layer without bias.
      num_classes: K; if given, W must have K rows.
      chunk_size: samples in a chunk, at most N. If None, a chunk takes a few MB.

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
    features, labels, W, b = check_features(features, labels, W, b, num_classes)
    samples, dim = features.shape
    if chunk_size is None:
        # At least as many samples as classes, because each chunk costs a few (K, d).
        chunk_size = max(W.shape[0], _CHUNK_ELEMENTS // (dim + W.shape[0]))
    check_integer("chunk_size", chunk_size, least=1)
    return _metrics_in_chunks(features, labels, W, b, min(chunk_size, samples))


@partial(jax.jit, static_argnums=4)
def _metrics_in_chunks(features, labels, W, b, chunk_size):
    samples, dim = features.shape
    num_classes, dtype = W.shape[0], W.dtype
    # No metric depends on the scale of features and b, or of W and b; squares may overflow.
    scale = power_of_two(features).astype(dtype)
    W, b = at_unit_scale((W, None if b is None else b / scale))

    def fold(take, state):
        def body(state, chunk):
            # The last chunk starts early enough to fit; repeated samples are masked.
            start = jnp.minimum(chunk * chunk_size, samples - chunk_size)
            mask = start + jnp.arange(chunk_size) >= chunk * chunk_size
            rows, targets = (
                jax.lax.dynamic_slice_in_dim(array, start, chunk_size)
                for array in (features, labels)
            )
            return take(state, rows.astype(dtype) / scale, targets, mask), None

        return jax.lax.scan(body, state, jnp.arange(-(-samples // chunk_size)))[0]

    first_pass = fold(statistics.update, statistics.init(num_classes, dim, dtype))
    against = statistics.reference(first_pass)

    def compare(state, features, labels, mask):
        return statistics.compare(state, first_pass, against, features, labels, W, b, mask)

    second_pass = fold(compare, statistics.init_comparison(num_classes, dtype))
    return _metrics(first_pass, second_pass, W)


def metrics_from_statistics(
    first_pass: ClassStatistics, second_pass: Comparison, W: Array
) -> CollapseMetrics:
    """Return collapse metrics from both passes of `ncjax.statistics` and W (K, d).

    The second pass must use `statistics.reference(first_pass)`.

    Raises:
      ValueError: `W` is not (K, d).
    """
    W, _ = check_classifier(W, None, first_pass.anchor.shape)
    return _metrics(first_pass, second_pass, W)


@jax.jit
def _metrics(
    first_pass: ClassStatistics, second_pass: Comparison, W: Array
) -> CollapseMetrics:
    means = statistics.centred_means(first_pass)
    chex.assert_equal_shape([W, means])
    W = W.astype(means.dtype)
    centred_W = measures.centre_rows(W)
    samples = jnp.sum(first_pass.counts, dtype=jnp.int32).astype(means.dtype)

    def share(sums):
        total, count = (jnp.sum(x, dtype=jnp.int32) for x in (sums, second_pass.counts))
        return statistics.fraction(total, count, means.dtype)

    return CollapseMetrics(
        within_class_variation=jnp.sum(second_pass.whitened_scatter) / samples,
        within_class_quotient=within_class_quotient(first_pass),
        cdnv=class_distance_normalised_variance(first_pass),
        mean_norm_variation=measures.norm_variation(means),
        classifier_norm_variation=measures.norm_variation(W),
        centred_classifier_norm_variation=measures.norm_variation(centred_W),
        mean_cosine_deviation=measures.cosine_deviation(means),
        classifier_cosine_deviation=measures.cosine_deviation(W),
        centred_classifier_cosine_deviation=measures.cosine_deviation(centred_W),
        etf_gram_error=measures.etf_gram_error(means),
        self_duality=measures.self_duality(W, means),
        centred_self_duality=measures.self_duality(centred_W, means),
        product_etf_error=measures.product_etf_error(W, means),
        ncc_mismatch=share(second_pass.mismatches),
        accuracy=1 - share(second_pass.errors),
    )


def within_class_quotient(
    first_pass: ClassStatistics, centring: str = "class_mean"
) -> Array:
    r"""$\operatorname{Tr} \Sigma_W / \operatorname{Tr} \Sigma_B$, a scalar.

    Args:
      first_pass: statistics of all samples.
      centring: global mean in $\Sigma_B$, as in `ncjax.statistics.centred_means`.
    """
    means = statistics.centred_means(first_pass, centring)
    samples = jnp.sum(first_pass.counts, dtype=jnp.int32).astype(means.dtype)
    return jnp.sum(first_pass.scatter) / samples / jnp.mean(jnp.sum(means**2, axis=1))


def class_distance_normalised_variance(
    first_pass: ClassStatistics, power: int = 1
) -> Array:
    r"""CDNV, the mean over pairs of $(v_j + v_k) / (2 |\bar h_j - \bar h_k|^{2 p})$.

    Args:
      first_pass: statistics of all samples; $v_k$ is the mean of $|h - \bar h_k|^2$ over
        class k.
      power: p, 1 in the source; other codebases also use 2.

    Source: Galanti, György, Hutter (2022), equation (1).
    """
    num_classes = first_pass.counts.shape[0]
    variance = first_pass.scatter / first_pass.counts.astype(first_pass.scatter.dtype)
    distances = statistics.squared_distances(statistics.centred_means(first_pass))
    j, k = np.triu_indices(num_classes, k=1)
    return jnp.mean((variance[j] + variance[k]) / (2 * distances[j, k] ** power))
