import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import curve, field

from ncjax.flow.stabilised import STABLE_TO, Stabilised4

SOLVER = Stabilised4()


@jax.jit
def linear_step(z):
    """End and error of a step of size 1 of y' = z y from 1."""
    term = diffrax.ODETerm(lambda _t, y, z: z * y)
    one = jnp.ones_like(z)
    y, error, *_ = SOLVER.step(term, 0.0, 1.0, one, z, z, False)
    return y, error


def test_the_stability_polynomial_is_bounded_on_the_real_interval():
    z = jnp.linspace(-STABLE_TO, -1, 20001)
    growth, error = linear_step(z)
    assert float(jnp.max(jnp.abs(growth))) < 0.951
    assert float(jnp.max(jnp.abs(error))) < 1.0
    assert abs(float(linear_step(jnp.asarray(-1.02 * STABLE_TO))[0])) > 1


def test_the_stability_polynomial_is_the_exponential_to_order_four():
    z = jnp.asarray(1e-2 * np.exp(2j * np.pi * np.arange(16) / 16))
    coefficients = np.fft.fft(np.asarray(linear_step(z)[0])) / 16 / 1e-2 ** np.arange(16)
    expected = [1 / math.factorial(k) for k in range(5)]
    np.testing.assert_allclose(coefficients[:5].real, expected, rtol=1e-6)


@jax.jit
def constant_steps(steps):
    """Solution of a nonlinear equation at 1, in so many steps, by a compiled loop."""
    term, h = diffrax.ODETerm(field), 1 / steps
    start = curve(jnp.zeros(())) + 0.1

    def body(index, carry):
        y, slope, _ = carry
        t = index * h
        y, error, _, slope, _ = SOLVER.step(term, t, t + h, y, None, slope, False)
        return y, slope, error

    return jax.lax.fori_loop(0, steps, body, (start, field(0.0, start), start))


def test_a_nonlinear_equation_is_solved_to_order_four():
    exact = constant_steps(640)[0]
    gaps = [float(jnp.max(jnp.abs(constant_steps(n)[0] - exact))) for n in (10, 20, 40)]
    assert 2**3.7 < gaps[0] / gaps[1] < 2**5.2
    assert 2**3.7 < gaps[1] / gaps[2] < 2**5.2
    errors = [float(jnp.max(jnp.abs(constant_steps(n)[2]))) for n in (20, 40)]
    assert 2**3.5 < errors[0] / errors[1] < 2**4.8


@pytest.mark.parametrize("rate", [30.0, 1e3, 1e4])
def test_a_stiff_component_follows_a_moving_target(rate):
    # The target moves slowly, as stiff components of the flow do.
    def stiff(t, y, _args):
        return -rate * (y - jnp.sin(t) / rate) + jnp.cos(t) / rate

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(stiff),
        SOLVER,
        t0=0.0,
        t1=2.0,
        dt0=1e-4,
        y0=jnp.asarray(0.3),
        saveat=diffrax.SaveAt(ts=jnp.linspace(1.0, 2.0, 30)),
        stepsize_controller=diffrax.PIDController(
            rtol=1e-8, atol=1e-8, pcoeff=0.3, icoeff=0.4
        ),
        max_steps=10_000,
    )
    np.testing.assert_allclose(solution.ys, np.sin(solution.ts) / rate, atol=1e-7)
    # A method that is stable to -3.3 would take 2 rate / 3.3 steps.
    assert int(solution.stats["num_steps"]) < 250 + 2 * rate / 20
