"""Statements on the models of Table 1, for `experiments.theorems`: a number for each."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _neighbours_path
from experiments._statements import NCJAX, Statement, below

K, N, D = 4, 3, 6
DECAY = 0.2
BALANCED, STEP = (N,) * K, (3, 3, 1, 1)
_REACHED = "value at the end of the flow, and its certificate: relative error"


def _reached(
    source: str, model: str, settings: dict[str, Any], counts=BALANCED
) -> Statement:
    """Compare the end of a flow with the minimiser in closed form, and with its bound."""
    objective = ncjax.Objective(**settings)
    best = ncjax.minimiser(objective, counts, D)
    weights = ncjax.sample_weights(counts)  # for all, so that fewer programs are compiled
    final = _end(objective, weights)
    fn = objective if objective.ball is None else objective.on_boundary
    value = float(fn(final, weights))
    given = None if objective.loss == "focal" else weights  # its bound is for equal weights
    gap = float(ncjax.certificate(final, objective, weights=given).gap)
    error = max(abs(value - best.value), gap) / best.value
    return below(source, f"{model}: {_REACHED}", f"counts {counts} d={D}", error, 1e-9)


def _end(objective: ncjax.Objective, weights):
    """Follow the flow from a random start until it has converged."""
    start: Any = ncjax.init_params(jax.random.key(0), K, N, D, 0.3)
    if objective.temperature is not None:
        start = ncjax.Params(*(_unit_rows(leaf) for leaf in start))
    if objective.fixed_classifier:
        start = start._replace(W=ncjax.simplex_etf(K, D))
    if objective.bias is not None:
        start = ncjax.BiasedParams(start.W, start.H, jnp.zeros(K))
    flow = ncjax.gradient_flow(
        start, times=[150.0], objective=objective, weights=weights, rtol=1e-11, atol=1e-11
    )
    return flow.final


def _unit_rows(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


_DECAY: dict[str, Any] = {"weight_decay": (DECAY, DECAY)}
_SQUARE = _DECAY | {"loss": "squared_error"}
# Source, model, settings of the objective, class sizes. No smoothing is written as 0, so
# that the first three share a program.
_MODELS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...] = (
    ("Zhu et al. 2021", "UFM", _DECAY | {"smoothing": 0.0}, BALANCED),
    (NCJAX, "UFM, STEP", _DECAY | {"smoothing": 0.0}, STEP),
    ("Zhou et al. 2022", "label smoothing", _DECAY | {"smoothing": 0.1}, BALANCED),
    (NCJAX, "focal loss", _DECAY | {"loss": "focal", "gamma": 2.0}, BALANCED),
    ("Tirer, Bruna 2022", "squared error", _SQUARE, BALANCED),
    (NCJAX, "squared error, bias", _SQUARE | {"bias": 1.0}, BALANCED),
    ("Fang et al. 2021", "LPM", {"ball": (8.0, 24.0)}, BALANCED),
    ("Yaras et al. 2022", "normalised", {"temperature": 3.0}, BALANCED),
    ("Yang et al. 2022", "fixed ETF", _DECAY | {"fixed_classifier": True}, BALANCED),
)


def _of_model(row) -> Callable[[Any], Statement]:
    return lambda _flow: _reached(*row)


def _spectrum(_flow) -> Statement:
    objective = ncjax.Objective(**_DECAY)
    closed = ncjax.spectrum(objective, BALANCED, D)
    expected = np.repeat(closed.eigenvalues, closed.multiplicities)
    params = ncjax.minimiser(objective, BALANCED, D).params
    found = ncjax.hessian_eig(objective, params, which="all").eigenvalues
    error = np.abs(np.asarray(found) - expected).max()
    on = f"all {expected.size} eigenvalues"
    return below(NCJAX, "UFM: Hessian spectrum at the minimiser", on, error, 1e-8)


def _block_saddle(_flow) -> Statement:
    point = ncjax.block_point(ncjax.Objective(**_DECAY), 2, 2, N, 5)
    error = _unstable_error(ncjax.Objective(**_DECAY), point)
    statement = "UFM: negative eigenvalues of a block saddle, with their multiplicity"
    return below(NCJAX, statement, f"m=2 b=2 n={N} d=5", error, 1e-8)


def _rank_saddle(_flow) -> Statement:
    objective = ncjax.Objective(**_SQUARE)
    point = ncjax.rank_point(objective, 2, K, N, 5)
    error = _unstable_error(objective, point)
    statement = "squared error: negative eigenvalues at rank 2, with their multiplicity"
    return below(NCJAX, statement, f"K={K} n={N} d=5", error, 1e-8)


def _unstable_error(objective, point) -> float:
    """Return the error of the negative eigenvalues; infinite if their number is wrong."""
    found = ncjax.hessian_eig(objective, point.params, which="all").eigenvalues
    negative = np.asarray(found)[np.asarray(found) < -1e-6]
    if negative.size != point.multiplicity:
        return math.inf
    return float(np.abs(negative - point.eigenvalue).max())


def _seli(_flow) -> Statement:
    counts = (4, 4, 1, 1)
    best = ncjax.solve_separation(counts, D)
    error = abs(best.value - 4.58113883008)  # of a conic solver, in the theory's table
    far = jax.tree.map(lambda leaf: 30 * leaf, best.params)
    gap = float(ncjax.certificate(far, weights=best.weights, multipliers="nnls").gap)
    return below(
        "Thrampoulidis 2022",
        "SELI: value v(n), duality gap",
        str(counts),
        max(error, gap),
        1e-8,
    )


def _path(_flow) -> Statement:
    limit = _neighbours_path.first_order(4)["cosine"]
    path = _neighbours_path.decay_path(4, 2)
    error = abs(path.cosine[-1] * path.log_inverse[-1] - limit)
    statement = "path to SELI: (cosine - limit) log(1/μ) tends to its first order"
    return below(NCJAX, statement, "counts (4, 4, 1, 1), μ = 1e-150", error, 2e-3)


def _lpm_threshold(_flow) -> Statement:
    """Compare the angle of minority classifiers just below R0 and just above."""
    ratio = ncjax.minority_collapse_ratio(2, 2, ball=(8.0, 8.0))
    objective = ncjax.Objective(ball=(8.0, 8.0))

    def distance(factor):
        weights = (factor * ratio, factor * ratio, 1.0, 1.0)
        W = np.asarray(
            ncjax.minimiser(objective, (1,) * 4, D, class_weights=weights).params.W
        )
        return np.linalg.norm(W[2] - W[3]) / np.linalg.norm(W[2])

    error = distance(1 + 1e-6) if distance(1 - 1e-6) > 1e-8 else math.inf
    return below(
        "Fang et al. 2021",
        "LPM: minority classifiers merge at R0, not before",
        f"K_A=2 K_B=2, R0 = {ratio:.7f}",
        error,
        1e-12,
    )


def _ufm_threshold(_flow) -> Statement:
    def distance(mu):
        objective = ncjax.Objective(weight_decay=(mu, mu))
        W = np.asarray(ncjax.minimiser(objective, (8, 8, 2, 2), D).params.W)
        return np.linalg.norm(W[2] - W[3]) / np.linalg.norm(W[2])

    threshold = math.sqrt(2)
    above, under = distance(threshold * (1 + 1e-6)), distance(threshold * (1 - 1e-6))
    return below(
        NCJAX,
        "UFM: minority classifiers merge at μ = √n_B, not before",
        "counts (8, 8, 2, 2)",
        above if under > 1e-8 else math.inf,
        1e-12,
    )


CHECKS: tuple[Callable[[Any], Statement], ...] = (
    *map(_of_model, _MODELS),
    *(_spectrum, _block_saddle, _rank_saddle),
    *(_seli, _path, _lpm_threshold, _ufm_threshold),
)
