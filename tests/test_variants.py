"""Formulas of other codebases reproduce their reference values and their definitions."""

import json
from functools import cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.optimize
from formulas import CALLS, UNTRACED, compiled, first_pass
from strategies import RANDOM

import ncjax
from ncjax import measures, variants
from ncjax.metrics import directions

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(__file__).parent / "data"
VALUES = json.loads((FOLDER / "collapse_values.json").read_text())


def decay(data, rate=5e-4):
    return rate / 2 * (jnp.sum(data.W**2) + jnp.sum(data.b**2))


@cache
def values(which):
    """Every formula of one data set."""
    data = RANDOM.get(which, oracles.REFERENCE)
    values = compiled(data, [name for name in CALLS if name not in UNTRACED])
    return values | {name: CALLS[name](data) for name in UNTRACED}


def test_every_reference_value_has_a_call():
    assert {f"formula.{name}" for name in CALLS} == set(VALUES)


@pytest.mark.parametrize("name", CALLS)
def test_formula_matches_its_reference_value(name):
    np.testing.assert_allclose(
        values("reference")[name], VALUES[f"formula.{name}"], rtol=1e-10
    )


@pytest.mark.parametrize("which", ["K=2, N<d", "d<K-1"])
def test_formulas_match_their_definitions_on_random_data(which):
    for name, value in values(which).items():
        exact = oracles.FORMULAS[name](RANDOM[which])
        np.testing.assert_allclose(value, exact, rtol=1e-9, atol=1e-12, err_msg=name)


def test_parts_of_the_squared_error_sum_to_it_for_equal_classes():
    data = RANDOM["wide"]
    labels = np.arange(60) % 5
    balanced = data._replace(labels=labels)
    parts = compiled(balanced, ("mse.LNC1", "mse.LNC23", "mse.Lperp")).values()
    loss = (oracles.squared_error(balanced) + decay(data)) / 2
    np.testing.assert_allclose(sum(parts), loss, rtol=1e-12)


def test_one_vs_rest_distances_of_known_hulls():
    # The hull of the other rows comes nearest to (1, 0) on its edge from b to c.
    b, c = np.array([0.6, 0.8]), np.array([0.0, -1.0])
    square = np.array([[1.0, 0], [-1, 0], [0, 1], b, c])
    normal = np.array([c[1] - b[1], b[0] - c[0]]) / np.linalg.norm(b - c)
    np.testing.assert_allclose(
        variants.one_vs_rest_distances(square)[0], abs(normal @ (square[0] - b)), rtol=1e-12
    )
    centre = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    far = variants.one_vs_rest_distances(centre)[3]
    assert far == pytest.approx(1 - 1 / np.sqrt(3), rel=1e-12)
    size = 7
    etf = np.eye(size) - 1 / size
    np.testing.assert_allclose(
        variants.one_vs_rest_distances(etf), size / (size - 1), rtol=1e-12
    )


@pytest.mark.parametrize("shape", [(70, 4), (40, 15), (12, 30)])
def test_one_vs_rest_distances_are_those_of_one_system_over_all_rows(shape):
    """The rows of a cluster are near twins, whose own hull is not the nearest part."""
    rng = np.random.default_rng(4)
    W = rng.normal(size=shape)
    W[: shape[0] // 2] = W[0] + 0.05 * W[: shape[0] // 2]
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)

    def distance(k):
        gaps = np.delete(unit, k, axis=0) - unit[k]
        system = np.vstack([gaps.T, np.ones(len(gaps))])
        weights, _ = scipy.optimize.nnls(system, np.eye(len(system))[-1])
        return np.linalg.norm(weights @ gaps) / weights.sum()

    exact = [distance(k) for k in range(len(W))]
    np.testing.assert_allclose(variants.one_vs_rest_distances(W), exact, rtol=1e-11)
    some = np.array([5, 0, 5])
    np.testing.assert_allclose(
        variants.one_vs_rest_distances(W, some), np.array(exact)[some], rtol=1e-11
    )
    assert variants.one_vs_rest_distances(W, np.array([], int)).shape == (0,)


def test_one_vs_rest_distances_reach_rows_that_are_not_near():
    """The pole is nearest to the centre of a circle, past twins of the pole on one side."""
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    circle = np.stack([np.cos(angles), np.sin(angles), np.full(8, -2.0)], axis=1)
    tilts = 0.5 + 1e-3 * np.arange(20)
    arc = np.stack([np.sin(tilts), 0 * tilts, np.cos(tilts)], axis=1)
    W = np.concatenate([[[0.0, 0, 1]], arc, circle])
    got = variants.one_vs_rest_distances(W, [0])
    # The segment from the nearest twin to the far side of the circle.
    a, b = arc[0], np.array([-1.0, 0, -2]) / np.sqrt(5)
    t = np.clip((W[0] - a) @ (b - a) / np.sum((b - a) ** 2), 0, 1)
    np.testing.assert_allclose(got, np.linalg.norm(a + t * (b - a) - W[0]), rtol=1e-12)


@pytest.mark.parametrize("kernel", variants.KERNELS)
@pytest.mark.parametrize("height", [3, 10])
def test_uniformity_moments_are_those_of_all_pairs(kernel, height):
    """With close pairs, and in blocks that do not divide the rows."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(10, 4)) * 2.0 ** rng.integers(-30, 30, size=(10, 1))
    rows[7] = rows[2] + 1e-7 * np.linalg.norm(rows[2]) * rng.normal(size=4)
    got = directions._moments_in_blocks(jnp.asarray(rows), kernel, 2.0, height)
    pairs = oracles.uniformity_kernel(rows, kernel)
    expected = pairs.mean(), pairs.var(), pairs.max()
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_uniformity_moments_take_an_exponent_and_float32():
    rows = np.random.default_rng(6).normal(size=(9, 3)).astype(np.float32)
    got = variants.uniformity_moments(rows, "riesz", -1.5)
    pairs = variants.uniformity_kernel(rows.astype(float), "riesz", -1.5)
    assert got.mean.dtype == np.float32
    np.testing.assert_allclose(got.mean, np.mean(pairs), rtol=1e-6)
    np.testing.assert_allclose(got.variance, np.var(pairs), rtol=1e-5)


def test_no_array_over_all_pairs_of_many_rows():
    """XLA's programs hold megabytes, where all pairs of 6000 rows would take 140 MB."""
    rows = jax.ShapeDtypeStruct((6000, 8), np.float32)
    program = directions._moments_in_blocks.lower(rows, "log", 6.0, 1024)
    assert len(program.as_text()) < 2**17  # no constant either
    assert program.compile().memory_analysis().temp_size_in_bytes < 2**25


def test_quotients_of_unequal_classes_need_no_padding_to_the_largest(monkeypatch):
    """Zipf's law: the largest class has as many samples as the other 63 together."""
    counts = np.maximum(300 // (1 + np.arange(64)), 1)
    labels = np.repeat(np.arange(64), counts)
    order = np.random.default_rng(7).permutation(labels.size)
    features = np.random.default_rng(8).normal(size=(labels.size, 4))
    held = []
    kept = variants._nuclear_quotients
    monkeypatch.setattr(
        variants, "_nuclear_quotients", lambda x, rows: held.append(rows) or kept(x, rows)
    )
    got = variants.nuclear_over_frobenius(features[order], labels[order], 64)
    assert sum(rows.size for rows in held) < 2 * labels.size + 8 * 64
    for k in (0, 1, 10, 63):
        singular = np.linalg.svd(features[labels == k], compute_uv=False)
        np.testing.assert_allclose(
            got[k], singular.sum() / np.linalg.norm(singular), rtol=1e-12
        )


def test_small_losses_keep_their_digits():
    features, labels = np.eye(3), np.arange(3)
    loss = variants.mean_cross_entropy(features, labels, 40 * np.eye(3))
    assert float(loss) == pytest.approx(2 * np.exp(-40), rel=1e-12)


def test_half_precision_is_computed_in_float32():
    data = RANDOM["wide"]
    data = data._replace(features=data.features.astype(np.float16))
    names = ("nc1.vci.sample_mean", "margin.cos_centred_mean", "mse.LNC1", "loss.ce")
    for name, value in compiled(data, names).items():
        assert value.dtype == np.float32
        exact = oracles.FORMULAS[name](oracles.float64(data))
        np.testing.assert_allclose(value, exact, rtol=1e-4, err_msg=name)


def test_variation_far_from_the_origin_in_float32():
    data = RANDOM["wide"]
    data = data._replace(features=(data.features + 1e4).astype(np.float32))
    # The other formulas depend on the origin: losses, uncentred products, directions.
    centred = ("nc1.pinv", "nc1.quot", "nc1.cdnv", "nc1.vci", "lpm", "nc2g")
    values = compiled(data, [name for name in CALLS if name.startswith(centred)])
    for name, value in values.items():
        exact = oracles.FORMULAS[name](oracles.float64(data))
        np.testing.assert_allclose(value, exact, rtol=1e-5, err_msg=name)


def test_unknown_names_are_refused():
    data = RANDOM["wide"]
    with pytest.raises(ValueError, match="weighting must be one of"):
        variants.within_class_variation(*data[:2], 5, weighting="classes")
    with pytest.raises(ValueError, match="centring must be one of"):
        variants.within_class_variation(*data[:2], 5, centring="mean")
    for function in (variants.uniformity_kernel, variants.uniformity_moments):
        with pytest.raises(ValueError, match="kernel must be one of"):
            function(jnp.eye(3), "cosine")
    with pytest.raises(ValueError, match="expected features"):
        variants.nearest_centre_accuracy(data.features[0], data.labels, 5)


def test_rows_that_do_not_fit_are_refused():
    """A single row would otherwise be taken for each of the others."""
    rows, one = jnp.ones((3, 4)), jnp.ones((1, 4))
    pairs = (
        *(measures.self_duality, measures.product_etf_error),
        *(measures.row_cosines, measures.row_dots, measures.row_distances),
    )
    message = r"expected rows of one shape \(K, d\), got \(3, 4\) and \(1, 4\)"
    for function in pairs:
        with pytest.raises(ValueError, match=message):
            function(rows, one)
    for function in (measures.norm_variation, measures.cosine_deviation):
        with pytest.raises(ValueError, match=r"\(K, d\), got \(4,\)"):
            function(one[0])
        with pytest.raises(ValueError, match="rows must be floating, got int32"):
            function(jnp.ones((3, 4), jnp.int32))
    seen = first_pass(RANDOM["wide"])
    W, b = RANDOM["wide"].W, RANDOM["wide"].b
    with pytest.raises(ValueError, match=r"expected b \(5,\), got \(4,\)"):
        variants.mean_logits_norm(seen, W, b[:4])
    data = RANDOM["wide"]
    for decay in (-1e-3, np.inf, np.nan):
        with pytest.raises(
            ValueError, match="weight_decay must be finite and not negative"
        ):
            variants.squared_error_parts(*data[:4], weight_decay=decay)


def test_a_missing_bias_is_a_bias_of_zeros_in_every_function_that_takes_one():
    data = RANDOM["wide"]
    seen, zeros = first_pass(data), jnp.zeros(5)
    calls = {
        function: lambda b, function=function: function(*data[:3], b)
        for function in (
            variants.logit_margins,
            variants.mean_cross_entropy,
            variants.mean_squared_error,
            variants.ncc_agreement,
            ncjax.collapse_metrics_from_features,
        )
    }
    calls["mean_logits_norm"] = lambda b: variants.mean_logits_norm(seen, data.W, b)
    for call in calls.values():
        chex.assert_trees_all_close(call(None), call(zeros), rtol=1e-12)


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (np.ones((1, 3)), r"expected W \(K, d\) with K at least 2, got \(1, 3\)"),
        (np.ones(3), r"expected W \(K, d\) with K at least 2, got \(3,\)"),
        (np.eye(3) * [1, 1, 0], "rows of W must be finite and not zero"),
        (np.full((2, 2), np.nan), "rows of W must be finite and not zero"),
    ],
)
def test_rows_without_a_direction_are_refused(W, message):
    with pytest.raises(ValueError, match=message):
        variants.one_vs_rest_distances(W)


def test_classes_out_of_range_and_a_single_row_are_refused():
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\), got 3 to 3"):
        variants.one_vs_rest_distances(np.eye(3), [3])
    with pytest.raises(ValueError, match="a mask becomes integers"):
        variants.one_vs_rest_distances(np.eye(3), np.eye(3)[0] > 0)
    with pytest.raises(ValueError, match=r"with K at least 2, got \(1, 3\)"):
        variants.uniformity_moments(jnp.ones((1, 3)), "log")
