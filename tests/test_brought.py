"""Functions of features on what people bring: any dtype, scale, offset, labels, classes.

The oracle reads the same numbers in float64, at unit scale and, where a value does not
depend on it, without the offset.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from strategies import brought

import ncjax
from ncjax import measures, statistics, variants
from ncjax.metrics import collapse

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

few = settings(max_examples=settings.default.max_examples // 2)


def kept(case):
    return np.flatnonzero(np.bincount(case.exact.labels, minlength=len(case.exact.W)))


def assume_well_posed(case):
    """The oracle squares the ratio of the spreads of the class means."""
    means = oracles.centred_means(*case.near[:2])
    spreads = np.linalg.svd(means, compute_uv=False)
    assume(spreads[0] < 30 * spreads[min(means.shape[1], len(means) - 1) - 1])


def assume_decided(case, rounding=1e-3):
    """No sample lies between two logits, or between two class means."""
    means = oracles.class_means(*case.near[:2])
    distances = np.linalg.norm(case.near.features[:, None] - means[None], axis=2)
    for scores in (oracles.logits(case.near), distances):
        ordered = np.sort(scores, axis=1)
        gaps = np.diff(ordered, axis=1)[:, [0, -1]]
        assume((gaps > rounding * np.abs(scores).max()).all())


def assert_near(got, exact, case, name="", digits=300):
    """Agree to a few hundred roundings of the dtype of the computation."""
    tolerance = digits * case.rounding
    np.testing.assert_allclose(got, exact, tolerance, tolerance, err_msg=name)


@few
@given(brought(absent=True))
def test_metrics_of_anything_that_is_brought(case):
    assume_well_posed(case)
    assume_decided(case)
    expected = oracles.metrics_of_present(case.near, 1)
    got = ncjax.collapse_metrics_from_features(*case.given[:4], min_count=1)
    for name, value in expected.items():
        assert_near(getattr(got, name), value, case, name, 3000)


def streamed(case, dtype):
    """Both passes in three batches, whose masks leave out every third sample of padding."""
    (num_classes, dim), samples = case.given.W.shape, len(case.given.labels)
    seen = statistics.init(num_classes, dim, dtype)
    masks = np.arange(samples) % 3 == np.arange(3)[:, None]
    for mask in masks:
        seen = update(seen, *case.given[:2], mask)
    against = reference(seen)
    second = statistics.init_comparison(num_classes, dtype)
    for mask in masks:
        second = compare(second, seen, against, *case.given[:4], mask)
    return seen, second


update, compare = jax.jit(statistics.update), jax.jit(statistics.compare)
reference = jax.jit(statistics.reference, static_argnames=("centring", "min_count"))


@few
@given(brought(widest=20))
def test_streamed_metrics_of_anything_that_is_brought(case):
    """Streams cannot know the largest feature, so squares bound the scale."""
    assume_well_posed(case)
    assume_decided(case)
    wide = case.given.features.dtype == np.float64
    first, second = streamed(case, np.float64 if wide else np.float32)
    got = collapse.metrics_from_statistics(first, second, case.given.W)
    for name, value in oracles.metrics_of_present(case.near, 1).items():
        assert_near(getattr(got, name), value, case, name, 3000)
    means = oracles.class_means(*case.exact[:2])
    # A mean itself rounds at its own size.
    far = 4 * case.rounding * (1 + case.offset)
    np.testing.assert_allclose(statistics.class_means(first) / case.scale, means, far, far)


@few
@given(brought(absent=True))
def test_variants_of_anything_that_is_brought(case):
    assume_well_posed(case)
    data, size = case.given[:2], len(case.given.W)
    near, exact = (
        oracles.without(which, kept(case))[:2] for which in (case.near, case.exact)
    )
    names = {
        "within_class_variation": oracles.within_class_variation,
        "variability_collapse_index": oracles.variability_collapse_index,
    }
    for name, oracle in names.items():
        got = getattr(variants, name)(*data, size, min_count=1)
        assert_near(got, oracle(*near), case, name, 3000)
    nearest = oracles.nearest_centres(*near)
    got = variants.nearest_centre_accuracy(*data, size, min_count=1)
    assert_near(got, np.mean(nearest == near[1]), case)
    got = variants.nuclear_over_frobenius(*data, size, min_count=1)
    assert_near(np.mean(got[kept(case)]), oracles.nuclear_over_frobenius(*exact), case)


@few
@given(brought())
def test_measures_of_rows_that_are_brought(case):
    """Class means and classifier as rows, in the dtype given."""
    means = oracles.class_means(*case.exact[:2])
    rows = np.asarray(means * case.scale).astype(case.given.W.dtype)
    exact = rows.astype(float) / case.scale
    W, exact_W = jnp.asarray(case.given.W), case.exact.W
    rows = jnp.asarray(rows)
    of_rows = ("norm_variation", "cosine_deviation", "etf_gram_error")
    for name in of_rows:
        got, expected = getattr(measures, name)(rows), getattr(oracles, name)(exact)
        assert_near(got, expected, case, name)
    for name in ("self_duality", "product_etf_error", "row_cosines"):
        got = getattr(measures, name)(rows, W)
        assert_near(got, getattr(oracles, name)(exact, exact_W), case, name)
    assert_near(
        measures.row_dots(rows, W) / case.scale,
        oracles.row_dots(exact, exact_W),
        case,
        digits=100 * (1 + case.offset),
    )


@few
@given(brought(widest=20))
def test_losses_and_margins_of_anything_that_is_brought(case):
    """Logits keep the scale of the features, and lose the digits of their offset."""
    assume(case.scale <= 1 or not case.offset)
    data = case.given[:4]
    exact = case.exact._replace(
        features=case.exact.features * case.scale, b=case.exact.b * case.scale
    )
    rounding = 100 * case.rounding * np.abs(oracles.logits(exact)).max()
    margins = oracles.own_minus_best_other(oracles.logits(exact), exact.labels)
    got = variants.logit_margins(*data)
    np.testing.assert_allclose(got, margins, atol=rounding)
    loss = variants.mean_cross_entropy(*data)
    expected = oracles.cross_entropy(exact)
    np.testing.assert_allclose(loss, expected, 10 * case.rounding, rounding)
    squares = oracles.squared_error(exact)
    got = variants.mean_squared_error(*data)
    np.testing.assert_allclose(got, squares, rtol=1e-3, atol=rounding)


@few
@given(brought())
def test_peeling_keeps_every_number_that_is_brought(case):
    params = ncjax.peel(*case.given[:4])
    dim, per_class = case.exact.W.shape[1], params.H.shape[1]
    assert per_class == np.bincount(case.exact.labels).min()
    for k, H in enumerate(np.asarray(params.H, float) / case.scale):
        of_class = case.exact.features[case.exact.labels == k][:per_class]
        np.testing.assert_array_equal(H[:, :dim], of_class)
    np.testing.assert_array_equal(params.W[:, :dim], case.exact.W)
    np.testing.assert_array_equal(
        np.asarray(params.W, float)[:, dim] / case.scale, case.exact.b
    )


@few
@given(brought())
def test_last_layer_of_anything_that_is_brought(case):
    """Ratios and balanced ratios of the least margin, at any scale."""
    layer = ncjax.last_layer(*case.given[:3])
    logits = case.exact.features @ case.exact.W.T
    least = oracles.own_minus_best_other(logits, case.exact.labels).min()
    W, H = np.linalg.norm(case.exact.W), np.linalg.norm(case.exact.features)
    factor = (len(case.exact.W) - 1) * np.sqrt(np.bincount(case.exact.labels).min())
    rounding = 100 * case.rounding
    np.testing.assert_allclose(
        layer.balanced_margin_ratio, factor * least / (W * H), rounding, rounding
    )
    norm = np.hypot(W / np.sqrt(case.scale), H * np.sqrt(case.scale))
    np.testing.assert_allclose(
        layer.margin_ratio, 2 * factor * least / norm**2, rounding, rounding
    )
    for angle in (layer.kkt_angle, layer.balanced_kkt_angle):
        assert 0 <= float(angle) <= 1 + rounding
