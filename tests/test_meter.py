"""`CollapseMeter`: the numbers of both passes, whatever the batches are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subprocesses
from hypothesis import given, settings
from hypothesis import strategies as st

import ncjax
from ncjax.metrics import devices, one_pass

K, D, N = 4, 6, 60
SECOND = ("ncc_mismatch", "accuracy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(seed=0, offset=0.0, spread=0.3, dtype=np.float64):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(N) % K)
    W, b = rng.normal(size=(K, D)), rng.normal(size=K)
    means = W + 0.5 * rng.normal(size=(K, D))
    features = means[labels] + spread * rng.normal(size=(N, D)) + offset
    return features.astype(dtype), labels, W.astype(dtype), b.astype(dtype)


def fill(taker, features, labels, sizes):
    """Pass the samples on in batches of the given sizes."""
    ends = np.cumsum(sizes)
    for x, y in zip(np.split(features, ends), np.split(labels, ends), strict=True):
        taker.update(x, y)
    return taker


def assert_metrics(got, expected, rtol, unknown=()):
    for name, value in got._asdict().items():
        right = np.nan if name in unknown else getattr(expected, name)
        np.testing.assert_allclose(value, right, rtol=rtol, atol=rtol / 10, err_msg=name)


@settings(max_examples=10)
@given(
    st.integers(0, 2**31), st.lists(st.integers(0, 25), max_size=4), st.integers(0, 10**4)
)
def test_every_metric_equals_the_two_pass_value_in_float64(seed, sizes, offset):
    features, labels, W, b = draw(seed, float(offset))
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b)
    meter = fill(ncjax.CollapseMeter(K, D), features, labels, sizes)
    assert_metrics(meter.compute(W, b).metrics, expected, 1e-10, SECOND)
    second = fill(meter.second_pass(W, b), features[::-1], labels[::-1], [10, 30])
    assert_metrics(second.compute().metrics, expected, 1e-10)


def test_float32_keeps_four_digits_far_from_the_origin():
    """Offset 1e4 and within-class spread 1e-3, a few roundings of the features."""
    features, labels, W, b = draw(1, 1e4, 1e-3, np.float32)
    wide = (array.astype(np.float64) for array in (features, W, b))
    x, V, c = wide
    expected = ncjax.collapse_metrics_from_features(x, labels, V, c)
    meter = fill(ncjax.CollapseMeter(K, D), features, labels, [7, 30])
    assert meter.statistics.anchor.dtype == np.float32
    assert_metrics(meter.compute(W, b).metrics, expected, 1e-4, SECOND)


def test_a_report_has_the_sum_of_the_classifier_the_norm_and_the_sizes():
    features, labels, W, b = draw()
    report = ncjax.CollapseMeter(K, D).update(features, labels).compute(W, b)
    total = np.linalg.norm(W.sum(axis=0))
    np.testing.assert_allclose(report.classifier_sum, total, rtol=1e-12)
    relative = total / np.linalg.norm(W, axis=1).sum()
    np.testing.assert_allclose(report.relative_classifier_sum, relative, rtol=1e-12)
    norm = np.linalg.norm(features, axis=1).mean()
    np.testing.assert_allclose(report.mean_feature_norm, norm, rtol=1e-12)
    np.testing.assert_array_equal(report.counts, np.bincount(labels))
    numbers = report.as_dict()
    assert all(type(value) is float for value in numbers.values())
    assert {"samples": 60.0, "classes": 4.0}.items() <= numbers.items()
    assert numbers.keys() >= set(ncjax.CollapseMetrics._fields)
    assert "cdnv" in str(report)


def test_without_a_classifier_its_metrics_are_nan_and_no_others():
    features, labels, W, _ = draw()
    expected = ncjax.collapse_metrics_from_features(features, labels, W)
    report = ncjax.CollapseMeter(K, D).update(features, labels).compute()
    of_classifier = [n for n in expected._fields if "classifier" in n or "duality" in n]
    assert_metrics(
        report.metrics, expected, 1e-10, (*SECOND, *of_classifier, "product_etf_error")
    )
    assert np.isnan(report.classifier_sum)


def test_unknown_metrics_are_no_error_under_debug_nans():
    features, labels, *_ = draw()
    with jax.debug_nans(True):
        report = ncjax.CollapseMeter(K, D).update(features, labels).compute()
    assert np.isnan(report.metrics.self_duality)


def test_meters_of_parts_merge_to_the_meter_of_the_whole():
    features, labels, W, _ = draw()
    known = {"centres": W, "classifier": W}
    whole = ncjax.CollapseMeter(K, D, **known).update(features, labels)
    parts = [
        ncjax.CollapseMeter(K, D, **known).update(features[rows], labels[rows])
        for rows in (slice(20), slice(20, None))
    ]
    merged = ncjax.CollapseMeter(K, D, **known)
    for part in parts:
        merged.merge(part)
    assert_metrics(merged.compute().metrics, whole.compute().metrics, 1e-10)
    # The parts are as they were, and a part that went on is the whole too.
    np.testing.assert_array_equal(parts[0].compute().counts, np.bincount(labels[:20]))
    copied = ncjax.CollapseMeter(K, D, **known).merge(parts[0])
    copied.update(features[20:], labels[20:])
    assert_metrics(copied.compute().metrics, whole.compute().metrics, 1e-10)
    np.testing.assert_array_equal(parts[0].compute().counts, np.bincount(labels[:20]))


@pytest.mark.parametrize("dtype", [np.float16, np.int64])
def test_a_classifier_of_any_dtype_has_the_numbers_of_its_float_copy(dtype):
    features, labels, W, b = draw()
    given_W, given_b = (np.round(1e4 * x).astype(dtype) for x in (W, b))
    meter = ncjax.CollapseMeter(K, D).update(features, labels)
    got, expected = (
        meter.second_pass(*pair).update(features, labels).compute()
        for pair in ((given_W, given_b), (given_W.astype(float), given_b.astype(float)))
    )
    assert got.as_dict() == pytest.approx(expected.as_dict(), rel=1e-5)
    total = np.linalg.norm(given_W.astype(float).sum(axis=0))
    assert meter.compute(given_W).classifier_sum == pytest.approx(total, rel=1e-5)


def test_after_reset_a_meter_is_new():
    features, labels, W, _ = draw()
    meter = ncjax.CollapseMeter(K, D).update(features + 7, labels[::-1])
    meter.reset().update(features, labels)
    expected = ncjax.CollapseMeter(K, D).update(features, labels)
    assert meter.compute(W).as_dict() == pytest.approx(
        expected.compute(W).as_dict(), nan_ok=True
    )


def test_the_arrays_that_a_meter_hands_out_outlive_later_updates():
    features, labels, W, b = draw()
    meter = ncjax.CollapseMeter(K, D).update(features, labels)
    statistics, second = meter.statistics, meter.second_pass(W, b)
    meter.update(features + 1, labels)
    second.update(features, labels)
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b)
    assert_metrics(second.compute().metrics, expected, 1e-10)
    np.testing.assert_array_equal(statistics.counts, np.bincount(labels))


def test_ignored_and_masked_samples_count_nowhere():
    features, labels, W, b = draw()
    ignored, masked = np.arange(N) % 7 == 0, np.arange(N) % 5 == 1
    given_labels = np.where(ignored, -100, labels)
    spoiled = np.where((ignored | masked)[:, None], np.nan, features)
    meter = ncjax.CollapseMeter(K, D).update(spoiled, given_labels, ~masked)
    kept = ~(ignored | masked)
    expected = ncjax.collapse_metrics_from_features(features[kept], labels[kept], W, b)
    assert_metrics(meter.compute(W, b).metrics, expected, 1e-10, SECOND)
    assert meter.compute().samples == kept.sum()


def test_equal_class_means_leave_nc1_undefined_and_not_zero():
    rows = np.random.default_rng(0).integers(-9, 9, (K, D)) + 0.5  # means without rounding
    features, labels = np.concatenate([rows, -rows]), np.arange(2 * K) % K
    report = ncjax.CollapseMeter(K, D).update(features, labels).compute(rows)
    whole = ncjax.collapse_metrics_from_features(features, labels, rows)
    layer = ncjax.layerwise({"layer": features}, labels).metrics
    for metrics in (report.metrics, whole, layer):
        assert np.isnan(metrics.within_class_variation)
    assert np.isnan(layer.fuzziness)
    assert np.isfinite(layer.ncc_accuracy)


def test_empty_batches_change_nothing():
    features, labels, *_ = draw()
    meter = fill(ncjax.CollapseMeter(K, D), features, labels, [0, 30, 30])
    assert meter.compute().samples == N
    assert meter._batches._sizes == [30]


def test_sequences_are_flattened():
    features, labels, W, _ = draw()
    flat = ncjax.CollapseMeter(K, D).update(features, labels).compute(W)
    sequences = features.reshape(5, 12, D), labels.reshape(5, 12)
    folded = ncjax.CollapseMeter(K, D).update(*sequences, np.ones((5, 12), bool))
    assert_metrics(folded.compute(W).metrics, flat.metrics, 1e-12)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, jnp.asarray, list])
def test_labels_of_any_kind_and_arrays_of_any_library_are_read(kind):
    features, labels, W, _ = draw()
    labels = labels.astype(kind) if isinstance(kind, type(np.uint8)) else labels
    given_labels = list(labels) if kind is list else labels
    if kind is jnp.asarray:
        features, given_labels = jnp.asarray(features), jnp.asarray(labels)
    report = ncjax.CollapseMeter(K, D).update(features, given_labels).compute(W)
    assert report.samples == N


def test_batches_of_all_sizes_share_two_programs():
    features, labels, *_ = draw()
    before = devices._update_in_place._cache_size()
    meter = ncjax.CollapseMeter(K, D + 1)
    wide = np.pad(features, ((0, 0), (0, 1)))
    for size in (16, 16, 5, 11, 3, 2, 7):
        meter.update(wide[:size], labels[:size])
    assert devices._update_in_place._cache_size() - before == 1
    assert meter._state.first.counts.sum() == 60


def test_centres_known_beforehand_give_nc4_in_one_pass():
    features, labels, W, b = draw()
    train = ncjax.CollapseMeter(K, D).update(*draw(5)[:2])
    centres = train.class_means
    meter = ncjax.CollapseMeter(K, D, centres=centres, classifier=(W, b))
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b, centres=centres)
    assert 0 < expected.ncc_mismatch < 1
    assert_metrics(
        fill(meter, features, labels, [20, 5]).compute().metrics, expected, 1e-10
    )
    second = ncjax.CollapseMeter(K, D).update(features, labels)
    second = second.second_pass(W, b, centres=centres).update(features, labels)
    assert_metrics(second.compute().metrics, expected, 1e-10)


def test_a_filter_by_count_is_exact_or_unknown_after_one_pass():
    features, labels, W, b = draw()
    kept = (labels != 2) | (np.cumsum(labels == 2) <= 2)
    features, labels = features[kept], labels[kept]
    meter = ncjax.CollapseMeter(K, D, min_count=3).update(features, labels)
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b, min_count=3)
    unknown = (*SECOND, "within_class_variation")
    assert_metrics(meter.compute(W, b).metrics, expected, 1e-10, unknown)
    second = meter.second_pass(W, b).update(features, labels)
    assert_metrics(second.compute().metrics, expected, 1e-10)
    single = (labels != 2) | (np.cumsum(labels == 2) <= 1)
    features, labels = features[single], labels[single]
    meter = ncjax.CollapseMeter(K, D).update(features, labels)
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b, min_count=2)
    assert_metrics(meter.compute(W, b, min_count=2).metrics, expected, 1e-10, SECOND)


def test_without_the_scatter_one_pass_lacks_one_metric():
    features, labels, W, b = draw()
    meter = ncjax.CollapseMeter(K, D, within_scatter=False).update(features, labels)
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b)
    unknown = (*SECOND, "within_class_variation")
    assert_metrics(meter.compute(W, b).metrics, expected, 1e-10, unknown)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m, x, y: m.compute(), "expected samples before compute: call update first"),
        (
            lambda m, x, y: m.update(x, y + 2),
            r"labels must lie in \[0, 4\), or -100 for no",
        ),
        (
            lambda m, x, y: m.update(x[:, :3], y),
            r"expected features \(B, 6\), got \(60, 3\)",
        ),
        (lambda m, x, y: m.update(x[0], y[0]), r"expected features \(B, 6\), got \(6,\)"),
        (
            lambda m, x, y: m.update(x, y[:-1]),
            r"labels of integers \(60,\), got int64 \(59,\): pass one label for each row",
        ),
        (lambda m, x, y: jax.jit(m.update)(x, y), "call update outside jax.jit"),
        (lambda m, x, y: m.update(x, y / 2), r"integers \(60,\), got float64 \(60,\)"),
        (
            lambda m, x, y: m.update(x, y, np.ones(1, bool)),
            r"mask of booleans \(60,\), got bool \(1,\)",
        ),
        (
            lambda m, x, y: m.update(
                x.reshape(5, 12, D), y.reshape(5, 12), np.ones((12, 5), bool)
            ),
            r"mask of booleans \(60,\), got bool \(12, 5\)",
        ),
        (lambda m, x, y: m.update(1e-170 * x, y).compute(), "got .*e-170: multiply"),
        (
            lambda m, x, y: m.update(1e170 * x, y).compute(),
            r"got .*e\+170: multiply",
        ),
        (lambda m, x, y: m.update(x, y).compute(x[:4] * np.nan), "W must be finite"),
        (
            lambda m, x, y: m.update(x, y).second_pass(x[:4], x[0, :4] * np.inf),
            "b must be finit",
        ),
        (lambda m, x, y: m.update(x * np.nan, y).compute(), "features must be finite"),
        (lambda m, x, y: m.update(x, y).compute(x), r"expected W \(4, 6\), got \(60, 6\)"),
        (lambda m, x, y: m.update(x, y * 0).compute(), "every class needs a sample"),
        (lambda m, x, y: m.update(x, jnp.asarray(y + 2)).compute(), "got 30 that do not"),
        (lambda m, x, y: m.merge(x), "a meter of the same sizes and settings, got a ndarr"),
        (lambda m, x, y: m.merge(ncjax.CollapseMeter(5, D)), r"num_classes=5, dim=6\) for"),
        (
            lambda m, x, y: (
                m.update(x, y).second_pass(x[:4]).update(x[1:], y[1:]).compute()
            ),
            "the second pass must read the samples of the first",
        ),
        (
            lambda m, x, y: ncjax.CollapseMeter(K, D, centres=x[:4]),
            "both centres and class",
        ),
        (
            lambda m, x, y: ncjax.CollapseMeter(
                K, D, centres=x[:4], classifier=x[:4]
            ).merge(ncjax.CollapseMeter(K, D, centres=x[:4], classifier=x[4:8])),
            "expected a meter with the same centres and classifier",
        ),
        (lambda m, x, y: ncjax.CollapseMeter(1, D), "num_classes must be an integer of at"),
        (
            lambda m, x, y: ncjax.CollapseMeter(K, D, ignore_index="0"),
            "ignore_index must be",
        ),
        (lambda m, x, y: ncjax.CollapseMeter(K, D, dtype="float16"), "float32 or float64"),
    ],
)
def test_bad_input_is_refused_with_advice(action, message):
    features, labels, *_ = draw()
    with pytest.raises(ValueError, match=message):
        action(ncjax.CollapseMeter(K, D), features, labels)


def test_pure_functions_of_one_pass_merge_over_devices():
    """`all_merge` over a mapped axis is `merge`."""
    features, labels, *_ = draw(2, 100.0)
    halves = features.reshape(2, 30, D), labels.reshape(2, 30)

    def of_half(features, labels):
        empty = one_pass.init(K, D, features.dtype)
        return one_pass.update(empty, features, labels)

    parts = jax.jit(jax.vmap(of_half))(*halves)
    one, other = (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2))
    merged = one_pass.merge(one, other)
    collected = jax.vmap(
        lambda part: one_pass.all_merge(part, "halves"), axis_name="halves"
    )(parts)
    for name in ("within", "norm", "outside"):
        got, expected = getattr(collected, name)[1], getattr(merged, name)
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=name)
    deviation = (
        features - np.stack([features[labels == k].mean(0) for k in range(K)])[labels]
    )
    np.testing.assert_allclose(merged.within, deviation.T @ deviation, rtol=1e-9)


def test_a_mesh_of_devices_gives_the_numbers_of_one():
    subprocesses.output(subprocesses.command("sharded_meter", strict=True))


def test_tensors_of_pytorch_are_read():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    features, labels, W, b = draw()
    expected = ncjax.collapse_metrics_from_features(features, labels, W, b)
    tensors = [torch.tensor(array) for array in (features, labels, W, b)]
    meter = ncjax.CollapseMeter(K, D).update(tensors[0].requires_grad_(), tensors[1])
    assert_metrics(meter.compute(*tensors[2:]).metrics, expected, 1e-10, SECOND)
