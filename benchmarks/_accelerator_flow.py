"""Time the flow of the layer-peeled model from many starts side by side."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._accelerator_timing import costs, timed
from ncjax.flow.methods import choose_solver

K, N, D = 10, 5, 20
TIMES = 40  # at which a flow is saved, even in log log t


class Case(NamedTuple):
    """Starts that are solved side by side."""

    seeds: int
    log_t: float
    dtype: str = "float64"


CASES = (
    Case(32, 1000.0),
    Case(1024, 1000.0),
    Case(32, 1000.0, "float32"),
    Case(256, 1e4),
    Case(32, 1e5),
)
TINY = (Case(2, 10.0),)


def checks(setting: Setting) -> list[Check]:
    """Return a check for each case."""
    cases = TINY if setting.tiny else CASES
    return [
        Check(
            f"{case.seeds} seeds, K={K} n={N} d={D}, log t={case.log_t:g}, {case.dtype}",
            partial(_solve, case),
        )
        for case in cases
    ]


def _solve(case: Case) -> Finding:
    dtype = jnp.dtype(case.dtype)
    solver = choose_solver(K, D, case.log_t, dtype)
    times = np.exp(np.linspace(0, np.log(case.log_t), TIMES))

    def start(key):
        return ncjax.init_params(key, K, N, D, 0.1, dtype)

    starts = jax.vmap(start)(jax.random.split(jax.random.key(0), case.seeds))
    run = jax.jit(jax.vmap(lambda z: ncjax.gradient_flow(z, times, solver=solver)))
    found, timing = timed(lambda: run(starts), repeats=1)
    failed = int(np.sum(np.asarray(found.result) != 0))
    details = {
        "solver": solver,
        "per_seed_ms": 1e3 * timing.seconds / case.seeds,
        "steps": np.median(found.num_steps),
        "drift": np.nanmax(found.drift.balance),
        "failed": failed,
        **costs(timing),
    }
    return Finding(failed == 0, timing.seconds, "s", details)
