r"""The optimum of minimum-norm separation (P2): closed forms, else a search.

$$v = \min \tfrac12 |W|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
(w_k - w_j)^\top h_{k,i} \ge 1 \; (j \ne k)$$
"""

from typing import Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np

from ncjax.checks import check_counts, check_integer, check_sizes, float_dtype
from ncjax.numerics import on_device
from ncjax.peeled.codes import fitting_matrices
from ncjax.peeled.factors import (
    balanced_params,
    by_sample,
    multipliers_of_matrix,
    norm_of_matrix,
)
from ncjax.peeled.geometry import helmert
from ncjax.peeled.polygon import polygon_factors
from ncjax.peeled.search import search
from ncjax.types import Array, DeepParams, Params

# Most unknowns and margins of a search together; this many take about a minute.
_LARGEST = 1500


_Point = TypeVar("_Point", bound=Params | DeepParams)


class Separation(NamedTuple, Generic[_Point]):
    """A minimiser of (P2) with its multipliers; n is the size of the largest class."""

    params: _Point  # H (K, n, d) with zeros beyond n_k; `Params` for depth 1
    value: float  # V = |Z|²/2, in float64 for any dtype
    multipliers: Array  # (K, n, K)  λ_kij >= 0 with sum 2V/p, zero where j = k, beyond n_k
    weights: Array | None  # (K, n)  1, and 0 beyond n_k; None for classes of equal size
    proved: bool  # whether it is proved that no point is smaller
    source: str  # "SELI", "regular polygon" or "search over N starts"
    spread: tuple[tuple[float, int], ...] | None  # minima of the search: value, how often


@overload
def solve_separation(
    counts,
    dim: int,
    dtype=None,
    *,
    depth: Literal[1] = 1,
    starts: int | None = None,
    seed: int = 0,
) -> Separation[Params]: ...


@overload
def solve_separation(
    counts,
    dim: int,
    dtype=None,
    *,
    depth: int,
    starts: int | None = None,
    seed: int = 0,
) -> Separation[DeepParams]: ...


def solve_separation(
    counts,
    dim: int,
    dtype=None,
    *,
    depth: int = 1,
    starts: int | None = None,
    seed: int = 0,
) -> Separation:
    r"""Return a minimiser of the minimum-norm separation problem.

    $$\min \tfrac12 |W|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
    (w_k - w_j)^\top h_{k,i} \ge 1 \; (j \ne k)$$

    **SELI.** Let $P = I - \tfrac1K \mathbf 1 \mathbf 1^\top$, $A = P
    \operatorname{diag}(n_k) P$ and $E E^\top = P$. For $d \ge K - 1$ all margins are 1 at
    the minimum, and

    $$W = A^{1/4} E, \qquad h_{k,i} = (A^{+1/4} E)_k, \qquad v = \operatorname{tr} A^{1/2},
    \qquad \lambda_{kij} = -(A^{+1/2})_{jk} > 0.$$

    All other minimisers are rotations of this one. It is called SELI, simplex-encoded-
    labels interpolation. For classes of equal size n it is neural collapse, with
    $v = (K-1) \sqrt n$.

    **Regular polygon.** For d = 2, K >= 4 and equal sizes, at any depth. One layer has
    $v = K \sqrt n / (1 - \cos \tfrac{2\pi}K)$. It is the best point known, not proved
    optimal.

    **Search.** Any other d from 2 on, and several layers. With p = depth + 1 factors of
    width d the problem is

    $$V = \min \tfrac12 |Z|^2 = \min_{\operatorname{rank} M \le d} \tfrac p2 \sum_i
    \sigma_i(M)^{2/p} \quad \text{s.t. margins at least } 1,$$

    where M (K, K) has the columns $\sqrt{n_k}\, W_L \cdots W_1 h_k$. It is not convex.
    An augmented Lagrangian descends from `starts` points, the first half of them near the
    codes of `softmax_codes`, and Newton's method on the KKT conditions ends each descent.
    The result is numerical. The KKT conditions hold to rounding, but nothing proves that no
    point is smaller. The bound $V \ge \tfrac p2 v(n)^{2/p}$ is attained for K = 2 alone.

    Args:
      counts: (K,) integers $n_k$ of at least 1, the number of samples of each class.
      dim: `d`, the least width of all layers; at least 2, or 1 for K = 2.
      dtype: floating dtype; JAX's default if None.
      depth: `L`, the number of layers.
      starts: number of starts of a search; None takes 8 to 40, the fewer the larger the
        problem.
      seed: seed of the random starts.

    Returns:
      `Separation`. `spread` tells how often the search ended at which value: several values
      are local minima, and one start in forty at the best one asks for more starts.

    Raises:
      ValueError: counts are no integers or below 1, a size is out of range, d = 1 with
        K >= 3, where no point separates, or the search would take minutes.
      RuntimeError: no start came to a minimum.

    Source: Ji et al. (ICLR 2022), Theorem 3.1 and problem (P2), for equal sizes;
    Thrampoulidis et al. (NeurIPS 2022) for SELI; Jiang et al., "Generalized neural collapse
    for a large number of classes" (2023) for few dimensions; Súkeník, Lampert, Mondelli
    (NeurIPS 2024) and Garrod and Keating (2025) for several layers. The formulas for any
    sizes, the polygon and the search are ncjax's.

    >>> import ncjax
    >>> round(ncjax.solve_separation(counts=(9, 9, 9, 9), dim=5).value, 4)  # (K - 1) √n
    9.0
    >>> round(ncjax.solve_separation(counts=(4, 4, 1, 1), dim=6).value, 4)
    4.5811
    >>> pyramid = ncjax.solve_separation((1,) * 5, dim=3, starts=4)
    >>> pyramid.source, round(pyramid.value, 4)
    ('search over 4 starts', 4.8944)
    """
    counts = check_counts(counts)
    check_sizes(dim=dim)
    check_integer("depth", depth, least=1)
    check_integer("seed", seed, least=0)
    if starts is not None:
        check_integer("starts", starts, least=1)
    dtype = float_dtype(dtype)
    K, equal = len(counts), len(set(counts)) == 1
    if dim == 1 and K > 2:
        raise ValueError(
            f"dim must be at least 2 for num_classes = {K}, got 1: on a line no class "
            "between two others can be separated"
        )
    if depth == 1 and dim >= K - 1:
        return _two_factors(counts, _seli(counts, dim), dtype, "SELI")
    if K == 2:
        matrix = (np.eye(2) - 1 / 2) * np.sqrt(counts)
        return _product(counts, matrix, depth, dim, dtype, "SELI")
    if dim == 2 and equal and K > 3:
        W, rows, multipliers = polygon_factors(K, counts[0])
        if depth == 1:
            factors = W, rows, multipliers
            return _two_factors(counts, factors, dtype, "regular polygon")
        matrix = W @ rows.T * np.sqrt(counts)
        return _product(counts, matrix, depth, dim, dtype, "regular polygon")
    starts = _check_effort(K, dim, depth, starts)
    codes = _codes(K, dim, depth)[: (starts + 1) // 2]
    found = search(counts, dim, depth + 1, starts, seed, codes)
    source = f"search over {starts} starts"
    out = _product(counts, found.matrix, depth, dim, dtype, source)
    return out._replace(spread=found.spread)


def _check_effort(num_classes: int, dim: int, depth: int, starts: int | None) -> int:
    """Return the number of starts; raise ValueError if a search would take minutes."""
    width = min(dim, num_classes - 1)
    size = width * (2 * num_classes + (depth > 1)) + num_classes * (num_classes - 1)
    if size > _LARGEST:
        raise ValueError(
            f"the search for num_classes = {num_classes} at dim = {dim} has {size} "
            f"unknowns and margins, more than {_LARGEST}: choose fewer classes"
        )
    return starts or int(np.clip(4 * 10**6 // size**2, 8, 40))


def _codes(num_classes: int, dim: int, depth: int) -> tuple[np.ndarray, ...]:
    """Return the matrices of the codes that fit into dim, of least norm first."""
    fit = fitting_matrices(num_classes, dim)
    return tuple(sorted(fit, key=lambda M: norm_of_matrix(M, depth + 1)))


def _two_factors(counts, factors: tuple[np.ndarray, ...], dtype, source: str) -> Separation:
    """Return the optimum from W, rows h_k and multipliers λ_kj in closed form."""
    W, rows, multipliers = factors
    return Separation(
        params=Params(on_device(W, dtype), on_device(by_sample(rows, counts), dtype)),
        value=float(np.sum(np.asarray(counts) * multipliers.sum(axis=1))),
        multipliers=on_device(by_sample(multipliers, counts), dtype),
        weights=_weights(counts, dtype),
        proved=source == "SELI",
        source=source,
        spread=None,
    )


def _product(counts, matrix: np.ndarray, depth, dim, dtype, source: str) -> Separation:
    """Return the optimum from the product M of its factors."""
    multipliers = multipliers_of_matrix(matrix, counts, depth + 1)
    return Separation(
        params=balanced_params(matrix, counts, depth, dim, dtype),
        value=norm_of_matrix(matrix, depth + 1),
        multipliers=on_device(by_sample(multipliers, counts), dtype),
        weights=_weights(counts, dtype),
        proved=source == "SELI",
        source=source,
        spread=None,
    )


def _weights(counts, dtype) -> Array | None:
    """Return weights (K, n) of 1, and 0 beyond n_k; None for classes of equal size."""
    if len(set(counts)) == 1:
        return None
    return on_device(np.arange(max(counts)) < np.asarray(counts)[:, None], dtype)


def separation_value(counts) -> float:
    r"""$v(n) = \operatorname{tr} (P \operatorname{diag}(n_k) P)^{1/2}$, for $d \ge K - 1$.

    It is the minimum of (P2) and bounds the margin: $q_{\min} \le |Z|^2 / (2 v)$. For
    classes of equal size it is $(K-1) \sqrt n$. Along the flow $|Z|^2 / \log t \to 2 v$ and
    $t \mathcal L \log t \to v/2$.

    Args:
      counts: (K,) integers $n_k$ of at least 1.

    Returns:
      Number, computed in float64.

    Raises:
      ValueError: counts are no integers or below 1.

    Source: ncjax.

    >>> import ncjax
    >>> round(ncjax.separation_value((5, 3, 2, 1)), 6)
    4.851017
    """
    roots, _ = _spectrum(check_counts(counts))
    return float(np.sum(roots))


def _spectrum(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return roots of eigenvalues > 0 of `P diag(n) P`, (K-1,), and vectors (K, K-1)."""
    basis = helmert(len(counts))
    # One factor keeps the digits of small classes beside large ones.
    factor = basis * np.sqrt(np.asarray(counts, float))
    vectors, roots, _ = np.linalg.svd(factor, full_matrices=False)
    return roots, basis.T @ vectors


def _seli(counts: tuple[int, ...], dim: int) -> tuple[np.ndarray, ...]:
    """Return W (K, d), the rows h_k (K, d) and the multipliers λ_kj (K, K)."""
    roots, vectors = _spectrum(counts)
    num_classes = len(counts)

    def power(exponent: float) -> np.ndarray:
        return (vectors * roots ** (2 * exponent)) @ vectors.T

    # E without the projector P, which every power of A contains.
    wide = dim >= num_classes
    simplex = np.eye(num_classes, dim) if wide else helmert(num_classes).T
    multipliers = -power(-0.5)
    np.fill_diagonal(multipliers, 0)
    return power(0.25) @ simplex, power(-0.25) @ simplex, multipliers
