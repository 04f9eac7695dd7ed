"""Gradient flow of the layer-peeled model at any physical time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, overload

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array
from ncjax.checks import check_computes, check_count, check_installed
from ncjax.flow import outcome, regularised, saving, steps
from ncjax.flow.clock import Loss, check_objective, clock, field, unscaled
from ncjax.flow.invariants import InvariantDrift
from ncjax.flow.methods import find_method
from ncjax.flow.outcome import BAD_TIMES as BAD_TIMES
from ncjax.flow.outcome import STEP_LIMIT as STEP_LIMIT
from ncjax.flow.outcome import STEP_TOO_SMALL as STEP_TOO_SMALL
from ncjax.flow.outcome import SUCCESS as SUCCESS
from ncjax.numerics import on_device
from ncjax.objectives import Objective
from ncjax.objectives.objective import require_objective
from ncjax.peeled.kernels import log_loss
from ncjax.peeled.points import Point, check_any_params, last_factors
from ncjax.peeled.weights import check_weights, without_left_out
from ncjax.types import Array, BiasedParams, DeepParams, Params


class FlowSolution(NamedTuple, Generic[Point]):
    """Gradient flow at the T requested times; entries not reached are NaN."""

    log_times: Array  # (T,)    natural logarithm of physical time
    params: Point | None  # (T, ...) state, None if `record` was given
    recorded: Any  # (T, ...) record(params), None if it was not given
    log_loss: Array  # (T,)    log L, of the focal loss if it is the objective
    drift: InvariantDrift  # (T,)    change of the invariants since the start
    final: Point  # state at the last time, start of a next leg; NaN if not reached
    num_steps: Array  # ()      solver steps, rejected ones included
    num_rejected: Array  # ()      rejected steps
    result: Array  # ()      SUCCESS, STEP_LIMIT, STEP_TOO_SMALL or BAD_TIMES (int32)


@overload
def gradient_flow(
    params: Point,
    log_times,
    *,
    times: None = None,
    objective: Objective | None = None,
    weights=None,
    start_log_time: float = -math.inf,
    rtol: float | None = None,
    atol: float | None = None,
    solver: str | diffrax.AbstractSolver = "auto",
    record: Callable[[Any], Any] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> FlowSolution[Point]: ...


@overload
def gradient_flow(
    params: Params | BiasedParams,
    log_times: None = None,
    *,
    times,
    objective: Objective | None = None,
    weights=None,
    start_log_time: float = -math.inf,
    rtol: float | None = None,
    atol: float | None = None,
    solver: str | diffrax.AbstractSolver = "auto",
    record: Callable[[Any], Any] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> regularised.ObjectiveFlow: ...


def gradient_flow(
    params: Params | DeepParams | BiasedParams,
    log_times=None,
    *,
    times=None,
    objective: Objective | None = None,
    weights=None,
    start_log_time: float = -math.inf,
    rtol: float | None = None,
    atol: float | None = None,
    solver: str | diffrax.AbstractSolver = "auto",
    record: Callable[[Any], Any] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
):
    r"""Follow the exact gradient flow $dZ/dt = -\nabla \mathcal L(Z)$ to the given times.

    Give either `log_times`, for the loss alone at any time, or plain `times`, for any
    objective: with weight decay, on a ball, with a bias. `times` follow $dZ/dt = -\nabla
    F(Z)$ as described in `ncjax.flow.regularised.follow`; the rest of this text is on
    `log_times`.

    The gradient decays like $1/(t \log t)$, and $t$ itself overflows at $\log t = 709$, so
    the equation is solved on the clock $x = \log(1 + \log(1 + t))$. With
    $u = \log(1 + t) = e^x - 1$,

    $$\frac{dZ}{dx} = -(1 + u)\, e^{u + \log \mathcal L(Z)}\, \nabla \log \mathcal L(Z),$$

    which gives the same trajectory with every quantity finite. The solvers follow the state
    at rest, $Y = e^{-x/p} Z$ with the number p of factors: 2 for `Params`, L + 1 for
    `DeepParams` (`ncjax.flow.clock` has the equation of Y). The stiffness of the
    equation grows in proportion to $\log t$. An explicit solver takes about 0.4 steps
    (Tsit5, six gradients each) or 0.1 steps (`Stabilised4`, twelve each) per unit of
    $\log t$; its margins are accurate to about rtol times $\log t$. The linearly implicit
    solver takes about 300 steps to $\log t = 10^4$ and 50 more to $10^6$; each solves a
    system of K d unknowns, or of all entries of several layers. At each saved time it takes
    two short steps over the last 0.03 of x, which bring every margin to the accuracy of
    float64, and restores the invariants of the flow (see `invariant_drift`).

    The loss is the cross entropy or, by `objective`, the focal loss. With `weights` it is
    the weighted sum over samples, and classes may differ in size (`sample_weights`).

    Works under `jax.jit` and under `jax.vmap` over `params`; a start that fails (see
    `result`) does not affect the others. Reverse-mode differentiable.

    Args:
      params: start `Z(t_0)`, `W` (K, d) and `H` (K, n, d), or `DeepParams` with
        `log_times`. Its dtype is used throughout. With `times` and an objective with a
        bias, `BiasedParams`.
      log_times: (T,) strictly increasing natural logarithms of the physical time t;
        `-inf` is t = 0. Useful to 1e6 and beyond in float64, to about 3e4 in float32.
      times: (T,) increasing plain times t >= 0, instead of `log_times`.
      objective: any `Objective` with `times`. With `log_times` it is
        `Objective("cross_entropy")`, which None is too, or `Objective("focal", gamma=...)`,
        without regularisation and bias.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, not negative.
        Samples of weight 0 are left out: their rows of H are zero, and errors and
        tolerances do not count them. None is 1 everywhere and costs nothing.
      start_log_time: natural logarithm of the time t_0 of `params`; t_0 = 0 by default.
        With it a long flow can be split into legs, each from the `final` of the last.
      rtol: relative tolerance of a step; 1e-8 in float64 and 1e-6 in float32 if None.
      atol: absolute tolerance of a step. None takes rtol, times the root mean square of
        `params` if that is below 1, so that small starts are followed too.
      solver: "explicit" (Tsit5), "stabilised" (explicit, for stiff equations), "implicit"
        (Rodas5P with the structure of the Hessian), or a diffrax solver, which runs with
        the settings of "explicit" if it is not one of these three. "auto" chooses the
        fastest for the last time: "implicit" in float64 if log t is at least
        3e4 max(1, K d / 150)² and K d at most 2000; else "stabilised" if log t is at least
        2000 and rtol at least 1e-9; else, and for traced times, "explicit". For the focal
        loss "auto" does not choose "implicit", which has the Hessian of the cross entropy.
        For `DeepParams` the number of entries of all layers, or K d_0 if it is larger,
        stands for K d.
        Several layers of small entries pass plateaus on which "explicit" and "stabilised"
        take thousands of steps, more the smaller the start; take "implicit" there.
      record: function of the state; its value (any pytree of arrays) is saved instead of
        the state. It is compiled in: pass the same function object to compile once.
      max_steps: bound on the solver's steps, rejected ones included.
      progress: show a tqdm bar (over x); needs the extra `experiments`. The bar calls the
        host, so `jax.export` refuses the flow.

    Returns:
      `FlowSolution`; `ObjectiveFlow` with `times`.

    Raises:
      ValueError: both or neither of log_times and times are given; times are given with
        `DeepParams`; shapes, dtypes or weights do not fit; the objective does not go with
        log_times; the solver is unknown or does not fit the loss; or (outside jit) times do
        not increase, tolerances are not positive, or params hold NaN or infinity.
      ModuleNotFoundError: progress is set and tqdm is not installed.

    Source: the flow is equation (4) of Ji et al. (ICLR 2022); the clock is ncjax's.

    >>> import jax, numpy as np, ncjax
    >>> start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    >>> flow = ncjax.gradient_flow(start, np.log([1.0, 10.0, 100.0]))
    >>> flow.params.W.shape
    (3, 3, 4)
    """
    if progress:
        check_installed("experiments", "tqdm")
    if (log_times is None) == (times is None):
        given = "neither" if times is None else "both"
        raise ValueError(f"pass either log_times or times, the plain times t, got {given}")
    if objective is not None:
        require_objective(objective)
    if times is not None:
        _check_starts_at_zero(start_log_time)
        if isinstance(params, DeepParams):
            raise ValueError(
                "times need ncjax.Params or BiasedParams, got DeepParams: follow several "
                "layers with log_times, natural logarithms of the times"
            )
        return regularised.follow(
            params,
            times,
            Objective() if objective is None else objective,
            weights=weights,
            rtol=rtol,
            atol=atol,
            solver=solver,
            record=record,
            max_steps=max_steps,
            progress=progress,
        )
    start = check_any_params(params, finite=True)  # type: ignore[type-var]
    dtype = start.W.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"params must be float32 or float64, got {dtype}")
    check_computes("params", start.W)
    gamma = check_objective(objective, dtype, deep=isinstance(start, DeepParams))
    loss = Loss(check_weights(weights, start), gamma)
    start = without_left_out(start, loss.weights)
    requested = log_times
    log_times = _check_log_times(requested, start_log_time, dtype)
    rtol = steps.relative_tolerance(rtol, dtype)
    relative, absolute = steps.tolerances(start, loss.weights, rtol, atol)
    method = find_method(solver, start, requested, rtol, focal=loss.gamma is not None)
    check_count("max_steps", max_steps, least=1)
    return _integrate(
        start,
        loss,
        log_times,
        on_device(start_log_time, dtype),  # JAX checks no -inf that is only transferred
        relative,
        absolute,
        method=method,
        record=record,
        max_steps=max_steps,
        progress=progress,
    )


@partial(jax.jit, static_argnames=("method", "record", "max_steps", "progress"))
def _integrate(
    params, loss: Loss, log_times, start, rtol, atol, *, method, record, max_steps, progress
) -> FlowSolution:
    x_start, x_save, in_order = _on_clock(start, log_times)
    observe = partial(_observe, record, loss)
    plan = saving.plan(observe, params, x_save, x_start, method.finish, rtol, atol, loss)
    solution = method.solve(
        field,
        t0=x_start,
        t1=x_save[-1],
        dt0=method.first_step(x_start, x_save[-1]),
        y0=unscaled(-x_start, params),
        args=loss,
        saveat=plan.saveat,
        rtol=rtol,
        atol=atol,
        least_step=steps.least_step(x_start, x_save[-1]),
        max_steps=max_steps,
        progress=progress,
    )
    saved = plan.read(solution)
    # diffrax fills the times that it did not reach with infinity.
    reached = jnp.isfinite(solution.ts[0][: log_times.size]) & in_order
    recorded, log_loss = jax.tree.map(
        partial(outcome.nan_unless, reached),
        saved.observed,
        jax.eval_shape(observe, params),
    )
    result = jnp.where(in_order, outcome.result_code(solution.result), BAD_TIMES)
    succeeded = result == SUCCESS
    return FlowSolution(
        log_times=log_times,
        params=recorded if record is None else None,
        recorded=None if record is None else recorded,
        log_loss=log_loss,
        drift=jax.tree.map(lambda leaf: jnp.where(reached, leaf, jnp.nan), saved.drift),
        final=jax.tree.map(lambda leaf: jnp.where(succeeded, leaf, jnp.nan), saved.final),
        num_steps=solution.stats["num_steps"],
        num_rejected=solution.stats["num_rejected_steps"],
        result=result.astype(jnp.int32),
    )


def _observe(record, loss: Loss, state: Params | DeepParams):
    """Return the reported values of a state: `record(Z)`, or Z itself, and log L."""
    recorded = state if record is None else record(state)
    return jax.tree.map(jnp.asarray, (recorded, log_loss(last_factors(state), *loss)))


def _on_clock(start: Array, log_times: Array) -> tuple[Array, Array, Array]:
    """Return the start and the times (T,) on the clock x, and whether they are in order.

    Times out of order raise no error under jit. The solver gets increasing ones instead.
    """
    in_order = jnp.all(log_times[1:] > log_times[:-1]) & (log_times[0] >= start)
    in_order &= log_times[-1] < jnp.inf
    x_start = clock(start)
    stand_in = x_start + jnp.arange(log_times.size, dtype=log_times.dtype)
    return x_start, jnp.where(in_order, clock(log_times), stand_in), in_order


def _check_starts_at_zero(start_log_time) -> None:
    if isinstance(start_log_time, jax.core.Tracer) or start_log_time != -math.inf:
        raise ValueError(
            f"start_log_time goes with log_times, got {start_log_time} with times: a flow "
            "in plain time starts at t = 0, and its next leg at t = 0 from its final state"
        )


def _check_log_times(log_times, start_log_time: float, dtype) -> Array:
    """Return `log_times` (T,) in `dtype`; raise ValueError if they do not increase."""
    times = as_array("log_times", log_times)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(
            f"log_times must be a non-empty vector (T,), got shape {times.shape}"
        )
    cast = times.astype(dtype)
    if not isinstance(times, jax.core.Tracer):
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
