r"""Minimisers of the squared error: singular values of the targets, made smaller.

$$\min \sum_k n_k \tfrac{\omega_k}{2} |M_k + b - e_k|^2 + \mu\, |M|_*$$
"""

import numpy as np

from ncjax.objectives.factors import factorise
from ncjax.objectives.problem import Optimum, Problem, refuse
from ncjax.objectives.roots import root

_PLAIN = "Tirer and Bruna (ICML 2022) balanced, Dang et al. (ICML 2023) any class sizes"
_FREE = "Tirer and Bruna (ICML 2022), Zhou et al. (ICML 2022) balanced; ncjax"


def squared_error(problem: Problem) -> Optimum:
    """Return the minimiser without bias, with a free bias, or balanced with decay of b."""
    bias = problem.objective.bias
    if bias is None:
        return _plain(problem)
    if len(np.unique(problem.weights)) > 1:
        refuse("the squared error with a bias and different class weights")
    return _decayed_bias(problem, float(bias)) if bias else _free_bias(problem)


def _plain(problem: Problem) -> Optimum:
    r"""Return $M_k = (1 - \mu / (\omega_k \sqrt{n_k}))_+ e_k$."""
    kept = _shrink(problem, np.sqrt(problem.counts), 1 / problem.weights)
    W, H = factorise(problem, np.diag(kept / np.sqrt(problem.counts)))
    return Optimum(W, H, True, _PLAIN)


def _free_bias(problem: Problem) -> Optimum:
    """Return b = n_k / N and the soft threshold of the centred targets."""
    shares = problem.counts / problem.counts.sum()
    roots = np.sqrt(problem.counts)[:, None]
    left, values, right = np.linalg.svd(roots * (np.eye(len(shares)) - shares))
    values[-1] = 0  # the constant direction
    kept = _shrink(problem, values, 1 / problem.weights)
    W, H = factorise(problem, (left * kept) @ right / roots)
    return Optimum(W, H, True, _FREE, shares)


def _decayed_bias(problem: Problem, bias: float) -> Optimum:
    """Return an ETF part, and the constant direction in W, H or in b alone."""
    if problem.objective.ball is not None or not problem.balanced:
        refuse("the squared error with bias > 0 on a ball or with imbalanced classes")
    size, per_class = problem.num_classes, problem.counts[0]
    root_n, samples = np.sqrt(per_class), problem.counts.sum()
    mu = problem.mu / problem.weights[0]
    decay = bias / problem.weights[0]
    along = root_n - mu - mu * samples / decay
    if along > 0:
        constant = mu * root_n / decay
    else:
        along, constant = 0.0, 1 / (size * (1 + decay / samples))
    mean = np.full((size, size), 1 / size)
    etf = max(root_n - mu, 0.0) / root_n * (np.eye(size) - mean)
    W, H = factorise(problem, etf + along / root_n * mean)
    source = "ncjax, from the singular values of the targets"
    return Optimum(W, H, True, source, np.full(size, constant))


def _shrink(problem: Problem, values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return `(values - nu steps)_+`, nu = mu or so that the sum fits the ball.

    Of more than d values the d largest are kept: the best approximation of lower rank, as
    long as all steps are equal.
    """
    if len(np.unique(steps)) == 1:
        values = np.where(_ranks(values) < problem.dim, values, 0)
    nu = max(problem.mu, _multiplier(values, steps, problem.tau))
    shrunk = np.maximum(values - nu * steps, 0)
    rank = np.sum(shrunk > 0)
    if rank > problem.dim:
        refuse(
            f"the squared error with different class weights in dim={problem.dim}",
            f"dim must be at least {rank}",
        )
    return shrunk


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the place of each value in descending order, from 0."""
    places = np.empty(len(values), int)
    places[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return places


def _multiplier(values: np.ndarray, steps: np.ndarray, tau) -> float:
    """Return nu >= 0 with `sum (values - nu steps)_+ <= tau`, 0 if the ball is large."""

    def excess(nu):
        return np.sum(np.maximum(values - nu * steps, 0)) - tau

    return root(excess, 0.0, np.max(values / steps)) if excess(0.0) > 0 else 0.0
