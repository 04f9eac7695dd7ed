import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, sizes

import ncjax
from ncjax.peeled.geometry import helmert


def test_simplex_etf_orientations_differ_and_follow_the_key(key):
    one, two = ncjax.simplex_etf(3, 5, key), ncjax.simplex_etf(3, 5, jax.random.key(1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, ncjax.simplex_etf(3, 5, key))


def test_simplex_etf_in_float32_and_under_jit():
    etf = jax.jit(lambda: ncjax.simplex_etf(3, 5, dtype=jnp.float32))()
    assert etf.dtype == jnp.float32


def test_simplex_etf_needs_room():
    with pytest.raises(ValueError, match="dim must be at least num_classes - 1 = 4"):
        ncjax.simplex_etf(5, 3)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_helmert_is_an_orthonormal_basis_of_vectors_that_sum_to_zero(size):
    basis = helmert(size)
    np.testing.assert_allclose(basis @ basis.T, np.eye(size - 1), atol=1e-14)
    np.testing.assert_allclose(basis.sum(axis=1), 0, atol=1e-14)


@given(st.integers(0, 10**6), sizes)
def test_margins_agree_with_the_loop_and_are_infinite_on_the_diagonal(seed, shape):
    params = random_params(seed, *shape, 1.0)
    truth = oracles.margins(np.asarray(params.W), np.asarray(params.H))
    np.testing.assert_allclose(ncjax.margins(params), truth, atol=1e-12)


@given(st.integers(0, 10**6), sizes, st.floats(1e-3, 1e3))
def test_margin_ratio_is_at_most_one_and_independent_of_the_norm(seed, shape, scale):
    params = random_params(seed, *shape, 1.0)
    ratio = float(ncjax.margin_ratio(params))
    scaled = jax.tree.map(lambda leaf: scale * leaf, params)
    assert ratio <= 1 + 1e-12
    assert float(ncjax.margin_ratio(scaled)) == pytest.approx(ratio, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("per_class", [1, 3])
def test_margin_ratio_is_one_at_balanced_collapse_only(per_class):
    collapsed = ncjax.block_saddle(1, 5, per_class, 7)
    assert float(ncjax.margin_ratio(collapsed)) == pytest.approx(1, abs=1e-14)
    unbalanced = collapsed._replace(W=2 * collapsed.W)
    assert float(ncjax.margin_ratio(unbalanced)) < 0.95
    saddle = ncjax.block_saddle(2, 3, per_class, 7)
    assert float(ncjax.margin_ratio(saddle)) < 0.95


def test_balance_agrees_with_the_loop():
    params = random_params(1, 4, 3, 6, 1.0)
    outer = sum(np.outer(h, h) for block in np.asarray(params.H) for h in block)
    W = np.asarray(params.W)
    np.testing.assert_allclose(ncjax.balance(params), W.T @ W - outer, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 4, 2, 4), (2, 2, 1, 4), (3, 2, 3, 6), (2, 3, 2, 4)])
def test_block_saddles_have_the_margins_of_the_family(shape):
    num_blocks, block_size = shape[:2]
    params = ncjax.block_saddle(*shape)
    margins = np.asarray(ncjax.margins(params))
    block = np.arange(num_blocks * block_size) // block_size
    same = (block[:, None] == block[None])[:, None, :]
    expected = np.where(same, block_size / (block_size - 1), 1.0)
    finite = np.isfinite(margins)
    expected = np.broadcast_to(expected, margins.shape)
    np.testing.assert_allclose(margins[finite], expected[finite], atol=1e-14)
    np.testing.assert_allclose(ncjax.balance(params), 0, atol=1e-14)


def test_example_3_1_is_the_first_block_saddle():
    block = np.array([[1.0, -1.0], [-1.0, 1.0]])
    W = np.kron(np.eye(2), block)
    params = ncjax.block_saddle(2, 2, 1, 4)
    np.testing.assert_allclose(np.sqrt(2) * params.W, W, atol=1e-14)
    np.testing.assert_allclose(np.sqrt(2) * params.H[:, 0], W, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 4, 2, 4), (2, 2, 1, 4), (3, 2, 3, 6), (2, 3, 2, 4)])
def test_block_saddles_are_kkt_directions(shape):
    params = jax.tree.map(lambda leaf: 30 * leaf, ncjax.block_saddle(*shape))
    assert float(ncjax.kkt_angle(params)) < 1e-7


def test_kkt_angle_agrees_with_its_definition():
    params = random_params(2, 4, 3, 6, 1.0)
    gradient = jax.grad(ncjax.cross_entropy)(params)
    z, g = (np.concatenate([np.ravel(leaf) for leaf in t]) for t in (params, gradient))
    beta = -(z @ g) / np.linalg.norm(z) / np.linalg.norm(g)
    assert float(ncjax.kkt_angle(params)) == pytest.approx(np.sqrt(1 - beta**2), rel=1e-10)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 1, 4), "block_size must be an integer of at least 2, got 1"),
        ((0, 2, 1, 4), "num_blocks must be an integer of at least 1, got 0"),
        ((3, 3, 1, 5), r"dim must be at least num_blocks \* \(block_size - 1\) = 6, got 5"),
    ],
)
def test_block_saddle_names_the_argument_out_of_range(shape, message):
    with pytest.raises(ValueError, match=message):
        ncjax.block_saddle(*shape)
