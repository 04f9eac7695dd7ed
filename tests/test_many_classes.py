"""Thousands of classes: tiles give the numbers of whole arrays, and no array is (K, K)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

import ncjax
from ncjax import measures, statistics
from ncjax.metrics import tiles

K, D, N = 2060, 8, 3000
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def zipf():
    """Features of classes of very different sizes; some have one sample or none."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1.0, K + 1)
    labels = rng.permutation(K)[rng.choice(K, N, p=shares / shares.sum())]
    means = rng.normal(size=(K, D)) + 3
    features = means[labels] + 0.3 * rng.normal(size=(N, D))
    W = means + rng.normal(size=(K, D))
    return features, labels.astype(np.int32), W, rng.normal(size=K)


def norm_variation(rows):
    norms = np.linalg.norm(rows, axis=1)
    return norms.std(ddof=1) / norms.mean()


def cosine_deviation(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    return np.abs(cosines + 1 / (len(unit) - 1)).mean()


def etf_error(rows, others):
    product, size = rows @ others.T, len(rows)
    etf = (np.eye(size) - 1 / size) / np.sqrt(size - 1)
    return np.linalg.norm(product / np.linalg.norm(product) - etf)


def duality(rows, others):
    return np.linalg.norm(rows / np.linalg.norm(rows) - others / np.linalg.norm(others))


def whole_arrays(features, labels, W, b, min_count):
    """The metrics in NumPy, with arrays (K, K) and (N, K)."""
    counts = np.bincount(labels, minlength=len(W))
    classes = np.flatnonzero(counts >= min_count)
    chosen = np.isin(labels, classes)
    x, y = features[chosen], np.searchsorted(classes, labels[chosen])
    count = counts[classes]
    means = np.zeros((len(classes), x.shape[1]))
    np.add.at(means, y, x)
    means /= count[:, None]
    deviation, M, V = x - means[y], means - means.mean(axis=0), W[classes]
    within, centred_V = deviation.T @ deviation / len(x), V - V.mean(axis=0)
    variance = np.bincount(y, (deviation**2).sum(axis=1)) / count
    j, k = np.triu_indices(len(M), 1)
    distances = pdist(M, "sqeuclidean")
    nearest = cdist(x, means).argmin(axis=1)
    decided = (x @ W.T + b).argmax(axis=1)
    inverse = np.linalg.pinv(M.T @ M / len(M))
    return {
        "within_class_variation": np.trace(within @ inverse) / len(M),
        "within_class_quotient": np.trace(within) / (M**2).sum(axis=1).mean(),
        "cdnv": ((variance[j] + variance[k]) / (2 * distances)).mean(),
        "mean_norm_variation": norm_variation(M),
        "classifier_norm_variation": norm_variation(V),
        "centred_classifier_norm_variation": norm_variation(centred_V),
        "mean_cosine_deviation": cosine_deviation(M),
        "classifier_cosine_deviation": cosine_deviation(V),
        "centred_classifier_cosine_deviation": cosine_deviation(centred_V),
        "etf_gram_error": etf_error(M, M),
        "self_duality": duality(V, M),
        "centred_self_duality": duality(centred_V, M),
        "product_etf_error": etf_error(V, M),
        "ncc_mismatch": np.mean(decided != classes[nearest]),
        "accuracy": np.mean(decided == labels[chosen]),
    }


@pytest.mark.parametrize("min_count", [1, 2])
def test_metrics_under_zipf_labels_are_the_metrics_of_whole_arrays(zipf, min_count):
    expected = whole_arrays(*zipf, min_count)
    got = ncjax.collapse_metrics_from_features(*zipf, min_count=min_count)
    assert np.bincount(zipf[1], minlength=K).min() == 0
    for name, value in got._asdict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-10, err_msg=name)


def test_a_meter_gives_them_in_batches_of_bfloat16(zipf):
    features, labels, W, b = zipf
    half = jnp.asarray(features, jnp.bfloat16)
    expected = whole_arrays(np.asarray(half, np.float64), labels, W, b, 1)
    meter = ncjax.CollapseMeter(K, D, min_count=1)
    for start in range(0, N, 2000):
        meter.update(half[start : start + 2000], labels[start : start + 2000])
    second = meter.second_pass(W, b).update(half, labels)
    for report in (meter.compute(W, b), second.compute()):
        for name, value in report.metrics._asdict().items():
            if report is second or not np.isnan(value):
                np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("dim", [D, K])
def test_etf_errors_agree_with_whole_arrays(dim):
    """With a rank below K - 1, and with a simplex within reach."""
    rng = np.random.default_rng(1)
    rows = np.eye(K, dim) + 0.01 * rng.normal(size=(K, dim))
    others = np.eye(K, dim) + 0.01 * rng.normal(size=(K, dim))
    mask = jnp.arange(K) != 7
    kept = np.delete(rows, 7, axis=0), np.delete(others, 7, axis=0)
    got = measures.product_etf_error(rows, others, mask)
    np.testing.assert_allclose(got, etf_error(*kept), rtol=1e-9)


def test_the_distance_of_a_close_pair_keeps_its_digits_in_float32():
    """Two class means 1e-3 apart decide the mean over all pairs."""
    rng = np.random.default_rng(2)
    means = rng.normal(size=(K, D)).astype(np.float32)
    means[1700] = means[30] + np.float32(1e-3) * means[31]
    labels = np.repeat(np.arange(K), 2)
    spread = np.tile([1e-3, -1e-3], K)[:, None].astype(np.float32)
    features = means[labels] + spread
    first = statistics.class_statistics(features, labels, K)
    got = ncjax.metrics.class_distance_normalised_variance(first)
    exact = features.astype(np.float64).reshape(K, 2, D)
    centres, variance = exact.mean(axis=1), exact.var(axis=1).sum(axis=1)
    j, k = np.triu_indices(K, 1)
    distances = pdist(centres, "sqeuclidean")
    values = (variance[j] + variance[k]) / (2 * distances)
    assert values.max() > 0.4 * values.sum()
    np.testing.assert_allclose(got, values.mean(), rtol=1e-4)


def test_a_row_of_zeros_has_its_distances_to_the_others():
    rows = np.random.default_rng(0).normal(size=(200, 128))
    rows[3] = 0
    pairs = np.triu_indices(200, 1)  # none is close
    counted = np.zeros((200, 200), bool)
    counted[pairs] = True
    tile = jnp.asarray(rows)
    got = jax.jit(measures.tile_squared_distances)(tile, tile, counted)
    assert rows.shape[0] * rows.size > tiles.FEW_DIFFERENCES
    np.testing.assert_allclose(got[pairs], pdist(rows) ** 2, rtol=1e-12)


def test_the_nearest_of_close_centres_is_found_in_tiles():
    """At collapse each sample is next to its own mean, even if another mean is close."""
    rng = np.random.default_rng(3)
    means = (rng.normal(size=(K, D)) + 100).astype(np.float32)
    means[1::2] = means[::2] + np.float32(1e-4)
    labels = np.repeat(np.arange(K), 2)
    metrics = ncjax.collapse_metrics_from_features(means[labels], labels, means)
    assert metrics.ncc_mismatch == 1 - metrics.accuracy


def test_centres_that_are_missing_are_never_the_nearest(zipf):
    features, labels, W, b = zipf
    centres = np.array(W)
    centres[::3] = np.nan
    known = np.flatnonzero(np.isfinite(centres[:, 0]))
    nearest = known[cdist(features, centres[known]).argmin(axis=1)]
    decided = (features @ W.T + b).argmax(axis=1)
    metrics = ncjax.collapse_metrics_from_features(*zipf, centres=centres, min_count=1)
    np.testing.assert_allclose(metrics.ncc_mismatch, np.mean(decided != nearest))
    meter = ncjax.CollapseMeter(K, D, min_count=1, centres=centres, classifier=(W, b))
    report = meter.update(features, labels).compute()
    np.testing.assert_allclose(report.metrics.ncc_mismatch, metrics.ncc_mismatch)
    np.testing.assert_allclose(report.metrics.accuracy, metrics.accuracy)


def largest_array(jaxpr):
    """Return the number of entries of the largest array of a program."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes)


def test_no_array_grows_with_the_square_of_the_classes():
    size = 50_000

    def measure(features, labels, W):
        return ncjax.collapse_metrics_from_features(features, labels, W, min_count=1)

    arrays = (
        jax.ShapeDtypeStruct((20_000, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((20_000,), jnp.int32),
        jax.ShapeDtypeStruct((size, 64), jnp.bfloat16),
    )
    largest = largest_array(jax.make_jaxpr(measure)(*arrays).jaxpr)
    assert largest <= tiles._MOST_PRODUCTS


def test_the_largest_product_is_the_first_of_equal_ones():
    rng = np.random.default_rng(4)
    samples, rows = rng.normal(size=(30, 3)), rng.integers(-2, 3, size=(3000, 3)) * 1.0
    offset, mask = rng.integers(0, 2, 3000) * 1.0, rng.uniform(size=3000) < 0.5
    values = np.where(mask[None], samples @ rows.T + offset[None], -np.inf)
    got = jax.jit(tiles.largest_product)(samples, rows, offset, mask)
    best = values.max(axis=1)
    np.testing.assert_allclose(values[np.arange(30), got], best, rtol=1e-12)
    whole = tiles.largest_product(jnp.round(samples), rows, offset)
    np.testing.assert_array_equal(
        whole, (np.round(samples) @ rows.T + offset[None]).argmax(axis=1)
    )


def test_counts_go_beyond_the_signed_integers():
    """With three thousand million samples of a class the shares are right."""
    million = 1_000_000
    counts = np.array([3000 * million, 1000 * million, 5], np.uint32)
    with jax.enable_x64(False):
        means = jnp.asarray(np.eye(3), jnp.float32)
        half = statistics.ClassStatistics(
            jnp.asarray(counts // 2), means, jnp.zeros_like(means), jnp.ones(3, jnp.float32)
        )
        both = statistics.merge(half, half)
        np.testing.assert_array_equal(both.counts, counts // 2 * 2)
        mean = statistics.global_mean(both, "sample_mean")
        np.testing.assert_allclose(mean, [0.75, 0.25, 1e-9], atol=1e-8)
        quotient = ncjax.metrics.within_class_quotient(both)
        np.testing.assert_allclose(quotient, 6 / 4e9 / (2 / 3), rtol=1e-6)
