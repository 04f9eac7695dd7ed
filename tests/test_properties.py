"""Properties of the public functions at random shapes, dtypes, scales and seeds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_functions import compiled, of_state
from strategies import floats, random_params, seeds, sizes

import ncjax
from ncjax import measures, statistics
from ncjax.numerics import at_unit_scale, power_of_two

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

HALF = (jnp.float16, jnp.bfloat16)
DTYPES = (*HALF, jnp.float32, jnp.float64)


def scaled(params, factor_W, factor_H):
    return ncjax.Params(params.W * factor_W, params.H * factor_H)


def assert_close(first, second, rtol, atol=0.0):
    chex.assert_trees_all_close(first, second, rtol=rtol, atol=atol)


# The layer-peeled model


@settings(max_examples=max(8, settings.default.max_examples // 3))
@given(seeds, sizes, floats)
def test_metrics_and_losses_are_invariant_under_rotation_and_order(seed, shape, dtype):
    """Rotate the features; permute the classes and the samples within a class."""
    params, rng = random_params(seed, *shape, 1.0, dtype), np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(shape[2], shape[2])))[0].astype(dtype)
    order = rng.permutation(shape[0])
    samples = rng.permutation(shape[1])
    turned = jax.tree.map(lambda leaf: (leaf @ frame)[order], params)
    turned = turned._replace(H=turned.H[:, samples])
    got, expected = compiled(turned), compiled(params)
    # If class means nearly coincide, quotients lose digits.
    rtol = 1e4 * np.finfo(dtype).eps
    gap = statistics.squared_distances(jnp.mean(params.H, axis=1))
    if np.sqrt(gap[np.triu_indices(shape[0], 1)].min()) > 0.1:
        assert_close(got, expected, rtol, rtol)
    margins = ncjax.margins(params)[order][:, samples][:, :, order]
    assert_close(ncjax.margins(turned), margins, 1, 100 * np.finfo(dtype).eps)
    balance = frame.T @ ncjax.balance(params) @ frame
    assert_close(ncjax.balance(turned), balance, 1, 300 * np.finfo(dtype).eps)


@given(seeds, sizes, floats, st.integers(-100, 100), st.integers(-100, 100))
def test_metrics_do_not_depend_on_two_scales_nor_margin_ratio_on_a_common_scale(
    seed, shape, dtype, p, q
):
    # In float64 from 2^-1000 to 2^1000. Powers of two round nothing.
    wide = 10 if dtype == np.float64 else 1
    params = random_params(seed, *shape, 1.0, dtype)
    far = scaled(params, dtype(2.0 ** (wide * p)), dtype(2.0 ** (wide * q)))
    expected = compiled(params)
    rtol = 100 * np.finfo(dtype).eps
    assert_close(compiled(far)["metrics"], expected["metrics"], rtol, rtol)
    both = dtype(2.0 ** (wide * p))
    ratio = compiled(scaled(params, both, both))["margin_ratio"]
    assert_close(ratio, expected["margin_ratio"], rtol)


@given(seeds, sizes, floats, st.integers(-100, -15))
def test_kkt_angle_near_the_origin_equals_the_linear_flow(seed, shape, dtype, p):
    # Near the origin ∇log L is linear in Z, in the direction of (S H, Sᵀ W).
    factor = 2.0 ** (p * (10 if dtype == np.float64 else 1))
    params = random_params(seed, *shape, 1.0, dtype)
    angle = compiled(scaled(params, dtype(factor), dtype(factor)))["kkt_angle"]
    W, H = (np.asarray(leaf, float) for leaf in params)
    pull_W = H.sum(axis=1) - H.sum(axis=(0, 1)) / shape[0]
    pull_H = np.broadcast_to((W - W.mean(axis=0))[:, None], H.shape)
    z, g = (np.concatenate([a.ravel(), b.ravel()]) for a, b in ((W, H), (pull_W, pull_H)))
    beta = z @ g / np.linalg.norm(z) / np.linalg.norm(g)
    expected = np.sqrt(max(0.0, 1 - beta**2))
    assert float(angle) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(seeds, sizes, st.sampled_from([1e-3, 1.0, 30.0]))
def test_float32_is_near_float64(seed, shape, scale):
    single = random_params(seed, *shape, scale, np.float32)
    double = jax.tree.map(lambda leaf: leaf.astype(float), single)
    got, exact = compiled(single), compiled(double)
    eps = float(np.finfo(np.float32).eps)
    # A margin rounds at eps |w| |h|: an absolute error of log L, a relative one of L.
    largest = [np.linalg.norm(leaf, axis=-1).max() for leaf in double]
    rounding = 20 * eps * (1 + largest[0] * largest[1])
    assert_close(got["log_cross_entropy"], exact["log_cross_entropy"], eps, rounding)
    if rounding < 0.1:
        # For margins above 87 the loss is below the least normal number.
        tiny = float(np.finfo(np.float32).tiny)
        assert_close(got["cross_entropy"], exact["cross_entropy"], 2 * rounding, tiny)
    assert_close(ncjax.margins(single), ncjax.margins(double), eps, rounding)
    assert_close(got["squared_norm"], exact["squared_norm"], 20 * eps)
    assert_close(got["margin_ratio"], exact["margin_ratio"], 20 * eps, 100 * eps)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))


@given(seeds, st.sampled_from([(2, 1, 1), (5, 4, 5)]))
def test_jit_vmap_and_any_memory_layout_agree(seed, shape):
    params = random_params(seed, *shape, 1.0)
    expected = compiled(params)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    together = _together(stacked)
    assert_close(jax.tree.map(lambda leaf: leaf[0], together), expected, 1e-9, 1e-12)
    W, H = (np.asarray(leaf) for leaf in params)
    strided = ncjax.Params(np.asfortranarray(W), np.repeat(H, 2, axis=1)[:, ::2])
    assert_close(ncjax.log_cross_entropy(strided), expected["log_cross_entropy"], 1e-12)
    assert_close(ncjax.collapse_metrics(strided), expected["metrics"], 1e-12)


_together = jax.jit(jax.vmap(of_state))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    params = random_params(0, 3, 2, 7, 0.1, dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_close(compiled(params), compiled(wide), 1e-6)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(compiled(params)))
    collapse = ncjax.block_saddle(1, 3, 2, 7, dtype)
    values = compiled(collapse)
    eps = float(jnp.finfo(dtype).eps)
    assert float(values["metrics"].centred_self_duality) < 4 * eps
    assert float(values["metrics"].accuracy) == 1
    verdict = ncjax.certificate(scaled(collapse, 2, 2), multipliers="nnls").verdict
    assert int(verdict) == 0
    exact = ncjax.log_cross_entropy(jax.tree.map(lambda leaf: leaf.astype(float), collapse))
    assert float(values["log_cross_entropy"]) == pytest.approx(float(exact), rel=20 * eps)


@given(
    st.sampled_from([2, 3, 7]),
    st.integers(-1, 3),
    st.sampled_from(DTYPES),
    st.booleans(),
    seeds,
)
def test_simplex_etf_has_its_gram_matrix(num_classes, extra, dtype, turned, seed):
    key = jax.random.key(seed) if turned else None
    etf = ncjax.simplex_etf(num_classes, num_classes + extra, key, dtype)
    assert etf.shape == (num_classes, num_classes + extra)
    assert etf.dtype == dtype
    etf, eps = np.asarray(etf, float), float(jnp.finfo(dtype).eps)
    gram = num_classes / (num_classes - 1) * (np.eye(num_classes) - 1 / num_classes)
    np.testing.assert_allclose(etf @ etf.T, gram, atol=20 * eps)
    np.testing.assert_allclose(etf.sum(axis=0), 0, atol=20 * eps)


@given(seeds, sizes)
def test_separation_has_unit_margins_and_the_optimal_value(seed, shape):
    """For classes of any size; the largest has the size of the shape."""
    num_classes, per_class, dim = shape
    rng = np.random.default_rng(seed)
    counts = np.append(per_class, rng.integers(1, per_class + 1, num_classes - 1))
    solution = ncjax.solve_separation(counts, dim, starts=2)
    weights = ncjax.sample_weights(counts)
    margins = np.asarray(ncjax.margins(solution.params, weights))
    assert np.isfinite(margins).sum() == (num_classes - 1) * counts.sum()
    half = float(ncjax.squared_norm(solution.params)) / 2
    assert solution.value == pytest.approx(half, rel=1e-12)
    if dim < num_classes - 1:  # a search
        assert margins.min() == pytest.approx(1, abs=1e-12)
        assert solution.value > ncjax.separation_value(counts)
        return
    np.testing.assert_allclose(margins[np.isfinite(margins)], 1, rtol=1e-12)
    assert solution.value == pytest.approx(ncjax.separation_value(counts), rel=1e-12)
    # No point of the same margins is smaller.
    other = jax.tree.map(jnp.add, solution.params, random_params(seed, *shape, 0.1))
    assert float(ncjax.margin_ratio(other, weights)) <= 1 + 1e-12


@given(seeds, sizes, st.sampled_from([-500, -10, 0, 10, 500]))
def test_drift_agrees_with_loops_at_any_scale(seed, shape, p):
    start, end = random_params(seed, *shape, 1.0), random_params(seed + 1, *shape, 1.0)
    moved = np.linalg.norm(_balance_by_loops(end) - _balance_by_loops(start))
    size = sum(np.sum(np.asarray(leaf) ** 2) for leaf in end)
    sums = np.linalg.norm(np.sum(end.W, axis=0) - np.sum(start.W, axis=0))
    drift = ncjax.invariant_drift(
        scaled(end, 2.0**p, 2.0**p), scaled(start, 2.0**p, 2.0**p)
    )
    assert float(drift.balance) == pytest.approx(moved / size, rel=1e-10)
    assert float(drift.classifier_sum) == pytest.approx(sums / size**0.5, rel=1e-10)
    still = ncjax.invariant_drift(start, start)
    assert still == (0, 0)


def _balance_by_loops(params):
    W, H = (np.asarray(leaf) for leaf in params)
    return W.T @ W - sum(np.outer(h, h) for rows in H for h in rows)


def test_drift_at_the_origin_is_zero_and_states_of_other_shapes_are_refused():
    origin, other = random_params(0, 3, 2, 4, 0.0), random_params(0, 3, 2, 5, 1.0)
    assert ncjax.invariant_drift(origin, origin) == (0, 0)
    for function in (ncjax.invariant_drift, ncjax.restore_invariants):
        with pytest.raises(
            ValueError, match=r"expected a start like params, .*\(3, 2, 4\)"
        ):
            function(origin, other)


_restored = jax.jit(ncjax.restore_invariants)


@given(seeds, sizes, st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
def test_restoring_invariants_keeps_logits(seed, shape, scale, repeated):
    start = random_params(seed, *shape, scale)
    if repeated:  # rows that span less than the space
        start = start._replace(W=start.W.at[1].set(start.W[0]), H=start.H * 0 + scale)
    off = random_params(seed + 1, *shape, 1e-6 * scale)
    # A solver's error lies in the span of the rows it has moved.
    span = np.concatenate([start.W, start.H.reshape(-1, shape[2])])
    onto = np.linalg.pinv(span) @ span
    moved = jax.tree.map(lambda p, q: p + q @ onto, start, off)
    back = _restored(moved, start)
    drift = ncjax.invariant_drift(back, start)
    assert float(drift.balance) < 1e-11
    assert float(drift.classifier_sum) < 1e-13
    # Margins change by the square of the change of the balance.
    atol = 1e-8 * max(scale, 1e-3) ** 2
    assert_close(ncjax.margins(back), ncjax.margins(moved), 1e-8, atol)


# Rows and features


def row_measures(rows, others):
    return {
        "norm_variation": measures.norm_variation(rows),
        "unit_rows": measures.unit_rows(rows),
        "pair_cosines": measures.pair_cosines(rows),
        "cosine_deviation": measures.cosine_deviation(rows),
        "etf_gram_error": measures.etf_gram_error(rows),
        "product_etf_error": measures.product_etf_error(rows, others),
        "self_duality": measures.self_duality(rows, others),
        "row_cosines": measures.row_cosines(rows, others),
    }


@given(seeds, st.sampled_from([(2, 1), (3, 5), (6, 2)]), floats, seeds, seeds)
def test_quotients_of_rows_agree_with_loops_at_any_scale(seed, shape, dtype, p, q):
    rng, most = np.random.default_rng(seed), 1000 if dtype == np.float64 else 100
    rows, others = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    far = (
        jnp.asarray(x) * dtype(2.0 ** (r % (2 * most) - most))
        for x, r in ((rows, p), (others, q))
    )
    rows, others = rows.astype(float), others.astype(float)
    tolerance = 100 * np.finfo(dtype).eps
    for name, value in _row_measures(*far).items():
        expected = getattr(oracles, name)(*([rows, others][: 2 if name in PAIRED else 1]))
        np.testing.assert_allclose(value, expected, tolerance, tolerance, err_msg=name)


PAIRED = ("product_etf_error", "self_duality", "row_cosines")
_row_measures = jax.jit(row_measures)


@given(seeds, st.sampled_from([(2, 1), (3, 5), (6, 2)]))
def test_dots_and_distances_of_rows_agree_with_loops(seed, shape):
    rng = np.random.default_rng(seed)
    rows, others = (rng.normal(size=shape) for _ in range(2))
    got = measures.row_dots(jnp.asarray(rows), jnp.asarray(others))
    np.testing.assert_allclose(got, oracles.row_dots(rows, others), rtol=1e-12, atol=1e-14)
    gaps = [np.linalg.norm(r - o) for r, o in zip(rows, others, strict=True)]
    got = measures.row_distances(jnp.asarray(rows), jnp.asarray(others))
    np.testing.assert_allclose(got, gaps, rtol=1e-12)
    centred = measures.centre_rows(jnp.asarray(rows))
    np.testing.assert_allclose(centred, oracles.centred_rows(rows), atol=1e-14)


FEATURES = st.sampled_from([(2, 3, 20), (4, 30, 12)])  # K, d, N


@given(seeds, FEATURES, floats, seeds, st.booleans())
def test_metrics_of_features_at_any_scale_and_order(seed, shape, dtype, exponent, with_b):
    most = 900 if dtype == np.float64 else 100
    p = exponent % (2 * most) - most
    num_classes, dim, samples = shape
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % num_classes
    features, W = (rng.normal(size=(n, dim)).astype(dtype) for n in (samples, num_classes))
    b = rng.normal(size=num_classes).astype(dtype)
    expected = ncjax.collapse_metrics_from_features(
        features, labels, W, b if with_b else None
    )
    order, factor = rng.permutation(samples), dtype(2.0**p)
    # A common factor of features and bias keeps the decisions.
    far = factor * features[order], labels[order], W, factor * b if with_b else None
    got = ncjax.collapse_metrics_from_features(*far)
    tolerance = 1e4 * np.finfo(dtype).eps
    assert_close(got, expected, tolerance, tolerance)


# Bad input


def test_numbers_beyond_the_dtype_of_the_features_are_refused():
    features, labels = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(ValueError, match="W must be finite, got 3 of 9"):
        ncjax.collapse_metrics_from_features(features, labels, 1e300 * np.eye(3))


def test_too_few_samples_are_refused_under_jit():
    with pytest.raises(ValueError, match="expected a sample of each of 3 classes"):
        jax.jit(ncjax.collapse_metrics_from_features)(
            jnp.zeros((0, 4)), jnp.zeros(0, int), jnp.ones((3, 4))
        )


# Numerics


@given(seeds, floats, st.integers(-100, 100), st.booleans())
def test_power_of_two_rounds_nothing(seed, dtype, p, by_row):
    array = np.random.default_rng(seed).normal(size=(3, 4)).astype(dtype) * dtype(2.0**p)
    scale = np.asarray(power_of_two(jnp.asarray(array), 1 if by_row else None))
    assert scale.dtype == dtype
    assert (np.frexp(scale)[0] == 0.5).all()
    largest = np.abs(array).max(axis=1, keepdims=True) if by_row else np.abs(array).max()
    assert ((scale <= largest) & (largest < 2 * scale)).all()
    unit = at_unit_scale(jnp.asarray(array), 1 if by_row else None)
    np.testing.assert_array_equal(np.asarray(unit) * scale, array)
