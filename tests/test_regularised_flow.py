"""The flow of objectives in plain time, against exact solutions and reference runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regularised import Model
from scipy.integrate import solve_ivp
from strategies import sine_params

import ncjax
from ncjax.flow.outcome import BAD_TIMES, STEP_LIMIT, STEP_TOO_SMALL, SUCCESS

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, D = 4, 3, 6
DECAY = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))


def decaying(mu):
    return ncjax.Objective("cross_entropy", weight_decay=(mu, mu))


def optimum(mu):
    margin = np.log(K * N**0.5 / mu - K + 1)
    return K * N * np.log1p((K - 1) * np.exp(-margin)) + mu * (K - 1) * N**0.5 * margin


def aligned(size):
    """W and H with singular values `size` of M in every direction of the simplex."""
    frame = ncjax.simplex_etf(K, D) * ((K - 1) / K) ** 0.5
    H = jnp.repeat((size / N) ** 0.5 * frame[:, None], N, axis=1)
    return ncjax.Params(size**0.5 * frame, H)


def flow(params, times, objective, **settings):
    found = ncjax.gradient_flow(params, times=times, objective=objective, **settings)
    assert int(found.result) == SUCCESS
    return found


def test_the_reference_flow_with_decay():
    found = flow(sine_params(), [1.0, 10.0, 50.0], DECAY, rtol=1e-11)
    W, H = found.params
    norms = jnp.sum(W**2, axis=(1, 2)) + jnp.sum(H**2, axis=(1, 2, 3))
    np.testing.assert_allclose(
        found.value, [10.9518015518, 2.76397498978, 2.71042515098], rtol=5e-11
    )
    np.testing.assert_allclose(
        norms, [11.4817414297, 44.4083846943, 43.5844844747], rtol=5e-11
    )
    np.testing.assert_allclose(
        W[:, 0, 0], [0.637428644386, 1.5364240552, 1.6910233381], rtol=5e-11
    )


def test_the_exact_laws_hold_to_the_tolerance():
    """`WᵀW - Σ h hᵀ` decays as e^(-2λt), and the sum of the rows of W as e^(-λt)."""
    found = flow(sine_params(), [1.0, 5.0, 20.0], DECAY)
    start = sine_params()
    for t, W, H in zip(found.times, *found.params, strict=True):
        state = ncjax.Params(W, H)
        size = ncjax.squared_norm(state)
        gone = jnp.exp(-0.2 * t) * ncjax.balance(start)
        assert jnp.linalg.norm(ncjax.balance(state) - gone) < 1e-8 * size
        rows = jnp.exp(-0.1 * t) * jnp.sum(start.W, axis=0)
        assert jnp.linalg.norm(jnp.sum(W, axis=0) - rows) < 1e-8 * size**0.5
    assert (found.drift.balance < 1e-8).all()
    assert (found.drift.classifier_sum < 1e-8).all()


def test_a_collapsed_start_stays_on_its_ray():
    """`da/dt = 2 a (√n K ε - μ)`, a the singular values of M."""
    found = flow(aligned(0.5), [1.0, 3.0, 5.0], decaying(0.3), rtol=1e-11)
    sizes = jnp.sum(found.params.W**2, axis=(1, 2)) / (K - 1)
    np.testing.assert_allclose(sizes[::2], [3.182119482, 5.192967967], rtol=3e-10)


def test_the_distance_to_the_minimum_decays_at_the_slowest_eigenvalue():
    """The slowest eigenvalue at this minimum is λ = 0.1."""
    found = flow(sine_params(), [70.0, 90.0, 400.0], DECAY, rtol=1e-11)
    gaps = found.value - optimum(0.1)
    np.testing.assert_allclose(gaps[1] / gaps[0], np.exp(-2 * 0.1 * 20), rtol=1e-2)
    assert abs(gaps[2]) < 1e-13
    middle = jax.tree.map(lambda leaf: leaf[0], found.params)
    again = flow(middle, [0.1, 1.0, 20.0], DECAY, rtol=1e-11)  # a leg from t = 70 to 90
    np.testing.assert_allclose(again.final.W, found.params.W[1], atol=1e-9)
    verdict = ncjax.certificate(found.final, DECAY).verdict
    assert ncjax.POINT_VERDICTS[int(verdict)] == "globally optimal point"


@pytest.mark.parametrize("mu", [1e-2, 1e-5, 1e-8])
def test_small_decay_needs_no_other_clock(mu):
    found = flow(sine_params(), [1.0, 1 / mu, 25 / mu], decaying(mu))
    np.testing.assert_allclose(found.value[2], optimum(mu), rtol=1e-12)
    assert int(found.num_steps) < 1000


def test_many_starts_converge_at_once_and_a_bad_one_disturbs_none():
    keys = jax.random.split(jax.random.key(0), 8)
    starts = jax.vmap(lambda key: ncjax.init_params(key, K, N, D, scale=0.3))(keys)
    starts = starts._replace(W=starts.W.at[3].multiply(1e200))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def run(start, times):
        return ncjax.gradient_flow(start, times=times, objective=DECAY, max_steps=2000)

    found = run(starts, jnp.asarray([1.0, 130.0]))
    good = np.arange(8) != 3
    np.testing.assert_allclose(found.value[good, 1], optimum(0.1), rtol=1e-10)
    assert (found.result[good] == SUCCESS).all()
    assert found.result[3] == STEP_TOO_SMALL
    assert jnp.isnan(found.final.W[3]).all()
    for times in ([2.0, 1.0], [-1.0, 1.0], [1.0, jnp.nan]):  # jit cannot raise errors
        assert (run(starts, jnp.asarray(times)).result == BAD_TIMES).all()


def test_squared_error_has_an_exact_flow():
    """`da/dt = 2 a (√n - μ - a)` from an aligned start, a the singular values of M."""
    frame = jnp.eye(K, D)
    start = ncjax.Params(0.1 * frame, jnp.repeat(0.1 / N**0.5 * frame[:, None], N, axis=1))
    objective = ncjax.Objective("squared_error", weight_decay=(0.2, 0.2))
    times = jnp.asarray([0.5, 2.0])
    found = flow(start, times, objective, rtol=1e-11)
    limit = N**0.5 - 0.2
    right = limit / (1 + (limit / 0.01 - 1) * np.exp(-2 * limit * times))
    np.testing.assert_allclose(found.params.W[:, 0, 0] ** 2, right, rtol=3e-10)
    assert jnp.isnan(found.drift.classifier_sum).all()  # its slopes do not sum to zero
    assert (found.drift.balance < 1e-10).all()


@pytest.mark.parametrize(
    ("num_classes", "times", "lengths", "settings"),
    [
        (4, [1.0, 1e3], [0.828638959711, 6.43281286362], {"weight_decay": (0.5, 0.0)}),
        pytest.param(10, [10.0], [3.86685344754], {}, marks=pytest.mark.slow),
    ],
)
def test_with_a_fixed_frame_features_grow_along_it(num_classes, times, lengths, settings):
    """From zero each sample moves along its row of the classifier, which stays."""
    frame = ncjax.simplex_etf(num_classes, max(num_classes, D))
    start = ncjax.Params(frame, jnp.zeros((num_classes, N, max(num_classes, D))))
    objective = ncjax.Objective(fixed_classifier=True, **settings)
    found = flow(start, times, objective, rtol=1e-11)
    got = jnp.einsum("tkid,kd->tki", found.params.H, frame)
    expected = np.broadcast_to(np.reshape(lengths, (-1, 1, 1)), got.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    np.testing.assert_array_equal(found.final.W, frame)


def test_the_decay_of_a_fixed_classifier_moves_nothing():
    objective = ncjax.Objective(weight_decay=(0.5, 0.1), fixed_classifier=True)
    found = flow(sine_params(), [1.0, 3.0], objective)
    np.testing.assert_array_equal(found.final.W, sine_params().W)
    assert found.drift.classifier_sum[0] == 0


def integrate(model, z, times, project=None):
    """The flow of a model in NumPy; `project` gives the direction of motion."""

    def field(_, z):
        slope = model.value_and_grad(z)[1]
        return -(slope if project is None else project(z, slope))

    run = solve_ivp(
        field, (0, times[-1]), z, "DOP853", times, rtol=1e-11, atol=1e-12, max_step=1.0
    )
    return run.y.T


def as_vector(params):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in params])


def test_on_a_ball_it_is_the_flow_on_the_product_of_two_spheres():
    model = Model((K, N, D), ball=(8.0, 24.0))
    W, H = sine_params()
    on = ncjax.Params(W * 8**0.5 / jnp.linalg.norm(W), H * (24 / jnp.sum(H**2)) ** 0.5)

    def tangential(z, slope):
        parts = []
        for leaf, d in zip(model.split(z)[:2], model.split(slope)[:2], strict=True):
            parts.append((d - np.sum(d * leaf) / np.sum(leaf**2) * leaf).ravel())
        return np.concatenate(parts)

    times = [0.3, 4.0, 300.0]
    right = integrate(model, as_vector(on), times[:2], tangential)
    objective = ncjax.Objective(ball=(8, 24))
    found = flow(sine_params(), times, objective, rtol=1e-10)
    for k in range(2):
        state = jax.tree.map(lambda leaf, k=k: leaf[k], found.params)
        np.testing.assert_allclose(as_vector(state), right[k], atol=1e-8)
    np.testing.assert_allclose(found.value[2], 2.272066072546, rtol=1e-10)
    assert (found.drift.balance < 1e-8).all()
    found = ncjax.certificate(found.final, objective)
    assert ncjax.POINT_VERDICTS[int(found.verdict)] == "globally optimal point"


def test_with_bias_and_weights_it_follows_the_raw_equation():
    """Weight 0 leaves samples out: their features stay at zero."""
    weights = np.asarray(ncjax.sample_weights((3, 2, 1, 1), [1.0, 2.0, 0.5, 3.0]))
    model = Model((K, N, D), smoothing=0.1, decay=(0.1, 0.2), bias=0.3, weights=weights)
    W, H = sine_params()
    H = jnp.where(weights[..., None] > 0, H, 0)
    b = 0.3 * jnp.cos(jnp.arange(4.0))
    times = [0.5, 6.0]
    right = integrate(model, as_vector((W, H, b)), times)
    objective = ncjax.Objective(smoothing=0.1, weight_decay=(0.1, 0.2), bias=0.3)
    start = ncjax.BiasedParams(W, sine_params().H, b)
    found = flow(start, times, objective, weights=weights, rtol=1e-10)
    for k in range(2):
        state = jax.tree.map(lambda leaf, k=k: leaf[k], found.params)
        np.testing.assert_allclose(as_vector(state), right[k], atol=1e-8)
    np.testing.assert_allclose(found.value[1], model.value_and_grad(right[1])[0])
    assert jnp.isnan(found.drift.balance).all()  # the two decays differ
    assert (found.drift.classifier_sum < 1e-8).all()


def test_unit_rows_converge_to_the_normalised_optimum_and_keep_their_norms():
    objective = ncjax.Objective(temperature=5.0)
    found = flow(sine_params(), [300.0], objective)
    right = 12 * np.log1p(3 * np.exp(-20 / 3))
    np.testing.assert_allclose(found.value, [right], rtol=1e-10)
    for leaf, start in zip(found.final, sine_params(), strict=True):
        norms, before = (jnp.linalg.norm(x, axis=-1) for x in (leaf, start))
        np.testing.assert_allclose(norms, before, rtol=1e-6)
    assert (found.drift.balance < 1e-6).all()


def test_the_loss_alone_is_the_flow_of_the_logarithmic_clock():
    times = np.array([1.0, 30.0])
    plain = ncjax.gradient_flow(sine_params(), times=times, rtol=1e-10)
    clock = ncjax.gradient_flow(sine_params(), np.log(times), rtol=1e-10)
    np.testing.assert_allclose(plain.params.W, clock.params.W, atol=1e-8)
    np.testing.assert_allclose(jnp.log(plain.value), clock.log_loss, rtol=1e-8)
    assert (plain.drift.balance < 1e-8).all()


# Calls


def test_recorded_values_replace_the_states_up_to_the_limit_of_steps():
    found = ncjax.gradient_flow(
        sine_params(),
        times=[0.0, 10.0, 50.0],
        objective=DECAY,
        record=ncjax.squared_norm,
        max_steps=5,
    )
    assert found.params is None
    np.testing.assert_allclose(found.recorded[0], ncjax.squared_norm(sine_params()))
    np.testing.assert_allclose(found.value[0], 16.79666778715)
    assert int(found.result) == STEP_LIMIT
    for leaf in (found.value, found.recorded, *found.drift):
        assert jnp.isnan(leaf[2])
    assert jnp.isnan(found.final.W).all()


def test_a_flow_to_its_start_alone_takes_no_step():
    found = flow(sine_params(), [0.0], ncjax.Objective(temperature=5.0))
    np.testing.assert_array_equal(found.params.W[0], sine_params().W)
    np.testing.assert_array_equal(found.final.H, sine_params().H)
    assert int(found.num_steps) == 0


def test_float32_stays_float32():
    start = sine_params(np.float32)
    found = flow(start, [1.0, 10.0, 50.0], DECAY)
    assert found.final.W.dtype == found.value.dtype == jnp.float32
    np.testing.assert_allclose(
        found.value, [10.9518015518, 2.76397498978, 2.71042515098], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"log_times": [1.0]},
            "log_times need the cross entropy or the focal loss alone.*times=",
        ),
        ({"log_times": [1.0], "times": [1.0]}, "pass either log_times or times.*got both"),
        ({}, "pass either log_times or times.*got neither"),
        ({"times": [-1.0, 1.0]}, "times must not be negative, got -1.0"),
        ({"times": [2.0, 1.0]}, "times must strictly increase"),
        ({"times": [1.0, np.nan]}, "times must be finite"),
        ({"times": [1.0, np.inf]}, "times must be finite"),
        ({"times": []}, "times must be a non-empty vector"),
        ({"times": [1.0], "start_log_time": 0.0}, "start_log_time goes with log_times"),
        ({"times": [1.0], "solver": "implicit"}, 'solver "implicit" is for log_times'),
        ({"times": [1.0], "solver": "euler"}, "solver must be one of auto"),
        ({"times": [1.0], "rtol": 0.0}, "rtol must be positive"),
        ({"times": [1.0], "weights": [1.0, 2.0]}, "weights must have shape"),
    ],
)
def test_errors_say_in_one_line_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        ncjax.gradient_flow(sine_params(), objective=DECAY, **arguments)
    assert "\n" not in str(error.value)


def test_points_that_do_not_fit_the_objective_are_refused():
    biased = ncjax.BiasedParams(*sine_params(), jnp.zeros(4))
    with pytest.raises(ValueError, match="the objective has no bias"):
        ncjax.gradient_flow(biased, times=[1.0], objective=DECAY)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), sine_params())
    with pytest.raises(ValueError, match="params must be float32 or float64"):
        ncjax.gradient_flow(half, times=[1.0], objective=DECAY)
    with pytest.raises(ValueError, match=r"expected ncjax.Params.*got NoneType"):
        ncjax.gradient_flow(None, times=[1.0], objective=DECAY)
    mixed = sine_params()._replace(W=half.W)
    with pytest.raises(ValueError, match="W and H of one floating dtype"):
        ncjax.gradient_flow(mixed, times=[1.0], objective=DECAY)


def test_a_ball_needs_a_direction_to_start_in():
    start = sine_params()
    start = start._replace(W=jnp.zeros_like(start.W))
    with pytest.raises(ValueError, match="W must not be zero on a ball"):
        ncjax.gradient_flow(start, times=[1.0], objective=ncjax.Objective(ball=(8, 24)))
