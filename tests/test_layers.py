"""Metrics of every layer against NumPy loops in float64, and over depth in exact limits."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import ncjax
from ncjax import depth, layers

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N = 3, 17
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 1, 0, 2, 1, 2, 2])


def samples(seed=0, dim=5):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(K, dim))
    return centres[LABELS] + rng.normal(size=(N, dim))


def fuzziness(features, labels):
    """D of He and Su (2023), by their sums over samples."""
    mean = features.mean(axis=0)
    dim = features.shape[1]
    between, within = np.zeros((dim, dim)), np.zeros((dim, dim))
    for k in np.unique(labels):
        of_class = features[labels == k]
        centre = of_class.mean(axis=0)
        between += len(of_class) * np.outer(centre - mean, centre - mean) / len(features)
        for row in of_class:
            within += np.outer(row - centre, row - centre) / len(features)
    return np.trace(within @ oracles.pseudo_inverse(between))


def ranks(features, threshold=1e-3):
    covariance = np.cov(features.T, bias=True)
    eigenvalues = np.linalg.eigvalsh(covariance)[::-1].clip(0)
    # Not the roots of the eigenvalues, which have half the digits.
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return {
        "numerical_rank": int((eigenvalues > threshold * eigenvalues[0]).sum()),
        "stable_rank": eigenvalues.sum() / eigenvalues[0],
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
    }


def expected(features, labels):
    means = oracles.centred_means(features, labels)
    nearest = oracles.nearest_centres(features, labels)
    return {
        "dim": features.shape[1],
        "within_class_variation": oracles.within_class_variation(features, labels),
        "within_class_quotient": oracles.within_class_quotient(features, labels),
        "cdnv": oracles.cdnv(features, labels),
        "fuzziness": fuzziness(features, labels),
        "mean_norm_variation": oracles.norm_variation(means),
        "mean_cosine_deviation": oracles.cosine_deviation(means),
        "ncc_accuracy": np.mean(nearest == labels),
    } | ranks(features)


def assert_metrics(metrics, layer, right, rtol=1e-9):
    for name, value in right.items():
        np.testing.assert_allclose(
            getattr(metrics, name)[layer], value, rtol=rtol, err_msg=name
        )


@pytest.fixture(scope="module")
def report():
    images = samples(2, 30).reshape(N, 2, 3, 5)
    features = {"input": images, "wide": samples(0, 30), "last": samples(1)}
    return features, ncjax.layerwise(features, LABELS)


def test_every_metric_of_every_layer_equals_its_loops(report):
    features, found = report
    assert found.names == ("input", "wide", "last")
    for layer, rows in enumerate(features.values()):
        assert_metrics(found.metrics, layer, expected(rows.reshape(N, -1), LABELS))


def test_a_layer_without_a_classifier_has_no_accuracy(report):
    metrics = report[1].metrics
    assert np.isnan(metrics.accuracy).all()
    assert np.isnan(metrics.ncc_mismatch).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_classifier_decides_on_its_layer(bias):
    rows, rng = samples(3), np.random.default_rng(4)
    W, b = rng.normal(size=(K, 5)), rng.normal(size=K) if bias else np.zeros(K)
    data = oracles.Data(rows, LABELS, W, b)
    given = {"last": (W, b) if bias else W}
    found = ncjax.layerwise({"first": rows, "last": rows}, LABELS, classifiers=given)
    right = {name: getattr(oracles, name)(data) for name in ("accuracy", "ncc_mismatch")}
    assert_metrics(found.metrics, 1, right)
    assert np.isnan(found.metrics.accuracy[0])


def test_the_nearest_centre_is_among_the_centres_given():
    """A test split is compared with the class means of the training split."""
    train = ncjax.layerwise({"a": samples(5), "b": samples(6)}, LABELS)
    labels = LABELS[::-1].copy()
    features = {"a": samples(7), "b": samples(8)}
    found = ncjax.layerwise(features, labels, centres=train.class_means)
    for layer, name in enumerate(features):
        rows, centres = features[name], oracles.class_means(samples(5 + layer), LABELS)
        np.testing.assert_allclose(train.class_means[name], centres)
        distances = [[np.sum((row - c) ** 2) for c in centres] for row in rows]
        share = np.mean(np.argmin(distances, axis=1) == labels)
        assert float(found.metrics.ncc_accuracy[layer]) == pytest.approx(share)
        right = expected(rows, labels)
        del right["ncc_accuracy"]
        assert_metrics(found.metrics, layer, right)


def test_classes_below_the_least_count_are_left_out():
    rows, labels = samples(9), LABELS.copy()
    labels[labels == 0] = [0, 3, 3, 3]  # one sample of class 0
    found = ncjax.layerwise({"only": rows}, labels, num_classes=5, min_count=2)
    kept = labels != 0
    right = expected(rows[kept], labels[kept] - 1) | ranks(rows)
    assert_metrics(found.metrics, 0, right)


def test_nothing_depends_on_scale_and_little_on_an_offset_in_float32():
    rows = samples(10).astype(np.float32)
    small = (1e-25 * rows.astype(np.float64)).astype(np.float32)
    far = (rows.astype(np.float64) + 1e4).astype(np.float32)
    found = ncjax.layerwise({"plain": rows, "small": small, "far": far}, LABELS)
    assert found.metrics.cdnv.dtype == jnp.float32
    assert_metrics(found.metrics, 0, expected(rows.astype(np.float64), LABELS), 1e-4)
    assert_metrics(found.metrics, 1, expected(rows.astype(np.float64), LABELS), 1e-4)
    assert_metrics(found.metrics, 2, expected(far.astype(np.float64), LABELS), 1e-4)


def test_layers_of_several_dtypes_share_one_table():
    rows = samples(11)
    half = jnp.asarray(rows, jnp.bfloat16)
    found = ncjax.layerwise({"half": half, "double": rows}, LABELS)
    assert found.metrics.cdnv.dtype == jnp.float64
    assert_metrics(found.metrics, 0, expected(np.asarray(half, np.float64), LABELS), 1e-4)
    assert_metrics(found.metrics, 1, expected(rows, LABELS))


@pytest.mark.parametrize(
    ("pooling", "axes"),
    [("channels_last", (1, 2)), ("channels_first", (2, 3)), ("flatten", ())],
)
def test_pooling_averages_over_positions(pooling, axes):
    images = np.random.default_rng(0).normal(size=(4, 2, 3, 5))
    right = images.mean(axis=axes) if axes else images.reshape(4, -1)
    np.testing.assert_allclose(layers.pool(images, pooling), right)
    half = layers.pool(jnp.asarray(images, jnp.bfloat16), pooling)
    assert half.shape == right.shape
    rows = images[:, 0, 0]
    assert layers.pool(rows, pooling) is rows


# Over depth


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.25])
def test_features_that_separate_at_a_constant_rate_lie_on_the_line(ratio):
    r"""$h = \mu_y + \rho^{l/2} \epsilon$ has $D_l = \rho^l D_0$ exactly."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(N, 5))
    means = oracles.class_means(noise, LABELS)
    noise, centres = noise - means[LABELS], rng.normal(size=(K, 5))
    features = {
        f"layer{depth}": centres[LABELS] + ratio ** (depth / 2) * noise
        for depth in range(5)
    }
    law = ncjax.layerwise(features, LABELS).law
    start = np.log(fuzziness(features["layer0"], LABELS))
    np.testing.assert_allclose(law, (np.log(ratio), start, ratio, 1), rtol=1e-9)


def test_the_law_is_the_least_squares_line():
    values = np.exp(np.random.default_rng(1).normal(size=7))
    depths = np.array([0.0, 1, 2, 4, 5, 8, 9])
    law = depth.separation_law(values, depths)
    right = np.polyfit(depths, np.log(values), 1)
    np.testing.assert_allclose((law.slope, law.intercept), right)
    correlation = np.corrcoef(depths, np.log(values))[0, 1]
    np.testing.assert_allclose(law.r_squared, correlation**2)


def test_a_layer_without_a_finite_positive_fuzziness_is_left_out():
    kept = depth.separation_law(np.array([8.0, 0, 2, np.inf, np.nan, 0.25]))
    np.testing.assert_allclose(kept, (np.log(0.5), np.log(8), 0.5, 1), rtol=1e-12)
    assert np.isnan(depth.separation_law(np.array([0.0, 3.0]))).all()


@pytest.mark.parametrize(
    ("accuracies", "start"),
    [
        ([0.2, 0.5, 0.96, 0.99, 1.0], 2),
        ([0.2, 0.97, 0.5, 0.99, 1.0], 3),  # a layer below ends the tunnel
        ([0.2, 0.5, 0.6, 0.7, 0.8], 4),
        ([0.3, 0.3, 0.3, 0.3, 0.3], 0),
    ],
)
def test_the_tunnel_starts_where_the_accuracy_stays_near_the_last(accuracies, start):
    ranks = np.array([3, 40, 20, 10, 5])
    tunnel = depth.find_tunnel(np.array(accuracies), ranks)
    assert tuple(map(int, tunnel[:2])) == (start, 5 - start)
    assert float(tunnel.rank_ratio) == pytest.approx(5 / ranks[start])


def test_no_tunnel_is_found_without_a_last_accuracy():
    tunnel = depth.find_tunnel(np.array([0.5, np.nan]), np.array([3, 2]))
    assert tuple(map(int, tunnel[:2])) == (2, 0)
    assert np.isnan(tunnel.rank_ratio)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_equal_singular_values_give_the_full_rank_thrice(shape):
    """The rows of a centred orthogonal frame; at most N - 1 of them are independent."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(shape[0], min(shape[0] - 1, shape[1])))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], left.shape[1])))[0]
    found = depth.feature_rank(left @ right.T + 3)
    np.testing.assert_allclose(found, [left.shape[1]] * 3, rtol=1e-9)


def test_equal_samples_have_no_rank():
    found = depth.feature_rank(np.full((4, 3), 7.0))
    assert int(found.numerical_rank) == 0
    assert np.isnan(found[1:]).all()


def test_the_threshold_is_a_share_of_the_largest_eigenvalue():
    scales = np.array([1.0, 0.5, 0.1])
    rows = np.concatenate([np.diag(scales), -np.diag(scales)])
    for threshold, rank in ((0.3, 1), (0.24, 2), (0.011, 2), (0.009, 3)):
        assert int(depth.feature_rank(rows, threshold=threshold).numerical_rank) == rank


def test_layers_measured_one_by_one_join_to_the_same_report(report):
    features, found = report
    parts = [layers.layer_metrics(rows, LABELS, K) for rows in features.values()]
    metrics, means = zip(*parts, strict=True)
    names = tuple(features)
    joined = layers.over_depth(names, metrics, dict(zip(names, means, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, joined[1:], found[1:])


def test_tables_hold_plain_numbers(report):
    rows, flat = report[1].rows(), report[1].as_dict()
    assert [row["layer"] for row in rows] == ["input", "wide", "last"]
    assert {type(v) for row in rows for k, v in row.items() if k != "layer"} == {float, int}
    assert flat["wide/cdnv"] == rows[1]["cdnv"]
    assert flat["law/r_squared"] == float(report[1].law.r_squared)
    assert {type(value) for value in flat.values()} == {float}
    assert len(flat) == 3 * len(layers.LayerMetrics._fields) + 7


def test_a_wide_layer_forms_no_square_matrix():
    """d = 65536: a (d, d) matrix would take 17 GB, and this test a second."""
    rows = np.zeros((6, 2**16), np.float32)
    rows[:, :8] = np.random.default_rng(0).normal(size=(6, 8))
    labels = np.array([0, 1, 0, 1, 2, 2])
    found = ncjax.layerwise({"wide": rows}, labels)
    narrow = expected(rows[:, :8].astype(np.float64), labels)
    assert_metrics(found.metrics, 0, narrow | {"dim": 2**16}, 1e-4)


# Inputs

ROWS = samples(12)
BAD = {
    "no layer": (lambda: ncjax.layerwise({}, LABELS), "at least one layer, got dict"),
    "a list": (lambda: ncjax.layerwise([ROWS], LABELS), "must be a dict .* got list"),
    "labels of another length": (
        lambda: ncjax.layerwise({"a": ROWS, "b": ROWS[1:]}, LABELS),
        r"layer 'b': expected labels of integers \(16,\)",
    ),
    "integers": (
        lambda: ncjax.layerwise({"a": LABELS[:, None]}, LABELS),
        "layer 'a': features must be floating, got int64: cast it",
    ),
    "not finite": (
        lambda: ncjax.layerwise({"a": np.where(ROWS > 0, ROWS, np.nan)}, LABELS),
        "layer 'a': features must be finite",
    ),
    "one axis": (
        lambda: ncjax.layerwise({"a": ROWS[:, 0]}, LABELS),
        r"layer 'a': expected features \(N, d\) or \(N, ...\), got \(17,\)",
    ),
    "an unknown layer": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, classifiers={"b": np.ones((K, 5))}),
        "classifiers names layer 'b', which features_by_layer lacks; it has 'a'",
    ),
    "a missing layer": (
        lambda: ncjax.layerwise(
            {"a": ROWS, "b": ROWS}, LABELS, centres={"a": np.ones((K, 5))}
        ),
        "centres lacks layer 'b'",
    ),
    "centres alone": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, centres=np.ones((K, 5))),
        "centres must be a dict by the name of the layer, got ndarray",
    ),
    "a transposed classifier": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, classifiers={"a": np.ones((5, K))}),
        r"layer 'a': expected W \(3, 5\), got \(5, 3\): transpose W",
    ),
    "an unknown pooling": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, pooling="mean"),
        "layer 'a': pooling must be one of flatten, channels_last, channels_first",
    ),
    "a threshold of zero": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, rank_threshold=0.0),
        "layer 'a': threshold must be positive",
    ),
    "a share above 1": (
        lambda: ncjax.layerwise({"a": ROWS}, LABELS, tunnel_share=1.5),
        r"share must lie in \(0, 1\], got 1.5",
    ),
    "traced labels": (
        lambda: jax.jit(lambda y: ncjax.layerwise({"a": ROWS}, y).law)(LABELS),
        "give num_classes",
    ),
    "depths of another length": (
        lambda: depth.separation_law(np.ones(3), np.ones(2)),
        r"expected depths \(3,\), got \(2,\)",
    ),
    "a missing name": (
        lambda: layers.over_depth(["a"], []),
        "got 1 names and 0 layers",
    ),
    "a matrix of ranks": (
        lambda: depth.find_tunnel(np.ones(3), np.ones((3, 1))),
        r"expected ranks \(3,\), got \(3, 1\)",
    ),
    "ranks of integers": (
        lambda: depth.feature_rank(LABELS[:, None]),
        r"expected floating features \(N, d\), got int64 \(17, 1\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
