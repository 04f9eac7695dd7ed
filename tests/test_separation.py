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


@pytest.mark.parametrize("shape", [(2, 1, 1), (4, 3, 3), (5, 2, 8)])
def test_solution_has_unit_margins_the_optimal_value_and_no_gap(shape):
    num_classes, per_class, _ = shape
    solution = ncjax.solve_separation(*shape)
    margins = np.asarray(ncjax.margins(solution))
    np.testing.assert_allclose(margins[np.isfinite(margins)], 1, atol=1e-14)
    optimum = (num_classes - 1) * per_class**0.5
    assert float(ncjax.squared_norm(solution)) / 2 == pytest.approx(optimum, rel=1e-14)
    assert abs(float(ncjax.certificate(solution).gap)) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_classes", "per_class"), [(3, 1), (3, 2), (4, 2)])
def test_a_convex_solver_finds_the_same_value(num_classes, per_class):
    cvxpy = pytest.importorskip("cvxpy")
    matrix = cvxpy.Variable((num_classes, num_classes * per_class))
    constraints = [
        matrix[k, k * per_class + i] - matrix[j, k * per_class + i] >= 1
        for k in range(num_classes)
        for i in range(per_class)
        for j in range(num_classes)
        if j != k
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.normNuc(matrix)), constraints)
    problem.solve(solver=cvxpy.CLARABEL)
    solution = ncjax.solve_separation(num_classes, per_class, num_classes)
    value = float(ncjax.squared_norm(solution)) / 2
    assert problem.value == pytest.approx(value, rel=1e-6)


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
