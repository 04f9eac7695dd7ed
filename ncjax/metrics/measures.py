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

import jax.numpy as jnp
import numpy as np

from ncjax.metrics.inputs import check_rows
from ncjax.numerics import at_unit_scale, matmul, root
from ncjax.types import Array


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
    gram = matmul(unit, unit.T)
    return gram[np.triu_indices(len(gram), k=1)]


def cosine_deviation(rows: Array, mask: Array | None = None) -> Array:
    r"""Mean over pairs of $|\cos(v_j, v_k) + \tfrac{1}{K-1}|$, 0 for a simplex ETF.

    Source: Papyan, Han, Donoho (2020), Figure 3, for `rows` (K, d).
    """
    (rows,) = check_rows(rows)
    size = len(rows)
    if mask is None:
        return jnp.mean(jnp.abs(pair_cosines(rows) + 1 / (size - 1)))
    cosines = pair_cosines(jnp.where(mask[:, None], rows, 1))
    j, k = np.triu_indices(size, k=1)
    return jnp.mean(jnp.abs(cosines + 1 / (_size(rows, mask) - 1)), where=mask[j] & mask[k])


def etf_gram_error(rows: Array, mask: Array | None = None) -> Array:
    r"""$| V V^\top / |V V^\top|_F - (I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1} |_F$.

    Zero if and only if the `rows` V (K, d) are a simplex ETF.

    Source: Zhu et al. (2021), NC2.
    """
    return product_etf_error(rows, rows, mask)


def product_etf_error(rows: Array, others: Array, mask: Array | None = None) -> Array:
    r"""$| V C^\top / |V C^\top|_F - (I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1} |_F$.

    For `rows` V (K, d) and `others` C (K, d).

    Source: Zhu et al. (2021), NC3.
    """
    rows, others = check_rows(rows, others)
    rows, others = (at_unit_scale(_kept(matrix, mask)) for matrix in (rows, others))
    product = at_unit_scale(matmul(rows, others.T))
    return _norm(product / jnp.linalg.norm(product) - _etf_gram(rows, mask))


def _etf_gram(rows: Array, mask: Array | None) -> Array:
    r"""Return $(I - \tfrac1K \mathbf{1 1}^\top) / \sqrt{K-1}$ (K, K), 0 at masked rows."""
    identity, size = jnp.eye(len(rows), dtype=rows.dtype), len(rows)
    if mask is None:
        return (identity - 1 / size) / math.sqrt(size - 1)
    count = _size(rows, mask)
    gram = (identity - 1 / count) / jnp.sqrt(count - 1)
    return jnp.where(mask[:, None] & mask[None], gram, 0)


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
