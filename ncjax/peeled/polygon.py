"""The regular polygon: K classes in the plane, and its saddle in more dimensions."""

import math
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_integer, check_sizes, float_dtype
from ncjax.numerics import on_device
from ncjax.types import Params


class PolygonSaddle(NamedTuple):
    r"""The regular polygon in more than two dimensions, a strict saddle direction."""

    params: Params  # at margins of at least 1
    value: float  # |Z|²/2 = K √n / (1 - cos(2π/K))
    sigma_max: float  # largest singular value of S; at most 1 at the optimum
    eigenvalues: np.ndarray  # distinct negative ones of the Hessian, ascending
    multiplicities: np.ndarray  # how often each occurs


def polygon_saddle(num_classes: int, per_class: int, dim: int, dtype=None) -> PolygonSaddle:
    r"""Return the regular K-gon in d > 2 dimensions and its directions of descent.

    $$w_k = n^{1/4} \frac{u_k}{\sqrt{g}}, \qquad h_{k,i} = n^{-1/4} \frac{u_k}{\sqrt{g}},
    \qquad u_k = \left(\cos \tfrac{2 \pi k}K, \sin \tfrac{2 \pi k}K, 0, \dots\right),
    \qquad g = 1 - \cos \tfrac{2 \pi}K$$

    Only the multipliers of the two neighbours are positive. So S is a circulant Laplacian,
    with the singular values

    $$\sigma_j = \frac{1 - \cos(2 \pi j / K)}{1 - \cos(2 \pi / K)}, \qquad j = 0, \dots,
    K - 1.$$

    In the d - 2 directions orthogonal to the plane, the Hessian of $\log \mathcal L$ on the
    sphere has the eigenvalues $(1 - \sigma_j) / V$ as $|Z| \to \infty$, each d - 2 times.
    They are negative for 1 < j < K - 1. In the plane itself the polygon is the best
    direction known (`ncjax.solve_separation` with dim = 2).

    Args:
      num_classes: `K`, at least 4; 3 is collapse.
      per_class: `n`, samples of each class.
      dim: `d`, at least 3.
      dtype: floating dtype of the params; JAX's default if None.

    Returns:
      `PolygonSaddle`.

    Raises:
      ValueError: a size is out of range.

    Source: ncjax. Jiang et al., "Generalized neural collapse for a large number of classes"
    (2023), for d < K - 1.

    >>> import ncjax
    >>> saddle = ncjax.polygon_saddle(6, per_class=2, dim=4)
    >>> saddle.eigenvalues.round(6).tolist(), saddle.multiplicities.tolist()
    ([-0.176777, -0.117851], [2, 4])
    """
    check_sizes(per_class=per_class)
    check_integer("num_classes", num_classes, least=4)
    check_integer("dim", dim, least=3)
    dtype = float_dtype(dtype)
    W, rows, _ = polygon_factors(num_classes, per_class)
    wide = ((0, 0), (0, dim - 2))
    H = np.repeat(np.pad(rows, wide)[:, None], per_class, axis=1)
    gap = 1 - math.cos(2 * math.pi / num_classes)
    value = num_classes * math.sqrt(per_class) / gap
    # j and K - j have the same eigenvalue; j = K/2 has no partner.
    j = np.arange(num_classes // 2, 1, -1)
    sigma = (1 - np.cos(2 * np.pi * j / num_classes)) / gap
    return PolygonSaddle(
        params=Params(on_device(np.pad(W, wide), dtype), on_device(H, dtype)),
        value=value,
        sigma_max=float(sigma[0]),
        eigenvalues=(1 - sigma) / value,
        multiplicities=(dim - 2) * np.where(2 * j == num_classes, 1, 2),
    )


def polygon_factors(num_classes: int, per_class: int) -> tuple[np.ndarray, ...]:
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
