import math

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.integrate import solve_ivp
from strategies import random_params, sine_params

import ncjax
from ncjax import checks
from ncjax.flow.methods import METHODS, choose_solver, find_method
from ncjax.flow.solve import BAD_TIMES, STEP_LIMIT, STEP_TOO_SMALL, SUCCESS

pytestmark = pytest.mark.usefixtures("quick_compilation")

# t: L, q_min, |Z|², W[0, 0], H[0, 0, 0]; raw equation in t, DOP853 at rtol 1e-12.
EARLY = {
    1: (9.79920660605, -0.126166027668, 13.1756591027, 0.678160021521, 0.219764467778),
    10: (0.0697560306871, 5.34920211001, 73.0069392265, 1.77454233407, 0.804100695011),
    100: (0.00349084547924, 8.55600656532, 104.668022063, 2.21080316488, 1.10892365523),
    1e3: (2.49320152441e-4, 11.3097554347, 132.058865618, 2.56901897706, 1.35188892468),
    1e5: (1.61649209291e-6, 16.4536544085, 183.082725145, 3.18763475558, 1.74427037646),
}
# log(1 + t): log L, |Z|², W[0, 0], H[0, 0, 0]; the clock at tolerance 1e-10.
LATE = {
    100: (-103.711361, 1115.07309, 8.5597129, 4.9428132),
    1000: (-1005.961492, 10491.52622, 26.236817, 15.145522),
    10000: (-10008.256652, 104046.12128, 82.595737, 47.683309),
}


def flow_at(start, log_times, count=5, **options):
    """`gradient_flow` with earlier times added up to `count`, so that it compiles once."""
    added = count - len(log_times)
    earlier = log_times[0] - np.arange(added, 0, -1.0)
    flow = ncjax.gradient_flow(start, np.append(earlier, log_times), **options)
    each = ("log_times", "params", "log_loss", "drift")
    return flow._replace(
        **{
            name: jax.tree.map(lambda leaf: leaf[added:], getattr(flow, name))
            for name in each
        }
    )


@pytest.mark.parametrize("solver", ["explicit", "stabilised", "implicit"])
def test_reference_values_up_to_t_of_1e5(solver):
    flow = ncjax.gradient_flow(
        sine_params(), np.log(list(EARLY)), rtol=1e-11, atol=1e-11, solver=solver
    )
    got = np.stack(
        [
            jnp.exp(flow.log_loss),
            jax.vmap(lambda p: ncjax.margins(p).min())(flow.params),
            jax.vmap(ncjax.squared_norm)(flow.params),
            flow.params.W[:, 0, 0],
            flow.params.H[:, 0, 0, 0],
        ],
        axis=-1,
    )
    np.testing.assert_allclose(got, list(EARLY.values()), rtol=2e-9)


@pytest.mark.parametrize(
    ("log_times", "solver"),
    [([100.0], "explicit"), ([100.0, 1e3], "explicit"), ([100.0, 1e3], "implicit")],
)
def test_reference_values_at_late_times(log_times, solver):
    flow = flow_at(sine_params(), log_times, rtol=1e-10, atol=1e-10, solver=solver)
    got = np.stack(
        [
            flow.log_loss,
            jax.vmap(ncjax.squared_norm)(flow.params),
            flow.params.W[:, 0, 0],
            flow.params.H[:, 0, 0, 0],
        ],
        axis=-1,
    )
    # The values are printed to about eight digits; there log(1 + t) equals log t.
    np.testing.assert_allclose(got, [LATE[t] for t in log_times], rtol=2e-8)


@pytest.mark.parametrize("solver", ["explicit", "stabilised", "implicit"])
def test_reference_values_at_log_t_of_10000_at_the_default_tolerance(solver):
    flow = flow_at(sine_params(), [10000.0], solver=solver)
    got = [flow.log_loss[0], ncjax.squared_norm(flow.final), flow.final.W[0, 0]]
    np.testing.assert_allclose(got, LATE[10000][:3], rtol=1e-7)
    assert float(flow.drift.balance[0]) < 1e-7
    assert float(flow.drift.classifier_sum[0]) < 1e-12


def test_the_flow_is_the_raw_equation_in_t():
    params, times = random_params(5, 3, 2, 4, 0.5), [0.1, 1.0, 7.0, 30.0]
    sizes = (3, 4), (3, 2, 4)

    def field(_t, flat):
        W, H = flat[:12].reshape(sizes[0]), flat[12:].reshape(sizes[1])
        log_loss, *gradient = oracles.log_cross_entropy_and_gradient(W, H)
        loss = np.exp(log_loss)
        return -np.concatenate([(loss * g).ravel() for g in gradient]).astype(float)

    start = np.concatenate([np.ravel(leaf) for leaf in params])
    raw = solve_ivp(field, (0, 30), start, "DOP853", times, rtol=1e-10, atol=1e-12)
    flow = ncjax.gradient_flow(params, np.log(times), rtol=1e-10, atol=1e-10)
    got = np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in flow.params], axis=1)
    np.testing.assert_allclose(got, raw.y.T, rtol=1e-8, atol=1e-9)


def test_time_zero_is_the_start_and_no_drift():
    start = sine_params()
    flow = ncjax.gradient_flow(start, [-np.inf, -3.0, -2.0, -1.0, 0.0])
    np.testing.assert_array_equal(flow.params.W[0], start.W)
    assert float(flow.drift.balance[0]) == 0
    assert int(flow.result) == SUCCESS


def test_a_time_span_shorter_than_the_least_step_succeeds():
    """In float64 t = e^-50 changes nothing; the solve still succeeds."""
    start = sine_params()
    flow = ncjax.gradient_flow(start, [-50.0])
    assert int(flow.result) == SUCCESS
    chex.assert_trees_all_close(flow.final, start, rtol=1e-15)


def test_two_legs_agree_with_one_solve():
    start = sine_params()
    whole = flow_at(start, [20.0, 50.0])
    first = flow_at(start, [20.0])
    second = flow_at(first.final, [50.0], start_log_time=20.0)
    np.testing.assert_allclose(second.final.H, whole.final.H, rtol=1e-6)


def test_the_value_of_record_is_saved_instead_of_the_state():
    log_times = np.array([1.0, 5.0])
    flow = ncjax.gradient_flow(sine_params(), log_times, record=ncjax.collapse_metrics)
    states = flow_at(sine_params(), log_times).params
    assert flow.params is None
    expected = jax.vmap(ncjax.collapse_metrics)(states)
    chex.assert_trees_all_close(flow.recorded, expected, rtol=1e-6)


def test_a_failed_seed_has_its_result_code_and_leaves_others_unchanged():
    good, log_times = sine_params(), np.array([1.0, 10.0])
    starts = [good, jax.tree.map(lambda leaf: leaf * np.nan, good), good]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    flow = jax.vmap(lambda p: ncjax.gradient_flow(p, log_times))(stacked)
    alone = flow_at(good, log_times)
    np.testing.assert_array_equal(flow.result, [SUCCESS, STEP_TOO_SMALL, SUCCESS])
    np.testing.assert_allclose(flow.params.W[2], alone.params.W, rtol=1e-9)
    assert np.isnan(flow.params.W[1]).all()
    assert np.isnan(flow.log_loss[1]).all()
    assert int(flow.num_steps[1]) < 100


def test_the_step_limit_has_its_result_code_and_keeps_the_states_reached():
    flow = ncjax.gradient_flow(sine_params(), [0.0, 100.0], max_steps=50)
    assert int(flow.result) == STEP_LIMIT
    assert np.isfinite(flow.log_loss[0])
    assert np.isnan(flow.log_loss[1])


@pytest.mark.parametrize("scale", [1e-10, 1e-280])
def test_tolerances_follow_the_scale_of_a_small_start(scale):
    start = jax.tree.map(lambda leaf: scale * leaf, random_params(0, 4, 3, 6, 1.0))
    log_times = [0.0, 1.0, 2.0, 5.0, 10.0]
    flow = ncjax.gradient_flow(start, log_times)
    assert float(flow.log_loss[-1]) < -10
    tight = ncjax.gradient_flow(start, log_times, rtol=1e-11)
    np.testing.assert_allclose(flow.params.H, tight.params.H, rtol=1e-5)


def test_the_flow_stays_at_the_origin():
    start = random_params(0, 4, 3, 6, 0.0)
    flow = flow_at(start, [1.0, 10.0])
    assert int(flow.result) == SUCCESS
    np.testing.assert_array_equal(flow.params.H, 0)
    np.testing.assert_array_equal(flow.drift.balance, 0)

    # The state does not move, so its slope is 0 by symmetry.
    def log_loss(shift):
        moved = start._replace(W=start.W + shift)
        return ncjax.gradient_flow(moved, [1.0]).log_loss[0]

    assert float(jax.grad(log_loss)(0.0)) == 0


def test_a_leg_from_a_state_that_was_not_reached_fails():
    failed = ncjax.gradient_flow(sine_params(), [100.0], max_steps=20)
    assert np.isnan(failed.final.W).all()
    on = jax.jit(lambda p: ncjax.gradient_flow(p, [200.0], start_log_time=100.0))
    assert int(on(failed.final).result) == STEP_TOO_SMALL


def test_bad_times_under_jit_have_their_result_code():
    flow_of = jax.jit(lambda log_times: ncjax.gradient_flow(sine_params(), log_times))
    for log_times in ([20.0, 1.0], [1.0, np.nan], [1.0, np.inf]):
        flow = flow_of(jnp.array(log_times))
        assert int(flow.result) == BAD_TIMES
        assert np.isnan(flow.log_loss).all()


def test_record_may_return_integers_booleans_and_floats():
    def record(params):
        return {"argmax": jnp.argmax(params.W), "positive": params.W > 0, "one": 1}

    flow = ncjax.gradient_flow(sine_params(), [1.0, 2.0], record=record)
    assert flow.recorded["argmax"].dtype == jnp.int64
    assert flow.recorded["positive"].dtype == jnp.bool_
    np.testing.assert_array_equal(flow.recorded["one"], [1, 1])


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32 or float64, got bfloat16"):
        ncjax.gradient_flow(sine_params(jnp.bfloat16), [1.0])


@pytest.mark.slow
def test_the_flow_continues_where_t_overflows():
    flow = ncjax.gradient_flow(sine_params(), [1e5])
    assert int(flow.result) == SUCCESS
    optimum = 3 * np.sqrt(3)
    size = float(ncjax.squared_norm(flow.final))
    assert size / 1e5 == pytest.approx(2 * optimum, rel=1e-3)
    metrics = ncjax.collapse_metrics(flow.final)
    assert float(metrics.centred_self_duality) < 1e-5


def test_jit_vmap_and_loop_agree():
    starts = [random_params(seed, 3, 2, 4, 0.5) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    @jax.jit
    def many(params, log_times):
        return jax.vmap(lambda p: ncjax.gradient_flow(p, log_times).log_loss)(params)

    together = many(stacked, jnp.array([1.0, 20.0]))
    alone = [ncjax.gradient_flow(start, [1.0, 20.0]).log_loss for start in starts]
    np.testing.assert_allclose(together, alone, rtol=1e-8)


def test_float32_stays_float32_and_near_float64():
    start = sine_params(np.float32)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start)
    log_times = np.array([1.0, 10.0, 1000.0])
    flow, truth = flow_at(start, log_times), flow_at(exact, log_times)
    assert flow.params.W.dtype == flow.log_loss.dtype == jnp.float32
    got, expected = (np.asarray(f.params.H).reshape(3, -1) for f in (flow, truth))
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 1e-5).all()


@pytest.mark.slow
def test_float32_on_the_starts_of_the_default_run():
    keys = jax.random.split(jax.random.key(0), 32)
    starts = jax.vmap(lambda k: ncjax.init_params(k, 10, 5, 20, dtype=jnp.float32))(keys)
    log_times = np.concatenate([[-1.0, 0.5, 0.9], np.geomspace(1.5, 1000, 25)])

    def one(start):
        flow = ncjax.gradient_flow(start, log_times)
        return flow.params, jax.vmap(ncjax.collapse_metrics)(flow.params)

    run = jax.jit(jax.vmap(one))
    states, metrics = run(starts)
    truth, expected = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), starts))
    got, exact = (np.asarray(p.H).reshape(32, 28, -1) for p in (states, truth))
    error = np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert error.max() < 1e-5
    for name, value in metrics._asdict().items():
        right = np.asarray(getattr(expected, name))
        if name not in ("accuracy", "ncc_mismatch"):
            assert (np.abs(np.asarray(value) - right) < 5e-5 * right + 5e-6).all(), name


def test_a_start_with_huge_wrong_margins_recovers():
    start = jax.tree.map(lambda leaf: 1e2 * leaf, sine_params())
    flow = flow_at(start, [-20.0, 100.0])
    assert int(flow.result) == SUCCESS
    assert float(flow.log_loss[0]) > float(flow.log_loss[1])


def test_other_solvers_agree():
    log_times = [1.0, 20.0]
    tsit5 = flow_at(sine_params(), log_times)
    dopri8 = ncjax.gradient_flow(sine_params(), log_times, solver=diffrax.Dopri8())
    np.testing.assert_allclose(tsit5.params.W, dopri8.params.W, rtol=1e-6)


def test_gradient_through_the_flow_agrees_with_differences():
    start, step = sine_params(), 1e-5

    def loss(shift):
        moved = start._replace(W=start.W.at[0, 0].add(shift))
        return ncjax.gradient_flow(moved, [2.0], rtol=1e-11, atol=1e-11).log_loss[0]

    slope = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=1e-5)


def test_descent_converges_to_the_flow_at_first_order():
    start, errors = sine_params(), []
    truth = flow_at(start, [math.log(2.0)]).final
    for step_size in (2e-3, 1e-3):
        descent = ncjax.gradient_descent(start, step_size, round(2.0 / step_size))
        errors.append(np.linalg.norm(descent.final.H - truth.H))
        np.testing.assert_allclose(descent.log_times[-1], math.log(2.0), rtol=1e-12)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_descent_is_the_plain_loop():
    params = start = random_params(7, 3, 2, 4, 0.5)
    descent = ncjax.gradient_descent(start, 0.1, 7, save_steps=[0, 3, 7])
    for step in range(8):
        if step in (0, 3, 7):
            saved = list(descent.steps).index(step)
            np.testing.assert_allclose(descent.params.W[saved], params.W, rtol=1e-12)
        gradient = jax.grad(ncjax.cross_entropy)(params)
        params = jax.tree.map(lambda z, g: z - 0.1 * g, params, gradient)


def test_descent_continues_after_the_last_saved_step_and_records():
    start = sine_params()
    descent = ncjax.gradient_descent(
        start, 0.1, 20, save_steps=[5], record=ncjax.margin_ratio
    )
    assert descent.params is None
    whole = ncjax.gradient_descent(start, 0.1, 20)
    chex.assert_trees_all_close(descent.final, whole.final, rtol=1e-12)
    assert descent.recorded.shape == (1,)


def test_descent_maps_over_seeds():
    starts = jax.vmap(lambda key: ncjax.init_params(key, 3, 2, 4))(
        jax.random.split(jax.random.key(0), 4)
    )
    descent = jax.vmap(lambda p: ncjax.gradient_descent(p, 0.1, 10))(starts)
    assert descent.log_loss.shape[0] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_times": [1.0, 1.0]}, "log_times must strictly increase"),
        ({"log_times": [2.0, 1.0]}, "log_times must strictly increase"),
        ({"log_times": []}, r"non-empty vector \(T,\), got shape \(0,\)"),
        ({"log_times": 3.0}, r"non-empty vector \(T,\), got shape \(\)"),
        ({"log_times": [1.0, np.nan]}, "log_times must be numbers below infinity"),
        ({"log_times": [1.0, np.inf]}, "log_times must be numbers below infinity"),
        ({"start_log_time": 2.0}, "must not lie before start_log_time = 2.0, got 1.0"),
        ({"rtol": 0.0}, "rtol must be positive and finite, got 0.0"),
        ({"atol": -1.0}, "atol must be positive and finite, got -1.0"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"params": None}, r"expected ncjax.Params\(W, H\) or .*, got NoneType"),
    ],
)
def test_bad_input_to_the_flow_is_named(changes, message):
    arguments = {"params": sine_params(), "log_times": [1.0, 2.0]} | changes
    with pytest.raises(ValueError, match=message):
        ncjax.gradient_flow(**arguments)


def test_nan_in_params_is_refused_before_the_solve():
    start = sine_params()
    with pytest.raises(ValueError, match="W must be finite, got 1 of 24"):
        ncjax.gradient_flow(start._replace(W=start.W.at[0, 0].set(jnp.nan)), [1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"step_size": math.inf}, "step_size must be positive and finite, got inf"),
        ({"num_steps": 2**31}, r"num_steps must be below 2\*\*31"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps must be an integer of at least 1, got 2.5"),
        ({"save_steps": [3, 3]}, "save_steps must be strictly increasing integers"),
        ({"save_steps": [0.5]}, "save_steps must be strictly increasing integers"),
        ({"save_steps": [11]}, r"save_steps must lie in \[0, num_steps = 10\], got \[11\]"),
    ],
)
def test_bad_input_to_the_descent_is_named(changes, message):
    arguments = {"params": sine_params(), "step_size": 0.1, "num_steps": 10} | changes
    with pytest.raises(ValueError, match=message):
        ncjax.gradient_descent(**arguments)


@pytest.fixture(scope="module")
def far_times():
    return np.array([1e3, 1e4, 1e5, 1e6])


@pytest.fixture(scope="module")
def far(far_times):
    """A flow of the size of the committed run, to late times at the default tolerance."""
    start = ncjax.init_params(jax.random.key(0), 10, 5, 20)
    return start, ncjax.gradient_flow(start, far_times)


def test_the_steps_to_log_t_of_1e6_are_few(far):
    flow = far[1]
    assert int(flow.result) == SUCCESS
    assert int(flow.num_steps) < 400


def test_sharp_constants_to_five_digits(far, far_times):
    # |Z|² / log t -> 2 (K-1) √n and t L log t -> (K-1) √n / 2, with gaps like
    # log log t / log t.
    optimum, flow = 9 * 5**0.5, far[1]
    products = np.exp(far_times + flow.log_loss) * far_times
    scaled_gap = (1 - products / (optimum / 2)) * far_times
    np.testing.assert_allclose(products[-1], optimum / 2, rtol=2e-5)
    # In units of 1 / log t the gap grows like log log t.
    np.testing.assert_allclose(np.diff(scaled_gap)[1:], np.log(10), rtol=0.01)
    norm = float(ncjax.squared_norm(flow.final)) / far_times[-1]
    np.testing.assert_allclose(norm, 2 * optimum, rtol=3e-5)


def test_metrics_at_late_times_hold_to_six_digits(far, far_times):
    start, flow = far
    finer = ncjax.gradient_flow(start, far_times, rtol=1e-10)
    metrics = jax.jit(jax.vmap(ncjax.collapse_metrics))
    got, expected = (metrics(f.params) for f in (flow, finer))
    angle = jax.jit(jax.vmap(ncjax.kkt_angle))
    angles = [angle(f.params) for f in (flow, finer)]
    np.testing.assert_allclose(*angles, rtol=1e-6)
    for name in (
        "within_class_quotient",
        "mean_norm_variation",
        "centred_classifier_norm_variation",
        "mean_cosine_deviation",
        "self_duality",
        "centred_self_duality",
    ):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-6, err_msg=name
        )


def test_the_implicit_solver_restores_the_invariants(far):
    start, flow = far
    drift = jax.vmap(lambda state: ncjax.invariant_drift(state, start))(flow.params)
    np.testing.assert_array_less(drift.balance, 1e-14)
    np.testing.assert_array_less(drift.classifier_sum, 1e-14)
    # The drift reported is the drift of the solver itself, and small too.
    assert 0 < float(flow.drift.balance.max()) < 1e-8


def test_implicit_saves_at_the_start_and_close_together():
    times = [-np.inf, -20.0, 0.0, 1e-9, 1.0]
    implicit = ncjax.gradient_flow(sine_params(), times, solver="implicit")
    explicit = ncjax.gradient_flow(sine_params(), times, solver="explicit")
    np.testing.assert_allclose(implicit.params.H, explicit.params.H, rtol=1e-6, atol=2e-7)


@pytest.mark.slow
def test_implicit_legs_join_under_jit_and_vmap():
    starts = jax.tree.map(
        lambda leaf: jnp.stack([leaf, 1.1 * leaf]), random_params(3, 3, 2, 4, 0.5)
    )

    @jax.jit
    def two_legs(starts, first, second):
        def one(start):
            a = ncjax.gradient_flow(start, first, solver="implicit")
            b = ncjax.gradient_flow(
                a.final, second, start_log_time=first[-1], solver="implicit"
            )
            return b.final

        return jax.vmap(one)(starts)

    got = two_legs(starts, jnp.array([5.0, 300.0]), jnp.array([1e3, 3e4]))
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        whole = ncjax.gradient_flow(one, [3e4], solver="implicit").final
        np.testing.assert_allclose(got.W[i], whole.W, rtol=1e-6, atol=1e-6)


def test_auto_chooses_by_time_size_precision_and_tolerance():
    assert choose_solver(4, 6, 1e3, jnp.float64) == "explicit"
    assert choose_solver(4, 6, 3e4, jnp.float64) == "implicit"
    assert choose_solver(4, 6, 3e4, jnp.float32) == "stabilised"
    assert choose_solver(10, 20, 1e4, jnp.float64) == "stabilised"
    assert choose_solver(10, 20, 1e5, jnp.float64) == "implicit"
    assert choose_solver(100, 128, 1e9, jnp.float64) == "stabilised"
    assert choose_solver(10, 20, 1e4, jnp.float64, rtol=1e-11) == "explicit"


def test_auto_reads_constant_times_under_jit():
    times = [1.0, 2500.0]

    @jax.jit
    def compiled(start):
        return ncjax.gradient_flow(start, times).num_steps

    start = sine_params()
    assert int(compiled(start)) == int(flow_at(start, times, solver="stabilised").num_steps)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver must be one of auto, .*got 'euler'"):
        ncjax.gradient_flow(sine_params(), [1.0], solver="euler")


def test_implicit_follows_fast_motion_between_and_at_saved_times():
    # Far from the loss of its time the state moves within 1e-3 of x; then two times that
    # lie 0.02 apart about x = 1.
    start = random_params(7, 3, 2, 4, 4.0)
    leg = [2.0, 2.001, 2.07, 7.0]
    implicit, explicit = (
        ncjax.gradient_flow(start, leg, start_log_time=2.0, solver=s, rtol=1e-10)
        for s in ("implicit", "explicit")
    )
    np.testing.assert_allclose(implicit.params.H, explicit.params.H, rtol=1e-6, atol=1e-7)
    escape = jax.tree.map(lambda leaf: 1e-3 * leaf, start)
    times = [1.50, 1.53, 3.0, 3.5]
    implicit, explicit = (
        ncjax.gradient_flow(escape, times, solver=s, rtol=1e-10)
        for s in ("implicit", "explicit")
    )
    np.testing.assert_allclose(implicit.params.H, explicit.params.H, rtol=1e-6, atol=1e-7)


def test_the_absolute_tolerance_follows_the_relative_one():
    def steps(**tolerances):
        flow = flow_at(sine_params(), [1.0, 10.0], **tolerances)
        return int(flow.num_steps)

    size = float(ncjax.squared_norm(sine_params()) / 96) ** 0.5
    assert steps(rtol=1e-5) == steps(rtol=1e-5, atol=1e-5 * size)


def test_a_traced_start_time_is_accepted():
    flow = jax.jit(
        lambda start: ncjax.gradient_flow(sine_params(), [1.0, 10.0], start_log_time=start)
    )
    assert int(flow(0.0).result) == SUCCESS
    assert int(flow(2.0).result) == BAD_TIMES


def test_tolerances_of_another_dtype_are_accepted():
    flow = flow_at(sine_params(np.float32), [1.0], rtol=np.float64(1e-5))
    assert flow.log_loss.dtype == np.float32


def test_params_are_checked_once(monkeypatch):
    calls: list[dict] = []
    monkeypatch.setattr(checks, "check_sizes", lambda **sizes: calls.append(sizes))
    start = random_params(0, 3, 2, 5, 0.5)
    jax.eval_shape(lambda p: ncjax.gradient_flow(p, [1.0, 2.0], solver="implicit"), start)
    assert calls == [{"num_classes": 3, "per_class": 2, "dim": 5}]


@pytest.mark.parametrize("name", METHODS)
def test_a_solver_object_gets_the_settings_of_its_method(name):
    start = random_params(0, 3, 2, 5, 0.3)
    solver = METHODS[name].solver
    by_object = find_method(solver, start, [1.0], 1e-8)
    assert by_object == find_method(name, start, [1.0], 1e-8) == METHODS[name]


def test_another_solver_gets_the_settings_of_the_explicit_method():
    solver = diffrax.Dopri8()
    method = find_method(solver, random_params(0, 3, 2, 5, 0.3), [1.0], 1e-8)
    assert method == METHODS["explicit"]._replace(solver=solver)
