"""Gradient flow of the layer-peeled model at any physical time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_choice, check_integer, check_params, check_positive
from ncjax.flow import settle
from ncjax.flow.clock import LINEARLY_IMPLICIT, clock, field, unscaled
from ncjax.flow.invariants import InvariantDrift, invariant_drift
from ncjax.flow.stabilised import Stabilised4
from ncjax.numerics import at_unit_scale, power_of_two
from ncjax.peeled.geometry import squared_norm
from ncjax.peeled.losses import log_cross_entropy
from ncjax.types import Array, Params

# Values of `result`.
SUCCESS = 0
STEP_LIMIT = 1
STEP_TOO_SMALL = 2  # the state or its gradient is not finite, or the dtype too coarse
BAD_TIMES = 3  # under jit, where the times asked for cannot be refused

# First step in x. The controller corrects it within a few trials; diffrax's own guess
# would turn a start of NaN into a step of NaN, which never ends.
_FIRST_STEP = 0.1
# The same for the implicit solver, whose steps do not shrink with time.
_FIRST_IMPLICIT_STEP = 0.01

_SOLVERS = {
    "explicit": diffrax.Tsit5(),
    "stabilised": Stabilised4(),
    "implicit": LINEARLY_IMPLICIT,
}
SOLVERS = ("auto", *_SOLVERS)
# From this log t on the stabilised solver takes less time than the explicit one; from the
# next on the implicit one takes less than both, and from (K d / 150)² times it where its
# systems are larger than that. See benchmarks/flow.py.
_STABILISED_FROM = 2e3
_STABILISED_RTOL = 1e-9  # its order is 4: below, accuracy bounds the step and not stability
_IMPLICIT_FROM = 3e4
_IMPLICIT_SIZE = 150
_LARGEST_SYSTEM = 2000
# Of the stabilised solver, where stability and not accuracy bounds the step: with the last
# two errors a third as many steps are rejected as with the last error alone.
_TWO_ERRORS = {"pcoeff": 0.3, "icoeff": 0.4}


class FlowSolution(NamedTuple):
    """Gradient flow at the T times asked for; entries not reached are NaN."""

    log_times: Array  # (T,)    natural logarithm of physical time
    params: Params | None  # (T, ...) state, None where `record` was given
    recorded: Any  # (T, ...) record(params), None where it was not given
    log_loss: Array  # (T,)    log L
    drift: InvariantDrift  # (T,)    of the invariants since the given start
    final: Params  # state at the last time, to go on from; NaN if it was not reached
    num_steps: Array  # ()      solver steps tried
    num_rejected: Array  # ()      of which rejected
    result: Array  # ()      SUCCESS, STEP_LIMIT, STEP_TOO_SMALL or BAD_TIMES (int32)


def gradient_flow(
    params: Params,
    log_times,
    *,
    start_log_time: float = -math.inf,
    rtol: float | None = None,
    atol: float | None = None,
    solver: str | diffrax.AbstractSolver = "auto",
    record: Callable[[Params], Any] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> FlowSolution:
    r"""The exact gradient flow $dZ/dt = -\nabla \mathcal L(Z)$, saved at given times.

    The gradient fades like $1/(t \log t)$ and $t$ itself overflows at $\log t = 709$, so
    the equation is solved on the clock $x = \log(1 + \log(1 + t))$. With
    $u = \log(1 + t) = e^x - 1$,

    $$\frac{dZ}{dx} = -(1 + u)\, e^{u + \log \mathcal L(Z)}\, \nabla \log \mathcal L(Z),$$

    the same trajectory with every quantity finite. The equation grows stiff in
    proportion to $\log t$: an explicit solver takes about 0.4 steps (Tsit5, six gradients
    each) or 0.1 (`Stabilised4`, twelve each) per unit of $\log t$, and
    knows margins to about rtol times $\log t$. The linearly implicit one takes about 300
    steps to $\log t = 10^4$ and 50 more to $10^6$, each at the cost of solving a system of
    K d unknowns. It steps twice over the last 0.03 of x before a time that is
    asked for, where the state is slow enough for them: that lets every margin settle to
    the digits that float64 has for it. It puts the two invariants of the flow (see
    `invariant_drift`) right there.

    Works under `jax.jit` and under `jax.vmap` over `params`; a start that fails (see
    `result`) leaves the others as they are. Reverse-mode differentiable.

    Args:
      params: start `Z(t_0)`, `W` (K, d) and `H` (K, n, d). The dtype of the solve.
      log_times: (T,) strictly increasing natural logarithms of the physical time t;
        `-inf` is t = 0. In float64 to 1e6 and beyond, in float32 to about 3e4.
      start_log_time: natural logarithm of the time t_0 of `params`, t_0 = 0 if not given.
        Lets a long flow be taken in legs, from `final` on.
      rtol: relative tolerance of a step; 1e-8 in float64 and 1e-6 in float32 if None.
      atol: absolute tolerance of a step; if None as rtol, times the root mean square of
        `params` where that is below 1, so that small starts are followed too.
      solver: "explicit" (Tsit5), "stabilised" (explicit, for stiff equations), "implicit"
        (Rodas5P with the structure of the Hessian), or a diffrax solver. "auto" takes
        what is faster for the last time (where it is not traced, else "explicit"):
        "implicit" in float64 where log t is at least 3e4 max(1, K d / 150)², for K d up
        to 2000; else "stabilised" where it is at least 2000 and rtol at least 1e-9; else
        "explicit".
      record: function of the state whose value (any pytree of arrays) is saved instead of
        the state. It is compiled in: pass the same function object to compile once.
      max_steps: bound on the solver's steps, rejected ones included.
      progress: show a tqdm bar (over x).

    Returns:
      `FlowSolution`.

    Raises:
      ValueError: shapes or dtypes do not fit, or (outside jit) times do not increase,
        tolerances are not positive, the solver is unknown, or params hold NaN or infinity.

    Source: the flow is equation (4) of Ji et al. (ICLR 2022); the clock is ncjax's.

    >>> import jax, numpy as np, ncjax
    >>> start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    >>> flow = ncjax.gradient_flow(start, np.log([1.0, 10.0, 100.0]))
    >>> flow.params.W.shape
    (3, 3, 4)
    """
    params = check_params(params, finite=True)
    dtype = params.W.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"params must be float32 or float64, got {dtype}")
    given, log_times = log_times, _check_log_times(log_times, start_log_time, dtype)
    if rtol is None:
        rtol = 1e-8 if dtype == jnp.float64 else 1e-6
    check_positive("rtol", rtol)
    if atol is not None:
        check_positive("atol", atol)
    relative = jnp.asarray(rtol, dtype)
    absolute = _absolute_tolerance(params, relative) if atol is None else atol
    check_integer("max_steps", max_steps, least=1)
    return _integrate(
        params,
        log_times,
        jnp.asarray(start_log_time, dtype),
        relative,
        jnp.asarray(absolute, dtype),
        _resolve(solver, params, given, rtol),
        record,
        max_steps,
        progress,
    )


def choose_solver(
    num_classes: int, dim: int, log_t_max: float, dtype, rtol: float | None = None
) -> str:
    """The fastest of the solvers, as `gradient_flow` chooses.

    Args:
      num_classes: K.
      dim: d.
      log_t_max: natural logarithm of the last time.
      dtype: float32 or float64.
      rtol: relative tolerance of a step, None for the default.
    """
    size = num_classes * dim
    far = log_t_max >= _IMPLICIT_FROM * max(1.0, size / _IMPLICIT_SIZE) ** 2
    if far and size <= _LARGEST_SYSTEM and jnp.dtype(dtype) == jnp.float64:
        return "implicit"
    loose = rtol is None or rtol >= _STABILISED_RTOL
    return "stabilised" if loose and log_t_max >= _STABILISED_FROM else "explicit"


def _resolve(solver, params: Params, log_times, rtol) -> diffrax.AbstractSolver:
    """The diffrax solver that `solver` names."""
    if isinstance(solver, diffrax.AbstractSolver):
        return solver
    check_choice("solver", solver, SOLVERS)
    if solver == "auto":
        # As given: under jit even known times would be traced once they are an array.
        traced = any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(log_times))
        last = 0.0 if traced else float(np.asarray(log_times)[-1])
        tolerance = 0.0 if isinstance(rtol, jax.core.Tracer) else float(rtol)
        num_classes, dim = params.W.shape
        solver = choose_solver(num_classes, dim, last, params.W.dtype, tolerance)
    return _SOLVERS[solver]


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _integrate(params, log_times, start, rtol, atol, solver, record, max_steps, progress):
    dtype = log_times.dtype
    implicit = solver is LINEARLY_IMPLICIT

    def observe(state):
        recorded = state if record is None else record(state)
        return jax.tree.map(jnp.asarray, (recorded, log_cross_entropy(state)))

    def save(x, scaled, _args):
        state = unscaled(x, scaled)
        drift = invariant_drift(state, params)
        if implicit:  # observed later, once it has settled
            return scaled, drift
        # The solver fills what it does not reach with infinity, which integers lack.
        floating = jax.tree.map(
            lambda leaf: leaf if _is_inexact(leaf) else leaf.astype(dtype), observe(state)
        )
        return floating, drift

    sound = jnp.all(log_times[1:] > log_times[:-1]) & (log_times[0] >= start)
    sound &= log_times[-1] < jnp.inf
    x_start = clock(start)
    stand_in = x_start + jnp.arange(log_times.size, dtype=dtype)
    x_save = jnp.where(sound, clock(log_times), stand_in)
    x_last = x_save[-1]
    # XLA would lift what is saved at one time only out of the loop that waits for it, and
    # compute it at every step.
    x_told = jnp.repeat(x_save, 2) if x_save.size == 1 else x_save
    subs = [diffrax.SubSaveAt(ts=x_told, fn=save), diffrax.SubSaveAt(t1=True)]
    x_before = jnp.maximum(x_save - settle.SETTLING, x_start)
    if implicit:
        subs.append(diffrax.SubSaveAt(ts=x_before, fn=lambda _x, scaled, _args: scaled))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=x_start,
        t1=x_last,
        dt0=_first_step(implicit, x_start, x_last),
        y0=unscaled(-x_start, params),
        saveat=diffrax.SaveAt(subs=subs),
        stepsize_controller=diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            norm=settle.finite_or_infinite_norm,
            force_dtmin=False,
            dtmin=_least_step(x_start, x_last),
            **(_TWO_ERRORS if isinstance(solver, Stabilised4) else {}),
        ),
        max_steps=max_steps,
        throw=False,
        progress_meter=(
            diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()
        ),
    )
    told, (observed, drift) = jax.tree.map(
        lambda leaf: leaf[: x_save.size], (solution.ts[0], solution.ys[0])
    )
    final = unscaled(x_last, jax.tree.map(lambda leaf: leaf[-1], solution.ys[1]))
    if implicit:
        finish = partial(settle.settle, rtol=rtol, atol=atol, initial=params)
        states = jax.lax.map(
            lambda saved: finish(*saved), (x_before, solution.ys[2], x_save, observed)
        )
        observed = jax.lax.map(observe, states)
        final = jax.tree.map(lambda leaf: leaf[-1], states)
    reached = jnp.isfinite(told) & sound
    recorded, log_loss = jax.tree.map(
        partial(_nan_unless, reached), observed, jax.eval_shape(observe, params)
    )
    drift = jax.tree.map(lambda leaf: jnp.where(reached, leaf, jnp.nan), drift)
    result = jnp.where(sound, _result_code(solution.result), BAD_TIMES).astype(jnp.int32)
    succeeded = result == SUCCESS
    return FlowSolution(
        log_times=log_times,
        params=recorded if record is None else None,
        recorded=None if record is None else recorded,
        log_loss=log_loss,
        drift=drift,
        final=jax.tree.map(lambda leaf: jnp.where(succeeded, leaf, jnp.nan), final),
        num_steps=solution.stats["num_steps"],
        num_rejected=solution.stats["num_rejected_steps"],
        result=result,
    )


def _first_step(implicit: bool, x_start: Array, x_last: Array) -> Array:
    """First step in x, not beyond the end."""
    explicit = _FIRST_STEP * jnp.exp(-x_start)
    step = jnp.minimum(_FIRST_IMPLICIT_STEP, x_last - x_start) if implicit else explicit
    return jnp.where(step > 0, step, explicit)


def _least_step(x_start: Array, x_last: Array) -> Array:
    """Step in x below which the dtype is too coarse; not above the whole way, if any."""
    least = 16 * float(jnp.finfo(x_last.dtype).eps) * jnp.maximum(1, x_last)
    return jnp.where(x_last > x_start, jnp.minimum(least, x_last - x_start), least)


def _nan_unless(reached: Array, leaf: Array, like) -> Array:
    """`leaf` (T, ...) in the dtype of `like`, NaN or 0 in the rows not reached."""
    rows = reached.reshape(reached.shape + (1,) * (leaf.ndim - 1))
    missing = jnp.asarray(jnp.nan if _is_inexact(like) else 0, leaf.dtype)
    return jnp.where(rows, leaf, missing).astype(like.dtype)


def _is_inexact(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _absolute_tolerance(params: Params, rtol) -> Array:
    """`rtol` times the root mean square of the entries where that is below 1."""
    params = jax.lax.stop_gradient(params)
    mean = squared_norm(at_unit_scale(params)) / sum(leaf.size for leaf in params)
    size = power_of_two(params) * jnp.sqrt(mean)
    return jnp.maximum(rtol * jnp.minimum(size, 1), float(jnp.finfo(size.dtype).tiny))


def _result_code(result: diffrax.RESULTS) -> Array:
    """Result of diffrax as SUCCESS, STEP_LIMIT or STEP_TOO_SMALL."""
    success = result == diffrax.RESULTS.successful
    limit = result == diffrax.RESULTS.max_steps_reached
    code = jnp.where(success, SUCCESS, jnp.where(limit, STEP_LIMIT, STEP_TOO_SMALL))
    return code.astype(jnp.int32)


def _check_log_times(log_times, start_log_time: float, dtype) -> Array:
    """`log_times` (T,) in `dtype`, once they are known to increase from the start on."""
    given = jnp.asarray(log_times)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(
            f"log_times must be a non-empty vector (T,), got shape {given.shape}"
        )
    cast = given.astype(dtype)
    if not isinstance(given, jax.core.Tracer):
        values = np.asarray(cast)
        if np.isnan(values).any() or values[-1] == np.inf:
            raise ValueError(f"log_times must be numbers below infinity, got {values}")
        if not np.all(values[1:] > values[:-1]):
            raise ValueError(f"log_times must strictly increase (in {dtype}), got {values}")
        known = not isinstance(start_log_time, jax.core.Tracer)
        if known and not values[0] >= start_log_time:
            raise ValueError(
                f"log_times must not lie before start_log_time = {start_log_time}, "
                f"got {values[0]}"
            )
    return cast
