"""Balanced factors W, H of given logits, and the simplex ETF, in float64 on the host."""

import math

import numpy as np

from ncjax.objectives.problem import Problem
from ncjax.peeled.geometry import helmert

# Singular values below this share of the largest one are rounding.
_RANK = 1e-13


def factorise(problem: Problem, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return W and class features H (K, d) with `H Wᵀ = logits` and the least norms.

    With the singular values $\sqrt{n_k}\, M_k = U S V^\top$, the logits of class k in row
    k, $W = r V S^{1/2} Q$ and $\sqrt{n_k}\, h_k = r^{-1} U S^{1/2} Q$. Then
    $|W|_F^2 = r^2 \sum S$ and $|H|_F^2 = r^{-2} \sum S$ with $r^4$ = `problem.ratio`, so
    $\lambda_W W^\top W = \lambda_H H^\top H$.

    Raises:
      ValueError: the rank of the logits is above the dimension.
    """
    roots = np.sqrt(problem.counts)[:, None]
    left, values, right = np.linalg.svd(roots * logits)
    rank = int(np.sum(values > _RANK * max(values[0], 1e-300)))
    if rank > problem.dim:
        raise ValueError(
            f"dim must be at least {rank}, the rank of the optimal logits, got "
            f"{problem.dim}: a closed form for fewer dimensions is not known"
        )
    frame = _frame(right[:rank], problem.dim)
    spread = problem.ratio**0.25 * np.sqrt(values[:rank])
    W = right[:rank].T @ (spread[:, None] * frame)
    H = left[:, :rank] @ ((values[:rank] / spread)[:, None] * frame) / roots
    return W, H


def _frame(right: np.ndarray, dim: int) -> np.ndarray:
    """Orthonormal rows (r, d): the singular vectors if they fit, else unit vectors.

    With the singular vectors W is symmetric, and free of the choice of LAPACK where
    singular values are equal.
    """
    rank, size = right.shape
    if dim < size:
        return np.eye(rank, dim)
    return np.pad(right, ((0, 0), (0, dim - size)))


def unit_etf(num_classes: int, dim: int) -> np.ndarray:
    """Return a simplex ETF (K, d) with unit rows; ValueError if d < K - 1."""
    if dim < num_classes - 1:
        raise ValueError(
            f"dim must be at least num_classes - 1 = {num_classes - 1} to hold a simplex "
            f"ETF, got {dim}"
        )
    scale = math.sqrt(num_classes / (num_classes - 1))
    if dim == num_classes - 1:
        return scale * helmert(num_classes).T
    centring = np.eye(num_classes) - 1 / num_classes
    return scale * np.pad(centring, ((0, 0), (0, dim - num_classes)))
