"""Measure NC2 and NC3 on the rows of a matrix: norms, angles, frames, duality.

NC2: the centred class means approach a simplex ETF (equiangular tight frame), which is K
vectors of equal norm with all pairwise cosines -1/(K-1). NC3 (self-duality): the classifier
approaches the centred class means, up to scale.

Each function is the plain definition, for any rows: class means, centred class means, a
classifier or a centred classifier (the mean row subtracted). `ncjax.metrics` applies them.
Quotients neither overflow nor underflow at any scale of the rows, and half precision is
computed in float32. Derivatives are finite where a value is zero, as it is at collapse.
Some functions take a `mask` (K,) of booleans: they leave out the rows at False and count K
without them. Each function raises ValueError unless its matrices are floating, (K, d) and
of one shape.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from ncjax.metrics.inputs import check_rows
from ncjax.metrics.tiles import (
    FEW_CLASSES,
    FEW_DIFFERENCES,
    above_diagonal,
    mean_over_pairs,
    squared_differences,
    sum_over_tiles,
)
from ncjax.numerics import at_unit_scale, matmul, root
from ncjax.types import Array

# Pairs with 1 - cos below this are close: their distance would lose two digits.
_CLOSE = 2.0**-7


def centre_rows(rows: Array, mask: Array | None = None) -> Array:
    r"""Return $v_k - \tfrac1K \sum_j v_j$ of `rows` (K, d); 0 where `mask` is False."""
    (rows,) = check_rows(rows)
    where = None if mask is None else mask[:, None]
    return _kept(rows - jnp.mean(rows, axis=0, keepdims=True, where=where), mask)


def unit_rows(rows: Array) -> Array:
    r"""Return $v_k / |v_k|$ of `rows` (K, d)."""
    (rows,) = check_rows(rows)
    rows = at_unit_scale(rows, axis=1)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def norm_variation(rows: Array, ddof: int = 1, mask: Array | None = None) -> Array:
    r"""Return the variation of norms, $\mathrm{std}_k |v_k| / \mathrm{mean}_k |v_k|$.

    Args:
      rows: (K, d).
      ddof: 1 to divide the variance by K - 1 (Papyan et al., 2020), 0 to divide it by K.
      mask: (K,) booleans, False for rows to leave out.

    Returns:
      Scalar, the standard deviation divided by the mean; 0 for equal norms.
    """
    (rows,) = check_rows(rows)
    norms = _norm(at_unit_scale(_kept(rows, mask)), axis=1)
    deviation = root(jnp.var(norms, ddof=ddof, where=mask))
    return deviation / jnp.mean(norms, where=mask)


def pair_cosines(rows: Array) -> Array:
    r"""Return the cosines $\cos(v_j, v_k)$ of the K(K-1)/2 pairs j < k of `rows` (K, d)."""
    unit = unit_rows(rows)
    return above_diagonal(matmul(unit, unit.T))


def cosine_deviation(rows: Array, mask: Array | None = None) -> Array:
    r"""Mean over pairs of $|\cos(v_j, v_k) + \tfrac{1}{K-1}|$, 0 for a simplex ETF.

    Computed in tiles, so that no array is (K, K) if K is large.

    Source: Papyan, Han, Donoho (2020), Figure 3, for `rows` (K, d).
    """
    (rows,) = check_rows(rows)
    simplex = simplex_cosine(rows, mask)
    rows = nonzero_rows(rows, mask)

    def of_tile(left, right, _):
        return jnp.abs(tile_cosines(left, right) - simplex)

    return mean_over_pairs(of_tile, rows, mask)


def tile_cosines(left: Array, right: Array) -> Array:
    r"""Return $\cos(v_j, v_k)$ (t, u) of the rows of `left` (t, d) and `right` (u, d)."""
    return matmul(unit_rows(left), unit_rows(right).T)


def tile_squared_distances(left: Array, right: Array, counted: Array) -> Array:
    r"""Return $|v_j - v_k|^2$ (t, u) of two tiles, 1 at pairs that do not count.

    Small tiles take differences. Else $(|v_j| - |v_k|)^2 + 2 |v_j| |v_k| (1 - \cos)$ costs
    one product; it loses the digits of close pairs, so a tile with such a pair takes
    differences too.
    """

    def by_differences():
        return squared_differences(left, right)

    def by_cosines():
        return (norms[0] - norms[1]) ** 2 + 2 * norms[0] * norms[1] * gaps

    if left.shape[0] * right.size <= FEW_DIFFERENCES:
        squares = by_differences()
    else:
        gaps = 1 - tile_cosines(left, right)
        norms = _norm(left, axis=1)[:, None], _norm(right, axis=1)[None]
        close = jnp.any(counted & ~(gaps >= _CLOSE))  # a row of zeros has gaps of NaN
        squares = jax.lax.cond(close, by_differences, by_cosines)
    return jnp.where(counted, squares, 1)


def distances_of_rows(rows: Array) -> Array:
    r"""Return $|v_j - v_k|^2$ (K, K) of `rows` (K, d), 0 on the diagonal."""
    own = jnp.eye(len(rows), dtype=bool)
    return jnp.where(own, 0, tile_squared_distances(rows, rows, ~own))


def simplex_cosine(rows: Array, mask: Array | None) -> Array | float:
    """Return -1/(K-1), the cosine of a simplex ETF of the rows (K, d) that count."""
    return -1 / ((len(rows) if mask is None else _size(rows, mask)) - 1)


def nonzero_rows(rows: Array, mask: Array | None) -> Array:
    """Return `rows` with 1 in rows where `mask` is False: they have a direction."""
    return rows if mask is None else jnp.where(mask[:, None], rows, 1)


def etf_gram_error(rows: Array, mask: Array | None = None) -> Array:
    r"""$| V V^\top / |V V^\top|_F - (I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1} |_F$.

    Zero if and only if the `rows` V (K, d) are a simplex ETF.

    Source: Zhu et al. (2021), NC2.
    """
    return product_etf_error(rows, rows, mask)


def product_etf_error(rows: Array, others: Array, mask: Array | None = None) -> Array:
    r"""$| V C^\top / |V C^\top|_F - (I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1} |_F$.

    For `rows` V (K, d) and `others` C (K, d). The product (K, K) is in memory up to 2048
    classes. Beyond, if K > d + 1, the error comes from
    $|V C^\top|_F^2 = \sum (V^\top V \circ C^\top C)$ and the trace of $V C^\top$: the rank
    d keeps it away from 0, so that no digits are lost. Else it comes row tile by row tile.

    Source: Zhu et al. (2021), NC3.
    """
    rows, others = check_rows(rows, others)
    rows, others = (at_unit_scale(_kept(matrix, mask)) for matrix in (rows, others))
    size, dim = rows.shape
    if size <= FEW_CLASSES:
        product = at_unit_scale(matmul(rows, others.T))
        return _norm(product / jnp.linalg.norm(product) - _etf_gram(rows, mask))
    kept = jnp.ones(size, bool) if mask is None else mask
    return jax.lax.cond(
        jnp.sum(kept, dtype=jnp.int32) > dim + 1,
        _etf_error_by_dimension,
        _etf_error_by_tile,
        *(rows, others, kept),
    )


def _etf_gram(rows: Array, mask: Array | None) -> Array:
    r"""Return $(I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1}$ (K, K), 0 at masked rows."""
    identity, size = jnp.eye(len(rows), dtype=rows.dtype), len(rows)
    if mask is None:
        return (identity - 1 / size) / math.sqrt(size - 1)
    count = _size(rows, mask)
    gram = (identity - 1 / count) / jnp.sqrt(count - 1)
    return jnp.where(mask[:, None] & mask[None], gram, 0)


def _etf_error_by_dimension(rows: Array, others: Array, mask: Array) -> Array:
    """Return the error of `product_etf_error` from arrays (d, d)."""
    count = _size(rows, mask)
    grams = matmul(rows.T, rows), matmul(others.T, others)
    norm = jnp.sqrt(jnp.sum(jnp.sum(grams[0] * grams[1], axis=1)))
    trace = jnp.sum(jnp.sum(rows * others, axis=1))
    inner = trace - jnp.sum(jnp.sum(rows, axis=0) * jnp.sum(others, axis=0)) / count
    return root(2 - 2 * inner / (norm * jnp.sqrt(count - 1)))


def _etf_error_by_tile(rows: Array, others: Array, mask: Array) -> Array:
    """Return the error of `product_etf_error` from arrays (t, K)."""
    count = _size(rows, mask)

    def squares(tile, numbers, kept, norm=None):
        product = matmul(tile, others.T)
        if norm is not None:
            own = numbers[:, None] == jnp.arange(len(others), dtype=jnp.int32)[None]
            etf = (own.astype(tile.dtype) - 1 / count) / jnp.sqrt(count - 1)
            product = product / norm - jnp.where(mask[None], etf, 0)
        return jnp.sum(jnp.where(kept, jnp.sum(product**2, axis=1), 0))

    norm = jnp.sqrt(sum_over_tiles(squares, rows, mask))
    return root(sum_over_tiles(partial(squares, norm=norm), rows, mask))


def self_duality(
    rows: Array, others: Array, squared: bool = False, mask: Array | None = None
) -> Array:
    r"""$| V/|V|_F - C/|C|_F |_F$ of `rows` V and `others` C, both (K, d).

    `squared=True` returns the square, which Papyan, Han, Donoho (2020) plot.
    """
    rows, others = check_rows(rows, others)
    rows, others = (at_unit_scale(_kept(matrix, mask)) for matrix in (rows, others))
    difference = rows / jnp.linalg.norm(rows) - others / jnp.linalg.norm(others)
    distance_squared = jnp.sum(difference**2)
    return distance_squared if squared else root(distance_squared)


def row_cosines(rows: Array, others: Array) -> Array:
    r"""Return $\cos(v_k, c_k)$ (K,) of matching rows of two (K, d) matrices."""
    rows, others = check_rows(rows, others)
    return jnp.sum(unit_rows(rows) * unit_rows(others), axis=1)


def row_dots(rows: Array, others: Array) -> Array:
    r"""Return $v_k^\top c_k$ (K,) of matching rows of two (K, d) matrices."""
    rows, others = check_rows(rows, others)
    return jnp.sum(rows * others, axis=1)


def row_distances(rows: Array, others: Array) -> Array:
    r"""Return $|v_k - c_k|$ (K,) of matching rows of two (K, d) matrices."""
    rows, others = check_rows(rows, others)
    return _norm(rows - others, axis=1)


def _norm(array: Array, axis: int | None = None) -> Array:
    """Return the norm over all entries or along `axis`, with slope 0 at 0."""
    return root(jnp.sum(array**2, axis=axis))


def _kept(rows: Array, mask: Array | None) -> Array:
    """Return `rows` with 0 in rows where `mask` is False."""
    return rows if mask is None else jnp.where(mask[:, None], rows, 0)


def _size(rows: Array, mask: Array) -> Array:
    """Return the number of rows where `mask` is True, in the dtype of `rows`."""
    return jnp.sum(mask, dtype=jnp.int32).astype(rows.dtype)
