r"""Gradient flow of a network's parameters on the clock of its loss.

Let $\mathcal L(\theta)$ be the cross entropy summed over a data set. Its gradient flow
$d\theta/dt = -\nabla \mathcal L$ slows down like $1/t$: steps of constant size reach log t
after $e^{\log t}$ of them. With $ds = \mathcal L\, dt$ the flow is

$$\frac{d\theta}{ds} = -\nabla \log \mathcal L(\theta), \qquad
\log t = \log \int \frac{ds}{\mathcal L}.$$

Nothing under- or overflows there, because $\log \mathcal L$ and its gradient come from the
margin form. A step of size h in s is a step of gradient descent of size $h / \mathcal L$.

On the flow $d \log \mathcal L / ds = -|\nabla \log \mathcal L|^2$. Where this slope changes
slowly, $\log t + \log \mathcal L = -\log |\nabla \log \mathcal L|^2$. The difference of the
two sides, the *excess* $\log t + \log \mathcal L + \log |\nabla \log \mathcal L|^2$, grows
when a step excites directions of high curvature. It controls the steps.

Source: the clock is that of Lyu and Li (ICLR 2020), who step along it with a loss-based
learning rate; the stabilised steps and their control are ncjax's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_choice, check_integer, check_positive
from ncjax.types import Array

METHODS = ("stabilised", "descent")

# A step is accepted if log L does not exceed the largest of so many values before.
_MEMORY = 8
# Excess below which the step grows, and from which steps are shortened or refused.
_CALM, _WILD, _LIMIT = 0.5, 1.5, 4.0
# Largest predicted fall of log L in a step, as a share of log t, and at least.
_SHARE, _LEAST_FALL = 0.5, 5.0
_DAMPING = 0.05


class FlowState(NamedTuple):
    """A point of the flow, and what the next step needs."""

    params: Any  # θ
    slope: Any  # ∇ log L at θ
    log_loss: Array  # ()  log L, L the sum over samples
    log_time: Array  # ()  log t
    excess: Array  # ()  log t + log L + log |∇ log L|²
    step: Array  # ()  next step, in s
    stages: Array  # ()  gradients of the next step (int32)
    recent: Array  # (8,) log L of the last accepted points
    gradients: Array  # ()  gradients computed so far (int32)
    rejected: Array  # ()  steps rejected so far (int32)


class Method(NamedTuple):
    """Coefficients of Runge-Kutta-Chebyshev methods of order one with 1 to m stages.

    Row s of a table belongs to the method of s stages.
    """

    first: np.ndarray  # (m + 1,)  of the first stage
    previous: np.ndarray  # (m + 1, m + 1)  μ_j, of the stage before
    earlier: np.ndarray  # (m + 1, m + 1)  ν_j, of the stage before that
    slopes: np.ndarray  # (m + 1, m + 1)  of the slope at the stage before
    growth: float  # of a step after a calm one


def make_method(name: str = "stabilised", max_stages: int = 24) -> Method:
    r"""Return a method.

    "descent" is the explicit Euler method: gradient descent on $\log \mathcal L$.
    "stabilised" chooses among Runge-Kutta-Chebyshev methods, step by step. With Chebyshev
    polynomials $T_j$, $w_0 = 1 + \tfrac{1}{20 s^2}$, $w_1 = T_s(w_0) / T_s'(w_0)$ and $b_j
    = 1 / T_j(w_0)$ the method of s stages is $Y_1 = Y_0 + \tfrac{w_1}{w_0} h F_0$,

    $$Y_j = 2 w_0 \tfrac{b_j}{b_{j-1}} Y_{j-1} - \tfrac{b_j}{b_{j-2}} Y_{j-2}
    + 2 w_1 \tfrac{b_j}{b_{j-1}} h F_{j-1}.$$

    It is stable for $h \lambda$ down to about $-1.93 s^2$, at s gradients a step.

    Args:
      name: one of `METHODS`.
      max_stages: m, most stages of a step; at least 2.

    Raises:
      ValueError: the name is unknown, or max_stages is out of range.

    Source: van der Houwen, Sommeijer (1980); Verwer (1996), equation (2.5).
    """
    check_choice("method", name, METHODS)
    check_integer("max_stages", max_stages, least=2)
    if name == "descent":
        first, table = np.ones(2), np.zeros((2, 2))
        return Method(first, table, table, table, growth=1.08)
    size = max_stages + 1
    first, (previous, earlier, slopes) = np.ones(size), np.zeros((3, size, size))
    for s in range(2, size):
        w0 = 1 + _DAMPING / s**2
        T, slope = [1.0, w0], [0.0, 1.0]
        for _ in range(2, s + 1):
            slope.append(2 * T[-1] + 2 * w0 * slope[-1] - slope[-2])
            T.append(2 * w0 * T[-1] - T[-2])
        w1 = T[-1] / slope[-1]
        b = 1 / np.array(T)
        ratio = b[2:] / b[1:-1]
        first[s] = w1 / w0
        previous[s, 2 : s + 1] = 2 * w0 * ratio
        earlier[s, 2 : s + 1] = -b[2:] / b[:-2]
        slopes[s, 2 : s + 1] = 2 * w1 * ratio
    return Method(first, previous, earlier, slopes, growth=1.4)


def begin(log_loss_and_slope: Callable, params, step: float = 1e-2) -> FlowState:
    """Return the state at t = 0.

    Args:
      log_loss_and_slope: function of the parameters that returns log L and its gradient.
      params: θ(0), any pytree of floating arrays.
      step: first trial step in s.

    Raises:
      ValueError: step is not positive.
    """
    check_positive("step", step)
    log_loss, slope = log_loss_and_slope(params)
    dtype = log_loss.dtype
    never = jnp.asarray(-jnp.inf, dtype)
    return FlowState(
        params=params,
        slope=slope,
        log_loss=log_loss,
        log_time=never,
        excess=never,
        step=jnp.asarray(step, dtype),
        stages=jnp.ones((), jnp.int32),
        recent=jnp.full(_MEMORY, log_loss),
        gradients=jnp.ones((), jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
    )


def advance(log_loss_and_slope: Callable, method: Method, state: FlowState) -> FlowState:
    """Try one step, and return the state after it.

    A step that raises log L above its last eight values, or whose excess is 4 or more, is
    rejected: the point stays, and the next step has more stages or half the length.

    Args:
      log_loss_and_slope: function of the parameters that returns log L and its gradient.
      method: of `make_method`.
      state: of `begin`, or of the step before.
    """
    end = _stages(log_loss_and_slope, method, state)
    log_loss, slope = log_loss_and_slope(end)
    elapsed = log_elapsed(state.step, state.log_loss, log_loss)
    log_time = jnp.logaddexp(state.log_time, elapsed)
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slope))
    excess = log_time + log_loss + jnp.log(squares)
    # Comparisons with NaN are false.
    accepted = (log_loss <= jnp.max(state.recent)) & (excess < _LIMIT)
    state = state._replace(gradients=state.gradients + state.stages)
    recent = jnp.concatenate([state.recent[1:], log_loss[None]])
    moved = state._replace(
        params=end,
        slope=slope,
        log_loss=log_loss,
        log_time=log_time,
        excess=excess,
        recent=recent,
    )
    kept = state._replace(rejected=state.rejected + 1)
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, kept)
    return _control(method, state, accepted & (excess < _CALM), accepted & (excess < _WILD))


def _control(method: Method, state: FlowState, calm: Array, tame: Array) -> FlowState:
    """Choose length and stages of the next step: longer if calm, more stable if wild."""
    most = len(method.first) - 1
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state.slope))
    fall = jnp.maximum(_LEAST_FALL, _SHARE * state.log_time)
    longest = fall / squares
    longer = jnp.minimum(method.growth * state.step, longest)
    full = state.stages >= most
    step = jnp.where(calm, longer, jnp.where(tame | ~full, state.step, state.step / 2))
    more = jnp.minimum(most, state.stages + 1 + state.stages // 3)
    fewer = jnp.maximum(1, state.stages - (longer >= longest).astype(jnp.int32))
    stages = jnp.where(calm, fewer, jnp.where(tame, state.stages, more))
    return state._replace(step=step, stages=stages.astype(jnp.int32))


def _stages(log_loss_and_slope: Callable, method: Method, state: FlowState) -> Any:
    """Return the end point of one step."""
    dtype, s = state.step.dtype, state.stages
    previous, earlier, slopes = (
        jnp.asarray(table, dtype)[s]
        for table in (method.previous, method.earlier, method.slopes)
    )
    first = jnp.asarray(method.first, dtype)[s] * state.step

    def stage(j, carry):
        before, point = carry
        _, slope = log_loss_and_slope(point)
        after = jax.tree.map(
            lambda y, z, g: (
                previous[j] * y + earlier[j] * z - slopes[j] * state.step * g
            ).astype(y.dtype),
            point,
            before,
            slope,
        )
        return point, after

    start = state.params
    euler = jax.tree.map(lambda y, g: (y - first * g).astype(y.dtype), start, state.slope)
    return jax.lax.fori_loop(2, s + 1, stage, (start, euler))[1]


def log_elapsed(step: Array, before: Array, after: Array) -> Array:
    r"""Return $\log \int ds / \mathcal L$ over a step, with log L linear in s.

    $\log h - \log \mathcal L_1 + \log \frac{1 - e^{-\Delta}}{\Delta}$, where log L falls by
    $\Delta$ to $\log \mathcal L_1$.
    """
    fall = before - after
    small = jnp.abs(fall) < 1e-3
    safe = jnp.where(small, 1, fall)
    mean = jnp.where(small, 1 - fall / 2, -jnp.expm1(-safe) / safe)
    return jnp.log(step) - after + jnp.log(mean)
