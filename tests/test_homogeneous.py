"""Networks without normalisation are homogeneous, and flow as theory says."""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.networks import flow, models
from ncjax.networks.homogeneous import (
    Homogeneity,
    homogeneity,
    squared_norm_differences,
)
from ncjax.peeled.kernels import log_softplus
from ncjax.peeled.logits import log_odds_of_error, margins_of_samples

pytestmark = pytest.mark.usefixtures("quick_compilation")

K = 3
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vgg11": ("vgg11", {"width": 1 / 32, "norm": "none"}, 9),
    "vgg11-mlp": ("vgg11", {"width": 1 / 64, "norm": "none", "head": "mlp"}, 11),
    "convnet": ("convnet", {"width": 1 / 8, "norm": "none"}, 4),
    "mlp": ("mlp", {"hidden": (7, 6, 5), "hidden_bias": False, "use_bias": False}, 4),
    "mlp-1": ("mlp", {"hidden": (7,), "use_bias": False}, 2),
    "linear": ("mlp", {"hidden": (), "use_bias": False}, 1),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def build(network):
    name, options, degree = NETWORKS[network]
    return models.build(name, K, dtype=jnp.float64, **options), degree


def draw(model, shape, seed=0):
    """Images and parameters, with a bias in the first layer that is not zero."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(4, *shape))
    zeros = models.abstract_variables(model, shape)["params"]
    scale = {"kernel": lambda s: math.sqrt(2 / math.prod(s[:-1])), "bias": lambda s: 1.0}
    params = {
        name: {k: scale[k](v.shape) * rng.normal(size=v.shape) for k, v in layer.items()}
        for name, layer in zeros.items()
    }
    return images, params


@every_network
def test_logits_are_homogeneous_of_the_degree_of_the_network(network):
    model, degree = build(network)
    images, params = draw(model, (32, 32, 1))
    assert models.degree(model) == degree
    assert sorted(models.weight_layers(model)) == sorted(params)

    @jax.jit
    def logits(c):
        scaled = jax.tree.map(lambda x: c * x, params)
        return model.apply({"params": scaled}, images)[0]

    got = logits(1.0)
    assert got.dtype == jnp.float64
    assert np.ptp(got) > 1e-3
    np.testing.assert_allclose(logits(1.7), 1.7**degree * got, rtol=1e-11)


@every_network
def test_only_the_first_layer_has_a_bias(network):
    model, _ = build(network)
    variables = models.abstract_variables(model, (32, 32, 1))
    assert set(variables) == {"params"}
    biased = [name for name, layer in variables["params"].items() if "bias" in layer]
    first, *rest = models.weight_layers(model)
    assert biased == ([first] if rest else [])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"use_bias": False}),
        ("vgg11", {"use_bias": False}),
        ("convnet", {}),
        ("mlp", {}),
        ("mlp", {"hidden_bias": False}),
        ("mlp", {"use_bias": False}),
    ],
)
def test_other_networks_have_no_degree(name, options):
    with pytest.raises(ValueError, match="is not homogeneous: build a VGG or ConvNet"):
        models.degree(models.build(name, K, **options))


def test_options_of_homogeneous_networks_are_checked():
    with pytest.raises(ValueError, match="norm must be one of batch, none, got 'layer'"):
        models.build("vgg11", K, norm="layer")
    with pytest.raises(ValueError, match="no bias in the classifier: pass use_bias=False"):
        models.build("convnet", K, norm="none", use_bias=True)
    with pytest.raises(ValueError, match="no bias in the classifier: pass use_bias=False"):
        models.abstract_variables(models.ConvNet(K, norm="none"), (8, 8, 1))
    assert models.build("convnet", K, norm="none") == models.ConvNet(
        K, norm="none", use_bias=False
    )
    assert models.build("convnet", K, norm="batch") == models.ConvNet(K)


def test_the_first_activations_keep_their_mean_square():
    """He et al. (2015): half the variance of the sums times two."""
    vgg = models.build("vgg11", K, norm="none", width=1 / 4)
    params = jax.jit(vgg.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3), jnp.float32))
    for name, layer in params["params"].items():
        kernel = np.asarray(layer["kernel"], float)
        fan_in = math.prod(kernel.shape[:-1])
        spread = 5 / math.sqrt(2 * kernel.size)
        assert abs(kernel.std() / math.sqrt(2 / fan_in) - 1) < spread, name


@pytest.mark.parametrize("network", ["convnet", "mlp"])
def test_all_layers_grow_alike(network):
    """<θ_l, ∇_l f> = f for each layer l, the first one with its bias."""
    model, _ = build(network)
    images, params = draw(model, (8, 8, 1))
    weights = np.random.default_rng(2).normal(size=(4, K))

    def total(params):
        return jnp.sum(weights * model.apply({"params": params}, images)[0])

    value, slope = jax.jit(jax.value_and_grad(total))(params)
    for name in models.weight_layers(model):
        inner = sum(np.sum(params[name][k] * slope[name][k]) for k in slope[name])
        np.testing.assert_allclose(inner, value, rtol=1e-12, err_msg=name)


def test_quantities_have_their_definitions():
    rng = np.random.default_rng(3)
    params = {"a": {"kernel": rng.normal(size=(3, 2))}, "b": {"kernel": rng.normal(size=4)}}
    slope = jax.tree.map(lambda x: -x + 0.1 * rng.normal(size=x.shape), params)
    log_loss, log_time, least, degree = -1.3, 2.5, 0.7, 5
    got = homogeneity(
        *jax.tree.map(jnp.asarray, (params, slope)), log_loss, log_time, least, degree
    )
    theta, gradient = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
        for tree in (params, slope)
    )
    norm = np.linalg.norm(theta)
    cosine = -theta @ gradient / norm / np.linalg.norm(gradient)
    loss, time = math.exp(log_loss), math.exp(log_time)
    expected = Homogeneity(
        squared_norm=norm**2,
        margin=least / norm**degree,
        log_margin=math.log(least / norm**degree),
        log_smoothed_margin=math.log(-math.log(math.exp(loss) - 1) / norm**degree),
        kkt_angle=math.sqrt(1 - cosine**2),
        norm_growth=norm**2 / log_time ** (2 / degree),
        loss_growth=time * loss * log_time ** (2 - 2 / degree),
    )
    np.testing.assert_allclose(got, expected, rtol=1e-11)


def test_a_misclassified_sample_has_a_margin_but_no_logarithm():
    theta = {"w": jnp.asarray([3.0, 4.0])}
    got = homogeneity(theta, theta, math.log(2), -1.0, -50.0, degree=2)
    np.testing.assert_allclose([got.margin, got.kkt_angle], [-2.0, 0.0], atol=1e-15)
    undefined = [got.log_margin, got.log_smoothed_margin, got.norm_growth, got.loss_growth]
    assert np.isnan(undefined[0])
    assert np.all(np.isnan(undefined[2:]))
    assert not undefined[1] > -30  # L = log 2 up to a rounding: the smoothed margin is 0


@pytest.mark.parametrize("margin", [0.05, 1.0, 15.0, 25.0, 40.0, 3000.0])
def test_the_smoothed_margin_of_one_sample_is_its_margin(margin):
    log_loss = log_softplus(jnp.asarray(-margin))
    theta = {"w": jnp.asarray([2.0])}
    got = homogeneity(theta, theta, log_loss, 1.0, margin, degree=3)
    np.testing.assert_allclose(got.log_smoothed_margin, got.log_margin, atol=1e-13)


@pytest.mark.parametrize(
    ("degree", "margin", "dtype"),
    [
        (1, 2e3, np.float64),
        (3, 2e3, np.float32),
        (3, 1e6, np.float64),
        (19, 2e3, np.float32),
        (19, 1e6, np.float64),
    ],
)
def test_growth_tends_to_its_limits_on_a_flow_in_closed_form(degree, margin, dtype):
    """p equal factors θ with margin m = θ^p of one sample, whose 2V is p.

    dm/dt = p m^a e^-m with a = 2 - 2/p, hence t = e^m m^-a (1 + a/m + ...) / p.
    """
    p, m, a = degree, margin, 2 - 2 / degree
    factors = {f"w{i}": jnp.full(1, m ** (1 / p), dtype) for i in range(p)}
    slope = jax.tree.map(lambda w: -m / w, factors)
    log_time = m - math.log(p) - a * math.log(m) + math.log1p(a / m + a * (a + 1) / m**2)
    got = homogeneity(factors, slope, -m, log_time, m, p)
    assert {x.dtype for x in got} == {np.dtype(dtype)}
    eps = float(np.finfo(dtype).eps)
    gap = (math.log(p) + a * math.log(m)) / m  # of m / log t
    late = 3 * gap**2
    np.testing.assert_allclose(got.kkt_angle, 0, atol=10 * eps)
    np.testing.assert_allclose(got.log_margin, -p / 2 * math.log(p), atol=40 * eps * p)
    np.testing.assert_allclose(got.log_smoothed_margin, got.log_margin, atol=40 * eps)
    np.testing.assert_allclose(got.squared_norm, p * m ** (2 / p), rtol=40 * eps)
    np.testing.assert_allclose(got.norm_growth / p, 1 + 2 / p * gap, atol=late + 40 * eps)
    np.testing.assert_allclose(
        got.loss_growth * p, 1 - a * gap + a / m, atol=late + 4 * eps * m
    )


def test_what_does_not_fit_is_named():
    theta = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"degree must be .*at least 1, got 0"):
        homogeneity(theta, theta, 0.0, 0.0, 0.0, degree=0)
    with pytest.raises(ValueError, match="expected the layers w, got w, classifier"):
        squared_norm_differences({"w": theta}, ("w", "classifier"))


# A network of degree 3 on three noisy classes, in float64.
P = 3
LAYERS = ("fc1", "fc2", "classifier")
NUMBER = 1000  # steps of one walk


@cache
def problem():
    """Network, images, labels, and a start with layers of unequal norms."""
    rng = np.random.default_rng(4)
    labels = (np.arange(12) % K).astype(np.int32)
    centres = rng.normal(size=(K, 2, 2, 1))
    images = centres[labels] + 0.1 * rng.normal(size=(12, 2, 2, 1))
    options = {"hidden": (10, 10), "hidden_bias": False, "use_bias": False}
    model = models.build("mlp", K, dtype=jnp.float64, **options)
    _, params = draw(model, (2, 2, 1), seed=4)
    params["fc1"] = {kind: x / 2 for kind, x in params["fc1"].items()}
    return model, images, labels, params


def margins(params):
    """Margins (12, K), and the mask of the other classes."""
    model, images, labels, _ = problem()
    logits, _ = model.apply({"params": params}, jnp.asarray(images))
    return margins_of_samples(logits, jnp.asarray(labels))


@jax.value_and_grad
def log_loss_and_slope(params):
    return jax.nn.logsumexp(log_softplus(log_odds_of_error(*margins(params))))


@cache
def start():
    params = jax.tree.map(jnp.asarray, problem()[-1])
    return jax.jit(partial(flow.begin, log_loss_and_slope))(params)


class Path(NamedTuple):
    """Values after each step."""

    log_loss: jax.Array
    log_time: jax.Array
    homogeneity: Homogeneity
    differences: jax.Array


@partial(jax.jit, static_argnames=("name", "stages", "number"))
def walk(state, step, name="descent", stages=1, number=NUMBER):
    """Return the state after steps of one length, shorter after rough ones, and path."""
    method = flow.make_method(name)._replace(settled=-math.inf)

    def advance(carry, _):
        state, length = carry
        # A radius at which a step of this length needs so many stages.
        state = state._replace(step=length, radius=1.8 * stages**2 / length)
        refused = state.refused
        state = flow.advance(log_loss_and_slope, method, state)
        rough = (state.refused > refused) | (state.excess >= 1.5)
        length = jnp.where(rough, length / 2, length)
        values, others = margins(state.params)
        least = jnp.min(jnp.where(others, values, jnp.inf))
        numbers = state.log_loss, state.log_time, least
        return (state, length), Path(
            state.log_loss,
            state.log_time,
            homogeneity(state.params, state.slope, *numbers, degree=P),
            squared_norm_differences(state.params, LAYERS),
        )

    start = state, jnp.asarray(step, jnp.float64)
    (state, _), path = jax.lax.scan(advance, start, length=number)
    return state, path


@cache
def coarse():
    """To s = 4 by steps of 1/250."""
    return walk(start(), 4 / NUMBER)[1]


@cache
def fine():
    """To s = 4 by steps of 1/500: the last state, and the path."""
    middle, first = walk(start(), 2 / NUMBER)
    end, second = walk(middle, 2 / NUMBER)
    return end, jax.tree.map(lambda *x: np.concatenate(x), first, second)


def late(path):
    """The part of a path with L < log 2."""
    (index,) = np.nonzero(np.asarray(path.log_loss) < math.log(math.log(2)))
    assert index.size > 20
    return jax.tree.map(lambda x: np.asarray(x)[index], path)


def test_euler_identity_of_the_loss():
    state = start()
    values, others = (np.asarray(x) for x in margins(state.params))
    odds = np.where(others, np.exp(-values), 0)
    total = odds.sum(axis=1, keepdims=True)
    loss = np.sum(np.log1p(total))
    leaves = zip(*map(jax.tree.leaves, (state.params, state.slope)), strict=True)
    inner = -sum(np.sum(x * g) for x, g in leaves)
    expected = P * np.sum(odds / (1 + total) * np.where(others, values, 0)) / loss
    np.testing.assert_allclose(inner, expected, rtol=1e-12)


def test_the_smoothed_margin_does_not_fall_and_bounds_the_margin():
    paths = (coarse(), fine()[1], walk(start(), 8e-3, "stabilised", 4, NUMBER // 2)[1])
    for path in map(late, paths):
        smoothed, margin = path.homogeneity.log_smoothed_margin, path.homogeneity.log_margin
        assert np.all(np.diff(smoothed) > 0)
        assert smoothed[-1] > smoothed[0] + 1
        assert np.all(smoothed < margin)
        gap = np.exp(margin) - np.exp(smoothed)
        bound = math.log(12 * (K - 1)) * path.homogeneity.squared_norm ** (-P / 2)
        assert np.all(gap <= bound)


def test_descent_and_stabilised_steps_follow_the_same_path():
    end, path = fine()
    other, _ = walk(start(), 8e-3, "stabilised", 4, NUMBER // 2)
    assert end.refused == other.refused == 0
    at = partial(np.interp, other.log_time, path.log_time)
    np.testing.assert_allclose(other.log_loss, at(path.log_loss), atol=0.05)


def test_the_drift_of_conserved_differences_is_proportional_to_the_step():
    before = squared_norm_differences(start().params, LAYERS)
    drifts = [path.differences[-1] - before for path in (coarse(), fine()[1])]
    np.testing.assert_allclose(drifts[0] / drifts[1], 2, rtol=0.1)
    assert np.all(np.abs(drifts[1]) < 1e-2)
    assert np.all(np.abs(before) > 1)


def test_angle_and_growth_approach_their_limits():
    """The direction still turns, so that V comes from the margin of the same point."""
    end, path = fine()
    angles = late(path).homogeneity.kkt_angle[::50]
    assert np.all(np.diff(angles) < 0)
    state, _ = walk(end, 2e-4)
    state, further = walk(state, 2e-4)
    assert end.log_time < 30
    assert state.log_time > 150
    assert further.homogeneity.kkt_angle[-1] < 0.8 * angles[-1]
    gaps = []
    for part in (path, further):
        last = jax.tree.map(lambda x: x[-1], part.homogeneity)
        twice_value = np.exp(-2 / P * last.log_margin)
        ratios = last.norm_growth / twice_value, P**2 * last.loss_growth / twice_value
        gaps.append(np.abs(np.log(ratios)))
    assert np.all(gaps[1] < [0.04, 0.2])
    assert np.all(gaps[1] < gaps[0] / 3)
