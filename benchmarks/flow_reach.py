"""Measure how far along the gradient flow ncjax and its peers come in a minute.

The start and the peers come from `benchmarks.flow`. Each program continues from its last
state, one leg at a time, until its seconds are over or it fails. The last leg that ended in
time counts. The first leg ends at log t = 10, and each later leg multiplies log t by 1.1.
For gradient descent the first leg ends at log t = 5, and each later leg multiplies t by
1.1. Compilation is not counted. A row gives the seconds up to its `log_t`, and the errors
against the implicit solver at tolerance 1e-11.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ncjax
from benchmarks import flow
from benchmarks._timing import missing
from ncjax.flow.methods import SOLVERS
from ncjax.flow.solve import SUCCESS
from ncjax.types import Params

SECONDS = 60.0
FIRST_LEG = 10.0  # log t at the end of the first leg
LONGEST_LEG = 1.1
# Raw time is a float64: beyond this it overflows.
RAW_LIMIT = math.log(np.finfo(float).max)


@dataclasses.dataclass
class Racer:
    """A program that continues from a state."""

    name: str
    leg: Callable[[Params, float, float], Params]  # state, its log t, log t at the end
    limit: float = math.inf  # largest log t
    by_time: bool = False  # each leg multiplies t, not log t

    def next(self, log_t: float) -> float:
        """Return log t at the end of the next leg."""
        if log_t == -math.inf:
            return FIRST_LEG / 2 if self.by_time else FIRST_LEG
        target = log_t + math.log(LONGEST_LEG) if self.by_time else log_t * LONGEST_LEG
        return min(target, self.limit)


def measure(
    _repeats: int, seconds: float = SECONDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes; every program runs once, whatever the repeats."""
    start = flow.draw()
    every, notes = racers()
    return [row(racer, start, seconds) for racer in every], notes


def racers() -> tuple[list[Racer], list[str]]:
    """Return the installed programs, and notes about missing packages."""
    every = [
        *(Racer(f"ncjax, {name}", _ncjax(name)) for name in SOLVERS[1:]),
        Racer("gradient descent, compiled loop", _descent, by_time=True),
        *(Racer(name, _raw(solve), RAW_LIMIT) for name, solve in flow.SOLVERS.items()),
    ]
    notes = []
    for package, racer in (
        ("torchdiffeq", Racer(flow.TORCHDIFFEQ, _raw(flow.torchdiffeq), RAW_LIMIT)),
        ("torch", Racer("gradient descent, PyTorch", _torch_descent, by_time=True)),
    ):
        reason = missing(package)
        if reason:
            notes.append(reason)
        else:
            every.append(racer)
    return every, notes


def row(racer: Racer, start: Params, seconds: float) -> dict[str, Any]:
    """Return a row: how far `racer` comes in `seconds`."""
    warm_start = time.perf_counter()
    racer.leg(start, -math.inf, racer.next(-math.inf))
    compile_seconds = time.perf_counter() - warm_start
    state, log_t, used, reason = start, -math.inf, 0.0, "time is over"
    while log_t < racer.limit:
        target = racer.next(log_t)
        leg_start = time.perf_counter()
        try:
            after = racer.leg(state, log_t, target)
        except (RuntimeError, AssertionError) as error:  # torchdiffeq asserts
            reason = str(error).partition("\n")[0].rstrip(".")
            break
        took = time.perf_counter() - leg_start
        if used + took > seconds:
            break
        state, log_t, used = after, target, used + took
    else:
        reason = "the largest t of float64"
    return {
        "problem": f"one start, {seconds:g} s",
        "program": racer.name,
        "note": f"log t = {log_t:.4g}, {reason}, {_errors(start, log_t, state)}",
        "median_seconds": used,
        "over_ncjax": None,
        "seconds": [used],
        "compile_seconds": compile_seconds,
        "log_t": log_t if log_t > -math.inf else None,
    }


def _errors(start: Params, log_t: float, state: Params) -> str:
    if log_t == -math.inf:
        return "nowhere"
    errors = flow.end_errors(start, log_t, state)
    return "farther than the reference" if "nan" in errors else errors


def _ncjax(solver: str) -> Callable:
    def leg(state, log_t, target):
        solution = ncjax.gradient_flow(state, [target], start_log_time=log_t, solver=solver)
        if int(solution.result) != SUCCESS:
            raise RuntimeError("its steps become too small")
        return jax.block_until_ready(solution.final)

    return leg


def _steps(log_t: float, target: float) -> int:
    return round((math.exp(target) - math.exp(log_t)) / flow.STEP_SIZE)


def _descent(state, log_t, target):
    steps = _steps(log_t, target)
    descent = ncjax.gradient_descent(state, flow.STEP_SIZE, steps, save_steps=[steps])
    return jax.block_until_ready(descent.final)


def _torch_descent(state, log_t, target):
    return flow.torch_descent(state, _steps(log_t, target))


def _raw(solve: Callable) -> Callable:
    def leg(state, log_t, target):
        after = solve(state, math.exp(target), math.exp(log_t))
        if not np.isfinite(np.asarray(after.W)).all():
            raise RuntimeError("it returns NaN")
        return after

    return leg
