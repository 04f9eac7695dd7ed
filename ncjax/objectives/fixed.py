r"""Minimisers for a fixed simplex ETF as classifier: the samples decouple.

The feature of class k is $c_k u_k$ with the unit row $u_k$ of the ETF. The classifier is
$r u_k$, and $m = r c K/(K-1)$ are the margins.
"""

import math

import numpy as np

from ncjax.objectives.factors import unit_etf
from ncjax.objectives.objective import Objective
from ncjax.objectives.problem import Optimum, Problem, refuse
from ncjax.objectives.rays import focal_peak, largest_margin, log_pull
from ncjax.objectives.roots import root, root_above, root_below

_SOURCE = "Yang et al. (NeurIPS 2022) for the model; scalar equation by ncjax"


def fixed_classifier(problem: Problem) -> Optimum:
    r"""Return the features at weight decay, or on the ball $|H|_F^2 \le b$.

    Rows of W are unit vectors; with a ball $|W|_F^2 = a$. Each feature has one stationary
    length if its loss is convex in the margin from 0 on, which proves the minimum.
    """
    objective, size = problem.objective, problem.num_classes
    focal = objective.loss == "focal"
    if objective.bias is not None and (focal or not problem.balanced):
        refuse("a fixed classifier with a bias and imbalanced classes or the focal loss")
    norm_squared, _ = objective.ball or (size, None)
    radius = math.sqrt(norm_squared / size)
    etf = unit_etf(size, problem.dim)
    lengths = _lengths(problem, radius)
    proved = not focal or focal_peak(objective, size) <= 0
    source = (
        _SOURCE if proved else "stationary point; a proof for this focal loss is missing"
    )
    return Optimum(radius * etf, lengths[:, None] * etf, proved, source, _bias(problem))


def _lengths(problem: Problem, radius: float) -> np.ndarray:
    """Return the lengths c (K,) of the features."""
    if problem.objective.ball is None:
        _, decay = problem.objective.weight_decay or (0, 0)
        return _at_decay(problem, radius, math.log(decay))
    bound = float(problem.objective.ball[1])
    most = _longest(problem, radius)
    if problem.counts.sum() * most**2 <= bound:
        return np.full(problem.num_classes, most)

    def excess(log_decay):
        lengths = _at_decay(problem, radius, log_decay)
        return np.sum(problem.counts * lengths**2) / bound - 1

    log_decay = root_above(excess, 0.0) if excess(0.0) > 0 else root_below(excess, 0.0)
    return _at_decay(problem, radius, log_decay)


def _longest(problem: Problem, radius: float) -> float:
    """Return the length of the unregularised feature, infinite for the cross entropy."""
    share = (problem.num_classes - 1) / problem.num_classes / radius
    if problem.objective.loss == "squared_error":
        return share
    return largest_margin(problem.objective, problem.num_classes) * share


def _at_decay(problem: Problem, radius: float, log_decay: float) -> np.ndarray:
    """Return the lengths (K,) where the decay of a feature balances its loss."""
    weights, place = np.unique(problem.weights, return_inverse=True)
    lengths = [_length(problem, radius, log_decay - math.log(w)) for w in weights]
    return np.array(lengths)[place]


def _length(problem: Problem, radius: float, log_decay: float) -> float:
    r"""Solve $r\, \text{pull}(r c K/(K-1)) = \lambda c$; least squares have a formula."""
    objective, size = problem.objective, problem.num_classes
    gain = radius * size / (size - 1)  # margin per length
    if objective.loss == "squared_error":
        return radius / (radius * gain + math.exp(log_decay))
    log_scale = math.log(radius * gain) - log_decay

    # In logarithms, because the decay may be e^-10000 on a large ball.
    def excess(margin):
        ratio = log_scale + log_pull(objective, size, margin) - math.log(margin)
        return max(ratio, -1e300)

    least = math.exp(min(log_scale + log_pull(objective, size, 0.0), 0.0) - 40)
    peak = focal_peak(objective, size) if objective.loss == "focal" else 0.0
    if peak > least and excess(peak) > 0:
        least = peak
    return root(excess, least, _most_margin(objective, size, log_scale)) / gain


def _most_margin(objective: Objective, size: int, log_scale: float) -> float:
    r"""Return a bound on margins $m = e^\text{log\_scale}\, \text{pull}(m)$.

    With $c = 1 + \gamma$, no pull is above 2 c or $c K e^{-m}$.
    """
    log_most = log_scale + math.log1p(float(objective.gamma or 0))
    linear = math.exp(min(log_most + math.log(2), 700))
    exponential = max(1.0, log_most + math.log(size))
    return min(linear, exponential, largest_margin(objective, size))


def _bias(problem: Problem) -> np.ndarray | None:
    """Return the constant bias (K,): 0, or for the squared error the mean target."""
    objective, size = problem.objective, problem.num_classes
    if objective.bias is None:
        return None
    if objective.loss != "squared_error":
        return np.zeros(size)
    decay = float(objective.bias) / problem.weights[0]
    return np.full(size, 1 / (size * (1 + decay / problem.counts.sum())))
