"""Gradient flow of networks on the clock of the loss: the method, the loss, its groups."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.optimize

import ncjax
from ncjax.networks import data, flow, full_batch, models, train
from ncjax.peeled.losses import softmax_cross_entropy

PER_CLASS = 10

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train", per_class=PER_CLASS)


@pytest.fixture(scope="module")
def convnet():
    return models.build("convnet", 10, width=0.1)


@pytest.fixture(scope="module")
def start(convnet):
    images = jnp.zeros((1, 8, 8, 1), jnp.float32)
    return jax.jit(convnet.init)(jax.random.key(0), images)["params"]


def logistic(w):
    """The loss e^-w of one sample with one weight: log L and its gradient."""
    return -w, -jnp.ones_like(w)


def softplus(w):
    """The loss log(1 + e^-w): its flow is w' = 1 / (1 + e^w)."""
    return jax.value_and_grad(lambda w: jnp.log(jnp.log1p(jnp.exp(-w))))(w)


def advance(loss, method, state):
    return jax.jit(functools.partial(flow.advance, loss, method))(state)


def follow(loss, state, method, log_t, most=2000):
    """Return the state once the flow has come to log_t."""
    step = jax.jit(functools.partial(flow.advance, loss, method))
    while state.log_time < log_t:
        state = step(state)
        assert state.gradients < most
    return state


@pytest.mark.parametrize("stages", [1, 2, 3, 8, 24])
def test_a_step_has_the_damped_chebyshev_polynomial(stages):
    eigenvalues = np.linspace(0.0, 2.0, 9)
    method = flow.make_method(max_stages=24)

    def linear(y):  # log L = Σ λ y² / 2, offset so that no test of the steps matters
        return -1e3 + jnp.sum(eigenvalues * y**2) / 2, eigenvalues * y

    state = flow.begin(linear, jnp.ones(9), step=0.9 * stages**2)
    state = state._replace(log_time=jnp.asarray(10.0), radius=jnp.asarray(1.9 / 0.9))
    assert flow.stages_of(method, state) == stages
    got = flow._chebyshev(linear, method, state, flow.stages_of(method, state))
    z = -0.9 * stages**2 * eigenvalues
    w0 = 1 + 0.05 / stages**2 if stages > 1 else 1.0
    T = np.polynomial.Chebyshev.basis(stages)
    w1 = T(w0) / T.deriv()(w0)
    expected = T(w0 + w1 * z) / T(w0)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert np.abs(got).max() <= 1 + 1e-12


def test_stages_are_stable_on_the_interval_that_the_step_uses():
    for stages in (2, 5, 20, 96):
        w0 = 1 + 0.05 / stages**2
        T = np.polynomial.Chebyshev.basis(stages)
        z = np.linspace(-flow._STABLE * stages**2, 0, 2001)
        largest = np.abs(T(w0 + T(w0) / T.deriv()(w0) * z) / T(w0)).max()
        assert largest <= 1 + 1e-9


@pytest.mark.parametrize("fall", [-3.0, -1e-4, 0.0, 1e-5, 0.5, 40.0, 300.0])
def test_elapsed_time_is_the_integral_over_a_linear_log_loss(fall):
    h, before = 0.7, 2.0
    expected = scipy.integrate.quad(
        lambda s: math.exp(fall * (s - h) / h), 0, h, points=[h]
    )[0]
    got = flow.log_elapsed(jnp.asarray(h), jnp.asarray(before), jnp.asarray(before - fall))
    assert float(got) == pytest.approx(math.log(expected) - before + fall, abs=1e-7)


@pytest.mark.parametrize("name", flow.METHODS)
def test_the_flow_of_one_weight_is_its_closed_form(name):
    """w' = 1 / (1 + e^w) has w + e^w = t + 1 from w = 0."""
    state = flow.begin(softplus, jnp.asarray(0.0), step=1e-2)
    method = flow.make_method(name)
    for log_t in (2.0, 6.0):
        state = follow(softplus, state, method, log_t)
        t = math.exp(state.log_time)
        exact = scipy.optimize.brentq(lambda w, t=t: w + math.exp(w) - t - 1, 0, 50)
        assert float(state.params) == pytest.approx(exact, rel=0.05)


def test_the_clock_is_exact_where_time_overflows():
    """For L = e^-w the flow is w = log(1 + t)."""
    method = flow.make_method()
    state = flow.begin(logistic, jnp.asarray(0.0))
    state = follow(logistic, state, method, 1000.0, most=10_000)
    assert float(state.log_time) == pytest.approx(float(state.params), rel=1e-9)
    assert float(state.excess) == pytest.approx(0, abs=1e-6)


def test_a_step_that_raises_the_loss_is_refused():
    method = flow.make_method("descent")

    def steep(w):
        return 50 * w**2, 100 * w

    before = flow.begin(steep, jnp.asarray(1.0), step=1.0)
    after = advance(steep, method, before)
    assert (after.params, after.log_time) == (before.params, before.log_time)
    assert after.refused == 1
    assert after.gradients == 2
    assert float(after.step) == pytest.approx(0.5)


def test_a_step_to_nan_is_refused():
    def broken(w):
        return jnp.where(w > 1, jnp.nan, -w), -jnp.ones_like(w)

    state = flow.begin(broken, jnp.asarray(0.0), step=2.0)
    state = advance(broken, flow.make_method(), state)
    assert state.refused == 1
    assert state.params == 0


def test_a_flow_at_a_minimum_is_stalled():
    def valley(w):
        return jnp.sum((w - 1) ** 2), 2 * (w - 1)

    state = flow.begin(valley, jnp.asarray(0.5))
    assert not flow.is_stalled(state)
    assert flow.is_stalled(state._replace(slope=jnp.asarray(1e-17)))
    assert flow.is_stalled(state._replace(slope=jnp.asarray(jnp.nan)))


def test_descent_and_stabilised_steps_agree_at_equal_times(convnet, start, digits):
    groups = full_batch.split(digits)
    loss = functools.partial(full_batch.log_loss, convnet, groups)
    ends = {
        name: follow(loss, flow.begin(loss, start), flow.make_method(name), 15.0)
        for name in flow.METHODS
    }
    metrics = {}
    for name, state in ends.items():
        found = full_batch.features(convnet, groups, state.params)
        last = train.classifier(state.params)
        metrics[name] = ncjax.collapse_metrics_from_features(*found, *last)
    one, other = (metrics[name] for name in flow.METHODS)
    for field in ("within_class_quotient", "centred_self_duality", "product_etf_error"):
        ratio = float(getattr(one, field) / getattr(other, field))
        assert 0.7 < ratio < 1.4, field


def test_log_loss_is_the_logarithm_of_the_summed_cross_entropy(convnet, start, digits):
    groups = full_batch.split(digits)
    got, slope = full_batch.log_loss(convnet, groups, start)

    def plain(params):
        images = data.normalise(groups.images[0], groups.mean, groups.deviation)
        averages = full_batch.batch_statistics(convnet, groups, params)
        (logits, _), _ = convnet.apply(
            {"params": params, "batch_stats": averages},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.sum(softmax_cross_entropy(logits, groups.labels[0]))

    loss, gradient = jax.value_and_grad(plain)(start)
    assert float(got) == pytest.approx(math.log(loss), rel=1e-5)
    expected = jax.tree.map(lambda leaf: leaf / loss, gradient)
    chex.assert_trees_all_close(slope, expected, rtol=1e-3, atol=1e-5)


def test_groups_add_up_to_one_batch_without_normalisation(digits):
    model = models.build("mlp", 10, width=0.1)
    params = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]
    whole, parts = (
        full_batch.log_loss(model, full_batch.split(digits, n), params) for n in (1, 5)
    )
    chex.assert_trees_all_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_groups_are_balanced_and_hold_each_sample_once(digits):
    groups = full_batch.split(digits, 5)
    for labels in groups.labels:
        assert np.bincount(labels).tolist() == [PER_CLASS // 5] * 10
    images = np.asarray(groups.images).reshape(len(digits.labels), -1)
    expected = digits.images.reshape(len(digits.labels), -1)
    np.testing.assert_array_equal(np.sort(images, axis=0), np.sort(expected, axis=0))


def test_groups_that_do_not_divide_the_set_are_refused(digits):
    with pytest.raises(ValueError, match="num_groups must divide the 100 images"):
        full_batch.split(digits, 3)


def test_evaluation_with_the_batch_statistics_is_training_mode(convnet, start, digits):
    groups = full_batch.split(digits)
    features, _ = full_batch.features(convnet, groups, start)
    averages = full_batch.batch_statistics(convnet, groups, start)
    images = data.normalise(groups.images[0], groups.mean, groups.deviation)
    variables = {"params": start, "batch_stats": averages}
    _, evaluated = convnet.apply(variables, images, train=False)
    np.testing.assert_allclose(features, evaluated, rtol=1e-3, atol=1e-4)


def test_log_loss_stays_exact_where_the_loss_underflows(convnet, start, digits):
    groups = full_batch.split(digits)
    scaled = start | {"classifier": jax.tree.map(lambda w: 1e5 * w, start["classifier"])}
    value, slope = full_batch.log_loss(convnet, groups, scaled)
    assert jnp.isfinite(value)
    chex.assert_tree_all_finite(slope)


@pytest.mark.parametrize("name", ["Stabilised", "", "adam"])
def test_unknown_methods_are_refused(name):
    with pytest.raises(ValueError, match="method must be one of stabilised, descent"):
        flow.make_method(name)


def test_bad_steps_and_stages_are_refused():
    with pytest.raises(ValueError, match="max_stages must be an integer of at least 2"):
        flow.make_method(max_stages=1)
    with pytest.raises(ValueError, match="step must be positive"):
        flow.begin(logistic, jnp.asarray(0.0), step=0.0)


def duality_by_loops(features, labels, W, b):
    """The parts of self-duality, with loops over samples and classes."""
    num_classes = len(W)
    logits = features @ W.T + b
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    gradient, multipliers = np.zeros_like(W), np.zeros((num_classes, num_classes))
    for h, y, p in zip(features, labels, weights, strict=True):
        for j in range(num_classes):
            gradient[j] -= p[j] * h
            if j != y:
                multipliers[y, j] += p[j]
        gradient[y] += h
    off = multipliers[~np.eye(num_classes, dtype=bool)]
    means = oracles.class_means(features, labels)
    means -= means.mean(axis=0)
    W = W - W.mean(axis=0)
    outside = W - W @ np.linalg.pinv(means) @ means

    def unit(matrix):
        return matrix / np.linalg.norm(matrix)

    return (
        off.std() / off.mean(),
        np.linalg.norm(unit(gradient) - unit(means)),
        np.linalg.norm(unit(W) - unit(gradient)),
        np.linalg.norm(outside) / np.linalg.norm(W),
    )


def test_duality_parts_agree_with_loops():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    W, b = rng.normal(size=(4, 7)), rng.normal(size=4)
    features = W[labels] + rng.normal(size=(40, 7))
    got = ncjax.duality_parts(features, labels, W, b)
    np.testing.assert_allclose(got, duality_by_loops(features, labels, W, b), rtol=1e-9)


def test_self_duality_is_at_most_the_sum_of_its_parts():
    rng = np.random.default_rng(1)
    labels = np.arange(30) % 3
    for _ in range(20):
        features, W = rng.normal(size=(30, 5)), rng.normal(size=(3, 5))
        parts = ncjax.duality_parts(features, labels, W)
        whole = ncjax.collapse_metrics_from_features(features, labels, W)
        bound = parts.multiplier_duality + parts.multiplier_distance
        assert whole.centred_self_duality <= bound + 1e-12


def test_duality_parts_hold_at_a_loss_that_underflows():
    etf = ncjax.simplex_etf(4, 6, dtype=jnp.float64)
    parts = ncjax.duality_parts(etf, jnp.arange(4), 1e4 * etf)
    np.testing.assert_allclose(parts, 0, atol=1e-9)
