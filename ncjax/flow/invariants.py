"""The flow's two invariants: how far a solver has moved them, and back."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_params
from ncjax.numerics import matmul, power_of_two
from ncjax.peeled.kernels import balance, squared_norm
from ncjax.types import Array, Params

# Directions of a share below this are as good as empty.
_FLOOR = 1e-7


class InvariantDrift(NamedTuple):
    """How far the two conserved quantities of the flow have moved: the solver's error."""

    balance: Array  # |B(Z) - B(Z_0)|_F / |Z|²,          B of `ncjax.balance`
    classifier_sum: Array  # |Σ_k w_k - Σ_k w_k(0)| / |Z|


def invariant_drift(params: Params, start: Params) -> InvariantDrift:
    r"""Change of the flow's invariants between two points of one trajectory, relative.

    $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and $\sum_k w_k$ are conserved, so what
    they move by is the solver's own error.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d).
      start: earlier state `Z_0` of the same shapes.

    Returns:
      `InvariantDrift` of scalars, in units of `|Z|²` and `|Z|`; 0 where nothing has moved,
      at the origin too.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    return drift(*_check_alike(params, start))


def drift(params: Params, start: Params) -> InvariantDrift:
    """`invariant_drift` of states that are checked already."""
    scale = power_of_two(params)
    params, start = jax.tree.map(lambda leaf: leaf / scale, (params, start))
    size = squared_norm(params)
    moved = balance(params) - balance(start)
    sums = jnp.sum(params.W, axis=0) - jnp.sum(start.W, axis=0)
    return InvariantDrift(
        balance=_relative(moved, size), classifier_sum=_relative(sums, jnp.sqrt(size))
    )


def _relative(moved: Array, size: Array) -> Array:
    """`|moved| / size`, 0 with slope 0 where nothing has moved."""
    still = ~jnp.any(moved != 0)
    length = jnp.linalg.norm(jnp.where(still, 1, moved))
    return jnp.where(still, 0, length / jnp.where(still, 1, size))


def _check_alike(params: Params, start: Params) -> tuple[Params, Params]:
    """Both as JAX arrays, once of the same shapes and dtype."""
    params, start = check_params(params), check_params(start)
    if params.H.shape != start.H.shape or params.H.dtype != start.H.dtype:
        raise ValueError(
            f"expected a start like params, with H {params.H.dtype} {params.H.shape}, got "
            f"{start.H.dtype} {start.H.shape}"
        )
    return params, start


def restore_invariants(params: Params, start: Params) -> Params:
    r"""The nearby state whose two invariants are those of `start`.

    The mean row of W is replaced by that of `start`, which no margin sees. For the centred
    rows, with the balance $W^\top W - \sum h h^\top$ off by $\Delta$, a symmetric X with
    $G X + X G = \Delta$, $G = W^\top W + \sum h h^\top$, gives $W (I + X)$ and $(I - X) h$:
    to first order the balance is restored and no logit $W h$ moves.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d), with small errors.
      start: earlier state of the same trajectory.

    Returns:
      `Params`.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    return restore(*_check_alike(params, start))


def restore(params: Params, start: Params) -> Params:
    """`restore_invariants` of states that are checked already."""
    mean = jnp.mean(start.W, axis=0, keepdims=True)
    target = balance(Params(start.W - mean, start.H))
    W, H = params.W - jnp.mean(params.W, axis=0, keepdims=True), params.H
    for _ in range(2):  # Newton's method: each leaves the square of the error
        h = H.reshape(-1, H.shape[-1])
        gram = matmul(W.T, W)
        gram += matmul(h.T, h)
        size = jnp.trace(gram)
        # Directions that no row has cannot be put right, nor need they.
        gram += _FLOOR * size * jnp.eye(gram.shape[0], dtype=gram.dtype)
        X, _ = jax.scipy.sparse.linalg.cg(
            partial(_lyapunov, gram),
            target - balance(Params(W, H)),
            atol=float(jnp.finfo(gram.dtype).eps) * size,
            maxiter=50,
        )
        W = W + matmul(W, X)
        H = H - matmul(H, X)
    return Params(W + mean, H)


def _lyapunov(gram: Array, X: Array) -> Array:
    """`G X + X G`."""
    return matmul(gram, X) + matmul(X, gram)
