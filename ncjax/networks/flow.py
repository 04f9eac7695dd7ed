r"""Gradient flow of a network's parameters on the clock of its loss.

Let $\mathcal L(\theta)$ be the cross entropy summed over a data set. Its gradient flow
$d\theta/dt = -\nabla \mathcal L$ slows down like $1/t$: steps of constant size reach log t
only after about $e^{\log t}$ steps. With $ds = \mathcal L\, dt$ the flow is

$$\frac{d\theta}{ds} = -\nabla \log \mathcal L(\theta), \qquad
\log t = \log \int \frac{ds}{\mathcal L}.$$

Nothing under- or overflows there, because $\log \mathcal L$ and its gradient are computed
from margins. A step of size h in s is a step of gradient descent of size $h / \mathcal L$.

On the flow $d \log \mathcal L / ds = -|\nabla \log \mathcal L|^2$. If this slope changes
slowly, $\log t + \log \mathcal L = -\log |\nabla \log \mathcal L|^2$. The *excess* is the
difference of the two sides,

$$\log t + \log \mathcal L + \log |\nabla \log \mathcal L|^2.$$

It is near 0 on the flow, and grows when a step excites directions of high curvature. So it
controls the steps.

Source: the clock is Lyu's and Li's (ICLR 2020), who follow it with a loss-based learning
rate; the stabilised steps and their control are ncjax's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_choice, check_integer, check_positive
from ncjax.types import Array

METHODS = ("stabilised", "descent")
MAX_STAGES = 96

# A function of the parameters that returns log L and its gradient.
LogLoss = Callable[[Any], tuple[Array, Any]]

# A step is refused if log L exceeds the largest of so many values before.
_MEMORY = 8
# The excess decides from this log t on. Before, the slope has not settled.
_SETTLED = 5.0
# Excess below which the next step is longer, from which the radius is raised, and from
# which a step is refused.
_CALM, _WILD, _LIMIT = 0.5, 1.5, 4.0
# Factors of the radius after a calm, a wild and a refused step, and of Euler steps.
_LOWER, _RAISE, _REFUSE = 1 / 1.05, 1.25, 1.6
_EULER_LOWER, _EULER_REFUSE = 1 / 1.1, 2.0
# The radius grows like this power of log t on the way.
_TREND = 1.5
_GROWTH = 1.4  # of a step, at most
# Fall of log L that one step may have on the flow: a share of log t, and at least.
_SHARE, _LEAST_FALL = 0.5, 5.0
_DAMPING = 0.05
_STABLE = 1.9  # h ρ / s² at the end of the stability interval of s stages


class FlowState(NamedTuple):
    """A point of the flow, and what the next step needs."""

    params: Any  # θ
    slope: Any  # ∇ log L at θ
    log_loss: Array  # ()  log L, L the sum over samples
    log_time: Array  # ()  log t
    excess: Array  # ()  log t + log L + log |∇ log L|²
    step: Array  # ()  h, length of the next step in s
    radius: Array  # ()  ρ, estimate of the spectral radius of the Hessian of log L
    recent: Array  # (8,) log L of the last accepted points
    gradients: Array  # ()  number of gradients so far (int32)
    refused: Array  # ()  number of refused steps so far (int32)


class Method(NamedTuple):
    """Coefficients of the Runge-Kutta-Chebyshev methods of order 1 with 1 to m stages.

    Row s of a table belongs to the method of s stages, column j to its stage j.
    """

    first: np.ndarray  # (m + 1,)  of the slope in stage 1
    previous: np.ndarray  # (m + 1, m + 1)  μ_j, of the last stage
    earlier: np.ndarray  # (m + 1, m + 1)  ν_j, of the last stage but one
    slopes: np.ndarray  # (m + 1, m + 1)  of the slope at the last stage
    settled: float  # log t from which steps have several stages and a bound on the excess


def make_method(name: str = "stabilised", max_stages: int = MAX_STAGES) -> Method:
    r"""Return a method for `advance`.

    "descent" is the explicit Euler method: gradient descent on $\log \mathcal L$. Its step
    grows by 1.1, and is halved where $\log \mathcal L$ exceeds its last eight values.
    "stabilised" takes Euler steps to log t = 5, then
    steps with as many stages as their length needs. With Chebyshev polynomials $T_j$,
    $w_0 = 1 + \tfrac{1}{20 s^2}$, $w_1 = T_s(w_0) / T_s'(w_0)$ and $b_j = 1 / T_j(w_0)$ a
    step of s stages from $Y_0$ is $Y_1 = Y_0 + \tfrac{w_1}{w_0} h F_0$,

    $$Y_j = 2 w_0 \tfrac{b_j}{b_{j-1}} Y_{j-1} - \tfrac{b_j}{b_{j-2}} Y_{j-2}
    + 2 w_1 \tfrac{b_j}{b_{j-1}} h F_{j-1}.$$

    Its stability polynomial is $T_s(w_0 + w_1 z) / T_s(w_0)$: stable for z from $-1.9 s^2$
    to 0, at s gradients a step. So with twice the stages a step may be four times as long.

    Args:
      name: one of `METHODS`.
      max_stages: m, most stages of a step; at least 2. It does not matter to "descent".

    Raises:
      ValueError: the name is unknown, or max_stages is below 2.

    Source: van der Houwen and Sommeijer (1980); Verwer (1996).
    """
    check_choice("method", name, METHODS)
    check_integer("max_stages", max_stages, least=2)
    if name == "descent":
        table = np.zeros((2, 2))
        return Method(np.ones(2), table, table, table, settled=np.inf)
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
    return Method(first, previous, earlier, slopes, settled=_SETTLED)


def begin(log_loss: LogLoss, params: Any, step: float = 1e-2) -> FlowState:
    """Return the state of the flow at t = 0.

    Args:
      log_loss: returns log L and its gradient, such as `jax.value_and_grad` of a function.
      params: θ(0), any pytree of floating arrays.
      step: length of the first step in s.

    Raises:
      ValueError: step is not positive.
    """
    check_positive("step", step)
    value, slope = log_loss(params)
    dtype = value.dtype
    never = jnp.asarray(-jnp.inf, dtype)
    return FlowState(
        params=params,
        slope=slope,
        log_loss=value,
        log_time=never,
        excess=never,
        step=jnp.asarray(step, dtype),
        radius=jnp.asarray(_STABLE / step, dtype),
        recent=jnp.full(_MEMORY, value),
        gradients=jnp.ones((), jnp.int32),
        refused=jnp.zeros((), jnp.int32),
    )


def advance(log_loss: LogLoss, method: Method, state: FlowState) -> FlowState:
    """Try one step, and return the state after it.

    A step is refused if log L is not finite or exceeds its last eight values, or if the
    excess is 4 or more once log t is above 5. The point then stays, and the next step has
    more stages, or is shorter.

    Args:
      log_loss: returns log L and its gradient.
      method: of `make_method`.
      state: of `begin`, or of the last step.
    """
    before = state.log_time
    stages = stages_of(method, state)
    end = _chebyshev(log_loss, method, state, stages)
    value, slope = log_loss(end)
    elapsed = log_elapsed(state.step, state.log_loss, value)
    log_time = jnp.logaddexp(state.log_time, elapsed)
    excess = log_time + value + jnp.log(_squares(slope))
    judged = jnp.where(state.log_time < method.settled, -jnp.inf, excess)
    # Comparisons with NaN are false.
    accepted = (value <= jnp.max(state.recent)) & (judged < _LIMIT) & jnp.isfinite(excess)
    moved = state._replace(
        params=end,
        slope=slope,
        log_loss=value,
        log_time=log_time,
        excess=excess,
        recent=jnp.concatenate([state.recent[1:], value[None]]),
    )
    kept = state._replace(refused=state.refused + 1)
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, kept)
    state = state._replace(gradients=state.gradients + stages)
    return _control(method, state, accepted, judged, before)


def stages_of(method: Method, state: FlowState) -> Array:
    """Return the number of stages of the next step, an int32 scalar."""
    most = jnp.where(state.log_time < method.settled, 1, len(method.first) - 1)
    needed = jnp.ceil(jnp.sqrt(state.step * state.radius / _STABLE) - 1e-3)
    return jnp.clip(needed, 1, most).astype(jnp.int32)


def _control(
    method: Method, state: FlowState, accepted: Array, excess: Array, before: Array
) -> FlowState:
    """Choose the length and, through the radius, the stages of the next step.

    `before` is log t before the last step.
    """
    early = state.log_time < method.settled
    most = jnp.where(early, 1, len(method.first) - 1)
    calm, wild = accepted & (excess < _CALM), accepted & (excess >= _WILD)
    lower, refuse = (
        jnp.where(early, *factors)
        for factors in ((_EULER_LOWER, _LOWER), (_EULER_REFUSE, _REFUSE))
    )
    factor = jnp.where(calm, lower, jnp.where(accepted, 1, refuse))
    radius = state.radius * jnp.where(wild, _RAISE, factor)
    later, sooner = (jnp.maximum(t, _SETTLED) for t in (state.log_time, before))
    radius = jnp.where(early, radius, radius * (later / sooner) ** _TREND)
    longest = jnp.maximum(_LEAST_FALL, _SHARE * state.log_time) / _squares(state.slope)
    longer = jnp.minimum(_GROWTH * state.step, jnp.where(early, jnp.inf, longest))
    step = jnp.where(calm, longer, state.step)
    return state._replace(step=jnp.minimum(step, _STABLE * most**2 / radius), radius=radius)


def is_stalled(state: FlowState) -> Array:
    r"""Return whether the next step would be lost in rounding, or the slope is not finite.

    It is lost if $h |\nabla \log \mathcal L| \le \epsilon |\theta|$ with the rounding
    unit $\epsilon$ of the dtype.
    """
    rounding = jnp.finfo(state.step.dtype).eps
    length = state.step * jnp.sqrt(_squares(state.slope))
    # A slope that is not finite counts as stalled too.
    return ~(length > rounding * jnp.sqrt(_squares(state.params)))


def _squares(tree: Any) -> Array:
    """Return the sum of the squares of all entries."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # type: ignore[return-value]


def _chebyshev(log_loss: LogLoss, method: Method, state: FlowState, stages: Array) -> Any:
    """Return the end point of one step."""
    dtype = state.step.dtype
    previous, earlier, slopes = (
        jnp.asarray(table, dtype)[stages]
        for table in (method.previous, method.earlier, method.slopes)
    )

    def stage(j, carry):
        before, point = carry
        _, slope = log_loss(point)
        after = jax.tree.map(
            lambda y, z, g: (
                previous[j] * y + earlier[j] * z - slopes[j] * state.step * g
            ).astype(y.dtype),
            point,
            before,
            slope,
        )
        return point, after

    first = jnp.asarray(method.first, dtype)[stages] * state.step
    euler = jax.tree.map(
        lambda y, g: (y - first * g).astype(y.dtype), state.params, state.slope
    )
    return jax.lax.fori_loop(2, stages + 1, stage, (state.params, euler))[1]


def log_elapsed(step: Array, before: Array, after: Array) -> Array:
    r"""Return the logarithm of the time $\int ds / \mathcal L$ of a step.

    With log L linear in s it is $\log h - \log \mathcal L_1 + \log \frac{1 -
    e^{-\Delta}}{\Delta}$, where log L falls by $\Delta$ to $\log \mathcal L_1$.

    Args:
      step: h, length of the step in s.
      before: log L at its start.
      after: log L at its end.
    """
    fall = before - after
    small = jnp.abs(fall) < 1e-3
    safe = jnp.where(small, 1, fall)
    mean = jnp.where(small, 1 - fall / 2, -jnp.expm1(-safe) / safe)
    return jnp.log(step) - after + jnp.log(mean)
