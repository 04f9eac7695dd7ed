"""Classes without samples, second passes over other samples, and centres of a training set.

The oracle is the problem without the classes that are left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ncjax
from ncjax import measures, statistics, variants
from ncjax.metrics import collapse

K, D = 5, 4


def draw(seed, labels, offset=0.0):
    """Draw features of these labels, and a classifier of all K classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.asarray(labels))
    features = 2 * rng.normal(size=(K, D))[labels] + rng.normal(size=(labels.size, D))
    W, b = rng.normal(size=(K, D)), rng.normal(size=K)
    return oracles.Data(features + offset, labels, W, b)


def of_counts(seed, counts, offset=0.0):
    return draw(seed, np.repeat(np.arange(K), counts), offset)


update, compare = jax.jit(statistics.update), jax.jit(statistics.compare)


def streamed(data, first=slice(None), second=slice(None), min_count=None, parts=3):
    """Both passes over slices of the samples, and the metrics."""
    seen, compared = statistics.init(K, D, float), statistics.init_comparison(K, float)
    for part in np.array_split(np.arange(len(data.labels))[first], parts):
        seen = update(seen, data.features[part], data.labels[part])
    against = statistics.reference(seen, min_count=min_count)
    for part in np.array_split(np.arange(len(data.labels))[second], parts):
        batch = data.features[part], data.labels[part]
        compared = compare(compared, seen, against, *batch, data.W, data.b)
    return collapse.metrics_from_statistics(seen, compared, data.W, min_count=min_count)


@st.composite
def some_classes(draw_):
    """Draw 12 samples of two to five classes, so that two of these have two samples."""
    present = draw_(st.permutations(range(K)))[: draw_(st.integers(2, K))]
    rest = draw_(st.lists(st.sampled_from(present), min_size=8, max_size=8))
    return draw(
        draw_(st.integers(0, 2**31)),
        [*present[:2], *present[:2], *rest],
        draw_(st.sampled_from([0.0, 1e4])),
    )


@settings(max_examples=max(12, settings.default.max_examples // 2))
@given(some_classes(), st.sampled_from([1, 2]))
def test_metrics_of_the_classes_present_are_those_without_the_others(data, min_count):
    expected = oracles.metrics_of_present(data, min_count)
    whole = ncjax.collapse_metrics_from_features(
        *data[:4], min_count=min_count, chunk_size=8
    )
    for got in (whole, streamed(data, min_count=min_count)):
        for field, value in expected.items():
            np.testing.assert_allclose(
                getattr(got, field), value, rtol=1e-6, atol=1e-9, err_msg=field
            )


def test_variants_of_the_classes_present_are_those_without_the_others():
    data = of_counts(0, [0, 6, 1, 0, 9])
    few = oracles.without(data, [1, 2, 4])
    pairs = {}
    for options in ({}, {"weighting": "class"}, {"per_class": False}):
        pairs[str(options)] = [
            variants.within_class_variation(*which[:2], size, min_count=count, **options)
            for which, size, count in ((data, K, 1), (few, 3, None))
        ]
    for name in ("variability_collapse_index", "nearest_centre_accuracy"):
        function = getattr(variants, name)
        pairs[name] = [function(*data[:2], K, min_count=1), function(*few[:2], 3)]
    first, of_few = (
        statistics.class_statistics(
            jnp.asarray(x.features), jnp.asarray(x.labels), len(x.W)
        )
        for x in (data, few)
    )
    for centring in statistics.CENTRINGS:
        pairs[centring] = [
            jnp.asarray(statistics.centred_means(first, centring, 1))[jnp.array([1, 2, 4])],
            statistics.centred_means(of_few, centring),
        ]
        pairs[f"norm {centring}"] = [
            variants.average_squared_norm(first, centring, min_count=1),
            variants.average_squared_norm(of_few, centring),
        ]
        pairs[f"quotient {centring}"] = [
            collapse.within_class_quotient(first, centring, min_count=1),
            collapse.within_class_quotient(of_few, centring),
        ]
    for name, (got, exact) in pairs.items():
        np.testing.assert_allclose(got, exact, rtol=1e-11, err_msg=name)
    ratios = variants.nuclear_over_frobenius(*data[:2], K, min_count=1)
    np.testing.assert_array_equal(np.isnan(ratios), [True, False, False, True, False])
    shares = variants.ncc_agreement(*data[:4], min_count=2)
    np.testing.assert_array_equal(np.isnan(shares), [True, False, True, True, False])


def test_masked_measures_are_those_of_the_remaining_rows():
    rng = np.random.default_rng(0)
    rows, others = jnp.asarray(rng.normal(size=(2, 6, 4)))
    mask = jnp.asarray([True, False, True, True, False, True])
    for function in (
        measures.norm_variation,
        measures.cosine_deviation,
        measures.etf_gram_error,
    ):
        np.testing.assert_allclose(
            function(rows, mask=mask), function(rows[mask]), rtol=1e-12
        )
    for function in (measures.self_duality, measures.product_etf_error):
        got = function(rows, others, mask=mask)
        np.testing.assert_allclose(got, function(rows[mask], others[mask]), rtol=1e-12)
    centred = measures.centre_rows(rows, mask)
    np.testing.assert_allclose(centred[mask], measures.centre_rows(rows[mask]), atol=1e-15)
    assert not centred[~mask].any()


def test_a_class_without_samples_is_refused_unless_asked_for():
    data = of_counts(1, [3, 0, 3, 4, 2])
    message = r"every class needs a sample, none has label \[1\]"
    with pytest.raises(ValueError, match=message):
        ncjax.collapse_metrics_from_features(*data[:4])
    with pytest.raises(ValueError, match=message):
        streamed(data)
    with pytest.raises(ValueError, match="two classes with at least min_count = 9"):
        ncjax.collapse_metrics_from_features(*data[:4], min_count=9)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="min_count must be an integer of at least 1"):
            ncjax.collapse_metrics_from_features(*data[:4], min_count=wrong)


def test_a_class_without_samples_gives_nan_under_jit():
    """A number would be neither of all classes nor of those present."""
    data = of_counts(1, [3, 0, 3, 4, 2])
    metrics = jax.jit(ncjax.collapse_metrics_from_features)(*data[:4])._asdict()
    of_classifier = [
        name for name in metrics if name.startswith(("classifier", "centred_c"))
    ]
    for name, value in metrics.items():
        assert np.isnan(value) == (name not in of_classifier), name
    index = jax.jit(variants.variability_collapse_index, static_argnums=2)(*data[:2], K)
    share = jax.jit(variants.nearest_centre_accuracy, static_argnums=2)(*data[:2], K)
    assert np.isnan(index)
    assert np.isnan(share)


def test_ratios_of_a_last_layer_without_a_class_are_nan_under_jit():
    """The bound of the margin grows with the smallest class, which has no sample."""
    data = of_counts(1, [3, 0, 3, 4, 2])
    layer = jax.jit(ncjax.last_layer)(*data[:4])
    assert np.isnan(layer.margin_ratio)
    assert np.isnan(layer.balanced_margin_ratio)
    assert np.isfinite(layer.least_margin)


def test_nuclear_norms_need_known_labels():
    features, labels = of_counts(0, [3] * K)[:2]
    closed_over = jax.jit(lambda x: variants.nuclear_over_frobenius(x, labels, K))
    expected = variants.nuclear_over_frobenius(features, labels, K)
    np.testing.assert_allclose(closed_over(features), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="labels must be known"):
        jax.jit(lambda y: variants.nuclear_over_frobenius(features, y, K))(labels)


# The second pass


@pytest.mark.parametrize("second", [slice(0, -4), slice(3, None), slice(None, None, 2)])
def test_a_second_pass_over_other_samples_is_refused(second):
    data = of_counts(2, [9, 8, 7, 6, 5])
    with pytest.raises(
        ValueError, match="the second pass must read the samples of the first"
    ):
        streamed(data, second=second)


def test_a_second_pass_over_as_many_other_samples_is_refused():
    """The counts of the classes agree, the samples do not."""
    data = of_counts(3, [8] * K)
    by_class = np.argsort(data.labels, kind="stable").reshape(K, 8)
    first, second = by_class[:, :7].ravel(), by_class[:, 1:].ravel()
    with pytest.raises(
        ValueError, match="the second pass must read the samples of the first"
    ):
        streamed(data, first, second)
    shuffled = np.random.default_rng(0).permutation(first)
    got, expected = streamed(data, first, shuffled), streamed(data, first, first)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_second_pass_over_more_classes_than_are_measured_is_refused():
    data = of_counts(0, [5, 1, 4, 2, 0])
    first = statistics.class_statistics(data.features, data.labels, K)
    empty, reference = statistics.init_comparison(K, float), statistics.reference
    against = reference(first, min_count=1)
    second = statistics.compare(empty, first, against, *data[:3])
    with pytest.raises(ValueError, match=r"got class counts \[5 1 4 2 0\].* one min_count"):
        collapse.metrics_from_statistics(first, second, data.W, min_count=2)
    traced = jax.jit(collapse.metrics_from_statistics, static_argnames="min_count")
    got = traced(first, second, data.W, min_count=2)
    assert np.isnan([got.within_class_variation, got.ncc_mismatch, got.accuracy]).all()


def test_a_second_pass_over_other_samples_gives_nan_under_jit():
    data = of_counts(2, [9, 8, 7, 6, 5])

    @jax.jit
    def metrics(features, labels, mask):
        seen = statistics.class_statistics(features, labels, K)
        compared = statistics.compare(
            statistics.init_comparison(K, float),
            seen,
            statistics.reference(seen),
            features,
            labels,
            data.W,
            mask=mask,
        )
        return collapse.metrics_from_statistics(seen, compared, data.W)

    whole = metrics(*data[:2], np.ones(35, bool))
    short = metrics(*data[:2], np.arange(35) < 30)
    for name, value in short._asdict().items():
        if name in ("within_class_variation", "ncc_mismatch", "accuracy"):
            assert np.isnan(value)
        else:
            np.testing.assert_allclose(value, getattr(whole, name), rtol=1e-12)


# NC4 against the centres of a training split


@given(st.integers(0, 2**31), st.sampled_from([0.0, 100.0]))
def test_a_classifier_that_is_the_nearest_training_mean_has_no_mismatch(seed, offset):
    """`argmax 2 c·h - |c|²` is `argmin |h - c|`."""
    train, test = (
        of_counts(seed, [8] * K, offset),
        of_counts(seed + 1, [3, 1, 4, 2, 5], offset),
    )
    centres = oracles.class_means(*train[:2])
    W, b = 2 * centres, -np.sum(centres**2, axis=1)
    metrics = ncjax.collapse_metrics_from_features(*test[:2], W, b, centres=centres)
    assert float(metrics.ncc_mismatch) == 0
    assert np.all(variants.ncc_agreement(*test[:2], W, b, centres=centres) == 1)
    own = ncjax.collapse_metrics_from_features(*test[:2], W, b)
    for name in ncjax.CollapseMetrics._fields:
        if name != "ncc_mismatch":  # only NC4 knows the training split
            np.testing.assert_allclose(
                getattr(metrics, name), getattr(own, name), rtol=1e-10
            )
    nearest = np.argmin(
        np.sum((test.features[:, None] - centres[None]) ** 2, axis=2), axis=1
    )
    accuracy = variants.nearest_centre_accuracy(*test[:2], K, centres=centres)
    assert float(accuracy) == pytest.approx(np.mean(nearest == test.labels))


def test_a_class_absent_from_the_test_split_is_still_a_centre():
    train, test = of_counts(0, [6] * K), of_counts(1, [4, 0, 4, 3, 3])
    centres = oracles.class_means(*train[:2])
    distances = np.sum((test.features[:, None] - centres[None]) ** 2, axis=2)
    decided = oracles.logits(test).argmax(axis=1)
    got = ncjax.collapse_metrics_from_features(*test[:4], centres=centres, min_count=1)
    assert float(got.ncc_mismatch) == pytest.approx(np.mean(decided != distances.argmin(1)))
    unknown = np.where(np.arange(K)[:, None] == 2, np.nan, centres)
    distances[:, 2] = np.inf
    got = ncjax.collapse_metrics_from_features(*test[:4], centres=unknown, min_count=1)
    assert float(got.ncc_mismatch) == pytest.approx(np.mean(decided != distances.argmin(1)))


def test_centres_of_another_shape_are_refused():
    data = of_counts(0, [3] * K)
    with pytest.raises(ValueError, match=r"expected centres \(5, 4\), got \(4, 5\)"):
        ncjax.collapse_metrics_from_features(*data[:4], centres=np.ones((D, K)))


def test_complex_centres_and_a_reference_without_any_centre_are_refused():
    data = of_counts(0, [3] * K)
    with pytest.raises(ValueError, match="centres must be real, got complex"):
        ncjax.collapse_metrics_from_features(*data[:4], centres=np.ones((K, D)) + 1j)
    first = statistics.class_statistics(data.features, data.labels, K)
    with pytest.raises(ValueError, match="expected a centre, got NaN"):
        statistics.reference(first, centres=np.full((K, D), np.nan))
