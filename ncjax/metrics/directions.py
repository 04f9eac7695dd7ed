r"""Published measures of the directions of rows: how uniform, and how far from a hull.

Both see only the unit rows $\hat v_k = v_k / |v_k|$ of a matrix (K, d), such as centred
class means or a classifier. `ncjax.variants` re-exports these functions.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import read_array
from ncjax.checks import check_choice
from ncjax.metrics import measures, statistics
from ncjax.metrics.inputs import check_rows
from ncjax.metrics.tiles import TILE, above_diagonal, pair_of_tiles
from ncjax.types import Array

KERNELS = ("distance", "log", "riesz")
# Entries of a product of all rows with some points.
_PRODUCT_ENTRIES = 2**22


def uniformity_kernel(rows: Array, kernel: str, exponent: float | None = None) -> Array:
    r"""Return a kernel of distances of unit rows, $g(|v_j/|v_j| - v_k/|v_k||)$, by pair.

    Args:
      rows: (K, d); in the source the centred class means.
      kernel: g, one of "distance" $r$, "log" $-\log r$ and "riesz"
        $\operatorname{sign}(s)\, r^{-s}$.
      exponent: s of the Riesz kernel; None is d - 2, as in the source.

    Returns:
      (K(K-1)/2,) array over the pairs j < k. If K is large, `uniformity_moments` needs no
      array of all pairs.

    Raises:
      ValueError: kernel is none of these.

    Source: Liu et al. (2023), "Generalizing and decoupling neural collapse via
    hyperspherical uniformity gap", who report mean and variance over pairs.
    """
    check_choice("kernel", kernel, KERNELS)
    unit = measures.unit_rows(rows)
    squares = statistics.squared_distances(unit)
    return _kernel_values(above_diagonal(squares), kernel, _power(exponent, unit))


class Moments(NamedTuple):
    """Moments of a number over the pairs of rows. Scalars."""

    mean: Array
    variance: Array  # mean squared deviation from the mean
    maximum: Array


def uniformity_moments(rows: Array, kernel: str, exponent: float | None = None) -> Moments:
    r"""Return mean, variance and maximum over pairs of `uniformity_kernel`, in blocks.

    The pairs are read in blocks of 1024 by 1024, so memory does not grow with K². Distances
    come from a product of the blocks; a block with a close pair is measured by differences.

    Args:
      rows: (K, d), K at least 2.
      kernel: as in `uniformity_kernel`.
      exponent: as in `uniformity_kernel`.

    Raises:
      ValueError: kernel is unknown, or rows are not floating (K, d) with K at least 2.

    Source: Liu et al. (2023), as for `uniformity_kernel`; Chan, Golub, LeVeque (1983),
    equation (2.1), for the variance.
    """
    check_choice("kernel", kernel, KERNELS)
    (rows,) = check_rows(rows)
    if len(rows) < 2:
        raise ValueError(f"expected rows (K, d) with K at least 2, got {rows.shape}")
    height = min(len(rows), TILE)
    return _moments_in_blocks(rows, kernel, _power(exponent, rows), height)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _moments_in_blocks(rows: Array, kernel: str, power: float, height: int) -> Moments:
    """Return the moments from blocks of `height` by `height` pairs."""
    size = len(rows)
    count = -(-size // height)
    unit = measures.unit_rows(rows)
    unit = jnp.pad(unit, ((0, count * height - size), (0, 0)))
    steps = jnp.arange(height, dtype=jnp.int32)

    def block(state, number):
        start = tuple(height * tile for tile in pair_of_tiles(number, count))
        left, right = (
            jax.lax.dynamic_slice_in_dim(unit, start[i], height) for i in range(2)
        )
        above = (start[0] + steps)[:, None] < (start[1] + steps)[None]
        pairs = above & (start[1] + steps < size)[None]
        squares = measures.tile_squared_distances(left, right, pairs)
        return _added(state, _kernel_values(squares, kernel, power), pairs), None

    zero = jnp.zeros((), unit.dtype)
    numbers = jnp.arange(count * (count + 1) // 2, dtype=jnp.int32)
    state, _ = jax.lax.scan(block, (zero, Moments(zero, zero, zero - jnp.inf)), numbers)
    total, moments = state
    return moments._replace(variance=moments.variance / total)


def _added(state: tuple[Array, Moments], values: Array, mask: Array):
    """Add masked values to a count and its moments; `variance` holds the sum of squares."""
    total, moments = state
    count = jnp.sum(mask, dtype=jnp.int32).astype(values.dtype)
    mean = jnp.sum(values, where=mask) / jnp.maximum(count, 1)
    squares = jnp.sum((values - mean) ** 2, where=mask)
    both = total + count
    share, shift = count / jnp.maximum(both, 1), mean - moments.mean
    return both, Moments(
        mean=moments.mean + share * shift,
        variance=moments.variance + squares + total * share * shift**2,
        maximum=jnp.maximum(moments.maximum, jnp.max(values, where=mask, initial=-jnp.inf)),
    )


def _power(exponent: float | None, rows: Array) -> float:
    """Return s of the Riesz kernel."""
    return float(rows.shape[1] - 2 if exponent is None else exponent)


def _kernel_values(squares: Array, kernel: str, power: float) -> Array:
    """Return the kernel of distances from their squares."""
    distances = jnp.sqrt(squares)
    if kernel == "distance":
        return distances
    if kernel == "log":
        return -jnp.log(distances)
    return math.copysign(1.0, power) * distances**-power


def one_vs_rest_distances(W: Array, classes: Array | None = None) -> np.ndarray:
    r"""Return the distance of each unit row of `W` to the hull of the other unit rows.

    $\min_{u \ge 0,\, \sum u = 1} |\hat w_k - \sum_{j \ne k} u_j \hat w_j|$. Up to its sum,
    the same u minimises $|\sum_j u_j g_j|^2 + (\sum_j u_j - 1)^2$ over $u \ge 0$, with the
    gaps $g_j = \hat w_j - \hat w_k$: non-negative least squares, which an active-set method
    solves exactly. It runs over a few rows near $\hat w_k$. The nearest point x of their
    hull is the nearest of all if $g_j^\top x \ge |x|^2$ for every j; rows that violate this
    are added until none does.

    Computed in float64 outside JAX; the relative error is 1e-13 unless the distance is near
    zero.

    Args:
      W: (K, d) with K at least 2.
      classes: (m,) integers in [0, K), the rows whose distances are requested; None for
        all. Each row takes a few products with `W` and a few small systems in d + 1
        equations: 1 ms of one core at d = 64, 40 ms at d = 512, for K = 2000.

    Returns:
      (m,) distances in float64.

    Source: Jiang et al. (2024), "Generalized neural collapse for a large number of
    classes", GNC2, who report the smallest distance. Lawson, Hanson (1974), chapter 23.

    Raises:
      ValueError: W is not (K, d) with K at least 2, a row is zero or not finite, or classes
        are not integers in [0, K).
    """
    unit = np.asarray(read_array("W", W), np.float64)
    if unit.ndim != 2 or len(unit) < 2:
        raise ValueError(f"expected W (K, d) with K at least 2, got {unit.shape}")
    bad = np.flatnonzero(~np.isfinite(unit).all(axis=1) | ~unit.any(axis=1))
    if bad.size:
        raise ValueError(f"rows of W must be finite and not zero, got {unit[bad[0]]}")
    requested = np.arange(len(unit)) if classes is None else _indices(classes, len(unit))
    unit = unit / np.abs(unit).max(axis=1, keepdims=True)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    if unit.shape[1] > len(unit):  # rows in a basis of their span
        unit = np.linalg.qr(unit.T)[1].T
    step = max(1, _PRODUCT_ENTRIES // len(unit))
    parts = [
        _hull_distances(unit, requested[start : start + step])
        for start in range(0, len(requested), step)
    ]
    return np.concatenate([*parts, np.empty(0)])


def _indices(classes, num_classes: int) -> np.ndarray:
    """Return `classes` (m,) as integers in [0, K), or raise ValueError."""
    given = np.asarray(read_array("classes", classes))
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(
            f"expected classes of integers (m,), got {given.dtype} {given.shape}: "
            "a mask becomes integers by np.flatnonzero"
        )
    if given.size and not 0 <= given.min() <= given.max() < num_classes:
        raise ValueError(
            f"classes must lie in [0, {num_classes}), got {given.min()} to {given.max()}"
        )
    return given.astype(np.int64)


def _hull_distances(unit: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the distances (m,) of some unit rows (K, d) to the hulls of the others."""
    near = min(2 * unit.shape[1] + 1, len(unit) - 1)
    cosines = unit @ unit[classes].T
    cosines[classes, np.arange(len(classes))] = -np.inf
    chosen = list(np.argpartition(-cosines, near - 1, axis=0)[:near].T)
    points = np.empty((len(classes), unit.shape[1]))
    pending = np.arange(len(classes))
    while pending.size:
        for i in pending:
            points[i] = _nearest_in_hull(unit[chosen[i]] - unit[classes[i]])
        # g_j·x - |x|² of every row j.
        excess = unit @ points[pending].T
        own = np.sum((unit[classes[pending]] + points[pending]) * points[pending], axis=1)
        excess -= own
        norms, rounding = np.linalg.norm(points[pending], axis=1), 16 * np.finfo(float).eps
        bounds = np.where(norms > rounding, -rounding * norms, -np.inf)
        kept = []
        for column, i in enumerate(pending):
            excess[chosen[i], column] = excess[classes[i], column] = np.inf
            worst = _most_negative(excess[:, column], bounds[column], near)
            if worst.size:
                chosen[i] = np.concatenate([chosen[i], worst])
                kept.append(i)
        pending = np.array(kept, int)
    return np.linalg.norm(points, axis=1)


def _nearest_in_hull(gaps: np.ndarray) -> np.ndarray:
    """Return the point (d,) of the hull of `gaps` (m, d) that is nearest to 0."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # half a second

    system = np.vstack([gaps.T, np.ones(len(gaps))])
    weights, _ = nnls(system, np.eye(len(system))[-1])
    return weights @ gaps / weights.sum()


def _most_negative(values: np.ndarray, bound: float, most: int) -> np.ndarray:
    """Return the indices of at most `most` least values, all below `bound`."""
    below = np.flatnonzero(values < bound)
    if below.size <= most:
        return below
    return below[np.argpartition(values[below], most - 1)[:most]]
