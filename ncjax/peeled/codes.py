r"""Softmax codes: KKT directions of minimum-norm separation in closed form, at any depth.

Collapse is one of them. With three factors or more another code may have a smaller
norm, and with few dimensions collapse does not fit.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_integer, check_sizes, float_dtype
from ncjax.peeled.factors import balanced_params, norm_of_matrix, truncated_svd
from ncjax.peeled.polygon import polygon_factors
from ncjax.types import DeepParams, Params

# Up to this K the codes have blocks of all sizes, beyond it blocks of one size.
_ALL_SIZES = 10


class SoftmaxCode(NamedTuple):
    r"""A direction that satisfies the KKT conditions, at a least margin of 1."""

    name: str
    params: Params | DeepParams  # `Params` for depth 1; balanced
    value: float  # V = |Z|²/2 = (p/2) n^(1/p) Σ σ_i^(2/p)
    matrix: np.ndarray  # M (K, K), logits of the class means: column k for class k
    singular_values: np.ndarray  # (rank,)  σ_i of M, descending
    rank: int  # the least width that holds the code


def softmax_codes(
    num_classes: int,
    depth: int = 1,
    per_class: int = 1,
    *,
    dim: int | None = None,
    dtype=None,
) -> dict[str, SoftmaxCode]:
    r"""Return directions that satisfy the KKT conditions at p = depth + 1 factors.

    A code is given by the logits M (K, K) of its class means. Let
    $P_b = I - \tfrac1b \mathbf 1 \mathbf 1^\top$, and n the samples of a class.

    | name | $V / (\tfrac p2 n^{1/p})$ | rank |
    | --- | --- | --- |
    | simplex | $K - 1$ | K - 1 |
    | polygon | $2 (\tfrac{g K}2)^{2/p}$ | 2 |
    | pairs (m of them) | $m \, 2^{2/p}$ | m |
    | simplices 3+2 | $\sum_i (b_i - 1) (\tfrac{b_i}{b_i - 1})^{2/p}$ | $\sum b_i - m$ |
    | ... + q apexes | adds $q - 1 + (1 - \tfrac qK)^{1/p}$ | q more |

    - simplex: neural collapse, $M = P_K$.
    - polygon: $M_{jk} = g \cos \tfrac{2 \pi (j - k)}{K}$ with $g^{-1} = 1 - \cos
      \tfrac{2 \pi}K$.
    - simplices: m >= 2 blocks of $b_1 + b_2 + \dots$ classes, block-diagonal M with the
      blocks $\tfrac{b_i}{b_i - 1} P_{b_i}$. Margins across blocks are 1.
    - pairs: antipodal pairs, all $b_i = 2$.
    - apexes: the last q classes are no part of a block. Each has its column of $P_K$, and
      its features are orthogonal to all features of the blocks. Pairs + apex at K = 5 is
      the square pyramid.

    **Which are minima.** With one more dimension than its rank, every code but the simplex
    is a strict saddle for p = 2. For p >= 3 directions orthogonal to a code have a positive
    eigenvalue, so a minimum at dim = rank is one at any dim. The following is numerical.

    - Searches at dim = rank, for p = 2, 3 and 4 and K <= 8, came back to the simplex, the
      polygon and the pairs with any number of apexes. From all codes with a block of three
      or more they fell to smaller norms.
    - For p = 2 and $\tfrac K2 \le d \le K - 2$ no start (K <= 12) ended below the pairs
      with $2d - K$ apexes, $V = \sqrt n \, (K - 1 + \sqrt{2 (K - d) / K})$.
    - The list is not complete. `ncjax.solve_separation` finds smaller norms for few
      dimensions (K = 7, d = 3) and for odd K at four factors (K = 7, p = 4).

    Args:
      num_classes: `K`, at least 2.
      depth: `L`, the number of layers.
      per_class: `n`, samples of each class.
      dim: width of all layers: codes of a larger rank are left out. None gives every code,
        and each the width of its rank.
      dtype: floating dtype of the params; JAX's default if None.

    Returns:
      Dictionary from names to `SoftmaxCode`. Up to K = 10 it has blocks of all sizes from
      2 on, beyond it blocks of one size.

    Raises:
      ValueError: a size is out of range.

    Source: Jiang et al., "Generalized neural collapse for a large number of classes" (2023)
    for softmax codes; Súkeník, Lampert, Mondelli (NeurIPS 2024), Garrod and Keating (2025)
    and Garrod et al. (2026, arXiv 2605.23087) for depth. The formulas of blocks and apexes
    are ncjax's.

    >>> import ncjax
    >>> codes = ncjax.softmax_codes(6, depth=2)
    >>> best = min(codes.values(), key=lambda code: code.value)
    >>> best.name, best.rank, round(best.value / 1.5, 4)
    ('pairs', 3, 4.7622)
    """
    check_sizes(num_classes=num_classes, per_class=per_class)
    check_integer("depth", depth, least=1)
    if dim is not None:
        check_integer("dim", dim, least=1)
    dtype = float_dtype(dtype)
    codes = {}
    for name, matrix in code_matrices(num_classes):
        _, singular, _ = truncated_svd(matrix)
        rank = len(singular)
        if dim is not None and dim < rank:
            continue
        scaled = math.sqrt(per_class) * matrix
        params = balanced_params(
            scaled, (per_class,) * num_classes, depth, dim or rank, dtype
        )
        value = norm_of_matrix(scaled, depth + 1)
        codes[name] = SoftmaxCode(name, params, value, matrix, singular, rank)
    return codes


def code_matrices(num_classes: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the matrix M (K, K) at one sample a class of every code."""
    yield "simplex", np.eye(num_classes) - 1 / num_classes
    if num_classes >= 5:
        W, rows, _ = polygon_factors(num_classes, per_class=1)
        yield "polygon", W @ rows.T
    for apexes in range(num_classes - 3):
        for blocks in _blocks(num_classes - apexes, num_classes <= _ALL_SIZES):
            yield _name(blocks, apexes), _simplices(blocks, apexes)


def fitting_matrices(num_classes: int, dim: int) -> list[np.ndarray]:
    """Return the matrices (K, K) of the codes whose rank is at most dim."""
    return [M for _, M in code_matrices(num_classes) if len(truncated_svd(M)[1]) <= dim]


def _blocks(total: int, all_sizes: bool) -> list[tuple[int, ...]]:
    """Return the ways to split classes into at least two blocks of at least two."""
    if all_sizes:
        return [blocks for blocks in _split(total, total) if len(blocks) > 1]
    sizes = range(total // 2, 1, -1)
    return [(size,) * (total // size) for size in sizes if total % size == 0]


def _split(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Yield partitions of a number into parts from 2 to `largest`, descending."""
    if total == 0:
        yield ()
    for first in range(min(total, largest), 1, -1):
        for rest in _split(total - first, first):
            yield first, *rest


def _name(blocks: tuple[int, ...], apexes: int) -> str:
    sizes = "+".join(str(size) for size in blocks)
    name = "pairs" if max(blocks) == 2 else f"simplices {sizes}"
    if apexes:
        name += " + apex" if apexes == 1 else f" + {apexes} apexes"
    return name


def _simplices(blocks: tuple[int, ...], apexes: int) -> np.ndarray:
    """Return the matrix with a simplex for each block; margins across blocks are 1."""
    num_classes = sum(blocks) + apexes
    matrix, first = np.eye(num_classes) - 1 / num_classes, 0
    matrix[:, : sum(blocks)] = 0
    for size in blocks:
        block = slice(first, first + size)
        matrix[block, block] = (size * np.eye(size) - 1) / (size - 1)
        first += size
    return matrix
