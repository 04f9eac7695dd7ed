r"""Whiten the rows of a matrix by its singular values, with finite derivatives.

The derivatives of the factors in $A = U S V^\top$ divide by differences of singular values.
These differences are zero at neural collapse. But a metric depends on the span of equal
singular values alone, and not on its basis. `whiten` therefore has its own derivative rule,
which does not divide by such differences.
"""

import jax
import jax.numpy as jnp

from ncjax.numerics import matmul
from ncjax.singular import thin_svd
from ncjax.types import Array

# A matrix with this many times more rows than columns is tall.
_TALL = 4


@jax.custom_jvp
def whiten(rows: Array) -> tuple[Array, Array]:
    r"""Return $U$ (m, q) and $T = S^{-1} V^\top$ (q, d) of `rows` $A = U S V^\top$ (m, d).

    $T^\top T = (A^\top A)^+$ and $U = A T^\top$. A singular value counts as zero below
    $\min(m, d)$ roundings of the largest one. Its column of U and its row of T are then
    zero.

    The derivative is exact for every function that is the same for $(U, T)$ and $(U Q,
    Q^\top T)$ with Q orthogonal, such as $|T x|^2$, as long as the rank of A is constant.

    Source of the derivative: Golub, Pereyra (1973), equation (4.12), for $A^+$.
    """
    left, singular, right = _singular_vectors(rows)
    cutoff = min(rows.shape) * jnp.finfo(rows.dtype).eps * jnp.max(singular)
    kept = ~(singular <= cutoff)  # NaN is kept
    inverse = jnp.where(kept, 1 / jnp.where(kept, singular, 1), 0)
    return jnp.where(kept, left, 0), inverse[:, None] * right


def _singular_vectors(rows: Array) -> tuple[Array, Array, Array]:
    """Return the singular value decomposition; a tall matrix is first made triangular.

    The orthogonal factor costs no digits, and the decomposition of a (d, d) triangle is
    several times faster.
    """
    if rows.shape[0] < _TALL * rows.shape[1]:
        return thin_svd(rows)
    basis, triangle = jnp.linalg.qr(rows)
    left, singular, right = thin_svd(triangle)
    return matmul(basis, left), singular, right


@whiten.defjvp
def _whiten_jvp(primals, tangents):
    (rows,), (moved,) = primals, tangents
    left, T = whiten(rows)
    # With G = A⁺ (A⁺)ᵀ this dT has Tᵀ dT + dTᵀ T = dG, written in products of q columns.
    inner = matmul(left.T, matmul(moved, T.T))
    spread = matmul(left.T, rows)  # S Vᵀ
    outside = moved - matmul(matmul(moved, spread.T), T)
    along = matmul(matmul(T, T.T), matmul(left.T, outside))
    dT = along - matmul(inner + inner.T, T) / 2
    return (left, T), (matmul(moved, T.T) + matmul(rows, dT.T), dT)
