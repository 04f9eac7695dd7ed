r"""Linear systems with the Hessian of the loss of a deep point.

The loss depends on the layers through their product $M = W_L \cdots W_1$ alone. With the
samples eliminated at $(M, H)$ as for two factors (`block_solve`), one system of all entries
of the layers is left.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from ncjax.flow import block_solve
from ncjax.numerics import einsum, matmul
from ncjax.types import Array, DeepParams, Params


class Factored(NamedTuple):
    """`I + c ∇²L/L` of a deep point, prepared for `solve`; D entries of all layers."""

    eliminated: block_solve.Eliminated  # at (M, H)
    tangents: Array  # (K d_0, D)    derivative of M in the layers
    schur: Array  # (D, D)    inverse of the Schur complement, the matrix for the layers


def factor(
    params: DeepParams,
    slopes: tuple[Array, Array, Array],
    c: Array,
    weights: Array | None = None,
) -> Factored:
    r"""Prepare $I + c\, \nabla^2 \mathcal L / \mathcal L$ for `solve`.

    Let $I + c S$ be the Schur complement for $dM$ at the two factors $(M, H)$, T the
    derivative of M in the layers, and $G = \sum_a P_a h_a^\top$ the slope of the loss in M,
    over the loss. For the layers the Schur complement is

    $$I + c\, (\nabla^2 \langle G, M \rangle + T^\top S\, T).$$

    Args:
      params: point of any number of layers.
      slopes: `kernels.error_slopes` at the logits of `params`.
      c: positive scalar, small enough that the matrix is positive definite.
      weights: (K, n) weights of the samples, None for 1.

    Returns:
      `Factored`; NaN or wrong if the matrix is singular.

    Source: ncjax.
    """
    layers, H = params
    above, below = _products(layers, H.shape[-1])
    M = matmul(above[0], layers[0])
    eliminated = block_solve.eliminate(Params(M, H), slopes, c, weights)
    tangents = jnp.concatenate(
        [_kron(A, B.T) for A, B in zip(above, below, strict=True)], axis=1
    )
    G = einsum("kij,kid->jd", slopes[1], H)
    coupling = matmul(tangents.T, matmul(eliminated.coupling, tangents))
    coupling += _bending(layers, above, below, G)
    schur = jnp.eye(tangents.shape[1], dtype=M.dtype) + c * coupling
    # A divisor of the size of every layer.
    block = math.gcd(*(W.shape[1] for W in layers))
    return Factored(eliminated, tangents, block_solve.inverse(schur, block))


def solve(factored: Factored, right: DeepParams) -> DeepParams:
    """Return `X` for `R` as `block_solve.solve` does, both shaped as the deep point."""
    eliminated, tangents, schur = factored
    M = eliminated.params.W
    p, rest = block_solve.eliminate_right(eliminated, Params(jnp.zeros_like(M), right.H))
    flat = jnp.concatenate([W.reshape(-1) for W in right.layers])
    flat = matmul(schur, flat + matmul(tangents.T, rest.reshape(-1)))
    dM = matmul(tangents, flat).reshape(M.shape)
    sizes = [W.size for W in right.layers]
    ends = [sum(sizes[:number]) for number in range(1, len(sizes))]
    parts = zip(jnp.split(flat, ends), right.layers, strict=True)
    layers = tuple(part.reshape(W.shape) for part, W in parts)
    return DeepParams(layers, block_solve.features(eliminated, right.H, p, dM))


def _products(layers, dim: int) -> tuple[list[Array], list[Array]]:
    """Return for each layer the products of the layers above it and of the ones below.

    They have shapes (K, d_l) and (d_{l-1}, d_0).
    """
    dtype, num_classes = layers[0].dtype, layers[-1].shape[0]
    above, below = [jnp.eye(num_classes, dtype=dtype)], [jnp.eye(dim, dtype=dtype)]
    for W in reversed(layers[1:]):
        above.insert(0, matmul(above[0], W))
    for W in layers[:-1]:
        below.append(matmul(W, below[-1]))
    return above, below


def _bending(layers, above, below, G: Array) -> Array:
    """Return the Hessian of `<G, M>` in the layers, (D, D): M is linear in each of them."""
    count = len(layers)
    blocks = [[jnp.zeros((W.size, V.size), G.dtype) for V in layers] for W in layers]
    for low in range(count):
        between = jnp.eye(layers[low].shape[0], dtype=G.dtype)
        for high in range(low + 1, count):
            slope = matmul(matmul(above[high].T, G), below[low].T)
            # dW_high[a, i] between[i, j] dW_low[j, b] slope[a, b]
            block = slope[:, None, None, :] * between[None, :, :, None]
            block = block.reshape(layers[high].size, layers[low].size)
            blocks[high][low], blocks[low][high] = block, block.T
            between = matmul(layers[high], between)
    return jnp.block(blocks)


def _kron(left: Array, right: Array) -> Array:
    """Return `left ⊗ right`, which maps X, row by row, to `left X rightᵀ`."""
    product = left[:, None, :, None] * right[None, :, None, :]
    rows, columns = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    return product.reshape(rows, columns)
