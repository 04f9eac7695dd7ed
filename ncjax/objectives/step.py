r"""STEP imbalance: a large group A of equal classes and a small group B, by one equation.

$$\min_M \sum_k l_k\, \text{CE}(M_k, k) + \mu\, |M \operatorname{diag}(s)|_*$$

Loss weights l and scales s take two values. Weight decay has $l = \omega n_k$ and $s =
\sqrt{n_k}$. The layer-peeled model of Fang et al. (PNAS 2021) has $l = n_k$ and $s = 1$,
and its norm is bounded.

The logits of class k are $\alpha (e_k - 1_A/K_A) + a w$ in A and $\beta (e_k - 1_B/K_B) - b
w$ in B, with $w = 1_A/K_A - 1_B/K_B$. A sample of A gives the probability $q_A$ to all of B
and $p_A$ to each wrong class of A. The subgradient of the norm leaves an angle unknown:

$$l_A q_A = \frac{\mu s_A \cos\theta}{|w| \sqrt{K_A}}, \qquad
l_A (q_A + K_A p_A) = \mu s_A \text{ or } \alpha = 0, \qquad
\tan\theta = \frac{s_B \sqrt{K_B}\, b}{s_A \sqrt{K_A}\, a}$$

The same holds for B with the sine. a grows with the angle and b falls, so at most one root
has a, b > 0. If there is none, a = b = 0.
"""

import math
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_integer
from ncjax.objectives.blocks import log_pull_within
from ncjax.objectives.objective import Objective
from ncjax.objectives.problem import make_problem
from ncjax.objectives.roots import root, root_above, root_below
from ncjax.objectives.settings import read_pair

# Largest logarithm of a tangent or of a ratio; its exponential is finite.
_LARGEST_LOG = 700.0


class Group(NamedTuple):
    """Classes of one size."""

    size: int  # K_A
    loss: float  # l_A
    scale: float  # s_A


class Step(NamedTuple):
    """Coefficients of the optimal logits, and their weighted nuclear norm."""

    alpha: float
    beta: float
    a: float
    b: float
    norm: float  # |M diag(s)|_*

    def of_norm(self, norm: float) -> "Step":
        """Return the step scaled to a norm; 0 stays."""
        share = norm / self.norm if self.norm > 0 else 1.0
        return Step(*(share * coefficient for coefficient in self))


def solve_penalty(log_mu: float, first: Group, second: Group) -> Step:
    """Return the minimiser at the multiplier mu."""
    roots = [group.scale * math.sqrt(group.size) for group in (first, second)]

    def sides(log_tangent):
        logs = (-np.logaddexp(0, 2 * sign * log_tangent) / 2 for sign in (1, -1))
        log_cos, log_sin = (float(log) for log in logs)
        alpha, a = _side(first, second.size, log_mu + log_cos, log_mu)
        beta, b = _side(second, first.size, log_mu + log_sin, log_mu)
        excess = a * roots[0] * math.exp(log_sin) - b * roots[1] * math.exp(log_cos)
        return (alpha, beta, a, b), excess

    log_tangent = root(lambda x: sides(x)[1], -_LARGEST_LOG, _LARGEST_LOG)
    (alpha, beta, a, b), _ = sides(log_tangent)
    if min(a, b) <= 0:
        alpha = _apart(first, second.size, log_mu)
        beta = _apart(second, first.size, log_mu)
        a = b = 0.0
    within = (first.size - 1) * first.scale * alpha + (
        second.size - 1
    ) * second.scale * beta
    across = math.sqrt(_width(first, second)) * math.hypot(roots[0] * a, roots[1] * b)
    return Step(alpha, beta, a, b, within + across)


def solve_ball(tau: float, first: Group, second: Group) -> tuple[float, Step]:
    """Return the log of the multiplier and the minimiser at which the norm is tau."""

    def excess(log_nu):
        return solve_penalty(log_nu, first, second).norm - tau

    # At this multiplier the minimiser is 0.
    most = 2 * max(group.loss / group.scale for group in (first, second))
    log_nu = root_below(excess, math.log(most))
    return log_nu, solve_penalty(log_nu, first, second)


def minority_collapse_ratio(num_majority: int, num_minority: int, ball) -> float:
    r"""Return the ratio $R_0$ of class sizes from which on the minority classes merge.

    $$\min_{W, H} \sum_k n_k\, \text{CE}(W h_k, k) \quad \text{s.t.} \quad
    |W|_F^2 \le a,\; |H|_F^2 \le b, \qquad n_k = R \text{ or } 1$$

    is the layer-peeled model on class means. All minority classifiers are equal from
    $R = R_0$ on. The bounds of Fang et al., $|w_k|^2 \le E_W$ and $|h_k|^2 \le E_H$ on
    average, are `ball=(K * E_W, K * E_H)`.

    The minority merges where the multiplier of the norm is at least 1. At the multiplier 1
    the optimal norm grows with R, so $R_0$ is unique: at a fixed angle $\alpha$ and a grow
    with R, hence the angle falls, and a smaller angle makes $\alpha$, a and b larger.

    In the model with weight decay no search is needed: the minority merges if and only if
    $\mu \ge \sqrt{n_B}$.

    Args:
      num_majority: $K_A$, classes of size R, at least 1.
      num_minority: $K_B$, classes of size 1, at least 2.
      ball: (a, b), bounds on $|W|_F^2$ and $|H|_F^2$.

    Returns:
      $R_0$ as a float, infinite beyond e^700.

    Raises:
      ValueError: a number of classes or the ball is out of range.

    Source: Fang et al. (PNAS 2021) found the transition; the equation is ncjax's.

    >>> import ncjax
    >>> round(ncjax.minority_collapse_ratio(2, 2, ball=(16, 4)), 6)
    27.735391
    """
    check_integer("num_majority", num_majority, least=1)
    check_integer("num_minority", num_minority, least=2)
    counts = (1,) * (num_majority + num_minority)
    tau = make_problem(Objective(ball=read_pair("ball", ball)), counts, dim=1).tau

    def deficit(log_ratio):
        large = Group(num_majority, math.exp(log_ratio), 1.0)
        return tau - solve_penalty(0.0, large, Group(num_minority, 1.0, 1.0)).norm

    if deficit(_LARGEST_LOG) > 0:
        return math.inf
    if deficit(0.0) <= 0:  # a norm of rounding errors: at R = 1 the minimiser is 0
        return 1.0
    return math.exp(root(deficit, 0.0, _LARGEST_LOG))


def step_logits(step: Step, first: np.ndarray) -> np.ndarray:
    """Return the logits (K, K), row k of class k; `first` (K,) marks the classes of A."""
    w = np.where(first, 1 / np.sum(first), -1 / np.sum(~first))
    within = np.where(first, step.alpha, step.beta)[:, None]
    across = np.where(first, step.a, -step.b)[:, None]
    same = first[:, None] == first
    centring = np.eye(len(first)) - np.where(same, np.abs(w), 0)
    return within * centring + across * w


def _side(group: Group, others: int, log_part: float, log_mu: float) -> tuple[float, float]:
    """Return alpha and a of a group, from the logarithm of mu cos(theta)."""
    size = group.size
    width = 1 / size + 1 / others
    log_across = log_part + math.log(group.scale / group.loss)
    log_across -= math.log(width * size) / 2
    log_full = log_mu + math.log(group.scale / group.loss)
    across = min(math.exp(min(log_across, 0.0)), 1 - 2.0**-53)
    if size > 1 and log_full < 0:
        log_within = log_full + math.log1p(-math.exp(log_across - log_full))
        log_within -= math.log(size)
        log_own = math.log1p(-across - (size - 1) * math.exp(log_within))
    else:
        log_own = log_within = math.log1p(-across) - math.log(size)
    alpha = log_own - log_within
    return alpha, (log_within + math.log(others) - log_across + alpha / size) / width


def _apart(group: Group, others: int, log_mu: float) -> float:
    """Return alpha of a group where a = b = 0."""
    log_pull = log_mu + math.log(group.scale / group.loss)
    if group.size == 1 or log_pull >= 0:
        return 0.0
    return root_above(lambda x: log_pull_within(group.size, others, x) - log_pull, 0.0)


def _width(first: Group, second: Group) -> float:
    """`|w|²`."""
    return 1 / first.size + 1 / second.size
