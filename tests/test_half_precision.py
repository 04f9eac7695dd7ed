"""Half precision is computed in float32: against NumPy in float64 at the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from strategies import random_params, separating

import ncjax
from ncjax import losses

HALF = (jnp.float16, jnp.bfloat16)
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.parametrize("dtype", HALF),
]


def signs(dtype, num_classes=2, per_class=100, dim=1000):
    """Entries ±1, whose squares sum to more than the largest number of float16."""
    rng = np.random.default_rng(0)
    shapes = (num_classes, dim), (num_classes, per_class, dim)
    return ncjax.Params(*(jnp.asarray(rng.choice([-1, 1], s), dtype) for s in shapes))


def in_float64(params):
    return ncjax.Params(*(np.asarray(leaf, np.float64) for leaf in params))


def test_points_with_a_dtype_are_rounded_once(dtype):
    rounded = {
        "etf": (ncjax.simplex_etf(3, 2, dtype=dtype), ncjax.simplex_etf(3, 2)),
        "saddle": (ncjax.block_saddle(2, 3, 3, 7, dtype), ncjax.block_saddle(2, 3, 3, 7)),
        "optimum": (
            ncjax.solve_separation((3, 2, 1), 4, dtype)[:3:2],
            ncjax.solve_separation((3, 2, 1), 4)[:3:2],
        ),
    }
    for got, exact in rounded.values():
        eps = float(jnp.finfo(dtype).eps)
        for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_allclose(np.asarray(leaf, float), other, eps / 1.9, 1e-7)


def test_losses_of_many_samples_and_classes(dtype):
    origin = ncjax.Params(jnp.zeros((10, 2), dtype), jnp.zeros((10, 10_000, 2), dtype))
    expected = 1e5 * np.log(10)
    assert float(ncjax.cross_entropy(origin)) == pytest.approx(expected, rel=1e-5)
    assert float(ncjax.log_cross_entropy(origin)) == pytest.approx(
        np.log(expected), rel=1e-6
    )
    logits = jnp.zeros((1, 70_000), dtype)
    loss = losses.softmax_cross_entropy(logits, np.array([65_000]))
    np.testing.assert_allclose(loss, np.log(70_000), rtol=1e-6)
    gradient = jax.grad(lambda z: losses.softmax_cross_entropy(z, jnp.array([3]))[0])(
        logits
    )
    assert gradient.dtype == dtype
    assert float(gradient[0, 3]) == -1


def test_norms_margins_balance_and_drift_of_signs(dtype):
    params = signs(dtype)
    W, H = in_float64(params)
    squares = float(np.sum(W**2) + np.sum(H**2))
    assert float(ncjax.squared_norm(params)) == squares > 65_504
    np.testing.assert_array_equal(ncjax.margins(params), oracles.margins(W, H))
    balance = W.T @ W - np.einsum("kid,kie->de", H, H)
    np.testing.assert_array_equal(ncjax.balance(params), balance)
    ratio = 2 * 10 * oracles.margins(W, H).min() / squares
    assert float(ncjax.margin_ratio(params)) == pytest.approx(ratio, rel=1e-6)
    other = params._replace(W=-params.W[::-1], H=params.H[:, ::-1].at[0, 0].set(0))
    V, G = in_float64(other)
    moved = V.T @ V - np.einsum("kid,kie->de", G, G) - balance
    drift = ncjax.invariant_drift(other, params)
    size = np.sum(V**2) + np.sum(G**2)
    assert float(drift.balance) == pytest.approx(np.linalg.norm(moved) / size, rel=1e-6)
    sums = np.linalg.norm(V.sum(axis=0) - W.sum(axis=0))
    assert float(drift.classifier_sum) == pytest.approx(sums / size**0.5, rel=1e-6)
    even = ncjax.balance_norms(params)
    norms = [np.linalg.norm(leaf) for leaf in in_float64(even)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_results_are_float32_and_gradients_keep_the_dtype(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), separating(0))
    descent = ncjax.gradient_descent(params, 0.1, 3, save_steps=[3])
    results = [
        *(ncjax.kkt_angle(params), ncjax.margins(params), ncjax.kkt(params)),
        *(ncjax.certificate(params)._replace(verdict=jnp.float32(0)), descent.final),
        *(descent.log_loss, ncjax.restore_invariants(params, params)),
        losses.error_slopes(params),
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float32)}
    gradient = jax.grad(ncjax.log_cross_entropy)(params)
    _, *exact = oracles.log_cross_entropy_and_gradient(*in_float64(params))
    eps = float(jnp.finfo(dtype).eps)
    for got, expected in zip(gradient, exact, strict=True):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, float) - expected.astype(float)).max()
        assert error < 4 * eps * np.abs(expected).max()


def test_descent_agrees_with_descent_in_float32(dtype):
    start = random_params(0, 3, 2, 4, 0.5, dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
    got = ncjax.gradient_descent(start, 1e-3, 20, save_steps=[20]).final
    expected = ncjax.gradient_descent(wide, 1e-3, 20, save_steps=[20]).final
    for leaf, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(leaf, other)
