r"""The regularisation path: how the direction of the minimiser tends to max-margin.

As the decay falls or the ball grows, the logits of the minimiser turn towards the logits of
minimum-norm separation (SELI). At the minimiser

$$m_{kij} + \log(\mu \lambda_{kij}) \to 0$$

with the multipliers $\lambda$ of the separation problem. The margins are
$\log(1/\mu) - \log \lambda_{kij}$, so the direction differs from SELI by a constant over
$\log(1/\mu)$.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

import ncjax
from experiments import _legs

RATIOS = (4, 10, 100)
# mu of the values in the text of the theory.
REFERENCES = (1e-2, 1e-8, 1e-16)
_LARGE, _SMALL = 2, 2  # classes of the STEP counts
_DIM = 5
_FAR = 1e5  # log(1/mu) at which the limit of the first order is evaluated
_INIT_SCALE = 0.3
_LEAST_MU = 1e-150


class Path(NamedTuple):
    """Deviations from SELI along one path."""

    log_inverse: np.ndarray  # (T,) log(1/mu), mu the decay or the multiplier of the ball
    cosine: np.ndarray  # (T,) cosine of two minority classifiers minus SELI's
    logits: np.ndarray  # (T,) distance of the unit logits from SELI's


def step_counts(ratio: int) -> tuple[int, ...]:
    """Return two classes of `ratio` samples and two of one."""
    return (ratio,) * _LARGE + (1,) * _SMALL


def decay_path(ratio: int, size: int) -> Path:
    """Return the path of the UFM, over the decay mu."""
    log_inverse = np.geomspace(1.0, -math.log(_LEAST_MU), size)
    return _path(ratio, log_inverse, [_minimiser(ratio, math.exp(-x)) for x in log_inverse])


def at_references(ratio: int) -> np.ndarray:
    """Return the cosine's deviation times log(1/mu) at `REFERENCES`."""
    log_inverse = -np.log(REFERENCES)
    path = _path(ratio, log_inverse, [_minimiser(ratio, mu) for mu in REFERENCES])
    return path.cosine * log_inverse


def ball_path(ratio: int, size: int) -> Path:
    """Return the path of the LPM, over the logarithm of its inverse multiplier.

    The radii grow geometrically; nothing here knows the decay.
    """
    counts = step_counts(ratio)
    least = 3 * ncjax.solve_separation(counts, _DIM).value  # margins are about 3
    log_inverse, points = [], []
    for tau in np.geomspace(least, 100 * least, size):
        objective = ncjax.Objective(ball=(float(tau), float(tau)))
        best = ncjax.minimiser(objective, counts, _DIM)
        slopes = objective.slopes(best.params, best.weights)
        logits = np.einsum("jd,kid->kij", *map(np.asarray, best.params))
        log_inverse.append(-math.log(-np.sum(np.asarray(slopes) * logits) / tau))
        points.append(best.params)
    return _path(ratio, np.array(log_inverse), points)


def flow_path(ratio: int, seeds: int, seed: int, log_t_max: float) -> dict[str, np.ndarray]:
    """Return the distance (S, T) of the logits of the ULPM flow from SELI, over log t."""
    counts = step_counts(ratio)
    separation = ncjax.solve_separation(counts, _DIM)
    target = _unit_logits(separation.params, counts)
    log_times = np.geomspace(2.0, log_t_max, 20)

    def one(key):
        start = ncjax.init_params(key, len(counts), counts, _DIM, _INIT_SCALE)
        return ncjax.gradient_flow(
            start,
            log_times,
            weights=separation.weights,
            max_steps=_legs.step_limit(log_t_max),
        ).params

    keys = jax.random.split(jax.random.key(seed), seeds)
    states = jax.device_get(jax.jit(jax.vmap(one))(keys))
    distances = [
        [_distance(_unit_logits(state, counts), target) for state in _each(row)]
        for row in _each(states)
    ]
    return {"log_times": log_times, "logits": np.array(distances)}


def first_order(ratio: int) -> dict[str, float]:
    r"""Return the limits of both deviations times log(1/mu).

    The logits are $x P Y + \log \lambda$ with x = log(1/mu), centred over classes; the
    Gram matrix of the classifier is the square root of $M M^\top$.
    """
    counts = step_counts(ratio)
    separation = ncjax.solve_separation(counts, _DIM)
    by_class = np.asarray(separation.multipliers)[:, 0]
    num_classes = len(counts)
    others = ~np.eye(num_classes, dtype=bool)
    logs = np.zeros_like(by_class)
    logs[others] = np.log(by_class[others])  # minus the margins beyond x
    near = _centred(np.eye(num_classes))
    far = near + _centred(logs) / _FAR
    n = np.asarray(counts, float)
    weighted = [rows * np.sqrt(n)[:, None] for rows in (near, far)]
    cosines = [_cosine(_gram_of_classifier(rows)) for rows in weighted]
    units = [rows / np.linalg.norm(rows) for rows in weighted]
    return {
        "cosine": float((cosines[1] - cosines[0]) * _FAR),
        "logits": _distance(*units) * _FAR,
    }


def _minimiser(ratio: int, mu: float):
    objective = ncjax.Objective(weight_decay=(mu, mu))
    return ncjax.minimiser(objective, step_counts(ratio), _DIM).params


def _path(ratio: int, log_inverse: np.ndarray, points: list) -> Path:
    counts = step_counts(ratio)
    seli = ncjax.solve_separation(counts, _DIM).params
    target, limit = _unit_logits(seli, counts), _cosine_of(seli)
    return Path(
        log_inverse,
        np.array([_cosine_of(params) - limit for params in points]),
        np.array([_distance(_unit_logits(params, counts), target) for params in points]),
    )


def _cosine_of(params) -> float:
    W = np.asarray(params.W)
    return _cosine(W @ W.T)


def _cosine(gram: np.ndarray) -> float:
    """Return the cosine of the last two rows from their Gram matrix."""
    return float(gram[-1, -2] / np.sqrt(gram[-1, -1] * gram[-2, -2]))


def _gram_of_classifier(logits: np.ndarray) -> np.ndarray:
    """Return W W^T of the balanced factors of logits, one row per class."""
    _, values, vectors = np.linalg.svd(logits)
    return (vectors.T * values) @ vectors


def _centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=-1, keepdims=True)


def _unit_logits(params, counts) -> np.ndarray:
    """Return the centred logits of the samples that count (K, n, K), at norm 1."""
    W, H = (np.asarray(leaf, np.float64) for leaf in params)
    logits = _centred(np.einsum("jd,kid->kij", W, H))
    logits[np.arange(H.shape[1])[None] >= np.asarray(counts)[:, None]] = 0
    return logits / np.linalg.norm(logits)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second))


def _each(states: Any) -> list:
    return [
        ncjax.Params(states.W[place], states.H[place]) for place in range(len(states.W))
    ]
