import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from strategies import random_params

import ncjax
from ncjax.flow import block_solve
from ncjax.peeled import kernels, losses

SHAPES = [(2, 1, 1), (3, 2, 2), (4, 3, 6), (5, 1, 3), (3, 4, 8)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@jax.jit
def solved(params, c, right):
    factored = block_solve.factor(params, kernels.error_slopes(params), c)
    return block_solve.solve(factored, right)


@jax.jit
def hessian_over_loss(params):
    flat, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda z: ncjax.cross_entropy(unravel(z)))(flat)
    return hessian / ncjax.cross_entropy(params)


@pytest.mark.parametrize("shape", SHAPES)
def test_solves_identity_plus_c_times_the_hessian_over_the_loss(shape):
    params, right = random_params(0, *shape, 0.7), random_params(1, *shape, 1.0)
    hessian, flat_right = np.asarray(hessian_over_loss(params)), ravel_pytree(right)[0]
    for c in (1e-3, 0.05, 0.3):
        matrix = np.eye(len(hessian)) + c * hessian
        assert np.linalg.eigvalsh(matrix).min() > 0
        got = ravel_pytree(solved(params, jnp.asarray(c), right))[0]
        expected = np.linalg.solve(matrix, flat_right)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)


@given(
    st.integers(0, 2**31), st.sampled_from(SHAPES), st.floats(0, 2.5), st.floats(-4, 0.9)
)
def test_solves_at_any_state_and_any_step(seed, shape, scale, size):
    """In shapes that the previous test compiles, with a positive definite matrix."""
    params, right = random_params(seed, *shape, scale), random_params(seed + 1, *shape, 1.0)
    hessian = np.asarray(hessian_over_loss(params))
    least = np.linalg.eigvalsh(hessian)[0]
    c = 10**size if least >= 0 else min(10**size, 0.9 / -least)
    matrix = np.eye(len(hessian)) + c * hessian
    flat_right = np.asarray(ravel_pytree(right)[0])
    expected = np.linalg.solve(matrix, flat_right)
    got = np.asarray(ravel_pytree(solved(params, jnp.asarray(c), right))[0])
    gap = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert gap < 1e-11 * np.linalg.cond(matrix)


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_solves_where_the_loss_has_underflowed(scale):
    etf = ncjax.simplex_etf(4, 5)
    noise = random_params(2, 4, 3, 5, 0.01)
    W, H = etf + noise.W, jnp.repeat(etf[:, None], 3, axis=1) + noise.H
    params, right = ncjax.Params(scale * W, scale * H), random_params(3, 4, 3, 5, 1.0)
    assert float(ncjax.log_cross_entropy(params)) < -700

    def operator(v):
        # ∇²L / L = ∇² log L + ∇log L (∇log L)ᵀ
        slope, curved = jax.jvp(jax.grad(ncjax.log_cross_entropy), (params,), (v,))
        along = sum(jnp.sum(g * leaf) for g, leaf in zip(slope, v, strict=True))
        return jax.tree.map(lambda h, g: h + along * g, curved, slope)

    c = jnp.asarray(1e-2)
    X = solved(params, c, right)
    residual = jax.tree.map(lambda x, a, r: x + c * a - r, X, operator(X), right)
    for leaf in residual:
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


def test_vmap_solves_each_system():
    many = jax.vmap(lambda key: ncjax.init_params(key, 3, 2, 4, 0.5))(
        jax.random.split(jax.random.key(0), 3)
    )
    c = jnp.asarray([0.01, 0.02, 0.03])
    together = jax.jit(jax.vmap(solved))(many, c, many)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        alone = solved(one, c[i], one)
        np.testing.assert_allclose(together.W[i], alone.W, rtol=1e-12)


_inverse = jax.jit(block_solve.inverse, static_argnums=1)


@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 1), (7, 1), (12, 4), (20, 20)]),
    st.floats(0, 6),
    st.integers(-300, 300),
)
def test_inverse_of_a_positive_definite_matrix(seed, shape, decades, p):
    """At any scale, with a condition number up to a million."""
    (size, block), rng = shape, np.random.default_rng(seed)
    frames = np.linalg.qr(rng.normal(size=(3, size, size)))[0]
    values = 10 ** (decades * rng.uniform(-1, 0, size=(3, 1, size)))
    unit = (frames * values) @ frames.transpose(0, 2, 1)
    unit = (unit + unit.transpose(0, 2, 1)) / 2
    inverse = (frames / values) @ frames.transpose(0, 2, 1)
    got = np.asarray(_inverse(jnp.asarray(2.0**p * unit), block)) * 2.0**p
    worst = 10**decades
    np.testing.assert_allclose(got, inverse, rtol=0, atol=1e-13 * worst**2)


def test_a_block_that_does_not_divide_the_size_is_refused():
    with pytest.raises(ValueError, match="block must divide the size 6, got 4"):
        block_solve.inverse(jnp.eye(6), 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_slopes_are_the_gradient_of_the_log_loss(shape, scale):
    params = random_params(4, *shape, scale)
    slopes = losses.error_slopes(params)
    log_loss, dW, dH = oracles.log_cross_entropy_and_gradient(*map(np.asarray, params))
    np.testing.assert_allclose(slopes.log_loss, float(log_loss), rtol=1e-12)
    got = jnp.einsum("kij,kid->jd", slopes.P, params.H)
    size = float(np.abs(dW).max())
    np.testing.assert_allclose(got, dW.astype(float), rtol=1e-9, atol=1e-11 * size)
    got = jnp.einsum("kij,jd->kid", slopes.P, params.W)
    size = float(np.abs(dH).max())
    np.testing.assert_allclose(got, dH.astype(float), rtol=1e-9, atol=1e-11 * size)
    np.testing.assert_allclose(jnp.sum(slopes.P, axis=-1), 0, atol=1e-12 * scale)
