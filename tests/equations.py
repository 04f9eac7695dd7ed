"""An equation whose solution is known, and the implicit solver for small equations."""

import jax
import jax.numpy as jnp

from ncjax.flow.rosenbrock import Rodas5P


def dense_rodas(jacobian, time_derivative):
    """Rodas5P for a vector equation, with a dense factorisation."""

    def factor(t, y, _args, c):
        return jax.scipy.linalg.lu_factor(jnp.eye(y.size) - c * jacobian(t, y))

    return Rodas5P(
        factor,
        jax.scipy.linalg.lu_solve,
        lambda t, y, _args: time_derivative(t, y),
    )


def curve(t):
    """Exact solution of `field`."""
    return jnp.stack([jnp.sin(t) + 2, jnp.exp(-t)], axis=-1)


def field(t, y, _args=None):
    """y' = f(t, y), nonlinear in y and dependent on t, with solution `curve`."""
    exact, slope = jax.jvp(curve, (t,), (jnp.ones_like(t),))
    gap = y - exact
    return slope + jnp.stack([gap[0] * y[1] - gap[1], y[0] * gap[1] + gap[0] ** 2])
