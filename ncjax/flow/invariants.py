r"""The invariants of the flow: their drift under a solver, and their restoration.

The flow conserves the balance $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and the sum
$\sum_k w_k$ of the classifier's rows. With several layers there is a balance of each layer
with the factor below it (`ncjax.balance`), and $w_k$ are rows of the last layer.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.numerics import at_unit_scale, matmul, power_of_two, widen
from ncjax.peeled.kernels import balances, squared_norm
from ncjax.peeled.points import Point, as_deep, check_any_params, like
from ncjax.types import Array, DeepParams, Params

# Directions that hold a smaller share of the squared norm count as empty.
_FLOOR = 1e-7
# Bound on the iterations of conjugate gradients, for each layer.
_ITERATIONS = 50


class InvariantDrift(NamedTuple):
    """Relative change of the conserved quantities, which is the solver's error."""

    balance: Array  # |B(Z) - B(Z_0)|_F / |Z|²,          B of `ncjax.balance`, all layers
    classifier_sum: Array  # |Σ_k w_k - Σ_k w_k(0)| / |Z|


def invariant_drift(params: Point, start: Point) -> InvariantDrift:
    r"""Relative change of the flow's invariants between two points of one trajectory.

    $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and $\sum_k w_k$ are conserved, so any
    change is the solver's error. With several layers `balance` is the root of the sum of
    squares over all balances.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      start: earlier state `Z_0` of the same shapes.

    Returns:
      `InvariantDrift` of scalars, in units of `|Z|²` and `|Z|`, float32 for half precision;
      0 if nothing has moved, also at the origin.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    return drift(*_check_alike(params, start))


def drift(params: Point, start: Point) -> InvariantDrift:
    """`invariant_drift` of states that are checked already."""
    scale = power_of_two(params)
    params, start = jax.tree.map(lambda leaf: leaf / scale, (params, start))
    size = squared_norm(params)
    after, before = balances(as_deep(params)), balances(as_deep(start))
    moved = _as_one([new - old for new, old in zip(after, before, strict=True)])
    sums = jnp.sum(params.W, axis=0) - jnp.sum(start.W, axis=0)
    return InvariantDrift(
        balance=_relative(moved, size), classifier_sum=_relative(sums, jnp.sqrt(size))
    )


def _as_one(arrays: list[Array]) -> Array:
    """Return all entries in one array, a single array as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate([a.ravel() for a in arrays])


def _relative(moved: Array, size: Array) -> Array:
    """Return `|moved| / size`; 0 with slope 0 if nothing has moved."""
    still = ~jnp.any(moved != 0)
    moved = jnp.where(still, 1, moved)
    length = power_of_two(moved) * jnp.linalg.norm(at_unit_scale(moved))
    return jnp.where(still, 0, length / jnp.where(still, 1, size))


def _check_alike(params: Point, start: Point) -> tuple[Point, Point]:
    """Return both as JAX arrays, or raise ValueError if shapes or dtypes differ."""
    params, start = check_any_params(params), check_any_params(start)
    expected, given = _shapes(params), _shapes(start)
    if expected != given:
        raise ValueError(f"expected a start like params, with {expected}, got {given}")
    return widen((params, start))


def _shapes(params: Params | DeepParams) -> str:
    """Describe the shapes of a point for an error. The shape of H decides `Params`."""
    given = f"H {params.H.dtype} {params.H.shape}"
    if not isinstance(params, DeepParams):
        return given
    return f"layers {', '.join(str(W.shape) for W in params.layers)} and {given}"


def restore_invariants(params: Point, start: Point) -> Point:
    r"""Return the nearby state that has the invariants of `start`.

    W gets the mean row of `start`, on which no margin depends. Let the balance $W^\top W -
    \sum h h^\top$ of the centred rows be off by $\Delta$. With the symmetric solution X of
    $G X + X G = \Delta$, $G = W^\top W + \sum h h^\top$, the new state is $W (I + X)$ and
    $(I - X) h$: to first order this restores the balance and moves no logit $W h$.

    With several layers there is one X at each input of a layer, and $W_l$ becomes
    $(I - X_l)\, W_l\, (I + X_{l-1})$ to first order. The linear system couples neighbours:
    $\Delta_l = G_l X_l + X_l G_l - 2 W_{l+1}^\top X_{l+1} W_{l+1} - 2 W_l X_{l-1}
    W_l^\top$ with $G_l = W_{l+1}^\top W_{l+1} + W_l W_l^\top$.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d), or `DeepParams`, with small errors.
      start: earlier state of the same trajectory.

    Returns:
      Point of the kind of `params`, float32 for half precision.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    params, start = _check_alike(params, start)
    scale = power_of_two(params)
    params, start = jax.tree.map(lambda leaf: leaf / scale, (params, start))
    return jax.tree.map(lambda leaf: leaf * scale, restore(params, start))


def restore(params: Point, start: Point) -> Point:
    """`restore_invariants` of states that are checked already."""
    mean = jnp.mean(start.W, axis=0, keepdims=True)
    target = balances(_centred(start, mean))
    centred = _centred(params, jnp.mean(params.W, axis=0, keepdims=True))
    for _ in range(2):  # Newton's method: each iteration squares the error
        grams, sizes = zip(*map(_gram, _factors(centred)), strict=True)
        found = balances(centred)
        X, _ = jax.scipy.sparse.linalg.cg(
            partial(_response, centred.layers, grams),
            tuple(new - old for new, old in zip(target, found, strict=True)),
            atol=float(jnp.finfo(mean.dtype).eps) * reduce(jnp.maximum, sizes),
            maxiter=_ITERATIONS * len(grams),
        )
        centred = _change_basis(centred, X)
    (*below, W), H = centred
    return like(params, (*below, W + mean), H)


def _centred(params: Params | DeepParams, mean: Array) -> DeepParams:
    """Return the point with `mean` (1, d) subtracted from all rows of the classifier."""
    (*below, W), H = as_deep(params)
    return DeepParams((*below, W - mean), H)


def _factors(params: DeepParams) -> list[tuple[Array, Array]]:
    """Return at each input of a layer the layer and, as rows, the factor below it."""
    layers, H = params
    rows = [H.reshape(-1, H.shape[-1]), *(W.T for W in layers[:-1])]
    return list(zip(layers, rows, strict=True))


def _gram(factors: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return `G`, the sum of both factors' Gram matrices, and its trace."""
    W, below = factors
    gram = matmul(W.T, W)
    gram += matmul(below.T, below)
    size = jnp.trace(gram)
    # Without this term G is singular in directions orthogonal to all rows.
    return gram + _FLOOR * size * jnp.eye(gram.shape[0], dtype=gram.dtype), size


def _response(layers, grams, X: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the change of all balances by `_change_basis`, to first order in X."""
    changes = [matmul(G, X_l) + matmul(X_l, G) for G, X_l in zip(grams, X, strict=True)]
    for number, W in enumerate(layers[:-1]):  # between the inputs of two layers
        changes[number] -= 2 * matmul(W.T, matmul(X[number + 1], W))
        changes[number + 1] -= 2 * matmul(W, matmul(X[number], W.T))
    return tuple(changes)


def _change_basis(params: DeepParams, X: tuple[Array, ...]) -> DeepParams:
    """Return the point with `I + X` before each layer and `I - X` on the layer's input."""
    layers = [W + matmul(W, X_l) for W, X_l in zip(params.layers, X, strict=True)]
    for number, X_l in enumerate(X[1:]):
        layers[number] = layers[number] - matmul(X_l, layers[number])
    return DeepParams(tuple(layers), params.H - matmul(params.H, X[0]))
