"""A network's last layer as a layer-peeled model, against the model and NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, sizes

import ncjax

pytestmark = pytest.mark.usefixtures("quick_compilation")


def last_layer_of(params):
    """`ncjax.last_layer` of the samples of a model, in another order."""
    num_classes, per_class, dim = params.H.shape
    labels = np.repeat(np.arange(num_classes), per_class)
    order = np.random.default_rng(0).permutation(labels.size)
    features = np.asarray(params.H).reshape(-1, dim)
    return ncjax.last_layer(features[order], labels[order], params.W)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_last_layer_agrees_with_the_peeled_model_for_equal_classes(key, scale):
    params = ncjax.init_params(key, 4, 3, 6, scale)
    layer = last_layer_of(params)
    assert layer.log_loss == pytest.approx(float(ncjax.log_cross_entropy(params)))
    assert layer.least_margin == pytest.approx(float(ncjax.margins(params).min()))
    assert layer.margin_ratio == pytest.approx(float(ncjax.margin_ratio(params)))
    assert layer.kkt_angle == pytest.approx(float(ncjax.kkt_angle(params)), rel=1e-10)


def test_last_layer_keeps_its_digits_at_an_underflowing_loss(key):
    start = ncjax.init_params(key, 4, 3, 6)
    far = ncjax.gradient_flow(start, [2000.0]).final
    layer = last_layer_of(far)
    assert layer.loss == 0
    assert layer.log_loss == pytest.approx(float(ncjax.log_cross_entropy(far)), rel=1e-12)
    assert layer.kkt_angle == pytest.approx(float(ncjax.kkt_angle(far)), rel=1e-6)


@given(
    counts=st.sampled_from([[1, 1], [4, 1, 2], [2, 3, 1, 4]]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_last_layer_with_unequal_classes_and_bias_agrees_with_loops(
    counts, with_bias, seed
):
    rng = np.random.default_rng(seed)
    num_classes, dim = len(counts), 3
    labels = rng.permutation(np.repeat(np.arange(num_classes), counts))
    features = rng.normal(size=(labels.size, dim))
    W, b = rng.normal(size=(num_classes, dim)), rng.normal(size=num_classes)
    layer = ncjax.last_layer(features, labels, W, b if with_bias else None)
    logits = features @ W.T + (b if with_bias else 0)
    margins = [logits[a, y] - max(np.delete(logits[a], y)) for a, y in enumerate(labels)]
    losses = [np.log(np.exp(z - z[y]).sum()) for z, y in zip(logits, labels, strict=True)]
    full_W = np.column_stack([W, b]) if with_bias else W
    full_H = np.column_stack([features, np.ones(labels.size)]) if with_bias else features
    squares = (full_W**2).sum() + (full_H**2).sum()
    optimum = (num_classes - 1) * np.sqrt(min(counts))
    np.testing.assert_allclose(layer.loss, np.mean(losses), rtol=1e-9)
    np.testing.assert_allclose(layer.least_margin, min(margins), rtol=1e-9)
    np.testing.assert_allclose(
        layer.margin_ratio, 2 * optimum * min(margins) / squares, rtol=1e-9
    )
    norms = np.linalg.norm(full_W) * np.linalg.norm(full_H)
    np.testing.assert_allclose(
        layer.balanced_margin_ratio, optimum * min(margins) / norms, rtol=1e-9
    )
    beta = beta_by_loops(full_W, full_H, labels)
    np.testing.assert_allclose(
        layer.kkt_angle, np.sqrt(max(0.0, 1 - beta**2)), rtol=1e-6, atol=1e-7
    )
    assert layer.margin_ratio <= 1


def beta_by_loops(W, H, labels):
    """<Z, -∇L> / (|Z| |∇L|), gradients written out sample by sample."""
    gradient_W, gradient_H = np.zeros_like(W), np.zeros_like(H)
    for a, y in enumerate(labels):
        z = W @ H[a]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        p[y] -= 1
        gradient_W += np.outer(p, H[a])
        gradient_H[a] = W.T @ p
    inner = -(gradient_W * W).sum() - (gradient_H * H).sum()
    norm = np.sqrt((W**2).sum() + (H**2).sum())
    return inner / norm / np.sqrt((gradient_W**2).sum() + (gradient_H**2).sum())


def test_collapse_has_margin_ratio_one_for_any_scales_of_W_and_H():
    collapse = ncjax.block_saddle(1, 5, per_class=4, dim=6)
    split = ncjax.Params(7 * collapse.W, collapse.H / 3)
    layer = last_layer_of(split)
    assert layer.balanced_margin_ratio == pytest.approx(1)
    assert layer.margin_ratio < 0.5
    assert last_layer_of(collapse).margin_ratio == pytest.approx(1)


def test_float32_and_half_precision(key):
    params = ncjax.init_params(key, 5, 10, 8, scale=1.0, dtype=jnp.float32)
    exact = last_layer_of(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params))
    got = last_layer_of(params)
    for name, value in got._asdict().items():
        assert value.dtype == jnp.float32
        assert value == pytest.approx(float(getattr(exact, name)), rel=1e-5), name
    half = ncjax.last_layer(
        params.H.reshape(-1, 8).astype(jnp.bfloat16), np.repeat(np.arange(5), 10), params.W
    )
    assert half.loss.dtype == jnp.float32


def test_peel_takes_the_first_of_each_class_in_order():
    labels = np.array([1, 0, 1, 2, 0, 2, 1, 0])
    features = np.arange(16.0).reshape(8, 2)
    W, b = np.arange(6.0).reshape(3, 2), np.array([5.0, 6.0, 7.0])
    params = ncjax.peel(features, labels, W, b)
    np.testing.assert_array_equal(params.W, np.column_stack([W, b]))
    expected = [[features[labels == k][i] for i in range(2)] for k in range(3)]
    np.testing.assert_array_equal(params.H[..., :2], expected)
    np.testing.assert_array_equal(params.H[..., 2], 1)
    one = ncjax.peel(features, labels, W, per_class=1)
    np.testing.assert_array_equal(one.H[:, 0], np.asarray(expected)[:, 0])


def test_peeled_logits_equal_the_logits_of_the_network(key):
    features = jax.random.normal(key, (12, 4))
    W, b = jnp.ones((3, 4)), jnp.arange(3.0)
    labels = np.arange(12) % 3
    params = ncjax.peel(features, labels, W, b)
    data = oracles.Data(*(np.asarray(x) for x in (features, labels, W, b)))
    order = np.argsort(labels, kind="stable")
    got = jnp.einsum("kid,jd->kij", params.H, params.W).reshape(12, 3)
    np.testing.assert_allclose(got, oracles.logits(data)[order], rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 3}, "per_class is 3 but class 0 has 2 samples"),
        ({"per_class": 0}, "per_class must be an integer of at least 1, got 0"),
        ({"labels": np.array([0, 0, 0, 0])}, "every class needs a sample"),
        ({"labels": np.array([0, 1, 2, 0])}, "labels must lie in"),
        ({"features": np.ones((4, 2)) * np.nan}, "features must be finite"),
        ({"b": np.ones(3)}, r"expected b \(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "features": np.ones((4, 2)),
        "labels": np.array([0, 0, 1, 1]),
        "W": np.ones((2, 2)),
    } | changes
    with pytest.raises(ValueError, match=message):
        ncjax.peel(**arguments)
    arguments.pop("per_class", None)
    if "per_class" not in changes:
        with pytest.raises(ValueError, match=message):
            ncjax.last_layer(**arguments)


def test_balancing_keeps_logits_and_gives_the_balanced_numbers(key):
    params = ncjax.init_params(key, 4, 3, 6, scale=1.0)
    lopsided = ncjax.Params(params.W / 50, 3 * params.H)
    balanced = ncjax.balance_norms(lopsided)
    np.testing.assert_allclose(ncjax.margins(balanced), ncjax.margins(lopsided), rtol=1e-12)
    norms = [np.linalg.norm(leaf) for leaf in balanced]
    assert norms[0] == pytest.approx(norms[1])
    raw, even = last_layer_of(lopsided), last_layer_of(balanced)
    assert raw.balanced_margin_ratio == pytest.approx(float(even.margin_ratio))
    assert raw.balanced_kkt_angle == pytest.approx(float(even.kkt_angle), rel=1e-10)
    assert even.balanced_kkt_angle == pytest.approx(float(even.kkt_angle), rel=1e-10)
    assert raw.balanced_kkt_angle < raw.kkt_angle


@given(st.integers(0, 2**31), sizes, st.booleans())
def test_peeling_a_peeled_model_returns_it(seed, shape, with_bias):
    num_classes, per_class, dim = shape
    params, rng = random_params(seed, *shape, 1.0), np.random.default_rng(seed)
    b = rng.normal(size=num_classes) if with_bias else None
    order = rng.permutation(num_classes * per_class)
    # The samples of each class keep their order.
    labels = np.repeat(np.arange(num_classes), per_class)[order]
    features = np.zeros((labels.size, dim))
    for k in range(num_classes):
        features[labels == k] = params.H[k]
    peeled = ncjax.peel(features, labels, params.W, b)
    np.testing.assert_array_equal(peeled.H[..., :dim], params.H)
    np.testing.assert_array_equal(peeled.W[:, :dim], params.W)
    if with_bias:
        np.testing.assert_array_equal(peeled.W[:, dim], b)


@given(st.integers(0, 2**31), sizes, st.integers(-300, 300), st.integers(-300, 300))
def test_balanced_norms_are_equal_and_keep_the_margins(seed, shape, p, q):
    params = random_params(seed, *shape, 1.0)
    even = ncjax.balance_norms(ncjax.Params(2.0**p * params.W, 2.0**q * params.H))
    norms = [np.linalg.norm(leaf) for leaf in even]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    margins = 2.0 ** (p + q) * ncjax.margins(params)
    np.testing.assert_allclose(
        ncjax.margins(even), margins, rtol=1e-9, atol=1e-12 * 2.0 ** (p + q)
    )
    with pytest.raises(ValueError, match="expected W and H that are not zero, got W = 0"):
        ncjax.balance_norms(params._replace(W=0 * params.W))


@pytest.mark.parametrize("per_class", [None, 2])
def test_peel_says_that_it_needs_the_labels(per_class):
    etf, labels = ncjax.simplex_etf(3, 4), jnp.arange(9) % 3

    def squared_norm(features, labels):
        return ncjax.squared_norm(ncjax.peel(features, labels, etf, per_class=per_class))

    features = jnp.tile(etf, (3, 1))
    with pytest.raises(ValueError, match=r"labels must be known.* outside jax.jit"):
        jax.jit(squared_norm)(features, labels)
    known = jax.jit(lambda features: squared_norm(features, labels))(features)
    np.testing.assert_allclose(known, squared_norm(features, labels))
