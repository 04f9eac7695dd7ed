r"""Linear systems with the Hessian of the loss, by their block structure.

A linearly implicit step of the flow solves $(I + c\, \nabla^2\mathcal L / \mathcal L) X =
R$ for several right-hand sides. The Hessian couples the samples only through the
classifier: given $dW$ they decouple, which leaves one system of K d unknowns.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ncjax.numerics import matmul
from ncjax.types import Array, Params


class Eliminated(NamedTuple):
    """`I + c ∇²L/L` with the features eliminated; N = K n samples."""

    params: Params  # W (K, d), H (K, n, d)
    c: Array  # ()
    P: Array  # (N, K)        slopes of each sample's weighted loss in its logits, over L
    E: Array  # (N, K, K)     (I + c D_a W Wᵀ)⁻¹ D_a
    coupling: Array  # (K d, K d)    of dW: the Schur complement is I + c coupling


class Factored(NamedTuple):
    """`I + c ∇²L/L`, prepared for `solve`."""

    eliminated: Eliminated
    schur: Array  # (K d, K d)    inverse of the Schur complement


def factor(
    params: Params,
    slopes: tuple[Array, Array, Array],
    c: Array,
    weights: Array | None = None,
) -> Factored:
    r"""Prepare $I + c\, \nabla^2 \mathcal L / \mathcal L$ for `solve`.

    Args: as `eliminate`.

    Returns:
      `Factored`; NaN or wrong if the matrix is singular.
    """
    eliminated = eliminate(params, slopes, c, weights)
    size, dim = params.W.size, params.W.shape[1]
    schur = jnp.eye(size, dtype=params.W.dtype) + c * eliminated.coupling
    return Factored(eliminated, inverse(schur, dim))


def eliminate(
    params: Params,
    slopes: tuple[Array, Array, Array],
    c: Array,
    weights: Array | None = None,
) -> Eliminated:
    r"""Eliminate the features from $I + c\, \nabla^2 \mathcal L / \mathcal L$.

    With the slopes $P_a = \nabla \ell_a / \mathcal L$ and curvatures $D_a = \nabla^2
    \ell_a / \mathcal L$ of each sample's weighted loss in its logits $W h_a$, and $E_a =
    (I + c D_a W W^\top)^{-1} D_a$, eliminating the features leaves for $dW$

    $$dW - c^2 \sum_a P_a P_a^\top dW + c \sum_a T_a^* E_a T_a\, dW, \qquad
    T_a\, dW = dW h_a - c\, W dW^\top P_a.$$

    Args:
      params: `W` (K, d) and `H` (K, n, d).
      slopes: `kernels.error_slopes(params, weights)`; the caller needs its log loss too.
      c: positive scalar, small enough that the matrix is positive definite.
      weights: (K, n) weights of the samples, None for 1.

    Returns:
      `Eliminated`; NaN or wrong if a block of a sample is singular.

    Source: ncjax.
    """
    W, H = params
    num_classes, dim = W.shape
    h = H.reshape(-1, dim)
    P, E = _slopes_and_eliminated_curvatures(params, slopes, c, weights)
    # Sums over samples are matrix products that contract the samples.
    samples = h.shape[0]
    chex.assert_shape([P, E], [(samples, num_classes), (samples, num_classes, num_classes)])
    h_P = (h[:, :, None] * P[:, None, :]).reshape(samples, -1)
    EW = matmul(E, W)
    WEW = matmul(W.T, EW)
    size = num_classes * dim

    def kron(left, right):
        """Return the sum over samples of left (K, K) ⊗ right (d, d), (K d, K d)."""
        product = matmul(left.reshape(samples, -1).T, right.reshape(samples, -1))
        product = product.reshape(num_classes, num_classes, dim, dim)
        return product.transpose(0, 2, 1, 3).reshape(size, size)

    cross = matmul(EW.reshape(samples, -1).T, h_P)  # (i f, e l)
    cross = cross.reshape(num_classes, dim, dim, num_classes)
    cross = cross.transpose(0, 2, 3, 1).reshape(size, size)  # (i e, l f)
    outer_h = h[:, :, None] * h[:, None, :]
    outer_P = P[:, :, None] * P[:, None, :]
    inner = c * WEW - jnp.eye(dim, dtype=W.dtype)[None]
    coupling = kron(E, outer_h) - c * (cross + cross.T) + c * kron(outer_P, inner)
    chex.assert_shape([WEW, coupling], [(samples, dim, dim), (size, size)])
    return Eliminated(params, c, P, E, coupling)


def solve(factored: Factored, right: Params) -> Params:
    r"""Solve $(I + c\, \nabla^2\mathcal L/\mathcal L) X = R$.

    Args:
      factored: result of `factor`.
      right: `R`, shaped as the params.

    Returns:
      `X`, shaped as the params.
    """
    eliminated, schur = factored
    p, rest = eliminate_right(eliminated, right)
    dW = matmul(schur, rest.reshape(-1)).reshape(right.W.shape)
    return Params(dW, features(eliminated, right.H, p, dW))


def eliminate_right(eliminated: Eliminated, right: Params) -> tuple[Array, Array]:
    """Return the response of the logits' slopes with dW = 0, and the right side for dW.

    They have shapes (N, K) and (K, d).
    """
    (W, H), c, P, E, _ = eliminated
    h = H.reshape(-1, W.shape[1])
    r = right.H.reshape(h.shape)
    p = matmul(E, matmul(r, W.T)[..., None])[..., 0]
    chex.assert_shape([r, p], [h.shape, P.shape])
    rest = (
        right.W - c * matmul(P.T, r) - c * (matmul(p.T, h) - c * matmul(matmul(P.T, p), W))
    )
    return p, rest


def features(eliminated: Eliminated, right: Array, p: Array, dW: Array) -> Array:
    """Return dH for dW, the right side (K, n, d) and `p` of `eliminate_right`."""
    (W, H), c, P, E, _ = eliminated
    h = H.reshape(-1, W.shape[1])
    r = right.reshape(h.shape)
    pulled = matmul(P, dW)
    p = p + matmul(E, (matmul(h, dW.T) - c * matmul(pulled, W.T))[..., None])[..., 0]
    dh = r - c * pulled - c * matmul(p, W)
    return dh.reshape(H.shape)


def _slopes_and_eliminated_curvatures(
    params: Params, slopes, c: Array, weights: Array | None
) -> tuple[Array, Array]:
    r"""Return `P` (N, K) and `E` (N, K, K), inverting positive definite matrices only.

    In the logits of the other classes minus the logit of the own class, with $r_j^2 = P_j$
    and the weight $\omega$ of the sample,
    $D = \operatorname{diag}(r)\, (I - \tfrac{\mathcal L}{\omega}\, r r^\top)
    \operatorname{diag}(r)$. Its root is known, $D = F F^\top$ with
    $F = \operatorname{diag}(r)\, (I - \beta r r^\top)$. Therefore
    $E = F (I + c F^\top V V^\top F)^{-1} F^\top$, where V holds the differences of the rows
    of W.
    """
    num_classes = params.W.shape[0]
    log_loss, P, right = slopes
    others = ~jnp.eye(num_classes, dtype=bool)[:, None, :]
    root = jnp.sqrt(jnp.where(others, P, 0))  # r, (K, n, K)
    beta = jnp.exp(log_loss) / (1 + jnp.sqrt(right))  # (K, n)
    if weights is not None:
        # A sample left out has r = 0, so its beta does not matter.
        beta = beta / jnp.where(weights > 0, weights, 1)

    def scale(matrix):
        return root[..., :, None] * matrix * root[..., None, :]

    def deflate(matrix):
        """`(I - β r rᵀ) M (I - β r rᵀ)` for symmetric M."""
        image = jnp.sum(matrix * root[..., None, :], axis=-1)
        value = jnp.sum(root * image, axis=-1, keepdims=True)
        half = beta[..., None] * (image - beta[..., None] * value * root / 2)
        crossed = half[..., :, None] * root[..., None, :]
        return matrix - crossed - jnp.swapaxes(crossed, -1, -2)

    chex.assert_shape([root, beta], [P.shape, P.shape[:2]])
    differences = params.W[None] - params.W[:, None]  # (K, K, d)
    gram = matmul(differences, jnp.swapaxes(differences, -1, -2))[:, None]
    eye = jnp.eye(num_classes, dtype=gram.dtype)[None, None]
    E = scale(deflate(inverse(eye + c * deflate(scale(gram)))))
    # A common shift of the logits changes nothing: rows and columns sum to zero.
    own = ~others
    E = jnp.where(own[..., None], -jnp.sum(E, axis=-2, keepdims=True), E)
    E = jnp.where(own[..., None, :], -jnp.sum(E, axis=-1, keepdims=True), E)
    shape = (-1, num_classes)
    return P.reshape(shape), E.reshape(*shape, num_classes)


def inverse(matrix: Array, block: int = 1) -> Array:
    """Return the inverse of positive definite matrices by Gauss-Jordan elimination.

    It takes `M / block` matrix products for the whole batch. Batched LAPACK on CPU takes
    one matrix after another and solves with it column by column. There is no pivoting,
    which positive definite matrices do not need. On accelerators, where M small steps one
    after another are slow, a matrix of several blocks takes an LU decomposition.

    Args:
      matrix: (..., M, M), symmetric positive definite.
      block: number of rows eliminated at once, a divisor of M.

    Returns:
      (..., M, M) array, NaN or infinite if a pivot is zero.

    Raises:
      ValueError: block does not divide M.
    """
    size = matrix.shape[-1]
    if size % block:
        raise ValueError(f"block must divide the size {size}, got {block}")

    def sweep(k, matrix):
        """Exchange one block of unknowns for its right-hand sides."""
        start = k * block
        rows = jax.lax.dynamic_slice_in_dim(matrix, start, block, -2)
        columns = jax.lax.dynamic_slice_in_dim(matrix, start, block, -1)
        pivot = jax.lax.dynamic_slice_in_dim(rows, start, block, -1)
        pivot = 1 / pivot if block == 1 else inverse(pivot)
        rows = _product(pivot, rows)
        swept = matrix - _product(columns, rows)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, pivot, start, -1)
        swept = jax.lax.dynamic_update_slice_in_dim(
            swept, -_product(columns, pivot), start, -1
        )
        return jax.lax.dynamic_update_slice_in_dim(swept, rows, start, -2)

    def by_sweeps(matrix):
        return jax.lax.fori_loop(0, size // block, sweep, matrix)

    if block in (1, size):
        return by_sweeps(matrix)
    return jax.lax.platform_dependent(matrix, cpu=by_sweeps, default=jnp.linalg.inv)


def _product(left: Array, right: Array) -> Array:
    """Return the matrix product, elementwise if it is an outer product."""
    return left * right if left.shape[-1] == 1 else matmul(left, right)
