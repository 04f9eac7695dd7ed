"""Balanced factors of an end-to-end matrix, its norm and its multipliers, in NumPy.

The matrix M (K, K) has a column for each class: the logits of its mean feature times
`sqrt(n_k)`. At the least norm all samples of a class are equal, so M says everything.
"""

import numpy as np

from ncjax.numerics import on_device
from ncjax.types import DeepParams, Params

# A margin counts as 1 within this distance, and a singular value as 0 below it relatively.
ACTIVE = 1e-7
_ZERO = 1e-9


def margins_of_matrix(matrix: np.ndarray, roots: np.ndarray) -> np.ndarray:
    """Return the margins (K, K) of class k (row) over j, infinite where j = k."""
    margins = (np.diag(matrix)[:, None] - matrix.T) / roots[:, None]
    np.fill_diagonal(margins, np.inf)
    return margins


def norm_of_matrix(matrix: np.ndarray, degree: int) -> float:
    """`(p/2) Σ σ_i^(2/p)`, the least `|Z|²/2` of p factors with the product M."""
    _, singular, _ = truncated_svd(matrix)
    return degree / 2 * float(np.sum(singular ** (2 / degree)))


def truncated_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U (K, r), singular values (r,) above rounding and V (K, r)."""
    left, singular, right = np.linalg.svd(matrix)
    rank = int(np.sum(singular > _ZERO * singular[0]))
    return left[:, :rank], singular[:rank], right[:rank].T


def balanced_params(
    matrix: np.ndarray, counts: tuple[int, ...], depth: int, dim: int, dtype
) -> Params | DeepParams:
    """Return the point of least norm with the product M, every layer with `σ^(1/p)`.

    Args:
      matrix: M (K, K) of rank at most dim.
      counts: the class sizes n_k.
      depth: L, the number of layers; 1 gives `Params`.
      dim: width of all layers.
      dtype: floating dtype.
    """
    left, singular, right = truncated_svd(matrix)
    root = singular ** (1 / (depth + 1))
    beyond = ((0, 0), (0, dim - len(root)))
    rows = np.pad(right * root, beyond) / np.sqrt(counts)[:, None]
    H = on_device(by_sample(rows, counts), dtype)
    W = on_device(np.pad(left * root, beyond), dtype)
    if depth == 1:
        return Params(W, H)
    middle = on_device(np.diag(np.pad(root, beyond[1])), dtype)
    return DeepParams((*(middle,) * (depth - 1), W), H)


def by_sample(rows: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """Return (K, n, ...) with the row of each class n_k times, and zeros beyond."""
    counted = np.arange(max(counts)) < np.asarray(counts)[:, None]
    return np.where(counted[..., None], rows[:, None], 0)


def multipliers_of_matrix(
    matrix: np.ndarray, counts: tuple[int, ...], degree: int
) -> np.ndarray:
    r"""Return multipliers of a sample, λ_kj (K, K) >= 0, that fit the KKT conditions best.

    With $S = \sum_{k,j} n_k \lambda_{kj} (e_k - e_j) e_k^\top / \sqrt{n_k}$ these are

    $$S V \Sigma^{(p-1)/p} = U \Sigma^{1/p}, \qquad
    S^\top U \Sigma^{(p-1)/p} = V \Sigma^{1/p}.$$
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # half a second

    roots = np.sqrt(counts)
    left, singular, right = truncated_svd(matrix)
    k, j = np.nonzero(margins_of_matrix(matrix, roots) < 1 + ACTIVE)
    number, power = np.arange(len(k)), singular ** ((degree - 1) / degree)
    of_W, of_H = np.zeros((2, len(k), *left.shape))
    of_W[number, k] = right[k] * power / roots[k, None]
    of_W[number, j] = -of_W[number, k]
    of_H[number, k] = (left[k] - left[j]) * power / roots[k, None]
    system = np.concatenate([of_W, of_H], axis=1).reshape(len(k), -1).T
    point = np.concatenate([left, right]) * singular ** (1 / degree)
    found, _ = nnls(system, point.ravel(), maxiter=100 * len(k))
    multipliers = np.zeros(matrix.shape)
    multipliers[k, j] = found / np.asarray(counts, float)[k]
    return multipliers
