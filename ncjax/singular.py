r"""Singular value decompositions by the method that is fast on the platform.

On CPU it is LAPACK's. On a GPU of NVIDIA the two methods of cuSOLVER that JAX takes are
sequences of small steps: Jacobi rotations up to 1024 rows and columns, and QR iteration
beyond. Large matrices therefore take products there: a QR decomposition if they are tall,
the polar decomposition $A = U_p H$, and the eigendecomposition of $H$, whose eigenvalues
are the singular values of $A$. Their error is some roundings of the largest one, as with
LAPACK. The eigenvalues of $A^\top A$ would lose all values below the square root of a
rounding, where variability collapse is measured.

Source: Nakatsukasa, Higham (SIAM J. Sci. Comput. 35, 2013), for the polar decomposition.
"""

import jax
import jax.numpy as jnp

from ncjax.numerics import matmul

Array = jax.Array

# Matrices with fewer rows or columns take the default method on every platform.
LARGE = 256


def singular_values(matrix: Array) -> Array:
    """Return the singular values (q,) of a matrix (m, n), q = min(m, n), descending."""
    if min(matrix.shape) < LARGE:
        return _default_values(matrix)
    return _large_values(matrix)


def thin_svd(matrix: Array) -> tuple[Array, Array, Array]:
    r"""Return $U$ (m, q), $s$ (q,) descending and $V^\top$ (q, n) of a matrix (m, n).

    Where s is 0, or rounding beside its largest entry, a column of U may be any vector.
    """
    if min(matrix.shape) < LARGE:
        return _default(matrix)
    return _large(matrix)


def _default(matrix: Array) -> tuple[Array, Array, Array]:
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _default_values(matrix: Array) -> Array:
    return jnp.linalg.svd(matrix, compute_uv=False)


# The default method gives the derivatives: the loop of the other has no reverse one.


@jax.custom_jvp
def _large(matrix: Array) -> tuple[Array, Array, Array]:
    return jax.lax.platform_dependent(matrix, cuda=by_polar, default=_default)


@jax.custom_jvp
def _large_values(matrix: Array) -> Array:
    def values(matrix):
        return by_polar(matrix)[1]

    return jax.lax.platform_dependent(matrix, cuda=values, default=_default_values)


@_large.defjvp
def _(primals, tangents):
    return jax.jvp(_default, primals, tangents)


@_large_values.defjvp
def _(primals, tangents):
    return jax.jvp(_default_values, primals, tangents)


def by_polar(matrix: Array) -> tuple[Array, Array, Array]:
    """Return `thin_svd` by products, a polar and an eigendecomposition."""
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = by_polar(matrix.T)
        return right.T, values, left.T
    if matrix.shape[0] > matrix.shape[1]:
        basis, triangle = jnp.linalg.qr(matrix)
        left, values, right = by_polar(triangle)
        return matmul(basis, left), values, right
    with jax.default_matmul_precision("highest"):
        unitary, positive, _, _ = jax.lax.linalg.qdwh(matrix)
        vectors, values = jax.lax.linalg.eigh(positive)
    vectors, values = vectors[:, ::-1], values[::-1]
    # The smallest ones may be negative roundings.
    return matmul(unitary, vectors), jnp.maximum(values, 0), vectors.T
