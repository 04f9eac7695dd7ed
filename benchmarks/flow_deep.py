"""Time the flow of deep linear models: many starts, and one start to late times.

K = 6 classes, one sample of each, all widths 6, in float64; starts are drawn from
N(0, 0.3²).

**Many starts**: 64 starts of three factors to log t = 1000, under vmap. The peer is
diffrax's Dopri8 on the same clock with autodiff.

**Late times**: one start of three and of four factors to log t = 10 000 and 100 000, by
each solver. The note has the number of steps and the KKT angle at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._timing import Program, interleave, rows, warm_up
from benchmarks.flow import plain, seeds_program

K, N, WIDTH, SCALE = 6, 1, 6, 0.3
SOLVERS = ("stabilised", "implicit", "explicit")  # the last to log t = 10 000 only


def measure(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes."""
    return [*starts(repeats), *late(repeats)], []


def starts(repeats: int, count: int = 64, log_t: float = 1e3) -> list[dict[str, Any]]:
    """Return rows of many starts of three factors, and of a vmapped Dopri8."""
    many = jax.vmap(lambda key: draw(key, 3))(jax.random.split(jax.random.key(0), count))
    times = np.geomspace(1, log_t, 50)

    def flow(start):
        return ncjax.gradient_flow(start, times).final

    programs = [
        seeds_program("ncjax, auto", flow, many),
        seeds_program("Dopri8 on the clock, autodiff", plain(log_t), many),
    ]
    warm_up(programs)
    interleave(programs, repeats)
    return rows(f"{count} starts, p = 3, to log t = {log_t:g}", programs)


def draw(key, factors: int) -> ncjax.DeepParams:
    """Return a random start with this number of factors."""
    widths = (WIDTH,) * (factors - 1)
    return ncjax.init_deep_params(key, K, N, widths, SCALE, dtype=jnp.float64)


def late(repeats: int, log_ts=(1e4, 1e5)) -> list[dict[str, Any]]:
    """Return rows of one start at each number of factors and last time, by solver."""
    measured = []
    for factors in (3, 4):
        start = draw(jax.random.key(1), factors)
        for log_t in log_ts:
            solvers = SOLVERS if log_t <= 1e4 else SOLVERS[:-1]
            programs = [_solver(start, log_t, solver) for solver in solvers]
            warm_up(programs)
            interleave(programs, repeats)
            measured += rows(f"one start, p = {factors}, to log t = {log_t:g}", programs)
    return measured


def _solver(start: ncjax.DeepParams, log_t: float, solver: str) -> Program:
    def call(_repeat: int):
        return jax.block_until_ready(ncjax.gradient_flow(start, [log_t], solver=solver))

    def warm():
        flow = call(0)
        angle = float(ncjax.kkt_angle(flow.final))
        program.note = f"{int(flow.num_steps)} steps, KKT angle {angle:.1e}"

    program = Program(f"ncjax, {solver}", call, warm)
    return program
