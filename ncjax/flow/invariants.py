r"""The two invariants of the flow: their drift under a solver, and their restoration.

The flow conserves the balance $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and the sum
$\sum_k w_k$ of the classifier's rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_params
from ncjax.numerics import at_unit_scale, matmul, power_of_two, widen
from ncjax.peeled.kernels import balance, squared_norm
from ncjax.types import Array, Params

# Directions that hold a smaller share of the squared norm count as empty.
_FLOOR = 1e-7


class InvariantDrift(NamedTuple):
    """Relative change of the two conserved quantities, which is the solver's error."""

    balance: Array  # |B(Z) - B(Z_0)|_F / |Z|²,          B of `ncjax.balance`
    classifier_sum: Array  # |Σ_k w_k - Σ_k w_k(0)| / |Z|


def invariant_drift(params: Params, start: Params) -> InvariantDrift:
    r"""Relative change of the flow's invariants between two points of one trajectory.

    $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and $\sum_k w_k$ are conserved, so any
    change is the solver's error.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d).
      start: earlier state `Z_0` of the same shapes.

    Returns:
      `InvariantDrift` of scalars, in units of `|Z|²` and `|Z|`, float32 for half precision;
      0 if nothing has moved, also at the origin.

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
    """Return `|moved| / size`; 0 with slope 0 if nothing has moved."""
    still = ~jnp.any(moved != 0)
    moved = jnp.where(still, 1, moved)
    length = power_of_two(moved) * jnp.linalg.norm(at_unit_scale(moved))
    return jnp.where(still, 0, length / jnp.where(still, 1, size))


def _check_alike(params: Params, start: Params) -> tuple[Params, Params]:
    """Return both as JAX arrays, or raise ValueError if shapes or dtypes differ."""
    params, start = check_params(params), check_params(start)
    if params.H.shape != start.H.shape or params.H.dtype != start.H.dtype:
        raise ValueError(
            f"expected a start like params, with H {params.H.dtype} {params.H.shape}, got "
            f"{start.H.dtype} {start.H.shape}"
        )
    return widen((params, start))


def restore_invariants(params: Params, start: Params) -> Params:
    r"""Return the nearby state that has the two invariants of `start`.

    W gets the mean row of `start`, on which no margin depends. Let the balance $W^\top W -
    \sum h h^\top$ of the centred rows be off by $\Delta$. With the symmetric solution X of
    $G X + X G = \Delta$, $G = W^\top W + \sum h h^\top$, the new state is $W (I + X)$ and
    $(I - X) h$: to first order this restores the balance and moves no logit $W h$.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d), with small errors.
      start: earlier state of the same trajectory.

    Returns:
      `Params`, float32 for half precision.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    params, start = _check_alike(params, start)
    scale = power_of_two(params)
    params, start = jax.tree.map(lambda leaf: leaf / scale, (params, start))
    return jax.tree.map(lambda leaf: leaf * scale, restore(params, start))


def restore(params: Params, start: Params) -> Params:
    """`restore_invariants` of states that are checked already."""
    mean = jnp.mean(start.W, axis=0, keepdims=True)
    target = balance(Params(start.W - mean, start.H))
    W, H = params.W - jnp.mean(params.W, axis=0, keepdims=True), params.H
    for _ in range(2):  # Newton's method: each iteration squares the error
        h = H.reshape(-1, H.shape[-1])
        gram = matmul(W.T, W)
        gram += matmul(h.T, h)
        size = jnp.trace(gram)
        # Without this term G is singular in directions orthogonal to all rows.
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
