"""The problem of a minimiser and its solution, one row per class."""

import math
from typing import NamedTuple, NoReturn

import jax
import numpy as np

from ncjax.checks import check_counts, check_integer
from ncjax.objectives.objective import Objective, require_objective
from ncjax.peeled.weights import read_class_weights

FLOW = "find it by ncjax.gradient_flow(params, times=..., objective=objective)"

_ROUNDING = 1e-14


class Problem(NamedTuple):
    """An objective with class sizes. All samples of a class share one feature."""

    objective: Objective
    counts: np.ndarray  # (K,)  n_k
    weights: np.ndarray  # (K,)  class weights ω_k
    dim: int

    @property
    def num_classes(self) -> int:
        """`K`."""
        return len(self.counts)

    @property
    def balanced(self) -> bool:
        """Whether all classes have the same size and weight."""
        return len(np.unique(self.counts)) == len(np.unique(self.weights)) == 1

    @property
    def mu(self) -> float:
        r"""$\mu = \sqrt{\lambda_W \lambda_H}$, 0 without weight decay."""
        return 0.0 if self.objective.weight_decay is None else float(self.objective.mu)

    @property
    def tau(self) -> float:
        r"""$\tau = \sqrt{ab}$, infinite without a ball."""
        return math.inf if self.objective.ball is None else float(self.objective.tau)

    @property
    def ratio(self) -> float:
        r"""$|W|_F^2 / |H|_F^2$ at a minimiser: $\lambda_H / \lambda_W$, or a/b."""
        decay_W, decay_H = self.objective.weight_decay or (1.0, 1.0)
        of_W, of_H = self.objective.ball or (decay_H, decay_W)
        return float(of_W) / float(of_H)


class Optimum(NamedTuple):
    """A minimiser by class: every sample of class k has the feature `H[k]`."""

    W: np.ndarray  # (K, d)
    H: np.ndarray  # (K, d)
    proved: bool
    source: str
    b: np.ndarray | None = None  # (K,)

    @property
    def logits(self) -> np.ndarray:
        """Logits (K, K), row k of a sample of class k."""
        logits = self.H @ self.W.T
        return logits if self.b is None else logits + self.b


def make_problem(objective, counts, dim, class_weights=None) -> Problem:
    """Return the problem, or raise ValueError if an argument does not fit."""
    require_objective(objective)
    numbers = jax.tree.leaves(objective)
    if any(isinstance(number, jax.core.Tracer) for number in numbers):
        raise ValueError(
            "objective must have known numbers, got traced ones: closed forms are computed "
            "on the host, outside of jax.jit and jax.vmap"
        )
    if any(np.ndim(number) for number in numbers):
        raise ValueError(
            "objective must have single numbers, got arrays: take one objective at a time"
        )
    counts = np.asarray(check_counts(counts), float)
    check_integer("dim", dim, least=1)
    weights = read_class_weights(class_weights, len(counts))
    return Problem(objective, counts, weights, int(dim))


def refuse(what: str, advice: str = FLOW) -> NoReturn:
    """Raise ValueError for a minimiser without a closed form."""
    raise ValueError(f"no closed form of the minimiser is known for {what}: {advice}")


def value_of(problem: Problem, optimum: Optimum) -> float:
    """Return the objective's value in float64."""
    objective = problem.objective
    losses = _losses(objective, optimum.logits * (objective.temperature or 1.0))
    value = np.sum(problem.counts * problem.weights * losses)
    if objective.weight_decay is not None:
        decay_W, decay_H = objective.weight_decay
        squares = problem.counts * np.sum(optimum.H**2, axis=1)
        value += (decay_W * np.sum(optimum.W**2) + decay_H * np.sum(squares)) / 2
    if optimum.b is not None:
        value += objective.bias * np.sum(optimum.b**2) / 2
    return float(value)


def class_margins(problem: Problem, optimum: Optimum) -> np.ndarray:
    """Return the least margin (K,) of each class; rounding errors of 0 are 0."""
    logits = optimum.logits * (problem.objective.temperature or 1.0)
    margins = _margins(logits).min(axis=1)
    return np.where(np.abs(margins) <= _ROUNDING * np.max(np.abs(logits)), 0.0, margins)


def _margins(logits: np.ndarray) -> np.ndarray:
    """Margins (K, K), infinite on the diagonal."""
    margins = np.diag(logits)[:, None] - logits
    np.fill_diagonal(margins, np.inf)
    return margins


def _losses(objective: Objective, logits: np.ndarray) -> np.ndarray:
    """Loss (K,) of a sample of each class."""
    if objective.loss == "squared_error":
        return np.sum((logits - np.eye(len(logits))) ** 2, axis=1) / 2
    margins = _margins(logits)
    log_odds = np.logaddexp.reduce(-margins, axis=1)
    losses = np.logaddexp(0, log_odds)
    if objective.loss == "focal":
        return np.exp(-float(objective.gamma or 0) * np.logaddexp(0, -log_odds)) * losses
    if objective.smoothing is not None:
        pulls = np.sum(np.where(np.isinf(margins), 0, margins), axis=1) / len(logits)
        losses = losses + objective.smoothing * pulls
    return losses
