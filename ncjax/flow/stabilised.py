"""A stabilised explicit Runge-Kutta method, for stiff equations with a real spectrum."""

from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp

from ncjax.numerics import tensordot

# Euler steps before and after the four stages of `_FINISH`, in units of the step: the
# reciprocals of the real zeros of the stability polynomial.
# fmt: off
_BEFORE = (
    0.020935956678259607, 0.02174186101955554, 0.02650688582205915,
    0.03146928800475026, 0.05515490101444508,
)
_FINISH = (
    (0.08339791952131421, 0.0, 0.0, 0.0),
    (-0.612212987630778, 0.9979441850556108, 0.0, 0.0),
    (2.6229318436415605, -3.292739027748166, 1.4397619076655768, 0.0),
    (-0.021443857772745864, 0.21185318914645898, 0.4072339811464617,
     0.0935933647796866),
)
_AFTER = (0.0234896487850072, 0.0398250628133335, 0.08963971856272787)
# Weights of the thirteen slopes in the error estimate.
_ERROR = (
    0.0020067827359012344, -0.5308879366219877, 2.465093903303707, -3.0,
    -0.8090110278619251, 3.0, -1.058741135293823, -0.11541162501208851,
    0.005917478910603122, 0.000585114964989424, 0.012374192919258856,
    0.017789816353212487, 0.010284435602152614,
)
# fmt: on
STABLE_TO = 47.98  # |R(z)| <= 0.951 for z in [-STABLE_TO, -1]


class Stabilised4(diffrax.AbstractAdaptiveSolver):
    r"""Explicit method of order 4, stable for $h \lambda$ down to -48 at 12 slopes a step.

    Tsit5, with six slopes, is stable to about -3. This method has the stability polynomial
    of degree 12 whose absolute value stays below 0.95 on the longest interval,

    $$R(z) = w(z) \prod_{k=1}^{8} (1 + \tau_k z) = e^z + O(z^5),$$

    where $w$ has degree 4 and the complex zeros. Each factor $1 + \tau_k z$ is an Euler
    step of size $\tau_k h$, and $w$ is a method of four stages after the fifth of the eight
    Euler steps. This position and the two free coefficients of $w$ are chosen to keep
    three things small: the error constants of order 5, the growth within a step (21 at
    most), and the error in stiff components that follow a moving target. The error
    estimate is the difference to a solution of order 3 whose coefficient of $z^4$ is off by
    a tenth; it counts stiff components at most once. Dense output is the cubic Hermite
    interpolant of both ends.

    Source: ncjax's coefficients; the Euler steps are Lebedev's and Medovikov's (DUMKA),
    the four stages Abdulle's, SIAM J. Sci. Comput. 23 (2002) 2041 (ROCK4).
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms):
        """Return the order of the solution."""
        return 4

    def error_order(self, terms):
        """Return the power of the step size that the error estimate scales with."""
        return 4

    def init(self, terms, t0, t1, y0, args):
        """Return the slope at the start; later steps reuse the last slope before them."""
        return terms.vf(t0, y0, args)

    def func(self, terms, t0, y0, args):
        """Return the vector field."""
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """Take one step from `t0` to `t1`."""
        h = t1 - t0
        dtype = jnp.result_type(*jax.tree.leaves(y0))
        table = [jnp.asarray(values, dtype) for values in (_BEFORE, _FINISH, _AFTER)]
        before, finish, after = table
        weights = jnp.asarray(_ERROR, dtype)
        begin, end = len(_BEFORE) + 1, len(_ERROR) - len(_AFTER)

        def euler(carry, row):
            tau, weight = row
            c, y, slope, error = carry
            c, y = c + tau, _add(y, tau * h, slope)
            slope = terms.vf(t0 + c * h, y, args)
            return (c, y, slope, _add(error, weight, slope)), None

        def stage(carry, row):
            index, a, weight = row
            slopes, _, error = carry
            y = jax.tree.map(lambda y, k: y + h * tensordot(a, k, 1), base, slopes)
            slope = terms.vf(t0 + (c + jnp.sum(a)) * h, y, args)
            # The fourth slope goes to row 0, which no later stage reads.
            slopes = jax.tree.map(lambda k, new: k.at[index].set(new), slopes, slope)
            return (slopes, y, _add(error, weight, slope)), None

        zero = jnp.zeros((), dtype)
        error = jax.tree.map(lambda slope: weights[0] * slope, solver_state)
        start = (zero, y0, solver_state, error)
        (c, base, slope, error), _ = jax.lax.scan(euler, start, (before, weights[1:begin]))
        slopes = jax.tree.map(lambda k: jnp.zeros((4, *k.shape), dtype).at[0].set(k), slope)
        rows = (jnp.array([1, 2, 3, 0]), finish, weights[begin:end])
        (slopes, y, error), _ = jax.lax.scan(stage, (slopes, base, error), rows)
        slope = jax.tree.map(lambda k: k[0], slopes)
        start = (c + jnp.sum(finish[-1]), y, slope, error)
        (_, y1, slope, error), _ = jax.lax.scan(euler, start, (after, weights[end:]))
        ends = {"k0": _scale(h, solver_state), "k1": _scale(h, slope)}
        info = {"y0": y0, "y1": y1} | ends
        return y1, _scale(h, error), info, slope, diffrax.RESULTS.successful


def _add(y, factor, slope):
    return jax.tree.map(lambda y, slope: y + factor * slope, y, slope)


def _scale(factor, slope):
    return jax.tree.map(lambda slope: factor * slope, slope)
