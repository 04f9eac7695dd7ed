"""Properties of one step of each solver, for any equation and step size."""

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from equations import dense_rodas
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.linalg import expm
from strategies import random_params, seeds

from ncjax.flow import clock as clocks
from ncjax.flow.stabilised import STABLE_TO, Stabilised4

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIM = 3


def field(t, y, args):
    """a(t) + A y + y·B·y with a a polynomial of degree 4, at any d."""
    powers, A, B = args
    time = jnp.stack([t**k for k in range(5)])
    return time @ powers + A @ y + jnp.einsum("ijk,j,k->i", B, y, y)


def jacobian(y, args):
    _, A, B = args
    return A + jnp.einsum("ijk,k->ij", B + jnp.swapaxes(B, 1, 2), y)


def slope_in_time(t, args):
    return jnp.stack([k * t ** (k - 1) for k in range(1, 5)]) @ args[0][1:]


def augmented(_t, state, args):
    """The same equation with the time as one more unknown."""
    return jnp.append(field(state[-1], state[:-1], args), 1.0)


def augmented_jacobian(state, args):
    t, y = state[-1], state[:-1]
    beside = slope_in_time(t, args)[:, None]
    rows = jnp.concatenate([jacobian(y, args), beside], axis=1)
    return jnp.concatenate([rows, jnp.zeros((1, DIM + 1))])


def with_arguments(jacobian, time_derivative):
    """Rodas5P of a vector equation that has arguments, by a dense factorisation."""
    solver = dense_rodas(None, None)

    def factor(t, y, args, c):
        matrix = jnp.eye(y.size) - c * jacobian(t, y, args)
        return jax.scipy.linalg.lu_factor(matrix)

    return type(solver)(factor, jax.scipy.linalg.lu_solve, time_derivative)


PLAIN = {
    "rodas": with_arguments(
        lambda t, y, args: jacobian(y, args), lambda t, y, args: slope_in_time(t, args)
    ),
    "stabilised": Stabilised4(),
}
AUGMENTED = {
    "rodas": with_arguments(
        lambda t, y, args: augmented_jacobian(y, args),
        lambda t, y, args: jnp.zeros(DIM + 1),
    ),
    "stabilised": Stabilised4(),
}
solvers = st.sampled_from(sorted(PLAIN))


def stepper(vector_field, solver):
    """End, error and dense output at seven places of a step."""

    @jax.jit
    def step(t, h, y, args):
        term = diffrax.ODETerm(vector_field)
        state = solver.init(term, t, t + h, y, args)
        y1, error, info, state, _ = solver.step(term, t, t + h, y, args, state, False)
        inside = solver.interpolation_cls(t0=t, t1=t + h, **info)
        places = jnp.linspace(0, 1, 7)
        dense = jax.vmap(lambda place: inside.evaluate(t + place * h))(places)
        return y1, error, dense, state

    return lambda *arguments: jax.device_get(step(*arguments))


STEPS = {name: stepper(field, solver) for name, solver in PLAIN.items()}
AUGMENTED_STEPS = {name: stepper(augmented, s) for name, s in AUGMENTED.items()}


def drawn(seed, degree=4, linear=1.0, bent=0.3):
    """A time, a step, a state, and an equation whose a(t) has this degree."""
    rng = np.random.default_rng(seed)
    powers = rng.normal(size=(5, DIM)) * (np.arange(5) <= degree)[:, None]
    A = linear * rng.normal(size=(DIM, DIM))
    B = bent * rng.normal(size=(DIM, DIM, DIM))
    t, h = rng.normal(), 10 ** rng.uniform(-3, -0.5) * rng.choice([-1, 1])
    return t, h, rng.normal(size=DIM), (powers, A, B)


def assume_no_explosion(arrays):
    """Discard examples whose solution explodes within the step."""
    assume(all(np.abs(array).max() < 100 for array in jax.tree.leaves(arrays)))


@given(solvers, seeds)
def test_a_step_agrees_with_the_step_of_the_autonomous_equation(name, seed):
    t, h, y, args = drawn(seed)
    got = STEPS[name](t, h, y, args)
    assume_no_explosion(got)
    whole = AUGMENTED_STEPS[name](t, h, np.append(y, t), args)
    expected = tuple(part[..., :DIM] for part in whole[:3])
    chex.assert_trees_all_close(got[:3], expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(whole[0][-1], t + h, rtol=1e-12)


@given(solvers, seeds)
def test_steps_commute_with_affine_changes_of_coordinates(name, seed):
    """z = T y + s: the step of the equation of z is that of y, moved."""
    t, h, y, (powers, A, B) = drawn(seed)
    rng = np.random.default_rng(seed + 1)
    T, s = np.eye(DIM) + 0.3 * rng.normal(size=(DIM, DIM)), rng.normal(size=DIM)
    back = np.linalg.inv(T)
    y_of_0 = -back @ s  # y = back z + y_of_0
    bent = np.einsum("il,ljk,jm,kn->imn", T, B, back, back)
    crossed = np.einsum("ljk,k->lj", B + np.swapaxes(B, 1, 2), y_of_0)
    constant = A @ y_of_0 + np.einsum("ljk,j,k->l", B, y_of_0, y_of_0)
    moved = powers + np.eye(5)[:, :1] * constant
    other = (moved @ T.T, T @ (A + crossed) @ back, bent)
    y1, error, dense, _ = STEPS[name](t, h, y, (powers, A, B))
    assume_no_explosion(dense)
    z1, z_error, z_dense, _ = STEPS[name](t, h, T @ y + s, other)
    rtol = 1e-13 * np.linalg.cond(T) ** 3 * 100
    size = 1 + np.abs(z1).max() + np.abs(other[1]).max() + np.abs(bent).max()
    np.testing.assert_allclose(z1, T @ y1 + s, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(z_error, T @ error, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(z_dense, dense @ T.T + s, rtol=rtol, atol=rtol * size)


# Quadrature is exact up to these degrees of the integrand: of the step, of the estimate of
# its error, of the dense output.
EXACT = {"rodas": (4, 3, 3), "stabilised": (3, 2, 2)}


@given(solvers, seeds, st.integers(0, 4))
def test_polynomials_are_integrated_exactly(name, seed, degree):
    t, h, y, args = drawn(seed, degree, linear=0, bent=0)
    h *= 10  # up to 3
    y1, error, dense, _ = STEPS[name](t, h, y, args)
    roots = np.arange(1, 6)[:, None]

    def integral(until):
        return np.sum((until**roots - t**roots) / roots * args[0], axis=0)

    size = np.abs(args[0]).sum() * (1 + abs(t) + abs(h)) ** 5
    of_step, of_error, of_dense = EXACT[name]
    if degree <= of_step:
        np.testing.assert_allclose(y1, y + integral(t + h), atol=1e-13 * size)
    if degree <= of_error:
        np.testing.assert_allclose(error, 0, atol=1e-13 * size)
    else:
        assert np.abs(error).max() > 0
    if degree <= of_dense:
        path = [y + integral(t + h * place) for place in np.linspace(0, 1, 7)]
        np.testing.assert_allclose(dense, path, atol=1e-13 * size)


# |R(z) - e^z| / |z|^(p + 1) at most, over |z| < 1 in the matrix norm.
ORDERS = {"rodas": (6, 2e-3), "stabilised": (5, 8e-3)}


@given(solvers, seeds, st.floats(-3, 0))
def test_linear_equations_are_solved_to_the_order_of_the_method(name, seed, size):
    _, _, y, args = drawn(seed)
    A = args[1] * 10**size / np.linalg.norm(args[1], 2)
    y1, error, _, _ = STEPS[name](0.0, 1.0, y, (0 * args[0], A, 0 * args[2]))
    order, constant = ORDERS[name]
    gap = np.linalg.norm(y1 - expm(A) @ y) / np.linalg.norm(y)
    assert gap <= constant * 10 ** (order * size) + 1e-15
    # The error estimate has one order less.
    share = np.linalg.norm(error) / np.linalg.norm(y)
    assert share <= 10 * constant * 10 ** ((order - 1) * size) + 1e-15


@given(solvers, seeds, st.floats(-3, 12))
def test_decaying_components_are_never_amplified(name, seed, size):
    """For symmetric matrices with spectra in the interval of stability."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    largest = 10**size if name == "rodas" else min(10**size, STABLE_TO)
    rates = -largest * rng.uniform(size=DIM) ** 3
    A, y = (frame * rates) @ frame.T, rng.normal(size=DIM)
    _, _, _, args = drawn(seed)
    zero = (0 * args[0], A, 0 * args[2])
    y1, *_ = STEPS[name](0.0, 1.0, y, zero)
    parts, ends = frame.T @ y, frame.T @ np.asarray(y1)
    bound = np.abs(parts) * np.where((name == "stabilised") & (rates < -1), 0.951, 1)
    # The fastest component sets the rounding of the stages.
    room = 1e-9 * np.abs(y).max()
    assert (np.abs(ends) <= bound + room).all()
    # Each eigenvector evolves as if it were alone.
    alone = STEPS[name](0.0, 1.0, parts, (zero[0], np.diag(rates), zero[2]))[0]
    np.testing.assert_allclose(ends, alone, atol=room)


@given(seeds)
def test_the_stabilised_step_returns_its_last_slope(seed):
    t, h, y, args = drawn(seed)
    y1, _, dense, slope = STEPS["stabilised"](t, h, y, args)
    assume_no_explosion(dense)
    np.testing.assert_allclose(slope, field(t + h, y1, args), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([dense[0], dense[-1]], [y, y1], rtol=1e-12, atol=1e-13)


# The equation of the flow on its clock

SHAPE = (3, 2, 4)


@jax.jit
def on_the_clock(x, scaled, right, c):
    """Field, (I - c J) times the solution of that system, and the time derivative."""
    solver = clocks.LINEARLY_IMPLICIT
    solved = solver.solve(solver.factor(x, scaled, clocks.CROSS_ENTROPY, c), right)
    along = jax.jvp(lambda y: clocks.field(x, y), (scaled,), (solved,))[1]
    again = jax.tree.map(lambda v, jv: v - c * jv, solved, along)
    by_time = solver.time_derivative(x, scaled, clocks.CROSS_ENTROPY)
    return clocks.field(x, scaled), again, by_time


@given(seeds, st.floats(-30, 12), st.floats(-3, 0.3))
def test_the_clock_is_the_chain_rule(seed, log_time, size):
    x = float(clocks.clock(jnp.asarray(log_time)))
    t = np.exp(np.longdouble(log_time))
    u = np.log1p(t)
    assert x == pytest.approx(float(np.log1p(u)), rel=1e-14)
    params = random_params(seed, *SHAPE, 10**size)
    scaled = clocks.unscaled(-x, params)
    chex.assert_trees_all_close(clocks.unscaled(x, scaled), params, rtol=1e-14)
    right = random_params(seed + 1, *SHAPE, 1.0)
    slope, again, by_time = on_the_clock(x, scaled, right, 1e-3)
    # dZ/dx = -∇L dt/dx, and Z = e^{x/2} Y.
    log_loss, *gradient = oracles.log_cross_entropy_and_gradient(*params)
    speed = (1 + u) * (1 + t) * np.exp(log_loss)
    for got, g, y in zip(slope, gradient, scaled, strict=True):
        expected = (-speed * np.exp(-np.longdouble(x) / 2) * g).astype(float) - y / 2
        atol = 1e-11 * float(np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=atol)
    atol = 1e-9 * (1 + 1e-3 * float(speed))
    chex.assert_trees_all_close(again, right, rtol=1e-7, atol=atol)
    step = 1e-6
    late, early = (
        on_the_clock(x + h, scaled, right, 1e-3)[0] for h in (step / 2, -step / 2)
    )
    for got, a, b in zip(by_time, late, early, strict=True):
        size = float(jnp.abs(got).max()) + float(jnp.abs(a).max())
        np.testing.assert_allclose(got, (a - b) / step, atol=1e-7 * size)
