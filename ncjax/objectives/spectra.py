r"""Whole spectra of Hessians in closed form, at the minimiser and at the origin.

Blocks of the Hessian are written for $\lambda_W = \lambda_H = \mu$. For other decay the
rows of a block that move W gain the factor $r$ and the rows that move H the factor $1/r$,
with $r^2 = \sqrt{\lambda_W / \lambda_H}$; columns likewise.
"""

import math
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_choice
from ncjax.objectives.collapse import normalised, optimal_margin
from ncjax.objectives.coupling import pair, triple
from ncjax.objectives.objective import Objective
from ncjax.objectives.problem import Problem, make_problem
from ncjax.objectives.rays import largest_margin, pull
from ncjax.objectives.simplex import Curvature

# Eigenvalues closer than this share of themselves are equal.
_EQUAL = 1e-12
# Eigenvalues below this share of the largest one are rounding errors of 0.
_ZERO = 1e-15
POINTS = ("minimiser", "origin")


class Spectrum(NamedTuple):
    """Distinct eigenvalues of a Hessian, ascending, and how often each occurs."""

    eigenvalues: np.ndarray  # (r,)
    multiplicities: np.ndarray  # (r,) integers, whose sum is the number of variables


def spectrum(objective: Objective, counts, dim: int, *, at: str = "minimiser") -> Spectrum:
    r"""Return the spectrum of the Hessian at the minimiser, in closed form.

    The smallest positive eigenvalue is the rate of the gradient flow at its end:
    $F - F^* \sim e^{-2 \cdot \text{rate} \cdot t}$. Rotations of the feature space give
    eigenvalue 0.

    Args:
      objective: cross entropy, also with label smoothing, with weight decay or on a ball;
        squared error with weight decay; cross entropy at a temperature. No bias, and no
        fixed classifier. With a ball the minimiser is one of `objective.on_boundary`.
      counts: (K,) number of samples of each class. At the minimiser all are equal, and K is
        at least 3 for the cross entropy.
      dim: `d`, at least K - 1; at least K for the squared error.
      at: "minimiser", or "origin", where `objective` may also have the focal loss, counts
        may differ and dim is at least 1.

    Returns:
      `Spectrum` of the (K + K n) d variables, n = max(counts). The features of samples
      that counts leave out count as variables; their eigenvalue is 0.

    Raises:
      ValueError: an argument does not fit, or no closed form is known.

    Source: ncjax; the blocks are derived from the symmetry of the ETF.

    >>> import ncjax
    >>> objective = ncjax.Objective("squared_error", weight_decay=(0.5, 0.5))
    >>> found = ncjax.spectrum(objective, counts=(1, 1), dim=2)
    >>> found.eigenvalues.tolist(), found.multiplicities.tolist()
    ([0.0, 1.0, 2.0], [1, 6, 1])
    """
    check_choice("at", at, POINTS)
    problem = make_problem(objective, counts, dim)
    _check(objective)
    if at == "origin":
        return _merged(_at_origin(problem))
    _check_sizes_of_minimiser(problem)
    if objective.loss == "squared_error":
        return _merged(_of_squared_error(problem))
    if objective.temperature is not None:
        return _merged(_of_unit_rows(problem))
    return _merged(_of_etf(problem))


def _check(objective: Objective) -> None:
    if callable(objective.loss) or objective.bias is not None or objective.fixed_classifier:
        _refuse("a loss of your own, a bias or a fixed classifier")


def _check_sizes_of_minimiser(problem: Problem) -> None:
    objective, size = problem.objective, problem.num_classes
    if objective.loss == "focal":
        _refuse("the focal loss at the minimiser")
    if objective.temperature is not None and objective.smoothing:
        _refuse("label smoothing at a temperature")
    if objective.loss == "squared_error" and objective.weight_decay is None:
        _refuse("the squared error without weight decay")
    if not objective.regularised or (
        objective.weight_decay is not None and problem.mu == 0
    ):
        raise ValueError(
            "spectrum needs positive weight_decay, a ball or a temperature, got none"
        )
    if not problem.balanced:
        _refuse(f"classes of different sizes {problem.counts.astype(int).tolist()}")
    if objective.loss != "squared_error" and size < 3:
        _refuse("2 classes")
    least = size - (objective.loss != "squared_error")
    if problem.dim < least:
        raise ValueError(
            f"dim must be at least {least} for {size} classes, got {problem.dim}"
        )


def _refuse(what: str):
    raise ValueError(
        f"no closed form of the spectrum is known for {what}: use ncjax.hessian_eig"
    )


def _merged(pairs) -> Spectrum:
    """Return the spectrum from pairs of eigenvalue and multiplicity, equal ones merged."""
    pairs = sorted((float(value), int(count)) for value, count in pairs if count > 0)
    scale = max(abs(value) for value, _ in pairs)
    values: list[float] = []
    counts: list[int] = []
    for value, count in pairs:
        value = 0.0 if abs(value) <= _ZERO * scale else value
        if values and value - values[-1] <= _EQUAL * abs(value):
            counts[-1] += count
        else:
            values.append(value)
            counts.append(count)
    return Spectrum(np.array(values), np.array(counts))


def _of_etf(problem: Problem):
    """Pairs of eigenvalue and multiplicity at the ETF of weight decay or a ball."""
    K, d, n = problem.num_classes, problem.dim, int(problem.counts[0])
    margin, _ = optimal_margin(problem)
    if margin <= 0:
        yield from _at_origin(problem)
        return
    objective = problem.objective
    mu = problem.mu
    if objective.ball is not None:
        if problem.tau >= (K - 1) * math.sqrt(n) * largest_margin(objective, K):
            _refuse("a ball that holds a minimiser of the loss")
        mu = math.sqrt(n) * pull(objective, K, margin)
    r2 = 1 / math.sqrt(problem.ratio)
    curve = Curvature.at(K, margin)
    s2, eps, kap = math.sqrt(n) * margin, curve.eps, curve.kap
    a, b = s2 * curve.A / curve.c2, s2 * curve.B / math.sqrt(curve.c2)
    plus = s2 * eps + mu
    blocks = [
        (0, 2 * plus, (K - 1) * (K - 2) // 2),
        (2 * mu, 2 * s2 * eps, K * (K - 3) // 2),
        (0, 2 * mu, (K - 1) * (d - K + 1)),
    ]
    if objective.ball is not None:
        yield 0, 2
    else:
        blocks.append((2 * mu, 2 * s2 * kap, 1))  # the radial direction
    yield from _of_pairs(blocks, r2)
    yield from ((x, K - 1) for x in triple(mu, a, b, s2 * curve.C + mu, r2))
    yield mu * r2, d
    yield mu / r2, (K * n - K + 1) * (d - K + 1)
    yield plus / r2, (n - 1) * K * (K - 2)
    yield (mu + s2 * kap) / r2, (n - 1) * K


def _of_pairs(blocks, r2: float):
    r"""Pairs of eigenvalue and multiplicity of blocks from (low, high, multiplicity).

    A block is $D \begin{pmatrix} p & m \\ m & p \end{pmatrix} D$ with $D =
    \operatorname{diag}(r, r^{-1})$ and p - m, p + m given.
    """
    for low, high, count in blocks:
        middle = (low + high) / 2
        yield from ((x, count) for x in pair(middle * r2, middle / r2, low, high))


def _of_unit_rows(problem: Problem):
    """Pairs of eigenvalue and multiplicity at the ETF of the normalised model."""
    K, d, n = problem.num_classes, problem.dim, int(problem.counts[0])
    normalised(problem)
    t0 = float(problem.objective.temperature or 1)
    curve = Curvature.at(K, t0 * K / (K - 1))
    g = t0 * K * curve.eps
    s = g * t0 / (K - 1)
    yield 0, K + K * n + (K - 1) * (d - K + 1) + (K - 1) * (K - 2) // 2
    yield g * (n + 1), (K - 1) * (d - K + 1)
    yield n * g, d - K + 1
    yield g, (K * n - K + 1) * (d - K + 1)
    yield g + s, (n - 1) * K * (K - 2)
    yield (n + 1) * (g + s), (K - 1) * (K - 2) // 2
    total = (n + 1) * (g + s)
    large = (total + math.sqrt(total**2 - 16 * n * g * s)) / 2
    yield 4 * n * g * s / large, K * (K - 3) // 2
    yield large, K * (K - 3) // 2
    yield from ((x, K - 1) for x in np.linalg.eigvalsh(curve.unit_block(n, t0, g)))


def _of_squared_error(problem: Problem):
    """Pairs of eigenvalue and multiplicity at the minimiser of the squared error."""
    K, d, n = problem.num_classes, problem.dim, int(problem.counts[0])
    mu, root_n = problem.mu, math.sqrt(n)
    if mu >= root_n:
        yield from _at_origin(problem)
        return
    r2 = 1 / math.sqrt(problem.ratio)
    blocks = [
        (2 * mu, 2 * (root_n - mu), K * (K + 1) // 2),
        (0, 2 * root_n, K * (K - 1) // 2),
        (0, 2 * mu, K * (d - K)),
    ]
    yield from _of_pairs(blocks, r2)
    yield root_n / r2, (n - 1) * K**2
    yield mu / r2, (K * n - K) * (d - K)


def _at_origin(problem: Problem):
    """Pairs of eigenvalue and multiplicity at W = 0, H = 0."""
    objective, K = problem.objective, problem.num_classes
    if objective.temperature is not None:
        _refuse("a temperature at the origin, where unit rows do not exist")
    targets = np.eye(K)
    if objective.loss != "squared_error":
        targets = pull(objective, K, 0.0) * (targets - 1 / K)
    values = np.linalg.svd(targets * np.sqrt(problem.counts), compute_uv=False)
    values = values[values > _EQUAL * values[0]]
    samples = int(problem.counts.sum())
    decay = objective.weight_decay or (0.0, 0.0)
    for value in values:
        both = pair(*decay, problem.mu - value, problem.mu + value)
        yield from ((x, problem.dim) for x in both)
    yield decay[0], (K - len(values)) * problem.dim
    yield decay[1], (samples - len(values)) * problem.dim
    yield 0, (K * int(problem.counts.max()) - samples) * problem.dim
