"""Metrics of every layer of the deep model, against the functions for networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.peeled.points import factors_at

K, N, WIDTHS = 4, 3, (6, 9, 5)
LAYERS = range(len(WIDTHS))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def deep():
    return ncjax.init_deep_params(jax.random.key(2), K, N, WIDTHS, scale=0.7)


@pytest.fixture(scope="module")
def measured(deep):
    return ncjax.collapse_by_layer(deep)


@pytest.fixture(scope="module")
def features(deep):
    """Features (K n, d_l) of every layer, by a loop over samples and matrices."""
    out = []
    for layer in LAYERS:
        rows = []
        for h in np.asarray(deep.H).reshape(-1, WIDTHS[0]):
            for W in deep.layers[:layer]:
                h = np.asarray(W) @ h
            rows.append(h)
        out.append(np.array(rows))
    return out


def test_the_metrics_are_those_of_a_network_with_these_features(deep, measured, features):
    names = [f"layer {layer}" for layer in LAYERS]
    network = ncjax.layerwise(
        dict(zip(names, features, strict=True)),
        np.repeat(np.arange(K), N),
        classifiers={name: factors_at(deep, i).W for i, name in enumerate(names)},
    ).metrics._asdict()
    model = measured.collapse._asdict() | measured.ranks._asdict()
    shared = network.keys() & model.keys()
    assert {"within_class_variation", "cdnv", "stable_rank", "accuracy"} <= shared
    for name in shared:
        np.testing.assert_allclose(model[name], network[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_no_metric_depends_on_the_scale_of_a_factor(deep, measured, scale):
    """The product of all factors is far beyond the range of float64."""
    scaled = jax.tree.map(lambda leaf: scale * leaf, deep)
    found = ncjax.collapse_by_layer(scaled)
    for field in ("collapse", "ranks"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
            getattr(found, field),
            getattr(measured, field),
        )
    np.testing.assert_allclose(
        found.singular_values[0], scale * measured.singular_values[0], rtol=1e-12
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_the_metrics_of_its_two_factors(deep, measured, layer):
    found = jax.tree.map(lambda column: column[layer], measured.collapse)
    expected = ncjax.collapse_metrics(factors_at(deep, layer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


def test_the_singular_values_are_those_of_the_features(measured, features):
    assert measured.singular_values.shape == (len(WIDTHS), max(WIDTHS))
    for row, matrix in zip(np.asarray(measured.singular_values), features, strict=True):
        expected = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(row[: expected.size], expected, atol=1e-12)
        assert np.abs(row[expected.size :]).max(initial=0) < 1e-12


def test_every_layer_of_balanced_collapse_is_collapsed():
    """With p factors of equal singular values s, layer l has s^(l+1), K - 1 times."""
    root = np.eye(K) - 1 / K
    unit = np.repeat(root[:, None] / np.sqrt(N), N, axis=1)
    size = 1.7
    deep = ncjax.DeepParams((jnp.asarray(size * root),) * 2, jnp.asarray(size * unit))
    found = ncjax.collapse_by_layer(deep)
    for name, values in found.collapse._asdict().items():
        np.testing.assert_allclose(values, float(name == "accuracy"), atol=1e-7)
    expected = [[size ** (layer + 1)] * (K - 1) + [0] for layer in range(2)]
    np.testing.assert_allclose(found.singular_values, expected, atol=1e-12)
    np.testing.assert_array_equal(found.ranks.numerical_rank, K - 1)
    np.testing.assert_allclose(found.ranks.effective_rank, K - 1, rtol=1e-10)


def test_samples_of_weight_zero_are_left_out(deep, features):
    counts = (3, 1, 2, 3)
    weights = ncjax.sample_weights(counts)
    outside = deep._replace(H=jnp.where(weights[..., None] > 0, deep.H, 1e3))
    found = ncjax.collapse_by_layer(outside, weights)
    kept = np.asarray(weights).reshape(-1) > 0
    for layer, rows in enumerate(features):
        expected = ncjax.collapse_metrics(factors_at(deep, layer), weights)
        np.testing.assert_allclose(
            found.collapse.within_class_variation[layer],
            expected.within_class_variation,
            rtol=1e-9,
        )
        centred = rows[kept] - rows[kept].mean(axis=0)
        for values, matrix in (
            (found.ranks.stable_rank[layer], centred),
            (
                np.sum(
                    (found.singular_values[layer] / found.singular_values[layer, 0]) ** 2
                ),
                rows[kept],
            ),
        ):
            squares = np.linalg.svd(matrix, compute_uv=False) ** 2
            np.testing.assert_allclose(values, squares.sum() / squares[0], rtol=1e-10)


def test_many_points_are_measured_at_once(deep, measured):
    scaled = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), deep)
    both = jax.jit(jax.vmap(ncjax.collapse_by_layer))(scaled)
    for place in range(2):
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(a[place], b, rtol=1e-9),
            (both.collapse, both.ranks),
            (measured.collapse, measured.ranks),
        )
    factors = 2.0 ** (1 + np.arange(len(WIDTHS)))[:, None]
    np.testing.assert_allclose(
        both.singular_values[1], factors * measured.singular_values, atol=1e-12
    )


def test_two_factors_are_refused(deep):
    with pytest.raises(ValueError, match=r"expected ncjax\.DeepParams"):
        ncjax.collapse_by_layer(factors_at(deep, 0))
