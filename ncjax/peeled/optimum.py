r"""The optimum of minimum-norm separation (P2) in closed form, for classes of any size.

$$v = \min \tfrac12 |W|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
(w_k - w_j)^\top h_{k,i} \ge 1 \; (j \ne k)$$
"""

import math
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_counts, check_sizes, float_dtype
from ncjax.numerics import on_device
from ncjax.peeled.geometry import helmert
from ncjax.types import Array, Params


class Separation(NamedTuple):
    """A minimiser of (P2) with its multipliers; n is the size of the largest class."""

    params: Params  # W (K, d), H (K, n, d) with zeros beyond n_k
    value: float  # v = |Z|²/2, in float64 for any dtype
    multipliers: Array  # (K, n, K)  λ_kij >= 0 with sum v, zero where j = k and beyond n_k
    weights: Array | None  # (K, n)  1, and 0 beyond n_k; None for classes of equal size
    proved: bool  # whether it is proved that no point is smaller


def solve_separation(counts, dim: int, dtype=None) -> Separation:
    r"""Return a minimiser of the minimum-norm separation problem, in closed form.

    $$\min \tfrac12 |W|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
    (w_k - w_j)^\top h_{k,i} \ge 1 \; (j \ne k)$$

    Let $P = I - \tfrac1K \mathbf 1 \mathbf 1^\top$, $A = P \operatorname{diag}(n_k) P$ and
    $E E^\top = P$. For $d \ge K - 1$ all margins are 1 at the minimum, and

    $$W = A^{1/4} E, \qquad h_{k,i} = (A^{+1/4} E)_k, \qquad v = \operatorname{tr} A^{1/2},
    \qquad \lambda_{kij} = -(A^{+1/2})_{jk} > 0.$$

    All other minimisers are rotations of this one. It is called SELI, simplex-encoded-
    labels interpolation. For classes of equal size n it is neural collapse, with
    $v = (K-1) \sqrt n$.

    For d = 2, K >= 4 and equal sizes the regular polygon is returned, with
    $v = K \sqrt n / (1 - \cos \tfrac{2\pi}K)$: the best point known, not proved optimal.

    Args:
      counts: (K,) integers $n_k$ of at least 1, the number of samples of each class.
      dim: `d`, at least `K - 1`; or 2 with equal counts.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `Separation`.

    Raises:
      ValueError: counts are no integers or below 1, or no closed form is known for this
        `dim`.

    Source: Ji et al. (ICLR 2022), Theorem 3.1 and problem (P2), for equal sizes;
    Thrampoulidis et al. (NeurIPS 2022) for SELI. The formulas for any sizes and the polygon
    are ncjax's.

    >>> import ncjax
    >>> round(ncjax.solve_separation(counts=(9, 9, 9, 9), dim=5).value, 4)  # (K - 1) √n
    9.0
    >>> round(ncjax.solve_separation(counts=(4, 4, 1, 1), dim=6).value, 4)
    4.5811
    """
    counts = check_counts(counts)
    check_sizes(dim=dim)
    dtype = float_dtype(dtype)
    num_classes, equal = len(counts), len(set(counts)) == 1
    if dim >= num_classes - 1:
        W, rows, multipliers = _seli(counts, dim)
    elif dim == 2 and equal:
        W, rows, multipliers = _polygon(num_classes, counts[0])
    else:
        raise ValueError(
            f"dim must be at least num_classes - 1 = {num_classes - 1}, or 2 with equal "
            f"counts, got {dim}: no other optimum is known in closed form"
        )
    counted = np.arange(max(counts)) < np.asarray(counts)[:, None]
    H = np.where(counted[..., None], rows[:, None], 0)
    by_sample = np.where(counted[..., None], multipliers[:, None], 0)
    return Separation(
        params=Params(on_device(W, dtype), on_device(H, dtype)),
        value=float(np.sum(np.asarray(counts) * multipliers.sum(axis=1))),
        multipliers=on_device(by_sample, dtype),
        weights=None if equal else on_device(counted, dtype),
        proved=dim >= num_classes - 1,
    )


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


def _polygon(num_classes: int, per_class: int) -> tuple[np.ndarray, ...]:
    """Return W (K, 2), the rows h_k (K, 2) and the multipliers λ_kj (K, K)."""
    angles = 2 * math.pi * np.arange(num_classes) / num_classes
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # The hull of the other classes has this distance from a vertex at radius 1.
    distance = 1 - math.cos(2 * math.pi / num_classes)
    radius = per_class**0.25 / math.sqrt(distance)
    steps = np.abs(np.arange(num_classes)[:, None] - np.arange(num_classes))
    neighbours = (steps == 1) | (steps == num_classes - 1)
    multiplier = 1 / (2 * math.sqrt(per_class) * distance)
    return radius * unit, unit / (radius * distance), multiplier * neighbours
