"""The flow of one cell of the deep experiment: many starts to a late time, and its path."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _legs
from experiments._deep_cells import Cell
from experiments._seeds import Division, measurement
from ncjax.peeled.points import factors_at

NUM_TIMES = 60
# Starts of small scale pass plateaus of low rank. Their norm grows there while some samples
# stay misclassified, and the flow takes many steps to leave them.
_STEPS_OF_PLATEAUS = 30_000
Arrays = dict[str, np.ndarray]


def flow_of(cell: Cell, seeds: int, seed: int, log_t_max: float) -> Arrays:
    """Follow the starts of a cell, and measure them on the way and at the end.

    The starts of cells that differ in scale alone are multiples of each other.

    Returns:
      `log_times` (T,); for each start and time `singular_values` (S, T, K) of the logits of
      the class means, `least_margin`, `squared_norm` and `log_loss` (S, T), and
      `within_class_quotient` (S, T, L) of every layer; for each start `logits` (S, K, K) of
      the class means at the end, column k for class k, `kkt_angle` (S,) and the solver's
      `result` (S,).
    """
    log_times = _legs.log_times(log_t_max, NUM_TIMES)
    division, solve, measure_path, measure_end = _programs(cell.shape, seeds, log_t_max)
    keys = jax.random.split(jax.random.key(seed), seeds)
    solution = solve(_starts(cell, keys))
    found = measure_path(solution.params) | measure_end(solution.final)
    found |= {"log_loss": solution.log_loss, "result": solution.result}
    return {"log_times": log_times} | division.collect(found)


def _starts(cell: Cell, keys) -> ncjax.DeepParams:
    """Return random starts (S, ...)."""
    widths = (cell.width,) * (cell.factors - 1)
    deviation = cell.scale / math.sqrt(cell.width)

    def one(key):
        return ncjax.init_deep_params(
            key, cell.num_classes, cell.per_class, widths, deviation
        )

    return jax.vmap(one)(keys)


@functools.lru_cache(maxsize=1)
def _programs(shape: Cell, seeds: int, log_t_max: float):
    """Return the programs that the cells of one shape share."""
    log_times = _legs.log_times(log_t_max, NUM_TIMES)
    max_steps = _STEPS_OF_PLATEAUS + _legs.step_limit(log_t_max)

    def solve(start):
        return ncjax.gradient_flow(start, log_times, max_steps=max_steps)

    division = Division(seeds)
    return (
        division,
        division.compiled(solve),
        measurement(jax.vmap(jax.vmap(measure))),
        measurement(jax.vmap(_measure_end)),
    )


def measure(state: ncjax.DeepParams) -> dict[str, Any]:
    """Measure one state of the path."""
    return {
        "singular_values": jnp.linalg.svd(class_logits(state), compute_uv=False),
        "least_margin": jnp.min(ncjax.margins(state)),
        "squared_norm": ncjax.squared_norm(state),
        "within_class_quotient": ncjax.collapse_by_layer(
            state
        ).collapse.within_class_quotient,
    }


def _measure_end(state: ncjax.DeepParams) -> dict[str, Any]:
    return {"logits": class_logits(state), "kkt_angle": ncjax.kkt_angle(state)}


def class_logits(state: ncjax.DeepParams):
    """Return the logits (K, K) of the class means, column k for class k."""
    W, H = factors_at(state, len(state.layers) - 1)
    return jnp.einsum("jd,kd->jk", W, jnp.mean(H, axis=1))
