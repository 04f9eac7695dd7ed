"""The layer-peeled model and the last layer at any scale, against extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_functions import compiled
from strategies import floats, random_params, seeds, separating

import ncjax
from ncjax import variants
from ncjax.numerics import power_of_two, root_of_scale

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

single, double = np.float32, np.float64
# Scales of the features and of the classifier.
SCALES = [
    *((single, 1e18, 1e18), (single, 1e-18, 1e-18), (single, 1e-22, 1e-22)),
    *((single, 1e25, 1e-25), (single, 1e-25, 1e25), (single, 1e36, 1e-3)),
    *((double, 1e153, 1e153), (double, 1e-180, 1e-180), (double, 1e200, 1e-200)),
]


def scaled(params, dtype, factor_H, factor_W):
    W, H = (np.asarray(leaf, dtype) for leaf in params)
    return ncjax.Params(jnp.asarray(W * dtype(factor_W)), jnp.asarray(H * dtype(factor_H)))


def long_double(params):
    return ncjax.Params(*(np.asarray(leaf, np.longdouble) for leaf in params))


def exact_last_layer(params):
    num_classes, per_class, dim = params.H.shape
    labels = np.repeat(np.arange(num_classes), per_class)
    return oracles.last_layer(np.asarray(params.H).reshape(-1, dim), labels, params.W)


def assert_near(value, exact, dtype, rounding):
    """Numbers below the least normal one count as 0."""
    tiny = float(np.finfo(dtype).tiny)
    assert float(value) == pytest.approx(float(exact), rel=rounding, abs=2 * tiny)


@pytest.mark.parametrize(("dtype", "factor_H", "factor_W"), SCALES)
def test_last_layer_is_right_at_any_scale(dtype, factor_H, factor_W):
    rng, labels = np.random.default_rng(0), np.arange(40) % 4
    features, W = rng.normal(size=(40, 6)), rng.normal(size=(4, 6))
    features = features.astype("f4").astype(dtype) * dtype(factor_H)
    W = W.astype("f4").astype(dtype) * dtype(factor_W)
    layer = ncjax.last_layer(features, labels, W)
    # The loss is the exponential of its logarithm, whose rounding it has.
    rounding = 40 * float(np.finfo(dtype).eps) * (1 + abs(float(layer.log_loss)))
    for name, exact in oracles.last_layer(features, labels, W).items():
        assert_near(getattr(layer, name), exact, dtype, rounding)


@pytest.mark.parametrize(("dtype", "factor_H", "factor_W"), SCALES)
def test_losses_ratios_and_angles_of_params_are_right_at_any_scale(
    dtype, factor_H, factor_W
):
    params = scaled(random_params(1, 3, 2, 7, 1.0), dtype, factor_H, factor_W)
    exact, found = exact_last_layer(params), compiled(params)
    rounding = 40 * float(np.finfo(dtype).eps)
    for name in ("margin_ratio", "kkt_angle"):
        assert_near(found[name], exact[name], dtype, rounding)
    assert_near(found["log_cross_entropy"], exact["log_loss"], dtype, rounding)
    even = ncjax.balance_norms(params)
    norms = [np.sqrt(np.sum(leaf**2)) for leaf in long_double(even)]
    assert_near(norms[0], norms[1], dtype, rounding)
    even = exact_last_layer(even)
    assert_near(even["least_margin"], exact["least_margin"], dtype, 1000 * rounding)


@pytest.mark.parametrize("multipliers", ["softmax", "nnls"])
@pytest.mark.parametrize(
    ("dtype", "factor_H", "factor_W"),
    [
        *((single, 1e18, 1e18), (single, 1e-22, 1e-22), (single, 1e15, 1e-15)),
        *((double, 1e150, 1e150), (double, 1e-180, 1e-180)),
    ],
)
def test_kkt_residuals_are_right_at_any_scale(dtype, factor_H, factor_W, multipliers):
    params = scaled(separating(0), dtype, factor_H, factor_W)
    found = ncjax.kkt(params, multipliers=multipliers)
    weights = np.asarray(found.multipliers, np.longdouble)
    assert (weights >= 0).all()
    eps = float(np.finfo(dtype).eps)
    assert float(found.infeasibility) == pytest.approx(0, abs=10 * eps)
    exact = exact_last_layer(params)["kkt_angle"]
    assert float(found.beta) == pytest.approx(float(np.sqrt(1 - exact**2)), abs=10 * eps)
    if not weights.any():  # the unbalanced point: a multiplier is below the least number
        return
    tangent, slack = oracles.tangent_and_slack(long_double(params), weights)
    assert float(found.stationarity) == pytest.approx(float(tangent), rel=40 * eps)
    assert float(found.complementarity) == pytest.approx(float(slack), abs=40 * eps)


@given(st.sampled_from([-60, -30, 3, 60]), floats)
def test_a_certificate_by_nnls_does_not_depend_on_a_power_of_two(p, dtype):
    params = scaled(separating(0), dtype, 1, 1)
    factor = 2.0 ** (p * (8 if dtype == double else 1))
    near, far = (
        ncjax.certificate(point, multipliers="nnls", tol=1e-3)
        for point in (params, scaled(params, dtype, factor, factor))
    )
    for name in ("dual", "sigma_max", "gap", "excess", "residual", "verdict"):
        np.testing.assert_array_equal(getattr(far, name), getattr(near, name), name)


@given(seeds, floats, st.integers(-100, 100))
def test_drift_and_restored_invariants_at_any_scale(seed, dtype, p):
    factor = dtype(2.0 ** (p * (9 if dtype == double else 1)))
    start = scaled(random_params(seed, 3, 2, 7, 1.0), dtype, 1, 1)
    moved = scaled(random_params(seed + 1, 3, 2, 7, 1.0), dtype, 1e-3, 1e-3)
    moved = jax.tree.map(jnp.add, start, moved)
    far, far_start = (jax.tree.map(lambda z: z * factor, z) for z in (moved, start))
    assert ncjax.invariant_drift(far, far_start) == ncjax.invariant_drift(moved, start)
    restored = _restored(far, far_start)
    for got, expected in zip(restored, _restored(moved, start), strict=True):
        np.testing.assert_array_equal(got / factor, expected)


_restored = jax.jit(ncjax.restore_invariants)


@pytest.mark.parametrize("centred_product", [True, False])
def test_cosine_margins_do_not_depend_on_the_scale(centred_product):
    rng, labels = np.random.default_rng(0), np.arange(12) % 3
    features, W = rng.normal(size=(12, 4)), rng.normal(size=(3, 4))
    data = oracles.Data(features, labels, W, np.zeros(3))
    exact = oracles.cosine_margins(data, centred_product)
    for p, q in ((80, 80), (-80, -80), (100, -100)):
        far = (features * 2.0**p).astype(single), labels, (W * 2.0**q).astype(single)
        got = variants.cosine_margins(*far, centred_product=centred_product)
        np.testing.assert_allclose(got, exact, atol=1e-5)


@given(seeds, floats, st.integers(-100, 100))
def test_the_root_of_a_scale_is_a_power_of_two(seed, dtype, p):
    array = np.random.default_rng(seed).normal(size=5).astype(dtype) * dtype(2.0**p)
    root = np.asarray(root_of_scale(jnp.asarray(array)))
    assert root.dtype == dtype
    assert np.frexp(root)[0] == 0.5
    assert root**2 <= np.abs(array).max() < 4 * root**2


@pytest.mark.parametrize("dtype", [single, double])
def test_scales_of_zeros_and_of_numbers_below_the_least_normal_one(dtype):
    tiny = np.finfo(dtype).tiny
    below = jnp.asarray([tiny / 8, 0], dtype)
    assert float(power_of_two(below)) >= tiny
    assert float(power_of_two(jnp.zeros(3, dtype))) == 0.5
    assert float(root_of_scale(jnp.zeros(3, dtype))) == np.sqrt(tiny)
    assert float(root_of_scale(below)) == np.sqrt(tiny)
