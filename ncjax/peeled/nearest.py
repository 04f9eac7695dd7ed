"""Which softmax code a point is, up to the order of the classes and rotations."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np

from ncjax.checks import check_positive
from ncjax.peeled.codes import SoftmaxCode, code_matrices
from ncjax.peeled.factors import margins_of_matrix, norm_of_matrix
from ncjax.peeled.optimum import Separation
from ncjax.peeled.points import check_any_point, degree_of, last_factors
from ncjax.types import DeepParams, Params

OTHER = "other"


class NearestCode(NamedTuple):
    """The nearest of several codes to a point."""

    name: str  # "other" if no code is within the tolerance
    distance: float  # to the nearest code, in [0, √2]
    value: float  # V of the class means at a least margin of 1; inf if not separated


def nearest_code(
    params: Params | DeepParams,
    codes: Mapping[str, SoftmaxCode | Separation | Params | DeepParams] | None = None,
    weights=None,
    *,
    tol: float = 0.06,
) -> NearestCode:
    r"""Name the softmax code that a point is, up to rotation and the order of the classes.

    M (K, K) are the logits of the class means, without the mean of each column, divided by
    their norm $|M|_F$. Rotations of the features do not change M. The distance to a code
    with the matrix C is the larger of two bounds from below of $\min_\Pi |M - \Pi C
    \Pi^\top|_F$ over permutations $\Pi$:

    - the distance of the singular values, $\sqrt{\sum_i (\sigma_i(M) - \sigma_i(C))^2}$;
    - the distance of the classes in their best assignment. A class k is described by
      $M_{kk}$ and the sorted other entries of its column and of its row.

    At finite time a flow is at a distance of order $1 / \log t$ from its code. The search
    for the assignment runs on the host, outside `jax.jit` and `jax.vmap`.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      codes: the codes by name, from `softmax_codes`, `solve_separation` or as points. None
        takes all of `softmax_codes(K)`, of any rank.
      weights: (K, n) or (K,) weights of the samples or classes; samples of weight 0 are
        left out of the class means. None is 1 everywhere.
      tol: largest distance of a match. The codes of `softmax_codes` are at least
        0.126 apart for K <= 10.

    Returns:
      `NearestCode`, in Python's numbers. The value is $V = \tfrac p2 \sum_i
      \sigma_i^{2/p}$ of the class means, at most $|Z|^2 / (2 q_{\min}^{2/p})$.

    Raises:
      ValueError: shapes, dtypes or weights do not fit, the class means of the logits are
        equal, there is no code, or a code has another number of classes.

    Source: ncjax.

    >>> import ncjax
    >>> pairs = ncjax.softmax_codes(6, depth=2, per_class=3)["pairs"]
    >>> ncjax.nearest_code(pairs.params).name
    'pairs'
    """
    check_positive("tol", tol)
    matrix, counts = _class_matrix(params, weights)
    candidates = _matrices(len(matrix), codes)
    mark = _mark(matrix)
    distances = {name: _distance(mark, other) for name, other in candidates.items()}
    name = min(distances, key=lambda name: distances[name])
    distance = distances[name]
    return NearestCode(
        name=name if distance <= tol else OTHER,
        distance=distance,
        value=_value(matrix, counts, degree_of(params)),
    )


class _Mark(NamedTuple):
    """What permutations and rotations leave of a matrix, except for the order of rows."""

    singular_values: np.ndarray  # (K,)
    classes: np.ndarray  # (K, 2K - 1)


def _class_matrix(params, weights, name="params") -> tuple[np.ndarray, np.ndarray]:
    """Return the centred logits of the class means (K, K), of norm 1, and counts."""
    params, weights = check_any_point(params, weights)
    # The size of a factor does not change the direction, but products overflow with it.
    W, H = last_factors(jax.tree.map(_at_unit_size, params))
    kept = np.ones(H.shape[:2]) if weights is None else np.asarray(weights) > 0
    counts = kept.sum(axis=1)
    means = np.asarray(H, float).sum(axis=1) / counts[:, None]
    logits = np.asarray(W, float) @ means.T
    logits -= logits.mean(axis=0)
    size = np.linalg.norm(logits)
    if not 0 < size < np.inf:
        raise ValueError(
            f"{name} must have class means of different and finite logits, got centred "
            f"logits of norm {size:g} at factors of largest entry 1"
        )
    return logits / size, counts


def _at_unit_size(leaf) -> np.ndarray:
    leaf = np.asarray(leaf)
    with np.errstate(invalid="ignore"):  # infinite entries, which the caller reports
        return leaf / (np.abs(leaf).max() or 1)


def _matrices(num_classes: int, codes) -> dict[str, _Mark]:
    """Return what identifies each code."""
    if codes is None:
        return _catalogue(num_classes)
    if not isinstance(codes, Mapping) or not codes:
        raise ValueError(
            "codes must be a dictionary from names to codes, such as "
            f"ncjax.softmax_codes(K), got {type(codes).__name__} without codes"
        )
    out = {}
    for name, code in codes.items():
        if isinstance(code, SoftmaxCode):
            matrix = code.matrix
        elif isinstance(code, Separation):
            matrix, _ = _class_matrix(code.params, code.weights, f"code {name!r}")
        else:
            matrix, _ = _class_matrix(code, None, f"code {name!r}")
        if len(matrix) != num_classes:
            raise ValueError(
                f"codes must have the K = {num_classes} classes of params, got {name!r} "
                f"of {len(matrix)} classes"
            )
        out[name] = _mark(matrix / np.linalg.norm(matrix))
    return out


@lru_cache
def _catalogue(num_classes: int) -> dict[str, _Mark]:
    return {
        name: _mark(matrix / np.linalg.norm(matrix))
        for name, matrix in code_matrices(num_classes)
    }


def _mark(matrix: np.ndarray) -> _Mark:
    # Both a column and a row hold each entry, so the halves add to |M|² = 1.
    rows = np.sort(_others(matrix), axis=1) / np.sqrt(2)
    columns = np.sort(_others(matrix.T), axis=1) / np.sqrt(2)
    classes = np.concatenate([np.diag(matrix)[:, None], rows, columns], axis=1)
    return _Mark(np.linalg.svd(matrix, compute_uv=False), classes)


def _others(matrix: np.ndarray) -> np.ndarray:
    """Return the entries beside the diagonal, row by row, (K, K - 1)."""
    size = len(matrix)
    return matrix[~np.eye(size, dtype=bool)].reshape(size, size - 1)


def _distance(one: _Mark, other: _Mark) -> float:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    spectra = np.linalg.norm(one.singular_values - other.singular_values)
    difference = one.classes[:, None] - other.classes
    costs = np.sum(difference**2, axis=-1)
    assigned = np.sqrt(costs[linear_sum_assignment(costs)].sum())
    return float(max(spectra, assigned))


def _value(matrix: np.ndarray, counts: np.ndarray, degree: int) -> float:
    """Return `|Z|²/2` of the class means at a least margin of 1."""
    scaled = matrix * np.sqrt(counts)
    least = margins_of_matrix(scaled, np.sqrt(counts)).min()
    return norm_of_matrix(scaled / least, degree) if least > 0 else float("inf")
