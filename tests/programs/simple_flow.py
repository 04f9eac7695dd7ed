"""Run `ulpm_flow` with simple sums in place of the numerics.

The variable INTERRUPT_AFTER or SLEEP_AFTER holds the leg after which the first process is
interrupted, or works no more.
"""

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import ncjax
from experiments import _legs, ulpm_flow
from experiments._runs import cli
from ncjax import plotting

NAMES = (*ncjax.CollapseMetrics._fields, "log_loss", "squared_norm", "margin_ratio")
NAMES += ("kkt_angle", "balance_drift", "classifier_sum_drift")
save, blank = _legs._save, plotting.render(Figure(figsize=(1, 1)))


class Solution(NamedTuple):
    params: Any
    final: Any
    num_steps: Any
    num_rejected: Any
    result: Any


def flow(state, times, **_options):
    end = jax.tree.map(lambda leaf: leaf * 1.01 + jnp.sin(times[-1]), state)
    path = jax.tree.map(lambda leaf: leaf[None] * times[:, None, None, None], (end.H,))
    return Solution(path, end, *jnp.zeros(3, jnp.int32))


def measure(path, start):
    sums = path[0].sum((1, 2, 3)) + start.W.sum()
    return {name: jnp.abs(sums * (i + 1)) % 1 for i, name in enumerate(NAMES)}


def save_and_stop(folder, progress):
    save(folder, progress)
    if progress.legs_done == int(os.environ.get("INTERRUPT_AFTER", -1)):
        raise KeyboardInterrupt
    if progress.legs_done == int(os.environ.get("SLEEP_AFTER", -1)):
        print("asleep", flush=True)
        time.sleep(1e6)


ncjax.gradient_flow = flow
_legs.measure_collapse = measure
_legs._save = save_and_stop
plotting.render = lambda _figure: blank
cli.main(ulpm_flow.Config, ulpm_flow.run, "simple_flow")
