import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, sine_params

import ncjax
from ncjax import Objective, losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, D = 4, 3, 6
COUNTS = (3, 1, 2, 3)
DECAY = {"weight_decay": (0.1, 0.4), "bias": 0.5}
OBJECTIVES = {
    "cross_entropy": Objective(**DECAY),
    "label_smoothing": Objective(smoothing=0.1, **DECAY),
    "focal": Objective("focal", gamma=2.0, **DECAY),
    "squared_error": Objective("squared_error", **DECAY),
    "ball": Objective(ball=(8.0, 24.0), bias=0.0),
    "normalised": Objective(temperature=3.0),
}


def biased(params):
    b = 0.3 * np.cos(np.arange(len(params.W)))
    return ncjax.BiasedParams(*params, jnp.asarray(b, params.W.dtype))


def sample_loss(objective, logits, k):
    """Loss of one sample from the definition, (K,) logits."""
    log_p = logits - np.log(np.sum(np.exp(logits)))
    target = np.eye(len(logits))[k]
    if objective.loss == "squared_error":
        return np.sum((logits - target) ** 2) / 2
    if objective.loss == "focal":
        return -((1 - np.exp(log_p[k])) ** objective.gamma) * log_p[k]
    alpha = objective.smoothing or 0.0
    return -((1 - alpha) * target + alpha / len(logits)) @ log_p


def logits_by_loops(objective, params):
    W, H = np.asarray(params.W), np.asarray(params.H)
    if objective.temperature is not None:
        W = objective.temperature * W / np.linalg.norm(W, axis=1, keepdims=True)
        lengths = np.linalg.norm(H, axis=2, keepdims=True)
        H = H / np.where(lengths > 0, lengths, 1)
    b = np.asarray(params.b) if objective.bias is not None else 0
    return H @ W.T + b


def by_loops(objective, params, weights):
    logits = logits_by_loops(objective, params)
    value = 0.0
    for k in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            if weights[k, i] > 0:
                value += weights[k, i] * sample_loss(objective, logits[k, i], k)
    kept = np.asarray(params.H)[weights > 0]
    decay = objective.weight_decay or (0.0, 0.0)
    value += decay[0] / 2 * np.sum(np.asarray(params.W) ** 2) + decay[1] / 2 * np.sum(
        kept**2
    )
    if objective.bias is not None:
        value += objective.bias / 2 * np.sum(np.asarray(params.b) ** 2)
    return value


def point(objective, params):
    return params if objective.bias is None else biased(params)


@jax.jit
def everything(params, weights):
    """Values, logarithms, losses, slopes and gradients of all objectives."""
    return {
        name: (
            objective(point(objective, params), weights),
            objective.log_loss(point(objective, params), weights),
            objective.sample_losses(point(objective, params)),
            objective.slopes(point(objective, params), weights),
            jax.grad(objective.loss_value)(point(objective, params), weights),
        )
        for name, objective in OBJECTIVES.items()
    }


@given(st.integers(0, 10**6), st.booleans())
def test_objectives_agree_with_loops_and_slopes_with_gradients(seed, whole):
    params = random_params(seed, K, N, D, 1.0)
    weights = np.random.default_rng(seed).uniform(0.2, 3, (K, N))
    if not whole:
        weights *= np.asarray(ncjax.sample_weights(COUNTS))
    for name, found in everything(params, jnp.asarray(weights)).items():
        objective = OBJECTIVES[name]
        at = point(objective, params)
        value, log_loss, each, slopes, gradient = found
        np.testing.assert_allclose(value, by_loops(objective, at, weights), rtol=1e-12)
        kept = np.where(weights > 0, weights * each, 0)
        np.testing.assert_allclose(np.exp(log_loss), kept.sum(), rtol=1e-12)
        if objective.loss != "squared_error":
            np.testing.assert_allclose(np.sum(slopes, axis=-1), 0, atol=1e-12)
        if objective.temperature is None:
            H = np.where(weights[..., None] > 0, params.H, 0)
            by_W = np.einsum("kij,kid->jd", slopes, H)
            by_H = np.einsum("kij,jd->kid", slopes, params.W)
            np.testing.assert_allclose(gradient.W, by_W, atol=1e-12)
            np.testing.assert_allclose(gradient.H, by_H, atol=1e-12)
        if objective.bias is not None:
            np.testing.assert_allclose(gradient.b, slopes.sum((0, 1)), atol=1e-12)


def test_reference_values_at_the_sine_start():
    params = sine_params()
    values = [
        (Objective(weight_decay=(0.1, 0.1))(params), 16.79666778715),
        (Objective("squared_error", weight_decay=(0.2, 0.2))(params), 6.92396837209),
        (Objective(weight_decay=(0.1, 0.1), bias=0.5)(biased(params)), 17.1786536973),
    ]
    W, H = params
    params = ncjax.Params(
        np.sqrt(8) * W / jnp.linalg.norm(W), np.sqrt(24) * H / jnp.linalg.norm(H)
    )
    values.append((Objective(ball=(8, 24))(params), 21.80998284))
    for value, expected in values:
        assert abs(value - expected) < 1e-8


def test_the_public_losses_are_the_objectives_alone():
    params = random_params(1, K, N, D, 1.0)
    weights = ncjax.sample_weights(COUNTS)
    pairs = [
        (losses.smoothed_cross_entropy(params, 0.1, weights), Objective(smoothing=0.1)),
        (losses.focal_loss(params, 2.0, weights), Objective("focal", gamma=2.0)),
        (losses.squared_error(params, weights), Objective("squared_error")),
    ]
    for value, objective in pairs:
        np.testing.assert_allclose(value, objective(params, weights), rtol=1e-14)
    logarithm = losses.log_focal_loss(params, 2.0, weights)
    np.testing.assert_allclose(jnp.exp(logarithm), pairs[1][0], rtol=1e-13)


def test_log_focal_loss_at_a_margin_of_a_million_is_minus_three_million():
    collapsed = ncjax.block_saddle(1, K, N, D)  # margins K / (K - 1)
    far = jax.tree.map(lambda leaf: 1e3 * leaf, collapsed)
    margin = 1e6 * K / (K - 1)
    a = np.log(K - 1) - margin
    expected = np.log(K * N) + 3 * a
    np.testing.assert_allclose(losses.log_focal_loss(far, 2.0), expected, rtol=1e-14)


def test_slopes_keep_their_digits_at_large_margins():
    collapsed = ncjax.block_saddle(1, K, 1, D)
    far = jax.tree.map(lambda leaf: 10.0 * leaf, collapsed)
    small = np.exp(-100 * K / (K - 1))
    expected = small * (1 - K * np.eye(K))[:, None]
    np.testing.assert_allclose(Objective().slopes(far), expected, rtol=1e-11)


def test_a_function_of_logits_and_labels_is_a_loss():
    params = random_params(2, K, N, D, 1.0)
    given = Objective(optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(given(params), Objective()(params), rtol=1e-12)
    np.testing.assert_allclose(given.slopes(params), Objective().slopes(params), atol=1e-14)


def test_numbers_may_be_traced_and_equal_objectives_compile_once():
    params = random_params(3, K, N, D, 1.0)
    traces = []

    @jax.jit
    def value(decay):
        traces.append(decay)
        return Objective(weight_decay=(decay, 2 * decay))(params)

    for decay in (0.1, 0.2):
        expected = Objective(weight_decay=(decay, 2 * decay))(params)
        np.testing.assert_allclose(value(decay), expected, rtol=1e-14)
    assert len(traces) == 1
    first, second = Objective(weight_decay=[0.1, 0.2]), Objective(weight_decay=(0.1, 0.2))
    assert first == second
    assert hash(first) == hash(second)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, first), first)
    assert abs(float(first.mu) - np.sqrt(0.02)) < 1e-15
    assert float(Objective(ball=(2, 8)).tau) == 4


def test_an_objective_shows_the_settings_that_are_given():
    objective = Objective("focal", gamma=0.0, weight_decay=(0.1, 0.2), bias=0.0)
    shown = "Objective('focal', gamma=0.0, weight_decay=(0.1, 0.2), bias=0.0)"
    assert repr(objective) == shown
    assert repr(Objective(fixed_classifier=True)) == (
        "Objective('cross_entropy', fixed_classifier=True)"
    )


def test_a_fixed_classifier_has_no_gradient():
    params = random_params(4, K, N, D, 1.0)
    objective = Objective(weight_decay=(0.1, 0.1), fixed_classifier=True)
    free = dataclasses.replace(objective, fixed_classifier=False)
    fixed, moving = jax.grad(objective)(params), jax.grad(free)(params)
    assert not jnp.any(fixed.W)
    np.testing.assert_array_equal(fixed.H, moving.H)


def test_the_boundary_loss_does_not_depend_on_the_norms():
    params = random_params(5, K, N, D, 1.0)
    objective = Objective(ball=(8.0, 24.0))
    scaled = ncjax.Params(3.0 * params.W, 0.2 * params.H)
    value = objective.on_boundary(params)
    np.testing.assert_allclose(objective.on_boundary(scaled), value, rtol=1e-13)
    W, H = (
        np.sqrt(bound) * leaf / jnp.linalg.norm(leaf)
        for bound, leaf in zip((8, 24), params, strict=True)
    )
    np.testing.assert_allclose(objective(ncjax.Params(W, H)), value, rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_narrow_floats_give_float32(dtype):
    params = random_params(6, K, N, D, 1.0, dtype)
    for objective in OBJECTIVES.values():
        assert objective(point(objective, params)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of cross_entropy, focal, squared_error"),
        ({"loss": "focal"}, "the focal loss needs gamma, such as gamma=2, got None"),
        ({"gamma": 2.0}, "gamma is for loss='focal', got loss='cross_entropy'"),
        ({"loss": "squared_error", "smoothing": 0.1}, "smoothing is for"),
        ({"loss": "focal", "gamma": -1.0}, "gamma must be finite and not negative"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": (-0.1, 0.1)}, "weight_decay must be finite and not negative"),
        ({"weight_decay": (np.nan, 0.1)}, "weight_decay must be finite"),
        ({"weight_decay": 0.1}, r"pair of numbers, \(lambda_W, lambda_H\), got 0.1"),
        ({"weight_decay": (0.1, 0.1, 0.1)}, "weight_decay must be a pair"),
        ({"ball": (0.0, 1.0)}, "ball must be positive and finite, got 0"),
        ({"ball": ("1", 1.0)}, "ball must be a number, got '1'"),
        ({"bias": -1.0}, "bias must be finite and not negative"),
        ({"bias": True}, "bias must be a number, got True"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": 1.0, "bias": 0.0}, "temperature takes no bias"),
        ({"weight_decay": (1, 1), "ball": (1, 1)}, "got weight_decay and ball"),
        ({"weight_decay": "ab"}, "weight_decay must be a pair of numbers"),
        ({"weight_decay": {1, 2}}, "weight_decay must be a pair of numbers"),
        ({"weight_decay": np.array(1.0)}, "weight_decay must be a pair of numbers"),
        ({"weight_decay": (None, 1)}, "weight_decay must be a number, got None"),
        ({"weight_decay": (1j, 1)}, "weight_decay must be a number, got 1j"),
        ({"weight_decay": (jnp.array(-1.0), 1)}, "weight_decay must be finite and not"),
        ({"bias": np.True_}, "bias must be a number, got"),
        ({"smoothing": "a"}, "smoothing must be a number, got 'a'"),
        ({"loss": "focal", "gamma": [1]}, r"gamma must be a number, got \[1\]"),
        ({"fixed_classifier": "no"}, "fixed_classifier must be True or False, got 'no'"),
    ],
)
def test_bad_settings_are_named_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Objective(**settings)
    assert "\n" not in str(error.value)


def test_points_and_weights_that_do_not_fit_are_named():
    params = random_params(7, K, N, D, 1.0)
    free, ones = Objective(bias=0.0), np.ones(2)
    b = biased(params)
    small = random_params(7, K, N, D, 1.0, jnp.float32)
    best = partial(ncjax.minimiser, Objective(weight_decay=(1, 1)), dim=2)
    calls = [
        (lambda: Objective()(b), "the objective has no bias, got BiasedParams"),
        (lambda: free(params), r"expected ncjax.BiasedParams\(W, H, b\), got Params"),
        (lambda: free(b._replace(b=b.b[:2])), r"expected b float64 of shape \(K,\)"),
        (lambda: Objective().on_boundary(params), "needs an objective with a ball"),
        (lambda: Objective()(params, np.ones(3)), r"got \(3,\)"),
        (lambda: Objective()(params, -np.ones((K, N))), "weights must not be negative"),
        (lambda: Objective()(params, np.array([1, 1, 1, 0.0])), "got none for class 3"),
        (lambda: Objective()(params, np.full((K, N), np.nan)), "weights must be finite"),
        (lambda: ncjax.sample_weights((3, 0)), "counts must be an integer of at least 1"),
        (lambda: ncjax.sample_weights((3,)), "of each of K >= 2 classes"),
        (lambda: ncjax.sample_weights((3, 2), (1, 0)), "class_weights must be positive"),
        (lambda: ncjax.sample_weights((3, 2), (1, 1, 1)), "class_weights must have shape"),
        (lambda: Objective()(small, np.full((K, N), 1e39)), "weights must be finite"),
        (lambda: Objective()(small, np.full((K, N), 1e-60)), "0 or at least 1.18e-38 in"),
        (lambda: Objective()(params, np.full((K, N), 1j)), "weights must be real, got"),
        (lambda: ncjax.sample_weights((3, 2), (1, -1)), "got -1 for class 1"),
        (lambda: ncjax.sample_weights([[1, 2], 3]), "counts must be an array of numbers"),
        (lambda: jax.jit(ncjax.sample_weights)(np.array((3, 2))), "got a traced array"),
        (lambda: best((3, 2), class_weights="ab"), "class_weights must be an array"),
        (lambda: jax.jit(lambda w: best((3, 2), class_weights=w).value)(ones), "traced"),
        (lambda: losses.smoothed_cross_entropy(params, 1.5), "smoothing must lie in"),
        (lambda: losses.focal_loss(params, -1.0), "gamma must be finite"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_sample_weights_are_class_weights_up_to_the_counts():
    weights = ncjax.sample_weights((2, 3, 1), (1.0, 0.5, 4.0))
    np.testing.assert_array_equal(weights, [[1, 1, 0], [0.5, 0.5, 0.5], [4, 0, 0]])


def test_a_sample_of_weight_0_has_no_influence():
    params = random_params(8, K, N, D, 1.0)
    weights = ncjax.sample_weights(COUNTS)
    moved = params._replace(H=params.H.at[1, 1:].set(1e3))
    for objective in OBJECTIVES.values():
        here, there = point(objective, params), point(objective, moved)
        assert objective(here, weights) == objective(there, weights)
        gradient = jax.grad(objective)(there, weights)
        assert not jnp.any(gradient.H[1, 1:])
        assert np.isfinite(gradient.W).all()


@pytest.mark.parametrize("value", [np.nan, 1e300])
def test_no_number_of_a_sample_of_weight_0_reaches_a_loss_or_its_gradient(value):
    params = random_params(8, K, N, D, 1.0)
    weights = ncjax.sample_weights(COUNTS)
    moved = params._replace(H=params.H.at[1, 1:].set(value))
    functions = [
        lambda p: losses.smoothed_cross_entropy(p, 0.1, weights),
        lambda p: losses.focal_loss(p, 2.0, weights),
        lambda p: losses.log_focal_loss(p, 2.0, weights),
        lambda p: losses.squared_error(p, weights),
        lambda p: ncjax.margins(p, weights).min(),
    ]
    for function in functions:
        here, there = (jax.value_and_grad(function)(p) for p in (params, moved))
        chex.assert_trees_all_equal(here, there)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": np.array([0.1, 0.2])},
        {"weight_decay": jnp.array([0.1, 0.2]), "bias": np.float64(0.1)},
        {"temperature": np.float64(2.0)},
        {"loss": "focal", "gamma": jnp.asarray(2.0)},
        {"smoothing": np.float32(0.25)},
    ],
)
def test_numbers_of_any_library_are_floats_that_take_the_dtype_of_the_point(settings):
    objective = Objective(**settings)
    assert {type(number) for number in jax.tree.leaves(objective)} == {float}
    assert hash(objective) == hash(dataclasses.replace(objective))
    params = point(objective, random_params(9, K, N, D, 1.0, jnp.float32))
    assert objective(params).dtype == jnp.float32


def test_a_gradient_in_the_numbers_is_an_objective_of_any_sign():
    params = random_params(10, K, N, D, 1.0)
    objective = Objective("focal", gamma=2.0, weight_decay=(0.1, 0.2))
    slope = jax.tree.map(float, jax.grad(lambda o: o(params))(objective))
    h = 1e-5
    above, below = (
        dataclasses.replace(objective, gamma=2 + step)(params) for step in (h, -h)
    )
    assert slope.gamma < 0
    np.testing.assert_allclose(slope.gamma, (above - below) / (2 * h), rtol=1e-8)
    W, H = (float(jnp.sum(leaf**2)) / 2 for leaf in params)
    np.testing.assert_allclose(slope.weight_decay, (W, H), rtol=1e-13)


def test_vmap_takes_the_axes_of_an_objective_as_an_objective():
    params = random_params(11, K, N, D, 1.0)
    many = Objective(ball=(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    axes = jax.tree.map(lambda leaf: 0, many)
    values = jax.vmap(lambda o: o.on_boundary(params), in_axes=(axes,))(many)
    expected = [Objective(ball=ball).on_boundary(params) for ball in ((1, 3), (2, 4))]
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    with pytest.raises(ValueError, match="one objective at a time"):
        ncjax.minimiser(many, (2, 2), 2)


def test_the_boundary_loss_at_any_scale_of_the_point():
    params = random_params(12, K, N, D, 1.0)
    objective = Objective(ball=(8.0, 24.0))
    far = ncjax.Params(1e200 * params.W, 1e-200 * params.H)
    np.testing.assert_allclose(
        objective.on_boundary(far), objective.on_boundary(params), rtol=1e-13
    )
