r"""Search for the least norm with margins of at least 1, from many starts.

The p factors have the middle ones diagonal and equal, $M = A \operatorname{diag}(s)^{p-2}
B^\top$. This loses nothing: all minimisers of all p factors are balanced, and Schatten
quasi-norms of a power at most 1 are subadditive (Rotfel'd).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from ncjax.peeled.factors import (
    margins_of_matrix,
    norm_of_matrix,
    truncated_svd,
)

# Margins within this distance of 1 after the search are constraints of the last steps.
_NEAR = 1e-5
_NEWTON_STEPS = 12
# Rounds of the augmented Lagrangian, and the error in margins at which they stop.
_ROUNDS = 20
_UNMET = 1e-8
_RESIDUAL = 1e-11
# Values that differ by less are one minimum.
_SAME = 1e-7


class Found(NamedTuple):
    """The best point of a search, and the minima where the starts ended."""

    matrix: np.ndarray  # M (K, K), with a least margin of 1
    spread: tuple[tuple[float, int], ...]  # values |Z|²/2, ascending, and how often each


@dataclass(frozen=True)
class SeparationProblem:
    r"""`min |Z|²/2` subject to margins of at least 1, of rank at most dim.

    The unknowns x have a row $(a_i, b_i, s_i)$ for each of the dim rank-one parts of
    $M = \sum_i s_i^{p-2} a_i b_i^\top$; p = 2 has no s. In $|Z|^2$ the square of an
    unknown counts once, the square of s_i counts p - 2 times.
    """

    roots: np.ndarray  # (K,)  sqrt(n_k)
    dim: int
    degree: int

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes k and j of the K (K - 1) margins."""
        k, j = np.nonzero(~np.eye(len(self.roots), dtype=bool))
        return k, j

    @property
    def middle(self) -> int:
        """The number of diagonal factors, p - 2."""
        return self.degree - 2

    @cached_property
    def sizes(self) -> np.ndarray:
        """Weights of the unknowns in the norm, (dim, 2K) or (dim, 2K + 1)."""
        sizes = np.ones((self.dim, 2 * len(self.roots) + bool(self.middle)))
        if self.middle:
            sizes[:, -1] = self.middle
        return sizes

    def parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a (dim, K), b (dim, K) and s (dim, 1)."""
        rows, K = x.reshape(self.sizes.shape), len(self.roots)
        s = rows[:, 2 * K :] if self.middle else np.ones((self.dim, 1))
        return rows[:, :K], rows[:, K : 2 * K], s

    def matrix(self, x: np.ndarray) -> np.ndarray:
        """Return M (K, K)."""
        a, b, s = self.parts(x)
        return (a * s**self.middle).T @ b

    def unknowns(self, matrix: np.ndarray) -> np.ndarray:
        """Return the balanced unknowns of M."""
        left, singular, right = truncated_svd(matrix)
        parts = [left, right]
        if self.middle:
            parts.append(np.ones((1, len(singular))))
        rows = (np.concatenate(parts) * singular ** (1 / self.degree)).T
        return np.pad(rows, ((0, self.dim - len(rows)), (0, 0))).ravel()

    def objective(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return `|Z|²/2` and its gradient."""
        gradient = self.sizes.ravel() * x
        return float(gradient @ x) / 2, gradient

    def slack(self, x: np.ndarray) -> np.ndarray:
        """Return the margins minus 1, (K (K - 1),)."""
        return margins_of_matrix(self.matrix(x), self.roots)[self.pairs] - 1

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Return the derivatives of the margins, (K (K - 1), unknowns)."""
        (a, b, s), (k, j) = self.parts(x), self.pairs
        K, number = len(self.roots), np.arange(len(k))
        power = s**self.middle
        of_a, of_b = (power * b / self.roots).T, (power * a).T
        out = np.zeros((len(k), *self.sizes.shape))
        out[number, :, k] = of_a[k]
        out[number, :, j] = -of_a[k]
        difference = (of_b[k] - of_b[j]) / self.roots[k, None]
        out[number, :, K + k] = difference
        if self.middle:
            slope = self.middle * s[:, 0] ** (self.middle - 1)
            out[:, :, -1] = slope * (a.T[k] - a.T[j]) * b.T[k] / self.roots[k, None]
        return out.reshape(len(k), -1)

    def augmented(
        self, x: np.ndarray, multipliers: np.ndarray, penalty: float
    ) -> tuple[float, np.ndarray]:
        """Return `|Z|²/2 + Σ max(0, λ - ρ (m - 1))² / (2 ρ)` and its gradient."""
        (a, b, s), K = self.parts(x), len(self.roots)
        pull = np.maximum(0, multipliers - penalty * self.slack(x))
        dual, power = self.dual(pull), s**self.middle
        value, gradient = self.objective(x)
        rows = gradient.reshape(self.sizes.shape)
        rows[:, :K] -= power * (b @ dual.T)
        rows[:, K : 2 * K] -= power * (a @ dual)
        if self.middle:
            slope = self.middle * s[:, 0] ** (self.middle - 1)
            rows[:, -1] -= slope * np.sum((a @ dual) * b, axis=1)
        return value + float(pull @ pull) / (2 * penalty), rows.ravel()

    def dual(self, multipliers: np.ndarray) -> np.ndarray:
        """Return `S = Σ λ_kj (e_k - e_j) e_kᵀ / sqrt(n_k)`, (K, K)."""
        k, j = self.pairs
        dual = np.zeros((len(self.roots),) * 2)
        dual[j, k] = -multipliers / self.roots[k]
        np.fill_diagonal(dual, -dual.sum(axis=0))
        return dual

    def curvature(self, x: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """Return the Hessian of the Lagrangian, a block for each rank-one part."""
        (a, b, s), dual = self.parts(x), self.dual(multipliers)
        K, size = len(self.roots), self.sizes.shape[1]
        q, blocks = self.middle, np.zeros((self.dim, size, self.dim, size))
        for i in range(self.dim):
            block = np.diag(self.sizes[i])
            block[:K, K : 2 * K] -= s[i] ** q * dual
            block[K : 2 * K, :K] -= s[i] ** q * dual.T
            if q:
                slope = q * s[i] ** (q - 1)
                block[:K, -1] -= slope * (dual @ b[i])
                block[K : 2 * K, -1] -= slope * (a[i] @ dual)
                block[-1, :-1] = block[:-1, -1]
            if q > 1:
                block[-1, -1] -= (
                    q * (q - 1) * float(s[i, 0]) ** (q - 2) * (a[i] @ dual @ b[i])
                )
            blocks[i, :, i] = block
        return blocks.reshape(x.size, x.size)


def search(
    counts: tuple[int, ...],
    dim: int,
    degree: int,
    starts: int,
    seed: int,
    codes: tuple[np.ndarray, ...] = (),
) -> Found:
    """Return the best point found and the values of the minima.

    Args:
      counts: the class sizes n_k.
      dim: largest rank.
      degree: p, the number of factors.
      starts: number of starts.
      seed: seed of the random starts.
      codes: matrices (K, K) at one sample a class whose neighbourhoods are the first
        starts.

    Raises:
      RuntimeError: no start came to a minimum.
    """
    mean = float(np.exp(np.mean(np.log(counts))))
    roots = np.sqrt(np.asarray(counts) / mean)
    problem = SeparationProblem(roots, min(dim, len(counts) - 1), degree)
    rng = np.random.default_rng(seed)
    ends = []
    # On matrices this small BLAS threads only wait for each other: on a busy machine a
    # search takes ten times as long with them.
    with threadpool_limits(limits=1, user_api="blas"):
        for number in range(starts):
            code = codes[number] * roots if number < len(codes) else None
            matrix = _descend(problem, _start(problem, code, number, rng))
            if matrix is not None:
                ends.append((norm_of_matrix(matrix, degree), matrix))
    if not ends:
        raise RuntimeError(
            f"none of {starts} starts came to a minimum: raise starts, or choose counts "
            "that differ less"
        )
    scale = mean ** (1 / degree)
    _, best = min(ends, key=lambda end: end[0])
    return Found(best * np.sqrt(mean), _spread([scale * value for value, _ in ends]))


def _spread(values: list[float]) -> tuple[tuple[float, int], ...]:
    """Return the distinct values, ascending, and how often each occurs."""
    out: list[tuple[float, int]] = []
    for value in sorted(values):
        if out and value <= out[-1][0] * (1 + _SAME):
            out[-1] = out[-1][0], out[-1][1] + 1
        else:
            out.append((value, 1))
    return tuple(out)


def _start(problem: SeparationProblem, code, number: int, rng) -> np.ndarray:
    """Return a start near a code, or near unit rows of a rank that varies with the number.

    Every unit row is separated from the hull of the others, so the margins are positive
    before the noise. Ranks differ because for p >= 3 there are minima of several ranks.
    """
    if code is None:
        K, dim = len(problem.roots), problem.dim
        rank = dim if dim < 2 or not problem.middle else 2 + number % (dim - 1)
        rows = rng.normal(size=(K, dim))
        rows[:, rank:] *= 0.05
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        code = rows @ rows.T * problem.roots
    x = problem.unknowns(code)
    x += 0.05 * rng.normal(size=x.size) * np.sqrt(np.mean(x**2))
    least = float(problem.slack(x).min()) + 1
    return x * min(least ** (-1 / problem.degree), 3.0) if least > 0 else x


def _descend(problem: SeparationProblem, x: np.ndarray) -> np.ndarray | None:
    """Return the matrix of the minimum below a start, None if none is reached.

    An augmented Lagrangian, minimised by L-BFGS: it does not mind that the slopes of the
    active margins are dependent at symmetric codes, where sequential quadratic programming
    diverges.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]  # slow to import

    multipliers, penalty, last = np.zeros(len(problem.pairs[0])), 20.0, np.inf
    options = {"maxiter": 1000, "maxcor": 20, "gtol": 1e-9, "ftol": 1e-15}
    for _ in range(_ROUNDS):
        arguments = multipliers, penalty
        x = minimize(
            problem.augmented, x, arguments, "L-BFGS-B", jac=True, options=options
        ).x
        slack = problem.slack(x)
        unmet = float(np.abs(np.maximum(-slack, -multipliers / penalty)).max())
        if unmet < _UNMET or not np.isfinite(unmet):
            break
        multipliers = np.maximum(0, multipliers - penalty * slack)
        penalty *= 1 if unmet < last / 4 else 2.5
        last = unmet
    least = problem.slack(x).min()
    if not -_NEAR < least < _NEAR:
        return None
    try:
        found = _polish(problem, x)
    except (RuntimeError, np.linalg.LinAlgError):  # no convergence of SciPy or LAPACK
        return None
    if found is None:
        return None
    matrix = problem.matrix(found)
    return matrix / margins_of_matrix(matrix, problem.roots).min()


def _polish(problem: SeparationProblem, x: np.ndarray) -> np.ndarray | None:
    """Solve the KKT equations by Newton's method; None if they do not hold in the end.

    Rotations leave the system singular, so each step is the one of least norm.
    """
    from scipy.optimize import nnls

    active = problem.slack(x) < _NEAR
    multipliers = np.zeros(len(active))
    for number in range(_NEWTON_STEPS):
        slopes = problem.jacobian(x)[active]
        _, gradient = problem.objective(x)
        if not number:
            multipliers[active], _ = nnls(slopes.T, gradient, maxiter=100 * len(active))
        residual = np.concatenate(
            [gradient - multipliers[active] @ slopes, problem.slack(x)[active]]
        )
        if np.abs(residual).max() < _RESIDUAL:
            break
        corner = np.zeros((len(slopes),) * 2)
        system = np.block(
            [[problem.curvature(x, multipliers), -slopes.T], [slopes, corner]]
        )
        step = np.linalg.lstsq(system, -residual, rcond=1e-9)[0]
        x, multipliers[active] = x + step[: x.size], multipliers[active] + step[x.size :]
    slopes, (_, gradient) = problem.jacobian(x)[active], problem.objective(x)
    _, gap = nnls(slopes.T, gradient, maxiter=100 * len(active))
    kept = gap < 1e-9 * np.linalg.norm(x) and problem.slack(x).min() > -1e-9
    return x if kept else None
