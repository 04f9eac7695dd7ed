"""The gradient flow of deep points: references, limits, invariants, and clear errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp
from strategies import random_params

import ncjax
from ncjax import losses
from ncjax.flow import clock, deep_solve, invariants, steps
from ncjax.flow.methods import choose_solver_for
from ncjax.flow.solve import STEP_LIMIT, SUCCESS
from ncjax.peeled import kernels
from ncjax.peeled.points import last_factors

# t: L, |Z|² at p = 3, K = 3, n = 2, d = 4; raw equation in t.
EARLY = {
    1: (2.7274473494, 14.2679724293),
    10: (0.00847056326398, 32.1415357297),
    100: (4.33035898939e-4, 38.8889067725),
    1e3: (3.06115765923e-5, 44.53205354),
    1e5: (1.89838040707e-7, 54.5052491916),
}
THREE, FOUR = (3, 3, 2, 4), (4, 4, 2, 5)
# p, K, n, d, the solver, the last log t, and the limit V of |Z|²/2 at margins of 1: of
# collapse, for four factors of two pairs.
LIMITS = [
    pytest.param((2, 3, 2, 4), "implicit", 1e6, 2 * 2**0.5, marks=pytest.mark.slow),
    (THREE, "stabilised", 2e4, 1.5 * 2 * 2 ** (1 / 3)),
    (FOUR, "implicit", 1e6, 2 * 2 * 2**0.5 * 2**0.25),
]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def wave_params(p, num_classes, per_class, dim, dtype=np.float64):
    """The start of the reference runs: p - 1 layers of sines, features of cosines."""
    layers = []
    for number in range(p - 1):
        rows = num_classes if number == p - 2 else dim
        i, j = np.ogrid[:rows, :dim]
        layers.append(jnp.asarray(0.6 * np.sin(1 + 3 * i + 7 * j + 5 * number), dtype))
    k, i, j = np.ogrid[:num_classes, :per_class, :dim]
    H = 0.6 * np.cos(2 + 5 * k + 11 * i + 13 * j)
    return ncjax.DeepParams(tuple(layers), jnp.asarray(H, dtype))


def follow(start, log_times, **options):
    """`gradient_flow` with earlier times added up to five, so that it compiles once."""
    added = 5 - len(log_times)
    earlier = log_times[0] - np.arange(added, 0, -1.0)
    flow = ncjax.gradient_flow(start, np.append(earlier, log_times), **options)
    assert int(flow.result) == SUCCESS
    params, log_loss = jax.tree.map(lambda x: x[added:], (flow.params, flow.log_loss))
    return flow._replace(params=params, log_loss=log_loss)


def at(flow, number):
    """The state at one of the saved times."""
    return jax.tree.map(lambda leaf: leaf[number], flow.params)


def norms(flow):
    return np.array([ncjax.squared_norm(at(flow, i)) for i in range(len(flow.log_loss))])


def gradient_by_loop(layers, H, weights):
    """The gradient of the loss in all factors, one sample at a time."""
    slopes, dH = [np.zeros_like(W) for W in layers], np.zeros_like(H)
    for k, i in np.ndindex(*H.shape[:2]):
        activations = [H[k, i]]
        for W in layers:
            activations.append(W @ activations[-1])
        exponentials = np.exp(activations[-1] - activations[-1].max())
        back = exponentials / exponentials.sum()
        back[k] -= 1
        back *= weights[k, i]
        for number in reversed(range(len(layers))):
            slopes[number] += np.outer(back, activations[number])
            back = layers[number].T @ back
        dH[k, i] = back
    return slopes, dH


def as_numpy(point):
    return [np.asarray(W) for W in point.layers], np.asarray(point.H)


def test_reference_values_up_to_t_of_1e5():
    start = wave_params(*THREE)
    flow = follow(start, np.log(list(EARLY)), rtol=1e-11, atol=1e-11)
    got = np.stack([np.exp(flow.log_loss), norms(flow)], axis=-1)
    np.testing.assert_allclose(got, list(EARLY.values()), rtol=2e-9)
    end = flow.final
    entries = [end.W[0, 0], end.layers[0][0, 0], end.H[0, 0, 0], ncjax.margins(end).min()]
    expected = [-0.53374566758, 1.26707920297, -0.485898705279, 17.3673499492]
    np.testing.assert_allclose(entries, expected, rtol=2e-9)
    drift = ncjax.invariant_drift(end, start)
    assert float(drift.balance) < 1e-11
    assert float(drift.classifier_sum) < 1e-13


@pytest.mark.parametrize("solver", ["explicit", "stabilised"])
def test_reference_values_at_log_t_of_3000(solver):
    flow = follow(wave_params(*THREE), [3000.0], rtol=1e-10, solver=solver)
    np.testing.assert_allclose(norms(flow) / 3000 ** (2 / 3), 7.58382, rtol=1e-6)
    rate = np.exp(flow.log_loss + 3000 + 4 / 3 * np.log(3000))
    # Margins are accurate to about rtol times log t.
    np.testing.assert_allclose(rate, 0.835351, rtol=5e-6)


@pytest.mark.parametrize(
    ("case", "value", "rate"),
    [
        (FOUR, 6.768861, 0.834817),  # two pairs
        pytest.param((3, 4, 3, 5), 6.492582, 1.434, marks=pytest.mark.slow),  # collapse
    ],
)
def test_reference_values_of_four_classes_at_log_t_of_3000(case, value, rate):
    flow = follow(wave_params(*case), [3000.0], solver="implicit")
    end, p = flow.final, case[0]
    found = ncjax.squared_norm(end) / 2 / ncjax.margins(end).min() ** (2 / p)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    found = np.exp(flow.log_loss[0] + 3000 + (2 - 2 / p) * np.log(3000))
    np.testing.assert_allclose(found, rate, rtol=2e-6 if p == 4 else 1e-3)


@pytest.mark.parametrize(("case", "solver", "last", "V"), LIMITS)
def test_norm_and_loss_approach_the_sharp_rates(case, solver, last, V):
    """`|Z|²/u^(2/p) -> 2V` and `t L u^(2-2/p) -> 2V/p²`, closer at each later time."""
    p, u = case[0], np.geomspace(100, last, 5)
    flow = follow(wave_params(*case), u, rtol=1e-9, solver=solver)
    by_norm = norms(flow) / u ** (2 / p) / (2 * V) - 1
    by_loss = np.exp(flow.log_loss + u + (2 - 2 / p) * np.log(u)) / (2 * V / p**2) - 1
    for excess in np.abs([by_norm, by_loss]):
        assert (excess[1:] < excess[:-1] / 1.5).all(), excess
        assert excess[-1] < 2e-3


def test_the_flow_is_the_raw_equation_in_t():
    start = wave_params(*THREE)
    noise = random_params(3, 3, 2, 4, 0.3)
    start = start._replace(H=noise.H)
    flat, unravel = ravel_pytree(start)

    def field(_t, flat):
        layers, H = as_numpy(unravel(flat))
        slopes, dH = gradient_by_loop(layers, H, np.ones(H.shape[:2]))
        return -np.concatenate([leaf.ravel() for leaf in (*slopes, dH)])

    times = [0.1, 1.0, 3.0, 6.0, 10.0]
    raw = solve_ivp(field, (0, 10), flat, "DOP853", times, rtol=1e-10, atol=1e-12)
    flow = ncjax.gradient_flow(start, np.log(times), rtol=1e-10, atol=1e-10)
    got = np.stack([ravel_pytree(at(flow, i))[0] for i in range(5)])
    np.testing.assert_allclose(got, raw.y.T, rtol=1e-8, atol=1e-9)


# The columns of the Hadamard matrix of order 4 that sum to zero, of length 1.
HADAMARD = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 2


def hadamard_start(a):
    """Four factors with the singular values `a` (3,), for two equal samples a class."""
    diagonal = np.diag([*a, 0.0, 0.0])
    outer = np.pad(HADAMARD * a, ((0, 0), (0, 2)))
    H = np.repeat(outer[:, None] / np.sqrt(2), 2, axis=1)
    layers = (diagonal, diagonal, outer)
    return jax.tree.map(jnp.asarray, ncjax.DeepParams(layers, H))


def test_a_hadamard_start_keeps_its_singular_vectors():
    """Its singular values obey `a' = a^(p-1) g(a^p)`, three scalar equations."""

    def slope(s):
        logits = HADAMARD * s @ HADAMARD.T / np.sqrt(2)
        exponentials = np.exp(logits - logits.max(axis=0))
        errors = np.eye(4) - exponentials / exponentials.sum(axis=0)
        return np.sqrt(2) * np.einsum("ki,kj,ji->i", HADAMARD, errors, HADAMARD)

    a, times = np.array([0.5, 0.8, 0.9]), np.array([0.5, 5.0, 50.0, 500.0, 5000.0])
    exact = solve_ivp(
        lambda _t, a: a**3 * slope(a**4),
        (0, 5000),
        a,
        "Radau",
        times,
        rtol=1e-11,
        atol=1e-12,
    )
    start = hadamard_start(a)
    flow = follow(start, np.log(times), rtol=1e-11, atol=1e-11, solver="implicit")
    for i in range(5):
        chex.assert_trees_all_close(
            at(flow, i), hadamard_start(exact.y[:, i]), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize(("p", "gamma"), [(3, None), (4, 2.0)])
def test_the_field_is_the_gradient_at_the_scaled_state(p, gamma):
    """Also with samples left out: their features do not move."""
    start = wave_params(p, 3, 2, 4)
    weights = jnp.array([[1.0, 0.5], [2.0, 0.0], [1.0, 1.0]])
    start = start._replace(H=jnp.where(weights[..., None] > 0, start.H, 0))
    x = jnp.asarray(0.7)
    if gamma is None:
        log_loss, (slopes, dH) = (
            ncjax.log_cross_entropy(start, weights),
            gradient_by_loop(*as_numpy(start), np.asarray(weights)),
        )
        slopes, dH = jax.tree.map(lambda g: g / np.exp(log_loss), (slopes, dH))
    else:
        log_loss, (slopes, dH) = jax.value_and_grad(
            lambda z: losses.log_focal_loss(z, gamma, weights)
        )(start)
    Y = clock.unscaled(-x, start)
    u = np.expm1(0.7)
    rate = (1 + u) * np.exp(u + log_loss) * np.exp(-0.7 / p)
    expected = jax.tree.map(
        lambda g, y: -rate * g - y / p, ncjax.DeepParams(tuple(slopes), dH), Y
    )
    loss = clock.Loss(weights, None if gamma is None else jnp.asarray(gamma))
    chex.assert_trees_all_close(clock.field(x, Y, loss), expected, rtol=1e-12, atol=1e-13)


def test_one_layer_has_the_program_of_two_factors():
    two = random_params(0, 3, 2, 4, 0.5)
    deep = ncjax.DeepParams((two.W,), two.H)

    def programs(start):
        weights, kept = np.ones((3, 2)), ncjax.squared_norm
        return (
            lambda: ncjax.gradient_flow(start, [1.0, 2.0], weights=weights, record=kept),
            lambda: ncjax.gradient_descent(start, 0.1, 5),
            lambda: ncjax.restore_invariants(start, start),
        )

    for one, other in zip(programs(two), programs(deep), strict=True):
        assert str(jax.make_jaxpr(one)()) == str(jax.make_jaxpr(other)())


@pytest.mark.parametrize(("widths", "weighted"), [((3, 5), False), ((4, 6, 2), True)])
def test_solves_identity_plus_c_times_the_hessian_over_the_loss(widths, weighted):
    start = ncjax.init_deep_params(jax.random.key(1), 4, 2, widths, scale=0.7)
    right = ncjax.init_deep_params(jax.random.key(2), 4, 2, widths, scale=1.0)
    weights = ncjax.sample_weights((2, 1, 2, 1), (1.0, 2.0, 0.5, 1.0)) if weighted else None
    if weighted:
        left_out = weights[..., None] == 0
        start = start._replace(H=jnp.where(left_out, 0, start.H))
    flat, unravel = ravel_pytree(start)

    @jax.jit
    def both(c):
        hessian = jax.hessian(lambda v: ncjax.cross_entropy(unravel(v), weights))(flat)
        slopes = kernels.error_slopes(last_factors(start), weights)
        X = deep_solve.solve(deep_solve.factor(start, slopes, c, weights), right)
        return hessian / ncjax.cross_entropy(start, weights), ravel_pytree(X)[0]

    for c in (0.01, 0.1):
        hessian, got = both(c)
        matrix = np.eye(flat.size) + c * np.asarray(hessian)
        assert np.linalg.eigvalsh(matrix).min() > 0
        expected = np.linalg.solve(matrix, ravel_pytree(right)[0])
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)


def test_two_legs_agree_with_one_solve():
    start = wave_params(*THREE)
    whole = follow(start, [20.0, 50.0])
    first = follow(start, [20.0])
    second = follow(first.final, [26.0, 50.0], start_log_time=20.0)
    chex.assert_trees_all_close(second.final, whole.final, rtol=1e-6, atol=1e-7)


def test_relabelling_and_rotating_the_layers_commute_with_the_flow():
    start = wave_params(*THREE)
    order = jnp.array([2, 0, 1])
    Q, R = (jnp.linalg.qr(random_params(s, 4, 1, 4, 1.0).W)[0] for s in (1, 2))

    def turned(point):
        first, last = point.layers
        layers = (Q @ first @ R.T, last[order] @ Q.T)
        return ncjax.DeepParams(layers, point.H[order] @ R.T)

    flow = follow(turned(start), np.log(list(EARLY)), rtol=1e-11, atol=1e-11)
    straight = follow(start, np.log(list(EARLY)), rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_close(flow.final, turned(straight.final), rtol=1e-9, atol=1e-9)


def test_float32_starts_under_vmap_and_jit_and_a_failure_alone():
    start = wave_params(*THREE, dtype=np.float32)
    broken = start._replace(H=start.H * jnp.float32(1e20))
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, broken)
    log_times = np.log(list(EARLY)[:3])

    @jax.jit
    def solve(starts):
        def one(start):
            return ncjax.gradient_flow(
                start, log_times, record=ncjax.squared_norm, max_steps=150
            )

        return jax.vmap(one)(starts)

    flow = solve(many)
    assert flow.recorded.dtype == jnp.float32
    assert int(flow.result[0]) == SUCCESS
    assert int(flow.result[1]) != SUCCESS
    expected = [norm for _, norm in EARLY.values()][:3]
    np.testing.assert_allclose(flow.recorded[0], expected, rtol=1e-4)
    assert np.isnan(flow.final.H[1]).all()
    assert int(flow.result[1]) >= STEP_LIMIT


def test_restored_invariants_are_those_of_the_start_and_move_no_margin():
    start = ncjax.init_deep_params(jax.random.key(0), 4, 2, (3, 6, 5), scale=1.0)
    noise = ncjax.init_deep_params(jax.random.key(1), 4, 2, (3, 6, 5), scale=1e-5)
    moved = jax.tree.map(jnp.add, start, noise)
    restored = jax.jit(ncjax.restore_invariants)(moved, start)
    before, after = (jax.jit(ncjax.invariant_drift)(z, start) for z in (moved, restored))
    assert float(before.balance) > 1e-6
    assert float(after.balance) < 1e-13
    assert float(after.classifier_sum) < 1e-15
    others = np.isfinite(ncjax.margins(start))
    gap = np.asarray(ncjax.margins(restored) - ncjax.margins(moved))[others]
    assert np.abs(gap).max() < 1e-7
    chex.assert_trees_all_close(restored, moved, atol=1e-3)


def test_the_drift_adds_up_the_balances_of_all_layers():
    start = wave_params(*FOUR)
    other = jax.tree.map(lambda leaf: leaf + 0.01 * jnp.cos(leaf), start)
    pairs = ncjax.balance(other), ncjax.balance(start)
    moved = [new - old for new, old in zip(*pairs, strict=True)]
    expected = np.sqrt(sum(float(jnp.sum(m**2)) for m in moved))
    found = invariants.invariant_drift(other, start)
    size = float(ncjax.squared_norm(other))
    np.testing.assert_allclose(found.balance, expected / size, rtol=1e-12)
    sums = np.asarray(other.W - start.W).sum(axis=0)
    np.testing.assert_allclose(
        found.classifier_sum, np.linalg.norm(sums) / np.sqrt(size), rtol=1e-12
    )


def test_gradient_descent_steps_along_the_gradient():
    start, eta = wave_params(*THREE), 0.05
    weights = np.array([[1.0, 0.5], [2.0, 1.0], [1.0, 0.0]])
    descent = ncjax.gradient_descent(start, eta, 6, weights=weights, save_steps=[0, 3, 6])
    layers, H = as_numpy(start)
    H = np.where(weights[..., None] > 0, H, 0)
    for _ in range(6):
        slopes, dH = gradient_by_loop(layers, H, weights)
        layers = [W - eta * slope for W, slope in zip(layers, slopes, strict=True)]
        H = H - eta * dH
    expected = ncjax.DeepParams(tuple(layers), H)
    chex.assert_trees_all_close(descent.final, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        descent.log_loss[-1], ncjax.log_cross_entropy(descent.final, weights), rtol=1e-14
    )


def test_tolerances_do_not_count_samples_left_out():
    small = wave_params(3, 3, 1, 4)
    padded = small._replace(H=jnp.pad(small.H, ((0, 0), (0, 2), (0, 0))))
    weights = ncjax.sample_weights((1, 1, 1))
    padded_weights = jnp.pad(weights, ((0, 0), (0, 2)))
    one = steps.tolerances(small, weights, 1e-8, None)
    other = steps.tolerances(padded, padded_weights, 1e-8, None)
    # The norm of an error is a mean over all entries, zeros among them.
    counted = [sum(leaf.size for leaf in jax.tree.leaves(z)) for z in (small, padded)]
    ratio = np.sqrt(counted[0] / counted[1])
    np.testing.assert_allclose(other, np.array(one) * ratio, rtol=1e-12)


def test_the_solver_depends_on_the_last_time_and_the_size():
    start = wave_params(*THREE)
    assert choose_solver_for(start, 100.0) == "explicit"
    assert choose_solver_for(start, 1e6, rtol=1e-11, focal=True) == "explicit"
    assert choose_solver_for(start, 1e6, focal=True) == "stabilised"
    assert choose_solver_for(start, 1e6) == "implicit"
    small = jax.tree.map(lambda leaf: leaf.astype("float32"), start)
    assert choose_solver_for(small, 1e6) == "stabilised"
    wide = ncjax.init_deep_params(jax.random.key(0), 3, 1, (60, 60))
    assert choose_solver_for(wide, 1e9) == "stabilised"
    two = random_params(0, 10, 1, 20, 1.0)
    assert choose_solver_for(two, 1e4) == "stabilised"
    assert choose_solver_for(two, 1e5) == "implicit"


def test_bad_input_is_refused_with_what_was_given():
    start = wave_params(*THREE)
    decayed = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))
    other = wave_params(3, 3, 2, 5)
    cases = {
        "times need .*got DeepParams": lambda: ncjax.gradient_flow(start, times=[1.0]),
        "several layers have": lambda: ncjax.gradient_flow(start, [1.0], objective=decayed),
        "Hessian of the cross entropy": lambda: ncjax.gradient_flow(
            start, [1.0], objective=ncjax.Objective("focal", gamma=2.0), solver="implicit"
        ),
        "solver must be": lambda: ncjax.gradient_flow(start, [1.0], solver="rk4"),
        "W_1 .*NaN|NaN.*W_1|W_1 must be finite": lambda: ncjax.gradient_flow(
            jax.tree.map(lambda leaf: leaf * jnp.nan, start), [1.0]
        ),
        "one floating dtype": lambda: ncjax.gradient_descent(
            start._replace(H=start.H.astype("float32")), 0.1, 5
        ),
        "weights must have shape": lambda: ncjax.gradient_descent(
            start, 0.1, 5, weights=np.ones(4)
        ),
        "start like params.*layers \\(4, 4\\), \\(3, 4\\)": lambda: ncjax.invariant_drift(
            start, other
        ),
        "got H": lambda: ncjax.restore_invariants(start, last_factors(start)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
