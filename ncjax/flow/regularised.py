r"""Gradient flow of any objective in plain time, $dZ/dt = -\nabla F(Z)$."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array
from ncjax.checks import check_choice, check_count, concrete
from ncjax.flow import invariants, outcome, saving, steps
from ncjax.flow.invariants import InvariantDrift
from ncjax.flow.methods import METHODS, Method
from ncjax.numerics import on_device
from ncjax.objectives import Objective
from ncjax.types import Array, BiasedParams, Params

SOLVERS = ("auto", "explicit", "stabilised")
# The controller corrects the first step within a few trials.
_FIRST = 0.01
# Losses whose slopes sum to zero over the classes.
_SHIFT_INVARIANT = ("cross_entropy", "focal")


class ObjectiveFlow(NamedTuple):
    """Flow of an objective at the T requested times; entries not reached are NaN."""

    times: Array  # (T,)    plain time t
    params: Params | BiasedParams | None  # (T, ...) state, None if `record` was given
    recorded: Any  # (T, ...) record(params), None if it was not given
    value: Array  # (T,)    F; for a ball the loss
    drift: InvariantDrift  # (T,)    the solver's error against the exact laws, see `follow`
    final: Params | BiasedParams  # state at the last time; NaN if not reached
    num_steps: Array  # ()      solver steps, rejected ones included
    num_rejected: Array  # ()      rejected steps
    result: Array  # ()      as in `FlowSolution` (int32)


def follow(
    params: Params | BiasedParams,
    times,
    objective: Objective,
    *,
    weights=None,
    rtol: float | None = None,
    atol: float | None = None,
    solver: str | diffrax.AbstractSolver = "auto",
    record: Callable | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> ObjectiveFlow:
    r"""Follow $dZ/dt = -\nabla F(Z)$ in plain time; `gradient_flow(times=...)` calls this.

    On a ball (a, b) the flow starts from $(\sqrt a\, W/|W|, \sqrt b\, H/|H|)$ and stays on
    the product of the two spheres: it is the gradient flow of `objective.on_boundary`. With
    a fixed classifier W does not move.

    An adaptive explicit solver suffices. At a minimum the largest rate exceeds the slowest
    by about $2 \log(1/\mu)$ only, and before, the steps grow in proportion to t, as the
    rates of the loss fall like 1/t. The distance to the minimum decays like
    $e^{-\text{rate} \cdot t}$, $F - \min F$ like its square, with the slowest positive
    eigenvalue of the Hessian (`ncjax.spectrum`), so $t = \log(1/\text{tol}) / \text{rate}$
    reaches a minimum to tol. `ncjax.certificate(flow.final, objective)` bounds the rest.
    Later times still cost steps in proportion to t, because stability bounds the step.

    `drift` compares each state with laws that the exact flow obeys:

    - $W^\top W - \sum h h^\top$ decays as $e^{-2 \lambda t}$ if $\lambda_W = \lambda_H =
      \lambda$, and is conserved without decay (`balance`),
    - $\sum_k w_k$ decays as $e^{-\lambda_W t}$ if the slopes of the loss sum to zero over
      the classes, as for cross entropy and focal loss (`classifier_sum`),
    - on a ball $|W|^2$ and $|H|^2$, and with a temperature the norms of all rows, are
      conserved; their largest relative change stands in `balance`.

    Where no law is known, it is NaN, which `jax_debug_nans` reports.

    Args: as `ncjax.gradient_flow`. The objective's numbers may be traced.

    Returns:
      `ObjectiveFlow`.

    Raises:
      ValueError: shapes, dtypes or weights do not fit, the solver is unknown or implicit,
        or (outside jit) times are negative or do not increase, tolerances are not positive,
        params hold NaN or infinity, or W or H is zero on a ball.
    """
    given, (params, weights) = params, objective.check(params, weights, finite=True)
    dtype = as_array("W", given[0]).dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"params must be float32 or float64, got {dtype}")
    if objective.ball is not None:
        _check_direction(params)
    times = _check_times(times, dtype)
    rtol = steps.relative_tolerance(rtol, dtype)
    relative, absolute = steps.tolerances(Params(params.W, params.H), weights, rtol, atol)
    check_count("max_steps", max_steps, least=1)
    return _integrate(
        params,
        jax.tree.map(lambda number: on_device(number, dtype), objective),
        weights,
        times,
        relative,
        absolute,
        method=_find_method(solver),
        record=record,
        max_steps=max_steps,
        progress=progress,
    )


@partial(jax.jit, static_argnames=("method", "record", "max_steps", "progress"))
def _integrate(
    params,
    objective: Objective,
    weights,
    times,
    rtol,
    atol,
    *,
    method: Method,
    record,
    max_steps,
    progress,
) -> ObjectiveFlow:
    if objective.ball is not None:
        params = _on_boundary(objective.ball, params)
    start = params
    t_save, in_order = _in_order(times)
    observe = partial(_observe, record, objective, weights)
    # diffrax puts booleans in the place of numbers, which an objective refuses.
    numbers, structure = jax.tree.flatten(objective)

    def save(t, state, _args):
        drift = _drift(objective, t, state, start)
        return drift, saving.as_floats(observe(state), t.dtype)

    solution = method.solve(
        partial(_field, structure),
        t0=jnp.zeros_like(t_save[-1]),
        t1=t_save[-1],
        dt0=jnp.where(t_save[-1] > 0, jnp.minimum(_FIRST, t_save[-1]), _FIRST),
        y0=start,
        args=(numbers, weights),
        saveat=diffrax.SaveAt(
            subs=[saving.at_times(t_save, save), diffrax.SubSaveAt(t1=True)]
        ),
        rtol=rtol,
        atol=atol,
        least_step=_least_step(t_save[-1]),
        max_steps=max_steps,
        progress=progress,
    )
    drift, observed = saving.first_rows(solution.ys[0], times.size)
    # diffrax fills the times that it did not reach with infinity.
    reached = jnp.isfinite(solution.ts[0][: times.size]) & in_order
    recorded, value = jax.tree.map(
        partial(outcome.nan_unless, reached), observed, jax.eval_shape(observe, start)
    )
    result = outcome.result_code(solution.result)
    result = jnp.where(in_order, result, outcome.BAD_TIMES).astype(jnp.int32)
    return ObjectiveFlow(
        times=times,
        params=recorded if record is None else None,
        recorded=None if record is None else recorded,
        value=value,
        drift=jax.tree.map(lambda leaf: jnp.where(reached, leaf, jnp.nan), drift),
        final=jax.tree.map(
            lambda leaf: jnp.where(result == outcome.SUCCESS, leaf[-1], jnp.nan),
            solution.ys[1],
        ),
        num_steps=solution.stats["num_steps"],
        num_rejected=solution.stats["num_rejected_steps"],
        result=result,
    )


def _field(structure, _t, state, args):
    numbers, weights = args
    objective = jax.tree.unflatten(structure, numbers)
    slope = jax.grad(lambda state: _value(objective, state, weights))(state)
    return jax.tree.map(jnp.negative, slope)


def _value(objective: Objective, state, weights) -> Array:
    fn = objective if objective.ball is None else objective.on_boundary
    return fn(state, weights)


def _observe(record, objective: Objective, weights, state):
    """Return the reported values of a state: `record(Z)`, or Z itself, and F."""
    recorded = state if record is None else record(state)
    return jax.tree.map(jnp.asarray, (recorded, _value(objective, state, weights)))


def _on_boundary(ball, params):
    """Return `(√a W/|W|, √b H/|H|)`."""
    W, H = (
        jnp.sqrt(bound) * leaf / jnp.sqrt(jnp.sum(leaf**2))
        for bound, leaf in zip(ball, params, strict=False)
    )
    return params._replace(W=W, H=H)


def _check_direction(params) -> None:
    """Raise ValueError if W or H is known and zero, which no scale brings to a sphere."""
    for name, leaf in zip("WH", params, strict=False):
        values = concrete(leaf)
        if values is not None and not values.any():
            raise ValueError(
                f"{name} must not be zero on a ball, got zeros: the flow starts on the "
                "boundary, in the direction of W and H"
            )


def _drift(objective: Objective, t, state, start) -> InvariantDrift:
    """Return the distance of a state from the exact laws, see `follow`."""
    state, start = (Params(each.W, each.H) for each in (state, start))
    nan = jnp.full_like(t, jnp.nan)
    if objective.ball is not None or objective.temperature is not None:
        axes = None if objective.ball is not None else -1
        change = _change_of_norms(state, start, axes)
        return InvariantDrift(change, nan)
    decay_W, decay_H = objective.weight_decay or (0.0, 0.0)
    fixed = objective.fixed_classifier
    factor = jnp.exp(-(0.0 if fixed else decay_W) * t)
    found = invariants.drift(state, jax.tree.map(lambda leaf: factor * leaf, start))
    shrinks_evenly = jnp.asarray(decay_W == decay_H) & (not fixed)
    sum_is_known = fixed or objective.loss in _SHIFT_INVARIANT
    return InvariantDrift(
        balance=jnp.where(shrinks_evenly, found.balance, nan),
        classifier_sum=found.classifier_sum if sum_is_known else nan,
    )


def _change_of_norms(state: Params, start: Params, axes) -> Array:
    """Return the largest relative change of squared norms, of rows or of W and of H."""
    changes = []
    for leaf, first in zip(state, start, strict=True):
        before = jnp.sum(first**2, axis=axes)
        change = jnp.abs(jnp.sum(leaf**2, axis=axes) - before)
        changes.append(jnp.max(change / jnp.where(before > 0, before, 1)))
    return jnp.maximum(*changes)


def _in_order(times: Array) -> tuple[Array, Array]:
    """Return increasing times for the solver, and whether `times` (T,) are in order."""
    in_order = jnp.all(times[1:] > times[:-1]) & (times[0] >= 0)
    in_order &= times[-1] < jnp.inf
    stand_in = jnp.arange(times.size, dtype=times.dtype)
    return jnp.where(in_order, times, stand_in), in_order


def _least_step(t_last: Array) -> Array:
    """Return the least step; early steps are much shorter than the rounding of the end."""
    least = 16 * float(jnp.finfo(t_last.dtype).eps)
    return least * jnp.where(t_last > 0, jnp.minimum(t_last, 1), 1)


def _find_method(solver) -> Method:
    if isinstance(solver, diffrax.AbstractSolver):
        return METHODS["explicit"]._replace(solver=solver)
    if solver == "implicit":
        raise ValueError(
            'solver "implicit" is for log_times, got times: use solver="auto", the flow in '
            "plain time is not stiff"
        )
    check_choice("solver", solver, SOLVERS)
    return METHODS["explicit" if solver == "auto" else solver]


def _check_times(times, dtype) -> Array:
    """Return `times` (T,) in `dtype`; raise ValueError if they do not increase from 0."""
    times = as_array("times", times)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"times must be a non-empty vector (T,), got shape {times.shape}")
    cast = times.astype(dtype)
    if isinstance(times, jax.core.Tracer):
        return cast
    values = np.asarray(cast)
    if not np.isfinite(values).all():
        raise ValueError(f"times must be finite, got {values}")
    if values[0] < 0:
        raise ValueError(
            f"times must not be negative, got {values[0]}: pass logarithms as log_times"
        )
    if not np.all(values[1:] > values[:-1]):
        raise ValueError(f"times must strictly increase (in {dtype}), got {values}")
    return cast
