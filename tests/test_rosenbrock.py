import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import curve, dense_rodas, field

SOLVER = dense_rodas(
    lambda t, y: jax.jacfwd(field, argnums=1)(t, y),
    lambda t, y: jax.jvp(lambda t: field(t, y), (t,), (jnp.ones_like(t),))[1],
)


def constant_steps(steps, ts):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        SOLVER,
        t0=0.0,
        t1=1.0,
        dt0=1.0 / steps,
        y0=curve(jnp.asarray(0.0)) + 0.1,
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
    )
    return np.asarray(solution.ys)


TIMES = np.linspace(0, 1, 98)[1:]


@pytest.fixture(scope="module")
def fine():
    return constant_steps(320, TIMES)


def test_the_solution_is_of_order_five_and_its_dense_output_of_order_four(fine):
    gaps = [np.abs(constant_steps(n, TIMES) - fine).max(axis=1) for n in (10, 20)]
    final = gaps[0][-1] / gaps[1][-1]
    dense = gaps[0].max() / gaps[1].max()
    assert 2**4.5 < final < 2**6.5
    assert 2**3.5 < dense < 2**6.5


def test_the_error_estimate_has_order_four():
    term, start = diffrax.ODETerm(field), curve(jnp.asarray(0.0)) + 0.1
    estimates = [
        np.abs(SOLVER.step(term, 0.0, h, start, None, None, False)[1]).max()
        for h in (0.1, 0.05)
    ]
    assert 2**4.4 < estimates[0] / estimates[1] < 2**6


@pytest.mark.parametrize("rate", [1e3, 1e8])
def test_a_stiff_equation_is_followed_at_any_step(rate):
    # Prothero and Robinson: y' = -rate (y - sin t) + cos t.
    solver = dense_rodas(
        lambda t, y: jnp.full((1, 1), -rate),
        lambda t, y: rate * jnp.cos(t)[None] - jnp.sin(t)[None],
    )
    term = diffrax.ODETerm(lambda t, y, _: -rate * (y - jnp.sin(t)) + jnp.cos(t))
    y = jnp.zeros(1)
    for k in range(5):
        t0, t1 = jnp.asarray(0.1 * k), jnp.asarray(0.1 * (k + 1))
        y, *_ = solver.step(term, t0, t1, y, None, None, False)
    np.testing.assert_allclose(y[0], np.sin(0.5), rtol=1e-6)


def test_fast_components_are_damped_in_one_step():
    rate = 1e10
    solver = dense_rodas(lambda t, y: jnp.full((1, 1), -rate), lambda t, y: jnp.zeros(1))
    term = diffrax.ODETerm(lambda t, y, _: -rate * y)
    y, *_ = solver.step(term, jnp.zeros(()), jnp.ones(()), jnp.ones(1), None, None, False)
    assert abs(float(y[0])) < 1e-8


def test_dense_output_ends_in_both_states():
    term, start = diffrax.ODETerm(field), curve(jnp.asarray(0.0))
    y1, _, info, _, _ = SOLVER.step(term, 0.0, 0.3, start, None, None, False)
    inside = SOLVER.interpolation_cls(t0=0.0, t1=0.3, **info)
    np.testing.assert_allclose(inside.evaluate(0.0), start)
    np.testing.assert_allclose(inside.evaluate(0.3), y1)
    np.testing.assert_allclose(inside.evaluate(0.0, 0.3), y1 - start)
