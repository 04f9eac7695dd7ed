r"""One sample's loss against its margin to equal others, the ray of a simplex ETF.

At the logits $m (e_k - 1/K)$ every margin is m and $p = 1 / (1 + (K-1) e^{-m})$ is the
probability of the own class. $\psi(m)$ is the loss and the *pull* is
$-\tfrac{K}{K-1} \psi'(m)$:

$$\text{cross entropy: } \frac{K}{e^m + K - 1}, \qquad
\text{label smoothing: } \frac{K}{e^m + K - 1} - \alpha, \qquad
\text{focal: } \phi(p) \frac{K}{e^m + K - 1}$$

with $\phi(p) = (1-p)^\gamma - \gamma p (1-p)^{\gamma-1} \log p$. An ETF is stationary
where weight decay balances the pull: $\text{pull}(m) = \mu / \sqrt n$.
"""

import math

import numpy as np

from ncjax.objectives.objective import Objective
from ncjax.objectives.roots import root, root_above

# Below it a probability counts as 0.
_LEAST = 1e-300


def pull(objective: Objective, num_classes: int, margin: float) -> float:
    r"""Return $-\tfrac{K}{K-1} \psi'(m)$."""
    if objective.loss == "focal":
        return math.exp(_log_focal_pull(objective, num_classes, margin))
    return num_classes * _odds(num_classes, margin) - _smoothing(objective)


def log_pull(objective: Objective, num_classes: int, margin: float) -> float:
    """Return the logarithm of `pull`, -infinity where the pull is not positive."""
    if objective.loss == "focal":
        return _log_focal_pull(objective, num_classes, margin)
    if objective.smoothing is not None:
        value = pull(objective, num_classes, margin)
        return math.log(value) if value > 0 else -math.inf
    return math.log(num_classes) - float(np.logaddexp(margin, math.log(num_classes - 1)))


def loss_on_ray(objective: Objective, num_classes: int, margin: float) -> float:
    r"""Return $\psi(m)$."""
    cross_entropy = np.logaddexp(0, math.log(num_classes - 1) - margin)
    if objective.loss == "focal":
        log_error = -np.logaddexp(0, margin - math.log(num_classes - 1))
        return float(math.exp(float(objective.gamma or 0) * log_error) * cross_entropy)
    linear = _smoothing(objective) * (num_classes - 1) / num_classes * margin
    return float(cross_entropy + linear)


def largest_margin(objective: Objective, num_classes: int) -> float:
    """Return the margin at which the pull is 0; infinity without label smoothing."""
    alpha = _smoothing(objective)
    return margin_at_pull(objective, num_classes, 0.0) if alpha else math.inf


def margin_at_pull(objective: Objective, num_classes: int, value: float) -> float:
    """Return the largest margin m >= 0 with this pull; 0 if there is none."""
    if objective.loss != "focal":
        value = value + _smoothing(objective)
        return math.log1p(num_classes * (1 - value) / value) if value < 1 else 0.0
    start = max(0.0, focal_peak(objective, num_classes))

    def excess(margin):
        return _log_focal_pull(objective, num_classes, margin) - math.log(value)

    return root_above(excess, start) if excess(start) > 0 else 0.0


def is_convex_at(objective: Objective, num_classes: int, margin: float) -> bool:
    r"""Return whether $\psi$ equals its convex envelope at a margin m >= 0.

    The focal pull times $(K-1)/K$ is $f(p) = \phi(p) (1-p)$. It rises from f(0) = 1 to one
    peak and falls to f(1) = 0. So the tangent of $\psi$ lies below $\psi$ everywhere if and
    only if f(p) <= 1 to the right of the peak. Other losses are convex.
    """
    if objective.loss != "focal":
        return True
    slope = pull(objective, num_classes, margin) * (num_classes - 1) / num_classes
    return slope <= 1 and margin >= focal_peak(objective, num_classes)


def focal_peak(objective: Objective, num_classes: int) -> float:
    r"""Return the margin below which $\psi$ of the focal loss is concave.

    The derivative of f(p) has the sign of $-(2\gamma+1)(1-p) - \gamma \log p +
    \gamma(1+\gamma) p \log p$. This function is convex and ends in 0 with a positive slope
    at p = 1. So it has one root below 1; the root lies below 1/2.
    """
    gamma = float(objective.gamma or 0)

    def slope(p):
        logarithm = gamma * math.log(p)
        return -(2 * gamma + 1) * (1 - p) - logarithm + (1 + gamma) * p * logarithm

    if slope(_LEAST) <= 0:
        return -math.inf
    p = root(slope, _LEAST, 0.5)
    return math.log(num_classes - 1) + math.log(p) - math.log1p(-p)


def _smoothing(objective: Objective) -> float:
    return 0.0 if objective.smoothing is None else float(objective.smoothing)


def _odds(num_classes: int, margin: float) -> float:
    """`1 / (e^m + K - 1)`, the probability of each other class."""
    return float(np.exp(-np.logaddexp(margin, math.log(num_classes - 1))))


def _log_focal_pull(objective: Objective, num_classes: int, margin: float) -> float:
    gamma, others = float(objective.gamma or 0), math.log(num_classes - 1)
    log_error = float(-np.logaddexp(0, margin - others))  # log(1 - p)
    error = math.exp(log_error)
    cross_entropy = float(np.logaddexp(0, others - margin))  # -log p
    ratio = cross_entropy / error if error > _LEAST else 1.0
    scale = math.log(num_classes) - others + (1 + gamma) * log_error
    return scale + math.log1p(gamma * (1 - error) * ratio)
