"""Points of several linear layers: shapes, logits, norms, and clear errors."""

import jax
import numpy as np
import pytest

import ncjax
from ncjax import losses
from ncjax.peeled.points import factors_at

K, N, WIDTHS = 4, 2, (3, 6, 5)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def deep():
    return ncjax.init_deep_params(jax.random.key(0), K, N, WIDTHS, scale=0.8)


def features_by_loop(deep, layer):
    """`W_l ... W_1 h` of every sample, one matrix-vector product at a time."""
    rows = np.asarray(deep.H).reshape(-1, deep.H.shape[-1])
    out = []
    for h in rows:
        for W in deep.layers[:layer]:
            h = np.asarray(W) @ h
        out.append(h)
    return np.array(out).reshape(*deep.H.shape[:2], -1)


def test_shapes_and_degree(deep):
    assert [W.shape for W in deep.layers] == [(6, 3), (5, 6), (K, 5)]
    assert deep.H.shape == (K, N, 3)
    assert deep.degree == 4
    assert deep.W is deep.layers[-1]


def test_margins_and_loss_agree_with_a_loop(deep):
    logits = features_by_loop(deep, len(deep.layers))
    own = np.array([logits[k, :, k] for k in range(K)])
    expected = own[..., None] - logits
    found = np.asarray(ncjax.margins(deep))
    others = ~np.eye(K, dtype=bool)[:, None, :] & np.ones((K, N, K), bool)
    np.testing.assert_allclose(found[others], expected[others], rtol=1e-12)
    loss = np.sum(np.log(np.sum(np.exp(logits), axis=-1)) - own)
    np.testing.assert_allclose(ncjax.cross_entropy(deep), loss, rtol=1e-12)
    np.testing.assert_allclose(ncjax.log_cross_entropy(deep), np.log(loss), rtol=1e-12)


@pytest.mark.parametrize("layer", range(len(WIDTHS)))
def test_the_factors_at_a_layer_have_the_logits_and_features(deep, layer):
    factors = factors_at(deep, layer)
    np.testing.assert_allclose(factors.H, features_by_loop(deep, layer), rtol=1e-12)
    np.testing.assert_allclose(
        ncjax.cross_entropy(factors), ncjax.cross_entropy(deep), rtol=1e-12
    )


@pytest.mark.parametrize(
    "loss",
    [
        ncjax.cross_entropy,
        ncjax.log_cross_entropy,
        lambda z, w: losses.focal_loss(z, 2.0, w),
        lambda z, w: losses.log_focal_loss(z, 2.0, w),
        lambda z, w: losses.smoothed_cross_entropy(z, 0.1, w),
        losses.squared_error,
        lambda z, w: losses.error_slopes(z, w).log_loss,
        lambda z, w: ncjax.margins(z, w).min(),
    ],
)
def test_one_layer_is_the_model_of_two_factors(loss):
    two = ncjax.init_params(jax.random.key(1), K, (3, 1, 2, 2), 3, scale=1.0)
    weights = ncjax.sample_weights((3, 1, 2, 2))
    deep = ncjax.DeepParams((two.W,), two.H)
    assert loss(deep, weights) == loss(two, weights)


def test_the_gradient_is_homogeneous(deep):
    """`<Z, ∇m> = p m` for every margin."""
    _, slope = jax.jvp(lambda z: ncjax.margins(z)[0, 0, 1], (deep,), (deep,))
    expected = deep.degree * ncjax.margins(deep)[0, 0, 1]
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def test_norm_and_balances(deep):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(deep)]
    np.testing.assert_allclose(
        ncjax.squared_norm(deep), sum((leaf**2).sum() for leaf in leaves), rtol=1e-14
    )
    first, *above = ncjax.balance(deep)
    rows = np.asarray(deep.H).reshape(-1, WIDTHS[0])
    W = [np.asarray(layer) for layer in deep.layers]
    np.testing.assert_allclose(first, W[0].T @ W[0] - rows.T @ rows, atol=1e-13)
    for found, upper, lower in zip(above, W[1:], W[:-1], strict=True):
        np.testing.assert_allclose(found, upper.T @ upper - lower @ lower.T, atol=1e-13)


def test_a_list_of_factors_is_refused_by_name(deep):
    with pytest.raises(ValueError, match=r"or ncjax.DeepParams\(layers, H\), got list"):
        ncjax.gradient_flow([*deep.layers, deep.H], [1.0])


def test_bad_points_are_refused_with_what_was_given(deep):
    cases = {
        "at least one array.*got an empty tuple": deep._replace(layers=()),
        "at least one array.*got ndarray": deep._replace(layers=np.zeros((2, 4, 4))),
        "W_1 of 3 columns.*W_1 \\(4, 5\\)": deep._replace(layers=deep.layers[::-1]),
        "a row for each of the K = 4": deep._replace(layers=deep.layers[:2]),
        "floating dtype, got float32, float64": deep._replace(H=deep.H.astype("float32")),
        "jax.vmap": jax.tree.map(lambda leaf: leaf[None], deep),
    }
    for message, point in cases.items():
        with pytest.raises(ValueError, match=message):
            ncjax.cross_entropy(point)


def test_functions_of_two_factors_name_the_one_that_measures_layers(deep):
    with pytest.raises(ValueError, match=r"DeepParams: ncjax\.collapse_by_layer"):
        ncjax.collapse_metrics(deep)


@pytest.mark.parametrize("widths", [(), 3, (3, 0), "33"])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match="widths must be"):
        ncjax.init_deep_params(jax.random.key(0), K, N, widths)
