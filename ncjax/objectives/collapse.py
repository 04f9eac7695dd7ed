"""Minimisers of balanced classes: the simplex ETF, free or with unit rows."""

import math

import numpy as np

from ncjax.objectives.factors import unit_etf
from ncjax.objectives.problem import Optimum, Problem, refuse
from ncjax.objectives.rays import (
    is_convex_at,
    largest_margin,
    loss_on_ray,
    margin_at_pull,
)


def collapsed(problem: Problem) -> Optimum:
    """Return the ETF of weight decay or of the ball, with bias 0."""
    size, dim = problem.num_classes, problem.dim
    margin, proved = optimal_margin(problem)
    etf = unit_etf(size, dim) if margin > 0 else np.zeros((size, dim))
    product = margin * (size - 1) / size
    spread = (problem.ratio * problem.counts[0]) ** 0.25  # balances W and H
    W, H = (math.sqrt(product) * scale * etf for scale in (spread, 1 / spread))
    bias = None if problem.objective.bias is None else np.zeros(size)
    return Optimum(W, H, proved, _source(problem, proved), bias)


def optimal_margin(problem: Problem) -> tuple[float, bool]:
    r"""Return the margin of the ETF, and whether it is proved to be optimal.

    Weight decay: $\text{pull}(m) = \mu / (\omega \sqrt n)$. Ball: $(K-1) \sqrt n\, m =
    \tau$, or the margin at which a smoothed loss is least, if the ball holds it.
    """
    if problem.objective.ball is not None:
        return _margin_in_ball(problem)
    return _margin_of_decay(problem)


def normalised(problem: Problem) -> Optimum:
    """Return the ETF of the model with unit rows; its margins are t0 K/(K-1)."""
    size, objective = problem.num_classes, problem.objective
    margin = float(objective.temperature or 1) * size / (size - 1)
    most = largest_margin(objective, size)
    if margin > most:
        refuse(
            f"temperature={objective.temperature} with smoothing={objective.smoothing}",
            f"the closed form holds up to temperature {most * (size - 1) / size:.6g}",
        )
    proved = is_convex_at(objective, size, margin)
    etf = unit_etf(size, problem.dim)
    source = "Yaras et al. (NeurIPS 2022); proof by the convex bound on the norm ball"
    return Optimum(etf, etf, proved, source if proved else _NOT_SETTLED)


def _margin_of_decay(problem: Problem) -> tuple[float, bool]:
    objective, size = problem.objective, problem.num_classes
    strength = problem.mu / (problem.weights[0] * math.sqrt(problem.counts[0]))
    margin = margin_at_pull(objective, size, strength)
    # nu = strength (K-1)/K is the slope of the bound. Beyond 1 the bound holds at 0 alone.
    nu = strength * (size - 1) / size
    if nu <= 1 or is_convex_at(objective, size, 0.0):
        return margin, True
    gain = loss_on_ray(objective, size, 0.0) - loss_on_ray(objective, size, margin)
    return (margin if gain > nu * margin else 0.0), False


def _margin_in_ball(problem: Problem) -> tuple[float, bool]:
    objective, size = problem.objective, problem.num_classes
    margin = problem.tau / ((size - 1) * math.sqrt(problem.counts[0]))
    margin = min(margin, largest_margin(objective, size))
    return margin, is_convex_at(objective, size, margin)


_NOT_SETTLED = "best of the collapsed points; a proof for the focal loss here is missing"


def _source(problem: Problem, proved: bool) -> str:
    objective = problem.objective
    if not proved:
        return _NOT_SETTLED
    if objective.loss == "focal":
        return "ncjax, convex bound in the margin; locally Zhou et al. (NeurIPS 2022)"
    if objective.smoothing is not None:
        return "Zhou et al. (NeurIPS 2022) for the geometry; closed form by ncjax"
    if objective.ball is not None:
        return "Fang et al. (PNAS 2021), Theorem 1, as a norm ball"
    return "Zhu et al. (NeurIPS 2021), Theorem 3.1; closed form by ncjax"
