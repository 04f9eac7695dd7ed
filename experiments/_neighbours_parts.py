"""The parts of the comparison, each some seconds of work with arrays as its result."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import ncjax
from experiments import _neighbours_flows, _neighbours_minority, _neighbours_path
from experiments._neighbours_models import Model, Sizes, distance_to_optimum, models

Arrays = dict[str, np.ndarray]
SMALL_DECAYS = (1e-2, 1e-4, 1e-8)
_PATH_POINTS, _BALL_POINTS = 30, 10
_PATH_LOG_T = 1000.0  # end of the flows on the panel of the path
_PATH_SEEDS = 4
_HORIZON = 18.0  # end of the flows of small decay, times mu


def parts(sizes: Sizes, config: Any) -> dict[str, Callable[[], Arrays]]:
    """Return the parts by name, in the order of the run."""
    found: dict[str, Callable[[], Arrays]] = {}
    for model in models(sizes):
        found[f"flow/{model.name}"] = partial(
            _neighbours_flows.flow_of, model, config.seeds, config.seed, config.log_t_max
        )
    for decay in SMALL_DECAYS:
        found[f"small/{decay:g}"] = partial(_small, sizes, decay, config)
    for ratio in _neighbours_path.RATIOS:
        found[f"path/{ratio}"] = partial(_path, ratio, config)
    for name in _neighbours_minority.MODELS:
        for weighted in (False, True):
            found |= _minority(name, weighted, config)
    return found


def labels(sizes: Sizes) -> dict[str, Model]:
    """Return the models by the names of their parts."""
    return {f"flow/{model.name}": model for model in models(sizes)}


def _small(sizes: Sizes, decay: float, config: Any) -> Arrays:
    """Follow the balanced UFM of a small decay, whose flow is at first the ULPM's."""
    model = next(m for m in models(sizes._replace(decay=decay)) if m.name == "ufm-balanced")
    starts = model.starts(jax.random.key(config.seed), config.seeds, 0.3)
    times = np.geomspace(3.0, _HORIZON / decay, 160)
    best = model.best().params

    def one(start):
        flow = ncjax.gradient_flow(start, times=times, objective=model.objective)
        return jax.vmap(lambda state: distance_to_optimum(state, best))(flow.params)

    distance = np.asarray(jax.jit(jax.vmap(one))(starts))
    return {"log_times": np.log(times), "distance": distance}


def _path(ratio: int, config: Any) -> Arrays:
    """Return the regularisation path and the flow of one imbalance ratio."""
    decay = _neighbours_path.decay_path(ratio, _PATH_POINTS)
    ball = _neighbours_path.ball_path(ratio, _BALL_POINTS)
    flow = _neighbours_path.flow_path(ratio, _PATH_SEEDS, config.seed, _PATH_LOG_T)
    limits = _neighbours_path.first_order(ratio)
    return {
        "decay": np.stack(decay),
        "ball": np.stack(ball),
        "flow_log_times": flow["log_times"],
        "flow_logits": flow["logits"],
        "limits": np.array([limits["cosine"], limits["logits"]]),
        "references": _neighbours_path.at_references(ratio),
    }


def _minority(model: str, weighted: bool, config: Any) -> dict[str, Callable[[], Arrays]]:
    """Return the parts of one panel: the closed form, and the flows of each ratio."""
    name = f"minority/{model}/{'weighted' if weighted else 'plain'}"

    def closed_form() -> Arrays:
        found = {
            "predicted": _neighbours_minority.predicted(model, weighted),
            "at_flows": _neighbours_minority.at_flows(model, weighted),
        }
        if model == _neighbours_minority.ULPM:
            found["features"] = _neighbours_minority.features_of_separation()
        return found

    def flows(ratio: int) -> Arrays:
        seeds = min(config.seeds, 3)
        cosine = _neighbours_minority.found(model, weighted, ratio, seeds, config.seed)
        return {"cosine": cosine}

    return {name: closed_form} | {
        f"{name}/{ratio}": partial(flows, ratio)
        for ratio in _neighbours_minority.flow_ratios(model)
    }
