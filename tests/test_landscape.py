"""Hessian eigenpairs: closed forms, LAPACK and ARPACK, breakdown, ties, bad input."""

import dataclasses
import importlib.util
import itertools
import math
import os
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subprocesses
from hypothesis import given
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

import ncjax

pytestmark = pytest.mark.usefixtures("quick_compilation")

# m, b, n, d, the limit of the least eigenvalue and its multiplicity (m-1)(d-K+m).
SADDLES = [
    (2, 2, 1, 4, -1 / 4, 2),
    (3, 2, 1, 6, -1 / 12, 6),
    (2, 2, 3, 4, -1 / (4 * math.sqrt(3)), 2),
    (2, 3, 2, 8, -1 / (6 * math.sqrt(2)), 4),
]


def quadratic(x, matrix):
    """`x·A x/2` of a flat or structured x, with Hessian A; one A per batch."""
    x = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)])
    return jnp.dot(x, matrix @ x) / 2


def symmetric(eigenvalues, seed=0):
    """(1, D, D) array with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    dim = len(eigenvalues)
    frame = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return jnp.asarray((frame * np.asarray(eigenvalues)) @ frame.T)[None]


def block_saddle(scale, num_blocks, block_size, per_class, dim):
    saddle = ncjax.block_saddle(num_blocks, block_size, per_class, dim)
    return jax.tree.map(lambda leaf: scale * leaf, saddle)


def logits(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight + bias[None])
    weight, bias = params[-1]
    return x @ weight + bias[None]


def network_loss(params, batch):
    """Cross entropy of a tanh network, summed over the batch."""
    x, labels = batch
    log_probabilities = jax.nn.log_softmax(logits(params, x))
    return -jnp.sum(log_probabilities * jax.nn.one_hot(labels, 5, dtype=x.dtype))


def network(dtype="float64"):
    """A network with 1825 parameters, and 4 batches of 16 samples."""
    rng = np.random.default_rng(0)
    sizes = (10, 40, 30, 5)
    params = [
        (jnp.asarray(rng.normal(size=(p, q)) / p**0.5, dtype), jnp.zeros(q, dtype))
        for p, q in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.normal(size=(4, 16, 10)), dtype)
    return params, (x, jnp.asarray(rng.integers(5, size=(4, 16))))


def rows(eig):
    """Eigenvectors as a (k, D) matrix."""
    leaves = jax.tree.leaves(eig.eigenvectors)
    return np.concatenate([np.asarray(x, float).reshape(len(x), -1) for x in leaves], 1)


def assert_orthonormal(eig, atol=1e-12):
    vectors = rows(eig)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=atol)


# Closed forms of the theory.


def least_on_the_sphere(scale, saddle, multiplicity, method):
    params = block_saddle(scale, *saddle)
    eig = ncjax.hessian_eig(
        ncjax.log_cross_entropy, params, k=multiplicity + 1, sphere=True, method=method
    )
    assert eig.converged.all()
    assert eig.method == method
    assert_orthonormal(eig)
    radial = rows(eig) @ np.concatenate([np.ravel(leaf) for leaf in params])
    np.testing.assert_allclose(radial, 0, atol=1e-10)
    return eig.eigenvalues


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize(("m", "b", "n", "d", "limit", "multiplicity"), SADDLES)
def test_eigenvalues_of_block_saddles_at_large_scale(
    m, b, n, d, limit, multiplicity, method
):
    eigenvalues = least_on_the_sphere(30.0, (m, b, n, d), multiplicity, method)
    np.testing.assert_allclose(eigenvalues[:-1], limit, rtol=0, atol=1e-10)
    assert eigenvalues[-1] > limit + 0.01


@pytest.mark.parametrize("scale", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("m", "b", "n", "d", "limit", "multiplicity"), SADDLES)
def test_eigenvalues_of_block_saddles_at_finite_scale(
    scale, m, b, n, d, limit, multiplicity
):
    """-b (π_o - π_w) / (K √n ℓ): softmax weights of other and own block, sample's loss."""
    K = m * b
    own, other = math.exp(-(scale**2) * b / (b - 1)), math.exp(-(scale**2))
    odds = (b - 1) * own + (K - b) * other
    expected = -b * (other - own) / (1 + odds) / (K * math.sqrt(n) * math.log1p(odds))
    eigenvalues = least_on_the_sphere(scale, (m, b, n, d), multiplicity, "lanczos")
    np.testing.assert_allclose(eigenvalues[:-1], expected, rtol=0, atol=1e-12)


def test_example_of_the_paper_itself():
    block = np.array([[1.0, -1.0], [-1.0, 1.0]])
    W = jnp.asarray(np.kron(np.eye(2), block))
    params = ncjax.Params(W, W.T[:, None])
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, k=3, sphere=True)
    np.testing.assert_allclose(eig.eigenvalues[:2], -0.178810508, rtol=0, atol=1e-9)
    assert eig.eigenvalues[2] > -0.17
    # The gradient is radial here, so the Hessian of L over L has the same eigenvalues.
    plain = ncjax.hessian_eig(ncjax.cross_entropy, params, k=3, sphere=True)
    ratio = plain.eigenvalues / ncjax.cross_entropy(params)
    np.testing.assert_allclose(ratio[:2], eig.eigenvalues[:2], atol=1e-12)


def test_collapse_is_a_minimiser_on_the_sphere_only():
    """The plain Hessian has negative eigenvalues at collapse too."""
    params = block_saddle(2.0, 1, 4, 2, 6)
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, sphere=True)
    assert eig.eigenvalues[0] > -1e-12
    assert ncjax.hessian_eig(ncjax.log_cross_entropy, params).eigenvalues[0] < -0.1


@pytest.mark.parametrize(
    ("method", "extra"), [("dense", 3), ("lanczos", 0), ("lanczos", 3)]
)
def test_origin_has_tied_eigenvalues_of_both_signs(method, extra):
    K, n, d = 4, 3, 5
    origin = ncjax.Params(jnp.zeros((K, d)), jnp.zeros((K, n, d)))
    copies = d * (K - 1)
    eig = ncjax.hessian_eig(
        ncjax.cross_entropy, origin, k=copies + extra, which="both", method=method
    )
    high = np.repeat(math.sqrt(n), copies)
    expected = np.concatenate([-high, np.zeros(2 * extra), high])
    np.testing.assert_allclose(eig.eigenvalues, expected, rtol=0, atol=1e-10)
    assert eig.converged.all()
    assert_orthonormal(eig)


# Against LAPACK and ARPACK.


def test_network_agrees_with_dense_and_with_arpack():
    params, batches = network()
    eig = partial(ncjax.hessian_eig, network_loss, params, batches=batches)
    dense = eig(which="both", k=5, method="dense")
    free = eig(which="both", k=5)
    assert (dense.method, free.method) == ("dense", "lanczos")
    np.testing.assert_allclose(free.eigenvalues, dense.eigenvalues, rtol=0, atol=1e-10)
    assert free.converged.all()
    assert dense.converged.all()
    assert free.residuals.max() < 1e-8
    overlap = np.abs(rows(free) @ rows(dense).T)
    np.testing.assert_allclose(overlap, np.eye(10), atol=1e-6)
    assert jax.tree.structure(free.eigenvectors) == jax.tree.structure(params)

    flat, unravel = ravel_pytree(params)
    product = jax.jit(
        lambda v: ravel_pytree(
            ncjax.hvp(network_loss, params, unravel(v), batches=batches)
        )[0]
    )
    operator = LinearOperator(
        (flat.size, flat.size), lambda v: np.asarray(product(v.reshape(-1))), dtype=float
    )
    arpack = np.sort(eigsh(operator, k=10, which="BE", return_eigenvectors=False))
    np.testing.assert_allclose(free.eigenvalues, arpack, rtol=0, atol=1e-8)


def test_hvp_sums_over_batches():
    params, (x, y) = network()
    whole = (x.reshape(64, 10), y.reshape(64))
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)
                                               ).reshape(leaf.shape), params)  # fmt: skip

    def along(step):
        moved = jax.tree.map(lambda z, v: z + step * v, params, vector)
        return network_loss(moved, whole)

    product = jax.jit(partial(ncjax.hvp, network_loss))(params, vector, batches=(x, y))
    curvature = ravel_pytree(product)[0] @ ravel_pytree(vector)[0]
    exact = jax.jit(jax.grad(jax.grad(along)))(0.0)
    np.testing.assert_allclose(curvature, exact, rtol=1e-12)


def test_float32_network():
    params, (x, y) = network("float32")
    eig = ncjax.hessian_eig(network_loss, params, batches=(x, y), which="both", k=5)
    assert eig.eigenvalues.dtype == eig.residuals.dtype == jnp.float32
    assert eig.converged.all()
    wide = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
    exact = ncjax.hessian_eig(
        network_loss, wide, batches=(x.astype("float64"), y), which="both", k=5
    )
    np.testing.assert_allclose(eig.eigenvalues, exact.eigenvalues, rtol=1e-5)


def wavy(z, shift):
    return jnp.sum(jnp.sin(z * jnp.roll(z, 1)) * z + shift * z**3)


def wavy_sum(z):
    return wavy(z, 0.3) + wavy(z, -1.0)


wavy_derivatives = jax.jit(lambda z: (jax.grad(wavy_sum)(z), jax.hessian(wavy_sum)(z)))


@pytest.mark.parametrize("first", [0.0, -0.7])
def test_sphere_matches_its_definition(first):
    z = np.r_[first, np.linspace(-1, 2, 24)]

    shifts = jnp.asarray([0.3, -1.0])
    gradient, hessian = wavy_derivatives(z)
    projector = np.eye(25) - np.outer(z, z) / (z @ z)
    riemannian = projector @ hessian @ projector - gradient @ z / (z @ z) * projector
    frame = np.linalg.svd(z[None])[2][1:]
    expected = np.linalg.eigvalsh(frame @ riemannian @ frame.T)
    eig = partial(ncjax.hessian_eig, wavy, z, batches=shifts, sphere=True)
    dense, free = eig(which="all"), eig(which="smallest", k=3, method="lanczos")
    np.testing.assert_allclose(dense.eigenvalues, expected, atol=1e-12)
    np.testing.assert_allclose(free.eigenvalues, expected[:3], atol=1e-12)
    np.testing.assert_allclose(rows(dense) @ z, 0, atol=1e-13)
    np.testing.assert_allclose(rows(free) @ z, 0, atol=1e-13)
    vector = np.arange(25.0)
    product = jax.jit(partial(ncjax.hvp, wavy, sphere=True))(z, vector, batches=shifts)
    np.testing.assert_allclose(product, riemannian @ vector, atol=1e-11)


@given(st.integers(0, 2**31), st.integers(-100, 100))
def test_products_and_densities_of_quadratics(seed, exponent):
    """Linear and exact; a Gauss rule of a measure on the spectrum."""
    rng = np.random.default_rng(seed)
    spectrum = rng.normal(size=9) * 10.0**exponent
    matrices = symmetric(spectrum, seed)
    x, v, w = (jnp.asarray(z) for z in rng.normal(size=(3, 9)))
    norm = np.abs(spectrum).max()
    product = partial(ncjax.hvp, quadratic, x, batches=matrices)
    expected = matrices[0] @ (v + 2 * w)
    np.testing.assert_allclose(product(v + 2 * w), expected, rtol=0, atol=1e-13 * norm)
    density = ncjax.spectral_density(
        quadratic, x, batches=matrices, num_probes=2, num_steps=5, key=jax.random.key(seed)
    )
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert nodes.min() >= spectrum.min() - 1e-12 * norm
    assert nodes.max() <= spectrum.max() + 1e-12 * norm
    grid = np.asarray(density.grid)
    mass = np.sum(density.density) * (grid[1] - grid[0])
    assert float(mass) == pytest.approx(1, rel=1e-3)


# Multiplicity, clusters, breakdown.


@given(
    copies=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    gaps=st.lists(st.floats(1e-4, 1.0), min_size=8, max_size=8),
    first=st.floats(-5.0, 5.0),
    exponent=st.integers(-200, 200),
    seed=st.integers(0, 2**31 - 1),
)
def test_lanczos_finds_all_copies_of_multiple_eigenvalues(
    copies, gaps, first, exponent, seed
):
    levels = (first + np.cumsum(gaps)[: len(copies)]) * 10.0**exponent
    spectrum = np.repeat(levels, copies)
    spectrum = np.sort(np.pad(spectrum, (0, 60 - len(spectrum)), mode="edge"))
    eig = ncjax.hessian_eig(
        quadratic,
        jnp.ones(60),
        batches=symmetric(spectrum, seed),
        k=6,
        which="both",
        method="lanczos",
        key=jax.random.key(seed),
    )
    norm = np.max(np.abs(spectrum))
    expected = np.concatenate([spectrum[:6], spectrum[-6:]])
    np.testing.assert_allclose(eig.eigenvalues, expected, rtol=0, atol=1e-12 * norm)
    assert eig.converged.all()
    assert_orthonormal(eig)


CLUSTERS = {
    "six copies": np.r_[np.repeat(-1.0, 6), np.linspace(-0.9, 1, 94)],
    "cluster of 1e-6": np.r_[-1 - 1e-6 * np.arange(6), np.linspace(-0.9, 1, 94)],
    "cluster of 1e-10": np.r_[-1 - 1e-10 * np.arange(6), np.linspace(-0.9, 1, 94)],
    "tie of both signs": np.r_[np.repeat([-1.0, 1.0], 9), np.linspace(-0.5, 0.5, 82)],
    "rank one": np.r_[np.zeros(99), 1.0],
    "minus rank one": np.r_[-1.0, np.zeros(99)],
    "small end of a wide spectrum": np.r_[np.repeat(-1e-3, 4), np.linspace(0, 100, 96)],
    "far from zero": 1e3 + np.linspace(0, 1, 100),
    "two times the identity": np.full(100, 2.0),
    "zero": np.zeros(100),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_lanczos_resolves_clusters_and_survives_breakdown(name, dtype):
    spectrum = np.sort(CLUSTERS[name])
    norm = np.max(np.abs(spectrum))
    for k, which, expected in (
        (5, "smallest", spectrum[:5]),
        (1, "largest", spectrum[-1:]),
    ):
        eig = ncjax.hessian_eig(
            quadratic,
            jnp.ones(100, dtype),
            batches=symmetric(spectrum).astype(dtype),
            k=k,
            which=which,
            method="lanczos",
        )
        atol = (1e-13 if dtype == "float64" else 1e-6) * norm
        np.testing.assert_allclose(eig.eigenvalues, expected, rtol=0, atol=atol)
        assert eig.converged.all()
        assert_orthonormal(eig, 1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize(
    ("dim", "method", "which"),
    [
        (1, "dense", "both"),
        (1, "lanczos", "smallest"),
        (2, "lanczos", "both"),
        (7, "lanczos", "largest"),
    ],
)
def test_all_eigenvalues_of_a_small_space(dim, method, which):
    eig = ncjax.hessian_eig(
        quadratic,
        jnp.ones(dim),
        batches=symmetric(np.arange(dim) - 1.0),
        k=dim,
        which=which,
        method=method,
    )
    np.testing.assert_allclose(eig.eigenvalues, np.arange(dim) - 1.0, atol=1e-13)
    assert eig.converged.all()
    assert_orthonormal(eig)


def test_both_ends_do_not_overlap():
    matrix = symmetric(np.arange(5.0))
    eig = ncjax.hessian_eig(quadratic, jnp.ones(5), batches=matrix, k=3, which="both")
    np.testing.assert_allclose(eig.eigenvalues, np.arange(5.0), atol=1e-13)


@pytest.mark.parametrize(
    ("method", "fn"), [("dense", jnp.sum), ("lanczos", lambda x: jnp.asarray(3.0))]
)
def test_linear_and_constant_functions(method, fn):
    eig = ncjax.hessian_eig(fn, jnp.ones(50), k=4, method=method)
    np.testing.assert_array_equal(eig.eigenvalues, 0)
    np.testing.assert_array_equal(eig.residuals, 0)
    assert eig.converged.all()


def test_a_linear_function_is_curved_on_the_sphere():
    """Linear functions curve on the sphere: -<∇f, Z>/|Z|², D - 1 times."""
    z = jnp.asarray([0.0, 3.0, 4.0])
    eig = ncjax.hessian_eig(lambda x: x[2], z, which="all", sphere=True)
    np.testing.assert_allclose(eig.eigenvalues, [-4 / 25] * 2, atol=1e-15)


def test_mixed_dtypes_keep_their_leaves():
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones((2, 2)), "c": jnp.ones(())}

    def fn(p):
        b = jnp.sum(p["b"] ** 2)
        return jnp.sum(p["a"].astype(b.dtype) ** 4) + b + 3 * p["c"] ** 2

    for method in ("dense", "lanczos"):
        eig = ncjax.hessian_eig(fn, params, k=8, method=method)
        expected = [2, 2, 2, 2, 6, 12, 12, 12]
        np.testing.assert_allclose(eig.eigenvalues, expected, rtol=1e-6)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, eig.eigenvectors)
        assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, params)
        assert eig.eigenvectors["b"].shape == (8, 2, 2)
        assert eig.converged.all()


def test_converged_is_false_if_lanczos_stops_early():
    spectrum = 10.0 ** np.linspace(-6, 6, 100)
    eig = ncjax.hessian_eig(
        quadratic,
        jnp.ones(100),
        batches=symmetric(spectrum),
        k=5,
        method="lanczos",
        max_hvps=100,
    )
    assert not eig.converged.any()
    assert eig.num_hvps < 150
    assert np.isfinite(eig.eigenvalues).all()
    assert np.all(eig.residuals > 1e-6)


@pytest.mark.parametrize("max_hvps", [100, 20_000])
def test_progress_is_shown_and_changes_nothing(capfd, max_hvps):
    """The line ends whether Lanczos converges or not, and a second call shows it again."""
    solve = partial(
        ncjax.hessian_eig,
        quadratic,
        jnp.ones(100),
        batches=symmetric(10.0 ** np.linspace(-1, 1, 100)),
        k=3,
        method="lanczos",
        max_hvps=max_hvps,
    )
    quiet = solve()
    assert capfd.readouterr().err == ""
    for _ in range(2):
        eig = solve(progress=True)
        jax.effects_barrier()
        np.testing.assert_array_equal(rows(eig), rows(quiet))
        shown = capfd.readouterr().err
        assert shown.endswith("\n")  # the line is closed
        last = shown.strip().split("\r")[-1]
        # The three products for the true residuals come after the last restart.
        assert f"Hessian: {int(eig.num_hvps) - 3} products [" in last
        assert "residual=" in last


def test_progress_without_tqdm_names_the_extra_to_install(monkeypatch):
    """Before any product is taken."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def fn(x):
        pytest.fail("called although tqdm is missing")

    message = r"tqdm not found: pip install 'ncjax\[experiments\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        ncjax.hessian_eig(fn, jnp.ones(4), progress=True)


def test_the_result_is_a_pytree_of_arrays():
    """`method` is static: it takes part in the structure and not in the leaves."""
    eig = ncjax.hessian_eig(quadratic, jnp.ones(5), batches=symmetric(np.arange(5.0)))
    assert len(jax.tree.leaves(eig)) == 5
    assert jax.tree.map(jnp.zeros_like, eig).method == eig.method == "dense"
    other = dataclasses.replace(eig, method="lanczos")
    assert jax.tree.structure(other) != jax.tree.structure(eig)


# Transformations and devices.


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_under_jit_and_vmap(method):
    shifts = jnp.asarray([1.0, -2.0, 0.5])

    def least(shift):
        def fn(x):  # closes over a traced value
            return shift * jnp.sum(x[:3] ** 2) / 2 + jnp.sum(x[3:] ** 2)

        return ncjax.hessian_eig(fn, jnp.ones(30), k=3, method=method)

    one = jax.jit(least)(shifts[1])
    assert one.method == method
    np.testing.assert_allclose(one.eigenvalues, -2.0, rtol=0, atol=1e-13)
    many = jax.vmap(least)(shifts)
    expected = jnp.broadcast_to(shifts[:, None], (3, 3))
    np.testing.assert_allclose(many.eigenvalues, expected, rtol=0, atol=1e-13)
    assert many.converged.all()


@pytest.mark.parametrize(("method", "sphere"), [("dense", False), ("lanczos", True)])
def test_a_hessian_that_is_not_finite_is_flagged_under_jit_and_refused_outside(
    method, sphere
):
    def fn(x):
        return jnp.sum(x**1.5)  # second derivative infinite at zero

    def least(x):
        return ncjax.hessian_eig(fn, x, k=2, method=method, sphere=sphere)

    eig = jax.jit(least)(jnp.zeros(30))
    assert np.isnan(eig.eigenvalues).all()
    assert not eig.converged.any()
    with pytest.raises(ValueError, match="must be finite, got eigenvalues"):
        least(jnp.zeros(30).at[1].set(1.0))
    with pytest.raises(ValueError, match="must be finite, got nodes"):
        ncjax.spectral_density(fn, jnp.zeros(30), num_points=2, num_probes=1)


def test_the_same_key_gives_the_same_result():
    matrix = symmetric(np.linspace(-1, 1, 60))
    keys = [None, jax.random.key(0), jax.random.key(7)]
    eigs = [
        ncjax.hessian_eig(
            quadratic,
            jnp.ones(60),
            batches=matrix,
            k=6,
            which="both",
            method="lanczos",
            key=key,
        )
        for key in keys
    ]
    np.testing.assert_array_equal(rows(eigs[0]), rows(eigs[1]))
    for eig in eigs:
        np.testing.assert_allclose(eig.eigenvalues, eigs[0].eigenvalues, atol=1e-14)


def test_eigenvalues_of_sharded_data_agree_with_one_device():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    printed = subprocesses.output(subprocesses.command("sharded_eigenvalues"), environment)
    one, automatic, explicit = (
        [float.fromhex(word) for word in line.split()] for line in printed.splitlines()
    )
    assert len(one) == 4
    np.testing.assert_allclose(automatic, one, rtol=1e-9)
    np.testing.assert_allclose(explicit, one, rtol=1e-9)


# Spectral density.


def test_density_of_a_known_spectrum(key):
    spectrum = np.concatenate([np.linspace(-1, 1, 150), np.full(50, 3.0)])
    probes = 64
    density = ncjax.spectral_density(
        quadratic,
        jnp.ones(200),
        batches=symmetric(spectrum),
        num_probes=probes,
        num_steps=40,
        key=key,
    )
    assert density.nodes.shape == density.weights.shape == (probes, 40)
    assert density.grid.shape == density.density.shape == (1024,)
    np.testing.assert_allclose(density.weights.sum(), 1, rtol=1e-12)
    assert (density.weights >= 0).all()
    np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1, atol=1e-5)
    for power in range(1, 6):
        exact = np.mean(spectrum**power)
        per_probe = np.sum(density.weights * density.nodes**power, axis=1) * probes
        error = np.std(per_probe) / math.sqrt(probes)
        assert abs(per_probe.mean() - exact) < 4 * error
    # A quarter of the eigenvalues are at 3, three quarters at 1 and below.
    upper = np.asarray(density.grid) > 2
    share = np.trapezoid(density.density[upper], density.grid[upper])
    assert abs(share - 0.25) < 0.03


def test_gauss_rule_is_exact_for_its_vector():
    """With as many steps as dimensions the nodes are the eigenvalues."""
    spectrum = np.linspace(-2, 5, 12)
    density = ncjax.spectral_density(
        quadratic, jnp.ones(12), batches=symmetric(spectrum), num_probes=2, num_steps=99
    )
    for nodes in density.nodes:
        np.testing.assert_allclose(nodes, spectrum, atol=1e-10)


@pytest.mark.parametrize("factor", [2.0, 0.0, 1e-200, 1e200])
def test_density_of_a_multiple_of_the_identity(factor):
    density = ncjax.spectral_density(
        quadratic,
        jnp.ones(60),
        batches=factor * jnp.eye(60)[None],
        num_probes=3,
        num_steps=10,
    )
    np.testing.assert_allclose(density.nodes, factor, rtol=1e-13)
    np.testing.assert_allclose(density.weights.sum(), 1, rtol=1e-13)
    area = np.trapezoid(density.density, density.grid)
    np.testing.assert_allclose(area, 1, atol=1e-5)


def test_density_on_a_given_grid():
    grid = np.linspace(-1, 3, 41)
    density = ncjax.spectral_density(
        lambda x: jnp.sum(x**2) / 2, jnp.ones(9), grid=grid, width=0.2, num_probes=1
    )
    gaussian = np.exp(-(((grid - 1) / 0.2) ** 2) / 2) / (0.2 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(density.density, gaussian, atol=1e-10)
    on_sphere = ncjax.spectral_density(
        lambda x: jnp.sum(x**2) / 2, jnp.ones(9), num_probes=1, sphere=True
    )
    np.testing.assert_allclose(on_sphere.nodes, 0, atol=1e-14)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fn": lambda x: x}, r"one real floating scalar, got float64 of shape \(4,\)"),
        ({"fn": lambda x: (x[0], x[1])}, "one real floating scalar, got tuple"),
        ({"fn": lambda x: jnp.sum(x > 0)}, "one real floating scalar, got int64"),
        ({"params": jnp.arange(4)}, "params must be real and floating, got int64"),
        ({"params": [jnp.ones(4, complex)]}, r"params\[0\] must be real .* complex128"),
        ({"params": jnp.asarray([1.0, jnp.nan])}, "finite, got 1 of 2 entries"),
        ({"params": {}}, "at least one number, got an empty pytree"),
        ({"params": jnp.zeros(0)}, "at least one number, got an empty pytree"),
        ({"k": 5}, "k must be at most 4, the dimension of params, got 5"),
        ({"k": 4, "sphere": True}, "at most 3, the dimension of the tangent space, got 4"),
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 1.5}, "k must be an integer of at least 1, got 1.5"),
        ({"k": 2, "which": "all"}, "k must be 4 or None for which='all'"),
        ({"params": jnp.zeros(4), "sphere": True}, "away from the origin, got all zeros"),
        ({"params": jnp.ones(1), "sphere": True}, "at least 2 parameters, got 1"),
        ({"which": "top"}, "which must be one of .* got 'top'"),
        ({"method": "qr"}, "method must be one of .* got 'qr'"),
        ({"method": "lanczos", "which": "all"}, "which='all' needs method='dense'"),
        ({"tol": 0.0}, "tol must be positive and finite, got 0.0"),
        ({"tol": math.nan}, "tol must be positive and finite, got nan"),
        ({"max_hvps": 0}, "max_hvps must be an integer of at least 1, got 0"),
        ({"num_vectors": 3}, "num_vectors must be at least 4 for 1 eigenpairs, got 3"),
        ({"batches": jnp.ones((0, 4))}, r"at least 1 batch in common, got .*\(0, 4\)"),
        ({"batches": (jnp.ones(3), jnp.ones(2))}, "one leading axis"),
        ({"batches": ()}, r"one leading axis .* got shapes \[\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"fn": lambda x, *_: jnp.sum(x**2), "params": jnp.ones(4)} | change
    fn, params = arguments.pop("fn"), arguments.pop("params")
    with pytest.raises(ValueError, match=message) as caught:
        ncjax.hessian_eig(fn, params, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": -1.0}, "width must be positive and finite, got -1.0"),
        ({"grid": jnp.ones((2, 2))}, r"grid must be a vector \(T,\), got shape \(2, 2\)"),
        ({"num_probes": 0}, "num_probes must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_points": 1}, "num_points must be an integer of at least 2, got 1"),
    ],
)
def test_bad_input_of_the_density_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ncjax.spectral_density(lambda x: jnp.sum(x**2), jnp.ones(4), **change)


def test_vector_must_be_like_params():
    for vector in (jnp.ones(3), [jnp.ones(4)], {}):
        with pytest.raises(ValueError, match="vector must be like params"):
            ncjax.hvp(lambda x: jnp.sum(x**2), jnp.ones(4), vector)
