import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from state_functions import certificate, kkt
from strategies import separating

import ncjax
from experiments._saddles import Block
from ncjax.peeled.separation import (
    GLOBAL_OPTIMUM,
    NO_ROOM,
    NOT_KKT,
    NOT_SEPARATED,
    STRICT_SADDLE,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILY = [
    Block(1, 4, 3, 6),
    Block(2, 2, 1, 4),
    Block(3, 2, 3, 8),
    Block(2, 3, 2, 8),
    Block(6, 2, 2, 12),
]


@pytest.mark.parametrize("block", FAMILY, ids=str)
def test_multipliers_and_sigma_max_of_the_block_family(block):
    params = block.params(30.0)
    found, proof = kkt(params), certificate(params)
    size = block.num_classes
    others = size - (block.block_size if block.num_blocks > 1 else 1)
    weight = 1 / (others * block.per_class**0.5)
    group = np.arange(size) // block.block_size
    across = (
        group[:, None] != group[None] if block.num_blocks > 1 else ~np.eye(size, dtype=bool)
    )
    expected = np.broadcast_to(weight * across[:, None], found.multipliers.shape)
    if block.num_blocks == 1:
        expected = expected * (size - 1) / size
    np.testing.assert_allclose(found.multipliers, expected, atol=1e-10)
    assert float(found.stationarity) < 1e-10
    assert abs(float(found.complementarity)) < 1e-10
    assert float(found.beta) == pytest.approx(1, abs=1e-12)
    assert float(proof.sigma_max) == pytest.approx(block.sigma_max, abs=1e-10)
    verdict = GLOBAL_OPTIMUM if block.num_blocks == 1 else STRICT_SADDLE
    assert int(proof.verdict) == verdict
    half = float(ncjax.squared_norm(params) / ncjax.margins(params).min()) / 2
    assert float(found.multipliers.sum()) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize("multipliers", ["softmax", "nnls"])
def test_kkt_agrees_with_loops_off_a_kkt_point(multipliers):
    params = separating(0)
    found = kkt(params, multipliers=multipliers)
    weights = np.asarray(found.multipliers)
    assert (weights >= 0).all()
    tangent, slack = oracles.tangent_and_slack(params, weights)
    assert float(found.stationarity) == pytest.approx(tangent, rel=1e-9)
    assert float(found.complementarity) == pytest.approx(slack, rel=1e-9, abs=1e-12)


def test_softmax_stationarity_is_the_kkt_angle():
    params = separating(1)
    angle = float(ncjax.kkt_angle(params))
    assert float(kkt(params).stationarity) == pytest.approx(angle, rel=1e-9)


@pytest.mark.parametrize("block", FAMILY[:3], ids=str)
def test_dual_matrix_maps_features_to_classifier_and_back(block):
    params = block.params(30.0)
    root = jnp.sqrt(ncjax.margins(params).min())
    W, H = params.W / root, params.H.reshape(-1, block.dim) / root
    dual = certificate(params).dual
    np.testing.assert_allclose(dual @ H, W, atol=1e-10)
    np.testing.assert_allclose(dual.T @ W, H, atol=1e-10)


@given(st.integers(0, 10**6), st.sampled_from(["softmax", "nnls"]))
def test_weak_duality_brackets_the_optimum(seed, multipliers):
    params = separating(seed)
    assume(float(ncjax.margins(params).min()) > 1e-3)
    proof = certificate(params, multipliers=multipliers)
    assert float(proof.excess) >= -1e-12  # primal value at least (K-1)√n
    assert float(proof.gap) >= float(proof.excess) - 1e-9  # dual value at most that


def test_verdict_with_nnls_multipliers_is_invariant_under_rotation_and_scale(key):
    saddle, frame = Block(2, 2, 1, 4), jax.random.orthogonal(key, 4)
    for scale in (0.1, 1.0, 100.0):
        params = saddle.params(scale)
        turned = ncjax.Params(params.W @ frame, params.H @ frame)
        proof = certificate(turned, multipliers="nnls")
        assert int(proof.verdict) == STRICT_SADDLE
        assert float(proof.sigma_max) == pytest.approx(2, abs=1e-8)


def test_verdicts_off_kkt_points_and_without_room():
    assert int(certificate(separating(3), multipliers="nnls").verdict) == NOT_KKT
    tight = Block(2, 3, 2, 4).params(30.0)
    proof = certificate(tight)
    assert int(proof.verdict) == NO_ROOM
    assert np.isnan(proof.direction.W).all()


@pytest.mark.parametrize("block", [Block(2, 2, 1, 4), Block(2, 3, 2, 8)], ids=str)
def test_descent_direction_is_tangent_and_has_the_predicted_curvature(block):
    params = block.params(1.5)
    direction = certificate(params).direction
    inner = sum(jnp.vdot(x, z) for x, z in zip(direction, params, strict=True))
    assert abs(float(inner)) < 1e-12
    assert float(ncjax.squared_norm(direction)) == pytest.approx(1)
    size = jnp.sqrt(ncjax.squared_norm(params))

    def at(angle):
        turned = jax.tree.map(
            lambda z, x: jnp.cos(angle) * z + jnp.sin(angle) * size * x, params, direction
        )
        return ncjax.log_cross_entropy(turned)

    step = 1e-3
    curvature = (at(step) - 2 * at(0.0) + at(-step)) / step**2 / size**2
    assert float(curvature) == pytest.approx(block.eigenvalue(1.5), rel=1e-4)


# v(n) to the digits of an independent convex solver (CVXPY).
VALUES = {
    (5, 3, 2, 1): 4.85101666028,
    (4, 4, 1, 1): 4.58113883008,
    (100, 1, 1, 1, 1): 11.9554453,
    (10, 10, 1, 1, 1, 1): 8.80802897123,
    (50, 7, 3, 3, 2, 1, 1): 14.5956690,
    (9, 9, 9, 9): 9.0,
}


@pytest.mark.parametrize("counts", VALUES, ids=str)
def test_the_optimal_value_for_any_counts(counts):
    solution = ncjax.solve_separation(counts, len(counts) - 1)
    assert solution.proved
    assert solution.value == pytest.approx(VALUES[counts], rel=5e-8)
    assert float(solution.multipliers.sum()) == pytest.approx(solution.value, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 1, 1), (3, 2, 1)], ids=str)
def test_a_convex_solver_finds_the_same_value(counts):
    cvxpy = pytest.importorskip("cvxpy")
    classes = np.repeat(np.arange(len(counts)), counts)
    matrix = cvxpy.Variable((len(counts), len(classes)))
    constraints = [
        matrix[k, a] - matrix[j, a] >= 1
        for a, k in enumerate(classes)
        for j in range(len(counts))
        if j != k
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.normNuc(matrix)), constraints)
    problem.solve(solver=cvxpy.CLARABEL)
    assert problem.value == pytest.approx(ncjax.separation_value(counts), rel=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 9))
def test_multipliers_of_the_optimum_are_positive_and_its_dual_is_feasible(seed, size):
    """By the definitions in NumPy, for class sizes of a ratio up to 3000."""
    counts = np.exp(np.random.default_rng(seed).uniform(0, np.log(30), size))
    counts = np.append(counts.astype(int), 3000 if seed % 10 == 0 else 1)
    solution = ncjax.solve_separation(counts, len(counts))
    multipliers = np.asarray(solution.multipliers)
    W, H = (np.asarray(leaf) for leaf in solution.params)
    rest_W, outer = W.copy(), np.zeros((len(counts),) * 2)
    for k, count in enumerate(counts):
        row = multipliers[k, 0]
        assert (np.delete(row, k) > 0).all()
        np.testing.assert_array_equal(multipliers[k, :count], row[None].repeat(count, 0))
        assert not multipliers[k, count:].any()
        assert not H[k, count:].any()
        column = -row
        column[k] = row.sum()
        np.testing.assert_allclose(column @ W, H[k, 0], atol=1e-11)  # h = Sᵀ W
        rest_W -= count * np.outer(column, H[k, 0])  # W = S H
        outer += count * np.outer(column, column)
    np.testing.assert_allclose(rest_W, 0, atol=1e-11 * np.abs(W).max())
    assert np.linalg.eigvalsh(outer)[-1] <= 1 + 1e-12  # σ_max(S) ≤ 1


# K_A, K_B, n_A, n_B: v, cosines within A, within B, across, of W; within A, within B, of h.
STEP = {
    (2, 2, 4, 1): (
        *(4.58113883008, -0.433399211802, -0.116963119775),
        *(-0.353669829199, -0.225148226554, -0.519493853296),
    ),
    (2, 4, 10, 1): (
        *(8.80802897123, -0.283883819611, -0.030418706314),
        *(-0.285211806614, -0.113078122431, -0.279595378564),
    ),
    (3, 7, 100, 1): (
        *(34.3845095265, -0.159682179994, 0.177955380503),
        *(-0.258877824265, -0.058248492435, -0.159750635195),
    ),
}


@pytest.mark.parametrize("setting", STEP, ids=str)
def test_cosines_of_large_and_small_classes(setting):
    large, small, n_large, n_small = setting
    found = ncjax.solve_separation((n_large,) * large + (n_small,) * small, 12)
    pair = found.params.W, found.params.H[:, 0]
    W, h = (oracles.unit_rows(np.asarray(rows)) for rows in pair)
    of_W, of_h = W @ W.T, h @ h.T
    got = [found.value, of_W[0, 1], of_W[-1, -2], of_W[0, -1], of_h[0, 1], of_h[-1, -2]]
    np.testing.assert_allclose(got, STEP[setting], rtol=2e-11)


@pytest.mark.parametrize(
    ("counts", "dim", "value"),
    [((1,) * 4, 2, 4.0), ((2,) * 5, 2, 7.2360679775 * 2**0.5), ((4,) * 8, 2, 54.627416998)],
    ids=str,
)
def test_the_regular_polygon_in_two_dimensions(counts, dim, value):
    found = ncjax.solve_separation(counts, dim)
    assert not found.proved
    assert found.weights is None
    assert found.value == pytest.approx(value, rel=1e-11)
    assert float(ncjax.squared_norm(found.params)) == pytest.approx(2 * value, rel=1e-11)
    assert float(ncjax.margins(found.params).min()) == pytest.approx(1, abs=1e-13)
    multipliers = np.asarray(found.multipliers)
    tangent, slack = oracles.tangent_and_slack(found.params, multipliers)
    assert tangent < 1e-13
    assert abs(slack) < 1e-13
    singular = np.linalg.svd(_dual(multipliers), compute_uv=False)
    angle = 2 * np.pi * np.arange(len(counts)) / len(counts)
    expected = (1 - np.cos(angle)) / (1 - np.cos(angle[1]))
    np.testing.assert_allclose(singular, np.sort(expected)[::-1], atol=1e-12)


def _dual(multipliers):
    """S (K, K n) by loops."""
    dual = np.zeros((len(multipliers), *multipliers.shape[:2]))
    for k, i, j in np.ndindex(multipliers.shape):
        dual[k, k, i] += multipliers[k, i, j]
        dual[j, k, i] -= multipliers[k, i, j]
    return dual.reshape(len(multipliers), -1)


@pytest.mark.parametrize(
    ("counts", "dim", "message"),
    [
        ((4, 0, 1), 5, "counts must be an integer of at least 1, got 0"),
        ((4, 1.5), 5, r"counts must be an integer of at least 1, got \d"),
        (
            4,
            5,
            r"number of samples of each of K >= 2 classes, such as \(4, 4, 1, 1\), got 4",
        ),
        ((4, 4, 1, 1), 1, "dim must be at least 2 for num_classes = 4, got 1: on a line"),
        ((4,) * 50, 3, "at dim = 3 has 2750 unknowns and margins, more than 1500"),
        ((4, 4), 0, "dim must be an integer of at least 1, got 0"),
    ],
)
def test_bad_counts_and_dims_are_named(counts, dim, message):
    with pytest.raises(ValueError, match=message):
        ncjax.solve_separation(counts, dim)


def certified_flows(keys, sizes, log_times):
    """Certificates (starts, times) along the flow of random starts."""

    def one(key):
        flow = ncjax.gradient_flow(ncjax.init_params(key, *sizes), log_times)
        return jax.vmap(certificate)(flow.params)

    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def test_flows_are_certified():
    """On the way a state looks like a saddle by residual and sigma_max alone."""
    keys = jax.random.split(jax.random.key(0), 8)[np.array([0, 7])]
    proof = certified_flows(keys, (8, 2, 10), [80.0, 160.0, 1000.0])
    np.testing.assert_array_equal(proof.verdict[:, -1], GLOBAL_OPTIMUM)
    np.testing.assert_allclose(proof.sigma_max[:, -1], 1, atol=1e-6)
    assert (proof.excess[:, -1] < 1e-4).all()
    alike = (proof.sigma_max > 1 + proof.tolerance) & (proof.residual <= proof.tolerance)
    assert alike.any()
    assert (proof.verdict[alike] == NOT_KKT).all()


@pytest.mark.slow
def test_all_seeds_of_the_default_run_get_the_right_verdict():
    keys = jax.random.split(jax.random.key(0), 32)
    proof = certified_flows(keys, (10, 5, 20), [1000.0])
    verdict, sigma_max, excess = (
        leaf[:, 0] for leaf in (proof.verdict, proof.sigma_max, proof.excess)
    )
    arrived = excess < 3e-4
    assert arrived.sum() >= 30
    np.testing.assert_array_equal(verdict[arrived], GLOBAL_OPTIMUM)
    # States that are still leaving a saddle are not called optimal.
    assert (verdict[~arrived] != GLOBAL_OPTIMUM).all()
    assert (sigma_max[~arrived] > 1.01).all()


def test_float32_stays_float32():
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), Block(2, 2, 1, 4).params(30)
    )
    proof = certificate(params)
    assert proof.sigma_max.dtype == jnp.float32
    assert int(proof.verdict) == STRICT_SADDLE
    assert kkt(params, multipliers="nnls").multipliers.dtype == jnp.float32


def test_vmap_marks_misclassified_states_alone():
    good = separating(0)
    both = jax.tree.map(lambda *x: jnp.stack(x), good, good._replace(W=-good.W))
    proof = jax.vmap(ncjax.certificate)(both)
    assert int(proof.verdict[1]) == NOT_SEPARATED
    assert np.isnan(proof.sigma_max[1])
    assert np.isfinite(proof.sigma_max[0])


@pytest.mark.parametrize("fn", [ncjax.kkt, ncjax.certificate])
def test_bad_input_is_named(fn):
    good = separating(0)
    with pytest.raises(ValueError, match="follow the flow until the loss is below log 2"):
        fn(good._replace(W=-good.W))
    with pytest.raises(ValueError, match="every margin must be positive, got q_min = 0"):
        fn(jax.tree.map(jnp.zeros_like, good))
    with pytest.raises(ValueError, match="W must be finite"):
        fn(good._replace(W=good.W * jnp.nan))
    with pytest.raises(ValueError, match=r"multipliers must be one of .* got 'best'"):
        fn(good, multipliers="best")


def test_certificate_refuses_a_negative_tolerance():
    with pytest.raises(ValueError, match="tol must not be negative, got -1"):
        ncjax.certificate(separating(0), tol=-1)


@pytest.mark.parametrize(
    ("majority", "minority", "size"),
    [(2, 5, 10**15), (1, 3, 10**15), (3, 3, 10**12), (1, 1, 10**15)],
)
def test_the_value_keeps_its_digits_at_any_ratio_of_the_sizes(majority, minority, size):
    """Two sizes of classes: eigenvalues n_A, n_B and the mean with exchanged weights."""
    across = (minority * size + majority * 3) / (majority + minority)
    expected = (majority - 1) * size**0.5 + (minority - 1) * 3**0.5 + across**0.5
    for counts in (
        (3,) * minority + (size,) * majority,
        (size,) * majority + (3,) * minority,
    ):
        assert ncjax.separation_value(counts) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("counts", [(1, 1, 30000), (30000, 1, 1, 1)])
def test_the_margin_ratio_in_float32_is_1_for_very_different_classes(counts):
    problem = ncjax.solve_separation(counts, 4, dtype=jnp.float32)
    ratio = ncjax.margin_ratio(problem.params, problem.weights)
    assert float(ratio) == pytest.approx(1, abs=1e-6)
