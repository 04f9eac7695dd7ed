"""Whitening: its rank, and its derivatives where singular values are equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import ncjax
from ncjax import measures, variants
from ncjax.metrics.whitening import whiten

SHAPES = {"tall": (7, 4, 4), "wide": (4, 7, 4), "square": (5, 5, 5), "rank": (6, 5, 3)}


def rows_of(shape, seed=0):
    m, d, rank = SHAPES[shape]
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(m, rank)) @ rng.normal(size=(rank, d)))


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_inverts_the_gram_matrix(shape):
    rows = rows_of(shape)
    left, T = whiten(rows)
    np.testing.assert_allclose(T.T @ T, np.linalg.pinv(rows.T @ rows), atol=1e-10)
    np.testing.assert_allclose(left, rows @ T.T, atol=1e-12)
    projection = np.asarray(rows) @ np.linalg.pinv(rows)
    np.testing.assert_allclose(left @ left.T, projection, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_match_central_differences_at_constant_rank(shape):
    """First and second derivative of an invariant along a path, both modes."""
    rows, rng = rows_of(shape), np.random.default_rng(1)
    m, d = rows.shape
    x, turn, shear = (
        jnp.asarray(rng.normal(size=size)) for size in ((3, d), (m, m), (d, d))
    )

    @jax.jit
    def value(t):
        moved = (jnp.eye(m) + t * turn) @ rows @ (jnp.eye(d) + t * shear)
        left, T = whiten(moved)
        return (
            jnp.sum((x @ T.T) ** 2)
            + jnp.sum(left[:2] ** 2)
            + jnp.sum((x @ T.T @ left.T) ** 3)
        )

    slope = jax.jit(jax.grad(value))
    step = 1e-5
    for function, derivative in ((value, slope), (slope, jax.jit(jax.jacfwd(slope)))):
        central = (function(step) - function(-step)) / (2 * step)
        np.testing.assert_allclose(derivative(0.0), central, rtol=1e-6)


def collapsed_data():
    """A simplex ETF (4, 6) plus noise of mean zero in each class: equal singular values."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 5)
    noise = 0.1 * rng.normal(size=(4, 5, 6))
    noise -= noise.mean(axis=1, keepdims=True)
    features = np.asarray(ncjax.simplex_etf(4, 6))[labels] + noise.reshape(20, 6)
    return jnp.asarray(features), labels, rng.normal(size=(20, 6))


OF_FEATURES = {
    "within_class_variation": lambda x, y: variants.within_class_variation(x, y, 4),
    "variability_collapse_index": lambda x, y: variants.variability_collapse_index(x, y, 4),
    "nuclear_over_frobenius": lambda x, y: jnp.sum(
        variants.nuclear_over_frobenius(x, y, 4)
    ),
    "squared_error_parts": lambda x, y: sum(
        variants.squared_error_parts(x, y, ncjax.simplex_etf(4, 6))
    ),
    **{
        name: lambda x, y, name=name: getattr(metrics_of(x, y), name)
        for name in ("within_class_quotient", "cdnv", "self_duality", "product_etf_error")
    },
}


@jax.jit
def metrics_of(features, labels):
    """Every metric, with a classifier that is not the ETF."""
    W = 2 * ncjax.simplex_etf(4, 6) + 0.1 * jnp.arange(24.0).reshape(4, 6) % 7
    return ncjax.collapse_metrics_from_features(features, labels, W)


def test_every_metric_has_a_finite_gradient_at_collapse():
    features, labels, _ = collapsed_data()
    gradients = jax.jacrev(metrics_of)(features, labels)
    for name, gradient in gradients._asdict().items():
        assert np.isfinite(gradient).all(), name


@pytest.mark.parametrize("name", OF_FEATURES)
def test_metrics_have_their_derivatives_at_collapse(name):
    features, labels, direction = collapsed_data()
    function = partial(OF_FEATURES[name], y=labels)
    slope = jnp.vdot(jax.grad(function)(features), direction)
    step = 1e-6
    central = function(features + step * direction) - function(features - step * direction)
    np.testing.assert_allclose(slope, central / (2 * step), rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        measures.norm_variation,
        measures.etf_gram_error,
        lambda rows: measures.self_duality(rows, 2 * jax.lax.stop_gradient(rows)),
        lambda rows: jnp.sum(measures.row_distances(rows, jax.lax.stop_gradient(rows))),
    ],
)
def test_measures_have_finite_slopes_where_they_are_zero(function):
    rows = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    assert float(function(rows)) < 1e-15
    assert np.isfinite(jax.grad(function)(rows)).all()


def test_many_classes_keep_every_direction_of_their_means():
    """In float32, 800 classes in 16 dimensions whose spreads differ by 20000."""
    rng = np.random.default_rng(0)
    K, d = 800, 16
    means = rng.normal(size=(K, d)) * np.geomspace(1, 5e-5, d)
    labels = np.repeat(np.arange(K), 3)
    features = (means[labels] + 1e-5 * rng.normal(size=(3 * K, d))).astype(np.float32)
    exact = features.astype(float).reshape(K, 3, d)
    centres = exact.mean(axis=1)
    deviation = (exact - centres[:, None]).reshape(-1, d)
    singular, right = np.linalg.svd(centres - centres.mean(axis=0))[1:]
    expected = np.sum((deviation @ right.T / singular) ** 2) / (3 * K)
    got = variants.within_class_variation(features, labels, K)
    assert float(got) == pytest.approx(expected, rel=5e-3)


def test_many_samples_keep_every_direction_of_the_features():
    """In float32, 40000 samples whose features have spreads that differ by 2000."""
    rng = np.random.default_rng(0)
    labels = np.arange(40_000) % 4
    spread = np.geomspace(1, 5e-4, 4)
    features = (
        rng.normal(size=(4, 4))[labels] + 0.5 * rng.normal(size=(40_000, 4))
    ) * spread
    features = features.astype(np.float32)
    exact = oracles.variability_collapse_index(features.astype(float), labels)
    got = variants.variability_collapse_index(features, labels, 4)
    assert float(got) == pytest.approx(exact, rel=1e-4)
