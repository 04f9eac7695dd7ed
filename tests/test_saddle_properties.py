"""Block saddles, multipliers and Hessians on the sphere, at random states and scales."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.special import logsumexp
from state_functions import certificate, compiled, kkt
from strategies import WIDE, floats, seeds, separating

import ncjax
from experiments._saddles import Block, family
from ncjax.peeled import margin_bound
from ncjax.peeled.separation import GLOBAL_OPTIMUM, NO_ROOM, STRICT_SADDLE

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

few = settings(max_examples=settings.default.max_examples * 2 // 5)
# Collapse and saddles with and without room, in shapes that other tests compile. A
# campaign draws from the whole family up to K = 12.
SADDLE, TIGHT = Block(3, 2, 1, 4), Block(2, 3, 1, 4)
BLOCKS = family(12) if WIDE else [Block(1, 2, 1, 1), Block(1, 3, 2, 7), SADDLE, TIGHT]
blocks = st.sampled_from(BLOCKS)


def turned(params, seed):
    """Rotate the features at random and permute the classes."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(params.W.shape[1],) * 2))[0]
    order = rng.permutation(params.W.shape[0])
    leaves = (np.asarray(leaf) @ frame.astype(leaf.dtype) for leaf in params)
    return ncjax.Params(*(jnp.asarray(leaf[order]) for leaf in leaves))


def far(block, dtype, scale):
    return jax.tree.map(lambda leaf: dtype(scale) * leaf, ncjax.block_saddle(*block, dtype))


# The family in closed form


@given(blocks, floats)
def test_blocks_are_orthogonal_frames(block, dtype):
    m, b, n, _ = block
    W, H = (np.asarray(leaf, float) for leaf in ncjax.block_saddle(*block, dtype))
    gram = np.kron(np.eye(m), b / (b - 1) * (np.eye(b) - 1 / b))
    eps = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(W @ W.T, n**0.5 * gram, atol=eps * n**0.5)
    np.testing.assert_allclose(H, np.repeat(W[:, None], n, 1) / n**0.5, atol=eps)


@given(blocks, floats, seeds, st.floats(0.01, 60))
def test_loss_and_margins_of_blocks_agree_with_closed_forms(block, dtype, seed, scale):
    m, b, n, dim = block
    K, eps = block.num_classes, float(np.finfo(dtype).eps)
    params = turned(far(block, dtype, scale), seed)
    found = compiled(params)
    square = float(dtype(scale)) ** 2
    # A margin rounds at about eps times its size, and so does log L.
    rounding = 30 * eps * (1 + square)
    ways = logsumexp([-square * b / (b - 1), -square], b=[b - 1, K - b])
    log_loss = np.log(K * n) + float(oracles.log_softplus(ways)[0])
    assert float(found["log_cross_entropy"]) == pytest.approx(log_loss, abs=rounding)
    size = 2 * square * K * n**0.5
    assert float(found["squared_norm"]) == pytest.approx(size, rel=100 * eps)
    attainable = margin_bound.attainable_value(K, n, dim)
    if dim >= K - 1:
        assert attainable == pytest.approx((K - 1) * n**0.5)
    ratio = attainable / (K * n**0.5) if m > 1 else 1
    assert float(found["margin_ratio"]) == pytest.approx(ratio, rel=100 * eps)
    # The softmax weights carry the rounding of the margins.
    assert float(found["kkt_angle"]) <= 10 * rounding
    assert float(jnp.abs(ncjax.balance(params)).max()) <= 100 * eps * size


@given(blocks, floats, seeds)
def test_metrics_of_blocks_agree_with_closed_forms(block, dtype, seed):
    m, b, _, _ = block
    K = block.num_classes
    metrics = compiled(turned(far(block, dtype, 1.0), seed))["metrics"]
    within, pairs = m * b * (b - 1) / 2, K * (K - 1) / 2
    ideal = 1 / (K - 1)
    cosines = (within * abs(1 / (b - 1) - ideal) + (pairs - within) * ideal) / pairs
    # Projectors on m (b - 1) of the K - 1 dimensions.
    frame = (2 - 2 * (m * (b - 1) / (K - 1)) ** 0.5) ** 0.5
    expected = dict.fromkeys(metrics._fields, 0.0) | {"accuracy": 1.0}
    expected |= {name: cosines for name in metrics._fields if "cosine" in name}
    expected |= dict.fromkeys(("etf_gram_error", "product_etf_error"), frame)
    for name, value in metrics._asdict().items():
        near = pytest.approx(expected[name], abs=100 * float(np.finfo(dtype).eps))
        assert float(value) == near, name


@jax.jit
def product(params, vector):
    return ncjax.hvp(ncjax.log_cross_entropy, params, vector, sphere=True)


@few
@given(
    st.sampled_from([block for block in BLOCKS if block.multiplicity]),
    st.floats(0.3, 6),
    seeds,
)
def test_curvature_of_blocks_agrees_with_closed_forms(block, scale, seed):
    """Along (u aᵀ, ±v aᵀ), u the same within a block and of sum 0, a off all rows."""
    m, b, n, _ = block
    params, rng = block.params(scale), np.random.default_rng(seed)
    blockwise, off = rng.normal(size=m), null_space(np.asarray(params.W), rcond=1e-9)
    u = np.repeat(blockwise - blockwise.mean(), b)
    W = np.outer(u, off @ rng.normal(size=off.shape[1]))
    radial = slope_along(block, scale)
    for sign in (1, -1):
        # With the features the loss falls, against them it rises; the sphere adds `radial`.
        H = sign * np.repeat(W[:, None], n, 1) / n**0.5
        expected = sign * (block.eigenvalue(scale) + radial) - radial
        got = product(params, ncjax.Params(jnp.asarray(W), jnp.asarray(H)))
        for curved, leaf in zip(got, (W, H), strict=True):
            atol = 1e-12 * np.abs(leaf).max()
            np.testing.assert_allclose(curved, expected * leaf, rtol=1e-9, atol=atol)


def slope_along(block, scale):
    """<∇log L, Z> / |Z|²: twice the margins by their weights, over the norm."""
    b, K = block.block_size, block.num_classes
    within, across = np.exp(-(scale**2) * b / (b - 1)), np.exp(-(scale**2))
    rest = (b - 1) * within + (K - b) * across
    weighted = (b * within + (K - b) * across) / (1 + rest) / np.log1p(rest)
    return -weighted / (K * block.per_class**0.5)


# Multipliers and certificates

HOST = Block(2, 2, 1, 4), Block(1, 3, 2, 4), Block(2, 3, 2, 4)
VERDICTS = {HOST[0]: STRICT_SADDLE, HOST[1]: GLOBAL_OPTIMUM, HOST[2]: NO_ROOM}


@few
@given(st.sampled_from(HOST), seeds, st.floats(1e-3, 1e3))
def test_verdicts_of_blocks_are_invariant_under_rotation_and_scale(block, seed, scale):
    proof = certificate(turned(block.params(scale), seed), multipliers="nnls")
    assert int(proof.verdict) == VERDICTS[block]
    assert float(proof.residual) < 1e-9
    # Primal K √n and dual Σλ / σ of the same Σλ: σ is at least their quotient.
    least = block.num_classes / (block.num_classes - 1) if block.num_blocks > 1 else 1
    assert float(proof.sigma_max) > least - 1e-9
    assert float(proof.excess) == pytest.approx(least - 1, abs=1e-9)


@few
@given(seeds, st.integers(-200, 200))
def test_nnls_multipliers_are_optimal(seed, p):
    """No feasible step improves them, at any scale of the direction."""
    params = separating(seed)
    assume(float(ncjax.margins(params).min()) > 1e-2)
    found = kkt(jax.tree.map(lambda leaf: 2.0**p * leaf, params), multipliers="nnls")
    weights = np.asarray(found.multipliers)
    assert (weights >= 0).all()
    tangent, slack = oracles.tangent_and_slack(params, weights)
    assert float(found.stationarity) == pytest.approx(tangent, rel=1e-9)
    assert float(found.complementarity) == pytest.approx(slack, rel=1e-9, abs=1e-12)
    slope = objective_slope(params, weights)
    others = np.isfinite(slope)
    size = np.abs(slope[others]).max() + 1
    assert (slope[others] > -1e-9 * size).all()
    assert (np.abs(slope * weights)[others] < 1e-9 * size * weights.max()).all()


def objective_slope(params, weights):
    """Gradient of |Z̃ - Σ λ ∇m|² + Σ λ² (m̃ - 1)² by λ, by loops, NaN where j = k."""
    W, H = (np.asarray(leaf) for leaf in params)
    root = np.sqrt(oracles.margins(W, H).min())
    W, H = W / root, H / root
    indices = [kij for kij in np.ndindex(weights.shape) if kij[0] != kij[2]]
    rest_W, rest_H = W.copy(), H.copy()
    for k, i, j in indices:
        rest_W[k] -= weights[k, i, j] * H[k, i]
        rest_W[j] += weights[k, i, j] * H[k, i]
        rest_H[k, i] -= weights[k, i, j] * (W[k] - W[j])
    slope = np.full(weights.shape, np.nan)
    for k, i, j in indices:
        along = H[k, i] @ (rest_W[k] - rest_W[j]) + (W[k] - W[j]) @ rest_H[k, i]
        margin = (W[k] - W[j]) @ H[k, i]
        slope[k, i, j] = 2 * weights[k, i, j] * (margin - 1) ** 2 - 2 * along
    return slope


@few
@given(seeds, st.floats(0.3, 1e3))
def test_softmax_multipliers_are_the_slopes_of_the_loss(seed, scale):
    params = jax.tree.map(lambda leaf: scale * leaf, separating(seed))
    least = oracles.margins(*map(np.asarray, params)).min()
    assume(least > 1e-2 * scale**2)
    found = kkt(params)
    weights = np.asarray(found.multipliers)
    tangent, slack = oracles.tangent_and_slack(params, weights)
    assert float(found.stationarity) == pytest.approx(tangent, rel=1e-6, abs=1e-12)
    assert float(found.complementarity) == pytest.approx(slack, rel=1e-6, abs=1e-12)
    # In proportion to exp(-m) / (1 + Σ exp(-m)) of each sample, in extended precision.
    margins = oracles.margins(*(np.asarray(leaf, np.longdouble) for leaf in params))
    shares = np.exp(margins.min() - margins)
    shares /= 1 + np.exp(-margins).sum(axis=-1, keepdims=True)
    scaled = (shares / shares.max()).astype(float)
    rounding = 1e-14 * (1 + float(margins[np.isfinite(margins)].max()))
    np.testing.assert_allclose(weights / weights.max(), scaled, atol=10 * rounding)
    # β is the cosine of the angle whose sine is the stationarity.
    sine = float(np.sqrt(max(0, 1 - float(found.beta) ** 2)))
    assert float(found.stationarity) == pytest.approx(sine, rel=1e-6, abs=1e-7)


# Hessians on the sphere


def quartic(params, batch):
    """½ zᵀA z + g·z + (v·z)⁴ / 12, z the flattened pytree."""
    matrix, slope, ray = batch
    z = jnp.concatenate([params["a"].reshape(-1), params["b"]])
    along = jnp.dot(ray, z)
    return z @ matrix @ z / 2 + slope @ z + along**4 / 12


def quartic_on_the_sphere(z, matrix, slope, ray):
    """Spectrum of P ∇²f P - <∇f, z> P / |z|² on the tangent space, ascending."""
    along = ray @ z
    hessian = matrix + along**2 * np.outer(ray, ray)
    gradient = matrix @ z + slope + along**3 / 3 * ray
    tangent = null_space(z[None])
    curved = hessian - gradient @ z / (z @ z) * np.eye(z.size)
    return np.linalg.eigvalsh(tangent.T @ curved @ tangent)


@jax.jit
def eigenvalues(params, batches):
    solve = partial(ncjax.hessian_eig, quartic, params, batches=batches, sphere=True)
    return solve(which="all"), solve(k=2, which="both", method="lanczos", num_vectors=9)


@few
@given(seeds, st.integers(-60, 60), st.integers(-60, 60))
def test_spectra_on_the_sphere_agree_with_numpy(seed, p, q):
    rng = np.random.default_rng(seed)
    root, (z, slope, ray) = rng.normal(size=(11, 11)), rng.normal(size=(3, 11))
    # z and f have any scale, and the quartic term follows.
    z, matrix = 2.0**p * z, 2.0**q * (root + root.T)
    slope, ray = 2.0 ** (q + p) * slope, 2.0 ** ((q - 2 * p) // 4) * ray / 8
    params = {"a": jnp.asarray(z[:6].reshape(2, 3)), "b": jnp.asarray(z[6:])}
    batches = jax.tree.map(lambda x: jnp.asarray(x)[None], (matrix, slope, ray))
    expected = quartic_on_the_sphere(z, matrix, slope, ray)
    norm = np.abs(expected).max()
    whole, ends = eigenvalues(params, batches)
    assert bool(whole.converged.all() & ends.converged.all())
    np.testing.assert_allclose(whole.eigenvalues, expected, rtol=0, atol=1e-12 * norm)
    wanted = expected[[0, 1, -2, -1]]
    np.testing.assert_allclose(ends.eigenvalues, wanted, rtol=0, atol=1e-10 * norm)
    vectors = np.concatenate(
        [np.asarray(whole.eigenvectors[name]).reshape(10, -1) for name in "ab"], axis=1
    )
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(vectors @ z / np.linalg.norm(z), 0, atol=1e-12)
