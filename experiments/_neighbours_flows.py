"""The flow of each model from random starts, against its optimum in closed form."""

from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import ncjax
from experiments import _fits, _legs
from experiments._neighbours_models import Model, distance_to_optimum

INIT_SCALE = 0.3
NUM_TIMES = 160
# A flow ends when its slowest direction has fallen by this factor.
_FALL = 1e10
# The rate is fitted while the gradient lies between these shares of its start.
_FIT_TO, _FIT_FROM = 1e-8, 1e-5
_TOLERANCE = 1e-10  # of the solver
_LEAST_POINTS = 3
_SAME_RATE = 0.01  # relative difference of eigenvalues that count as the slowest one
POWER_WINDOW = (0.1, 1.0)  # shares of the last log t, for the exponent of the ULPM


def flow_of(model: Model, seeds: int, seed: int, log_t_max: float) -> dict[str, np.ndarray]:
    """Solve the flow from random starts and compare it with the closed form.

    Returns:
      `log_times` (T,); `distance` (S, T) of the direction from the optimal one; by start
      (S,) `value`, `bound_gap` over the value, `sigma_ratio`, `rate_fitted`; and scalars
      `optimum`, `rate_predicted`, `proved`, `failed`.
    """
    starts = model.starts(jax.random.key(seed), seeds, INIT_SCALE)
    solve = _regularised if model.regularised else _unregularised
    return {
        name: np.asarray(value) for name, value in solve(model, starts, log_t_max).items()
    }


def _regularised(model: Model, starts, _log_t_max: float) -> dict[str, Any]:
    """Follow the flow in plain time until it has converged."""
    best, rate = model.best(), model.least_rate()
    times = np.geomspace(0.1, np.log(_FALL) / rate, NUM_TIMES)

    def one(start):
        flow = ncjax.gradient_flow(
            start,
            times=times,
            objective=model.objective,
            weights=model.weights,
            rtol=_TOLERANCE,
            atol=_TOLERANCE,
        )

        def measure(state):
            distance = distance_to_optimum(state, best.params, model.weights)
            return distance, ravel_pytree(jax.grad(model.scalar)(state))[0]

        return flow.final, flow.result, *jax.vmap(measure)(flow.params)

    final, result, distance, gradients = jax.jit(jax.vmap(one))(starts)
    rates = [
        _rate(times, gradient, _slowest(model, state, rate))
        for gradient, state in zip(np.asarray(gradients), _each(final), strict=True)
    ]
    return {
        "distance": distance,
        "log_times": np.log(times),
        "optimum": best.value,
        "value": jax.vmap(model.scalar)(final),
        "rate_predicted": rate,
        "rate_fitted": rates,
        "proved": best.proved,
        "failed": np.sum(np.asarray(result) != 0),
    } | _certificates(model, final)


def _unregularised(model: Model, starts, log_t_max: float) -> dict[str, Any]:
    """Follow the flow on the clock; its direction converges, and its norm grows."""
    best = model.best()
    log_times = _legs.log_times(log_t_max, NUM_TIMES)

    def one(start):
        flow = ncjax.gradient_flow(
            start, log_times, weights=model.weights, max_steps=_legs.step_limit(log_t_max)
        )

        def measure(state):
            return distance_to_optimum(state, best.params, model.weights)

        ratio = ncjax.margin_ratio(flow.final, model.weights)
        return flow.final, flow.result, best.value / ratio, jax.vmap(measure)(flow.params)

    final, result, value, distance = jax.jit(jax.vmap(one))(starts)
    window = (POWER_WINDOW[0] * log_t_max, POWER_WINDOW[1] * log_t_max)
    return {
        "distance": distance,
        "log_times": log_times,
        "optimum": best.value,
        "value": value,
        "rate_predicted": 1.0,
        "rate_fitted": _fits.exponents(log_times, np.asarray(distance), window),
        "proved": best.proved,
        "failed": np.sum(np.asarray(result) != 0),
    } | _certificates(model, final)


def _slowest(model: Model, state, rate: float) -> np.ndarray:
    """Return the eigenvectors (D, r) of the slowest directions of the flow at its end."""
    eig = ncjax.hessian_eig(model.scalar, state, which="all")
    chosen = np.abs(np.asarray(eig.eigenvalues) / rate - 1) < _SAME_RATE
    rows = [np.asarray(leaf)[chosen] for leaf in eig.eigenvectors]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in rows], axis=1).T


def _rate(times: np.ndarray, gradient: np.ndarray, slowest: np.ndarray) -> float:
    """Fit the rate of the exponential fall of a gradient (T, D) in slow directions."""
    norm = np.linalg.norm(gradient, axis=1)
    share = np.minimum.accumulate(norm / norm[0])
    inside = (share < _FIT_FROM) & (share > _FIT_TO)
    if inside.sum() < _LEAST_POINTS:
        return float("nan")
    part = np.linalg.norm(gradient[inside] @ slowest, axis=1)
    return float(-np.polyfit(times[inside], np.log(part), 1)[0])


def _certificates(model: Model, final) -> dict[str, list[float]]:
    """Return gap over value, and sigma_max over mu, of the last state of each start."""
    found = [_certificate(model, state) for state in _each(final)]
    return {
        "bound_gap": [gap for gap, _ in found],
        "sigma_ratio": [ratio for _, ratio in found],
    }


def _certificate(model: Model, state) -> tuple[float, float]:
    if not model.regularised:
        direction = ncjax.certificate(state, weights=model.weights)
        return float(direction.gap), float(direction.sigma_max)
    found = ncjax.certificate(state, model.objective, weights=model.weights)
    ratio = float(found.sigma_max / found.mu)
    if model.objective.fixed_classifier:  # W need not be critical
        ratio = float("nan")
    return float(found.gap / found.value), ratio


def _each(states) -> list:
    """Return the states of a batch, one after the other."""
    return [
        jax.tree.map(lambda leaf, place=place: leaf[place], states)
        for place in range(len(states.W))
    ]
