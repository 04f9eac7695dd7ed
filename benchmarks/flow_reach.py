"""How far along the gradient flow ncjax and its peers come in a minute.

The start and the peers are those of `benchmarks.flow`. Each program goes on from where it
stands, a leg at a time, until its seconds are over or it fails; the last leg that ended in
time counts. The first leg ends at log t = 10, each other at 1.1 times the log t of the one
before; for gradient descent at log t = 5 and at 1.1 times the t. Compilation is not
counted. A row's seconds are those it took to its `log_t`; the errors are those against the
implicit solver at tolerance 1e-11.
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
FIRST_LEG = 10.0  # log t at its end
LONGEST_LEG = 1.1
# Raw time is a float64: beyond this it overflows.
RAW_LIMIT = math.log(np.finfo(float).max)


@dataclasses.dataclass
class Racer:
    """A program that goes on from a state."""

    name: str
    leg: Callable[[Params, float, float], Params]  # state, log t there and at the end
    limit: float = math.inf  # of log t
    by_time: bool = False  # legs in ratio of t, not of log t

    def next(self, log_t: float) -> float:
        """End of the next leg."""
        if log_t == -math.inf:
            return FIRST_LEG / 2 if self.by_time else FIRST_LEG
        further = log_t + math.log(LONGEST_LEG) if self.by_time else log_t * LONGEST_LEG
        return min(further, self.limit)


def measure(
    _repeats: int, seconds: float = SECONDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes; once whatever the repeats."""
    start = flow.draw()
    every, notes = racers()
    return [row(racer, start, seconds) for racer in every], notes


def racers() -> tuple[list[Racer], list[str]]:
    """The programs that are installed, and notes of those that are not."""
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
    """How far `racer` comes in so many seconds."""
    warm = time.perf_counter()
    racer.leg(start, -math.inf, racer.next(-math.inf))
    warm = time.perf_counter() - warm
    state, log_t, used, end = start, -math.inf, 0.0, "time is over"
    while log_t < racer.limit:
        target = racer.next(log_t)
        begun = time.perf_counter()
        try:
            after = racer.leg(state, log_t, target)
        except (RuntimeError, AssertionError) as error:  # torchdiffeq asserts
            end = str(error).partition("\n")[0].rstrip(".")
            break
        took = time.perf_counter() - begun
        if used + took > seconds:
            break
        state, log_t, used = after, target, used + took
    else:
        end = "the largest t of float64"
    return {
        "problem": f"one start, {seconds:g} s",
        "program": racer.name,
        "note": f"log t = {log_t:.4g}, {end}, {_errors(start, log_t, state)}",
        "median_seconds": used,
        "over_ncjax": None,
        "seconds": [used],
        "compile_seconds": warm,
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
