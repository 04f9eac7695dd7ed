"""Minority collapse: the angle between the classifiers of small classes over imbalance.

K = 10 classes, K_A of them with R samples and the others with one. The LPM is the model of
Fang et al. (PNAS 2021), which bounds norms of class means: classes of one sample each, with
weights n_k in the loss. The decay of the UFM is fixed in the convention of training, where
the loss is a weighted mean over samples: it grows with the sum of the weights.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax

LPM, UFM, ULPM = MODELS = ("LPM", "UFM", "ULPM")
NUM_CLASSES = 10
LARGE = (3, 5, 7)  # K_A
ENERGY = 5.0  # E_W E_H of the LPM
MEAN_DECAY = 0.005  # lambda_W = lambda_H of the UFM, for a mean loss
RATIOS = (1, 2, 5, 10, 30, 100)  # of the flows; the ULPM's go to 10
LARGEST_RATIO = 400  # of the closed forms
LOG_T = 1e6  # end of the flows of the ULPM
_DIM = 10
_ZERO = 1e-8  # relative length of a row that counts as zero
_INIT_SCALE = 0.3
_BALL_TIME = 200.0  # end of the flows of the LPM
_DECAY_TIMES = 40.0  # end of the flows of the UFM, times mu


def sizes_of(large: int, ratio: float) -> tuple[float, ...]:
    """Return the class sizes n_k, large classes first."""
    return (ratio,) * large + (1,) * (NUM_CLASSES - large)


def flow_ratios(model: str) -> tuple[int, ...]:
    """Return the ratios R of the flows of a model."""
    return RATIOS[:-2] if model == ULPM else RATIOS


def ratios(model: str) -> np.ndarray:
    """Return the ratios R of the closed forms: integers if they are class sizes."""
    if model == LPM:
        return np.geomspace(1, LARGEST_RATIO, 120)
    return np.unique(np.geomspace(1, LARGEST_RATIO, 90).round())


def thresholds(model: str) -> list[float]:
    """Return the ratio R for each of `LARGE` from which on the minority merges."""
    if model == LPM:
        return [
            ncjax.minority_collapse_ratio(large, NUM_CLASSES - large, _ball())
            for large in LARGE
        ]
    if model == UFM:  # mu = 1 = sqrt(n_B)
        return [(1 / MEAN_DECAY - NUM_CLASSES + large) / large for large in LARGE]
    return [math.inf for _ in LARGE]


def predicted(model: str, weighted: bool) -> np.ndarray:
    """Return the cosine of two minority classifiers by closed form, (K_A, R)."""
    return np.array(
        [
            [_cosine_of(_optimum(model, large, ratio, weighted)) for ratio in ratios(model)]
            for large in LARGE
        ]
    )


def features_of_separation() -> np.ndarray:
    """Return the cosine of two minority features of the ULPM's limit, (K_A, R)."""
    return np.array(
        [
            [
                _cosine_of(_optimum(ULPM, large, ratio, False).H[:, 0])
                for ratio in ratios(ULPM)
            ]
            for large in LARGE
        ]
    )


def at_flows(model: str, weighted: bool) -> np.ndarray:
    """Return the closed forms at the ratios of the flows, (K_A, R')."""
    return np.array(
        [
            [
                _cosine_of(_optimum(model, large, ratio, weighted))
                for ratio in flow_ratios(model)
            ]
            for large in LARGE
        ]
    )


def found(model: str, weighted: bool, ratio: int, seeds: int, seed: int) -> np.ndarray:
    """Return the cosine at the end of flows from random starts, (K_A, seeds)."""
    rows = [ratio if model != LPM else 1] * NUM_CLASSES
    sizes = (NUM_CLASSES, max(rows), _DIM)

    def start(key):
        return ncjax.init_params(key, *sizes, _INIT_SCALE, jnp.float64)

    starts = jax.vmap(start)(jax.random.split(jax.random.key(seed), seeds))
    weights = jnp.stack([_weights(model, large, ratio, weighted) for large in LARGE])
    classifiers = np.asarray(_flows(model)(starts, weights))
    return np.array([[_cosine(W) for W in row] for row in classifiers])


@functools.cache
def _flows(model: str):
    """Return the compiled flow: starts (S, ...) and weights (L, ...) to W (L, S, ...)."""
    end = {LPM: _end_on_ball, UFM: _end_with_decay, ULPM: _end_on_clock}[model]
    by_start = jax.vmap(end, in_axes=(0, None))
    return jax.jit(jax.vmap(by_start, in_axes=(None, 0)))


def _end_on_ball(start, weights):
    objective = ncjax.Objective(ball=_ball())
    flow = ncjax.gradient_flow(
        start, times=[_BALL_TIME], objective=objective, weights=weights
    )
    return flow.final.W


def _end_with_decay(start, weights):
    mu = MEAN_DECAY * jnp.sum(weights)
    objective = ncjax.Objective(weight_decay=(mu, mu))  # type: ignore[arg-type]
    times = (_DECAY_TIMES / mu)[None]
    flow = ncjax.gradient_flow(start, times=times, objective=objective, weights=weights)
    return flow.final.W


def _end_on_clock(start, weights):
    flow = ncjax.gradient_flow(
        start,
        jnp.array([LOG_T]),
        weights=weights,
        solver="implicit",
    )
    return flow.final.W - flow.final.W.mean(axis=0)


def _weights(model: str, large: int, ratio: int, weighted: bool) -> jax.Array:
    """Return the weights (K, n) of the samples."""
    counts = tuple(map(int, sizes_of(large, ratio)))
    class_weights = None if not weighted else [1 / count for count in counts]
    if model != LPM:
        return ncjax.sample_weights(counts, class_weights, jnp.float64)
    totals = np.asarray(counts, float) * (1.0 if class_weights is None else class_weights)
    return jnp.asarray(totals)[:, None]


def _optimum(model: str, large: int, ratio: float, weighted: bool) -> Any:
    """Return the optimal (W, H) in closed form."""
    sizes = sizes_of(large, float(ratio))
    if model == LPM:
        objective = ncjax.Objective(ball=_ball())
        ones = (1,) * NUM_CLASSES
        totals = (1.0,) * NUM_CLASSES if weighted else sizes
        return ncjax.minimiser(objective, ones, _DIM, class_weights=totals).params
    counts = tuple(map(int, sizes))
    if model == ULPM:  # class weights leave the separation problem as it is
        return ncjax.solve_separation(counts, _DIM).params
    mu = MEAN_DECAY * (NUM_CLASSES if weighted else sum(counts))
    objective = ncjax.Objective(weight_decay=(mu, mu))
    weights = tuple(1 / size for size in sizes) if weighted else None
    return ncjax.minimiser(objective, counts, _DIM, class_weights=weights).params


def _ball() -> tuple[float, float]:
    bound = NUM_CLASSES * math.sqrt(ENERGY)
    return bound, bound


def _cosine_of(rows) -> float:
    return _cosine(np.asarray(rows.W if isinstance(rows, ncjax.Params) else rows))


def _cosine(rows: np.ndarray) -> float:
    """Return the mean cosine of pairs of minority rows, the last ones; NaN if one is 0."""
    lengths = np.linalg.norm(rows, axis=1)
    if (lengths <= _ZERO * lengths.max()).any():
        return math.nan
    units = (rows / lengths[:, None])[max(LARGE) :]
    return float((units @ units.T)[np.triu_indices(len(units), 1)].mean())
