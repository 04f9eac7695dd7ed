r"""Lanczos iterations for a symmetric operator given as a function of a flat vector.

Thick restarts, full reorthogonalisation, fixed shapes (so it runs under `jax.jit`), and
two things that libraries leave out. On breakdown, where the Krylov space is invariant,
the iteration goes on with a random vector orthogonal to it: matfree 0.6.3 returns 1 and
3 on `2 I` there, and NaN on the zero matrix. And since a Krylov space holds one vector
of each eigenspace only, a fresh random start orthogonal to what was found must find
nothing new before the result is taken: multiplicities come out right.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.numerics import dot, matmul, power_of_two

Array = jax.Array

# Ritz pairs are locked once their estimated residual is this share of the tolerance, so
# that what later fresh starts leave out of them stays below it.
_LOCK = 0.1
# A fresh start has found nothing new once the residual of its best Ritz value is below
# this share of the distance to the eigenvalues already found.
_CLEAR = 0.1
# Up to this length XLA's product of a float32 matrix and a vector on the CPU is off by
# 1e-6 at most, which the second pass of Gram-Schmidt puts right.
_WIDE = 2**15


class EigenPairs(NamedTuple):
    """Eigenpairs at the ends of a spectrum, ascending."""

    values: Array  # (k,)
    vectors: Array  # (k, D) orthonormal rows
    residuals: Array  # (k,)  |A v - λ v|
    converged: Array  # (k,)  bool
    num_matvecs: Array  # ()  int32


class _Krylov(NamedTuple):
    """`A V = V T + r e_mᵀ`, with the rows of `basis` as the columns of V."""

    basis: Array  # (m, D) orthonormal rows, zero where not yet reached
    projected: Array  # (m, m)  T
    remainder: Array  # (D,)  r, orthogonal to the basis
    coupling: Array  # ()  |r|; zero after a breakdown, and before a fresh start
    scale: Array  # ()  norm of A as far as met
    key: Array


class _State(NamedTuple):
    krylov: _Krylov
    kept: Array  # ()  rows of the basis that survived the restart
    locked: Array  # (k,)  wanted Ritz values at the last fresh start
    fresh: Array  # ()  whether there has been a fresh start
    done: Array  # ()  bool
    num_matvecs: Array  # ()  int32


def eigh_ends(
    matvec: Callable[[Array], Array],
    dim: int,
    key: Array,
    *,
    count: int,
    which: str,
    tol: float | Array,
    eps: float,
    num_vectors: int,
    max_matvecs: int | Array,
    dtype,
    report: Callable[[Array, Array, Array], None] | None = None,
) -> EigenPairs:
    r"""Smallest, largest or both ends of the spectrum of a symmetric operator.

    Args:
      matvec: `v -> A v`, (D,) to (D,), symmetric and linear.
      dim: D.
      key: PRNG key for the start vectors.
      count: number of eigenpairs, at least 1; for both ends the sum of the two.
      which: "smallest", "largest" or "both".
      tol: a pair has converged once its residual is below `tol` times the norm of A.
      eps: relative rounding error of `matvec`.
      num_vectors: m, size of the basis; at least `min(dim, count + 4)`, at most `dim`.
      max_matvecs: no restart begins once so many products are spent.
      dtype: floating dtype of the vectors.
      report: called on the host at each restart with the number of products, the largest
        residual in units of the norm of A, and whether this was the last.

    Returns:
      `EigenPairs`; a pair that has not converged, or whose multiplicity was not settled
      within `max_matvecs`, says so. NaN if the operator gives NaN or infinity.
    """
    ends = 2 if which == "both" else 1
    order = _order(which, num_vectors)
    exhaustive = num_vectors == dim
    # A single smallest eigenvalue has no second copy to be missed.
    verify = count > ends and not exhaustive
    advance = partial(_extend, matvec, threshold=eps**0.8)

    def cycle(state: _State) -> _State:
        krylov = advance(state.krylov, state.kept)
        theta, rotation = _ritz(krylov.projected, order)
        estimate = krylov.coupling * jnp.abs(rotation[-1])
        scale = jnp.maximum(krylov.scale, jnp.max(jnp.abs(theta)))
        converged = jnp.all(estimate[:count] <= _LOCK * tol * scale) | exhaustive
        done, restart = converged, jnp.asarray(False)
        if verify:
            changed = jnp.any(jnp.abs(theta[:count] - state.locked) > tol * scale)
            restart = converged & (changed | ~state.fresh)
            clear = _is_clear(theta, estimate, count, ends, tol * scale)
            done = converged & ~restart & clear
        krylov = krylov._replace(scale=scale)
        krylov, kept = _restart(krylov, theta, rotation, count, restart)
        new = _State(
            krylov=krylov,
            kept=kept,
            locked=jnp.where(restart, theta[:count], state.locked),
            fresh=state.fresh | restart,
            done=done,
            num_matvecs=state.num_matvecs + (num_vectors - state.kept),
        )
        if report is not None:
            residual = jnp.max(estimate[:count]) / scale
            jax.debug.callback(report, new.num_matvecs, residual, ~unfinished(new))
        return new

    def unfinished(state: _State):
        finite = jnp.all(jnp.isfinite(state.krylov.projected))
        return ~state.done & finite & (state.num_matvecs < max_matvecs)

    zero = jnp.zeros((), jnp.int32)
    state = _State(
        krylov=_empty(num_vectors, dim, dtype, key),
        kept=zero,
        locked=jnp.zeros(count, dtype),
        fresh=jnp.asarray(False),
        done=jnp.asarray(False),
        num_matvecs=zero,
    )
    state = jax.lax.while_loop(unfinished, cycle, state)
    pairs = rayleigh(matvec, state.krylov.basis[:count], tol * state.krylov.scale)
    return pairs._replace(
        converged=pairs.converged & state.done,
        num_matvecs=state.num_matvecs + count,
    )


def rayleigh(matvec, vectors: Array, tolerance: Array) -> EigenPairs:
    r"""Rayleigh quotients of the rows of `vectors` (k, D), ascending, and true residuals.

    $$\lambda = v^\top A v, \qquad r = |A v - \lambda v|, \qquad |v| = 1$$
    """

    def pair(v):
        v = v / jnp.linalg.norm(v)
        product = matvec(v)
        value = dot(v, product)
        return value, v, _norm(product - value * v)

    values, vectors, residuals = jax.lax.map(pair, vectors)
    ascending = jnp.argsort(values)
    values, vectors, residuals = (x[ascending] for x in (values, vectors, residuals))
    return EigenPairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        converged=residuals <= tolerance,
        num_matvecs=jnp.asarray(len(residuals), jnp.int32),
    )


def gauss_quadrature(
    matvec: Callable[[Array], Array],
    dim: int,
    key: Array,
    *,
    num_steps: int,
    eps: float,
    dtype,
) -> tuple[Array, Array]:
    r"""Gauss rule of the spectral measure of a random unit vector u.

    $$u^\top f(A)\, u \approx \sum_i w_i f(x_i)$$

    Exact for polynomials up to degree `2 num_steps - 1`. After a breakdown the nodes that
    belong to other vectors carry no weight, so the rule stays exact.

    Args:
      matvec: `v -> A v`, (D,) to (D,), symmetric and linear.
      dim: D.
      key: PRNG key, for u and for the vectors that follow a breakdown.
      num_steps: number of nodes, at most D.
      eps: relative rounding error of `matvec`.
      dtype: floating dtype of the vectors.

    Returns:
      Nodes (num_steps,), ascending, and weights (num_steps,) that sum to 1.
    """
    krylov = _empty(num_steps, dim, dtype, key)
    krylov = _extend(matvec, krylov, jnp.zeros((), jnp.int32), threshold=eps**0.8)
    nodes, rotation = _ritz(krylov.projected, np.arange(num_steps))
    return nodes, rotation[0] ** 2


def _order(which: str, size: int) -> np.ndarray:
    """Indices of `size` ascending values with the wanted ones first."""
    up, down = np.arange(size), np.arange(size)[::-1]
    if which == "both":
        return np.stack([up, down], axis=1).reshape(-1)[:size]
    return up if which == "smallest" else down


def _empty(num_vectors: int, dim: int, dtype, key: Array) -> _Krylov:
    """No basis yet: the first step draws a random vector, as after a breakdown."""
    zero = jnp.zeros((), dtype)
    return _Krylov(
        basis=jnp.zeros((num_vectors, dim), dtype),
        projected=jnp.zeros((num_vectors, num_vectors), dtype),
        remainder=jnp.zeros(dim, dtype),
        coupling=zero,
        scale=zero,
        key=key,
    )


def _extend(matvec, krylov: _Krylov, kept: Array, *, threshold: float) -> _Krylov:
    """Lanczos steps that fill the basis from row `kept` on."""
    size = len(krylov.projected)

    def step(j, krylov: _Krylov) -> _Krylov:
        basis, projected, remainder, coupling, scale, key = krylov
        key, fresh_key = jax.random.split(key)
        vector = jax.lax.cond(
            coupling == 0,
            lambda: _random_orthogonal(fresh_key, basis),
            lambda: remainder / coupling,
        )
        basis = basis.at[j].set(vector)
        product = matvec(vector)
        remainder, column = _orthogonalise(basis, product)
        scale, length = jnp.maximum(scale, _norm(product)), _norm(remainder)
        return _Krylov(
            basis=basis,
            projected=projected.at[:, j].set(column).at[j].set(column),
            remainder=remainder,
            coupling=jnp.where(length <= threshold * scale, 0.0, length),
            scale=scale,
            key=key,
        )

    return jax.lax.fori_loop(kept, jnp.asarray(size, kept.dtype), step, krylov)


def _ritz(projected: Array, order: np.ndarray) -> tuple[Array, Array]:
    """Ritz values (m,) and their coefficients in the basis (m, m), columns, in `order`."""
    chex.assert_shape(projected, (len(order), len(order)))
    unit = power_of_two(projected)
    theta, rotation = jnp.linalg.eigh(projected / unit)
    return theta[order] * unit, rotation[:, order]


def _is_clear(theta, estimate, count: int, ends: int, tolerance: Array) -> Array:
    """Whether the best Ritz values not wanted are known to lie beyond the wanted ones."""
    wanted, beyond = theta[count - ends : count], theta[count : count + ends]
    gap = jnp.abs(beyond - wanted)
    error = estimate[count : count + ends]
    return jnp.all(error <= jnp.maximum(tolerance, _CLEAR * gap))


def _restart(krylov: _Krylov, theta, rotation, count: int, fresh) -> tuple[_Krylov, Array]:
    """Keep the best Ritz vectors; go on with r, or with a random vector if `fresh`."""
    size = len(theta)
    chex.assert_shape([rotation, krylov.projected], (size, size))
    most = min(count + (size - count) // 2, max(size - 1, count))
    kept = jnp.where(fresh, count, most).astype(jnp.int32)
    within = jnp.arange(size, dtype=jnp.int32) < kept
    rows = matmul(rotation[:, :most].T, krylov.basis)
    rows = jnp.where(within[:most, None], rows, 0.0)
    restarted = krylov._replace(
        basis=jnp.zeros_like(krylov.basis).at[:most].set(rows),
        projected=jnp.diag(jnp.where(within, theta, 0.0)),
        coupling=jnp.where(fresh, 0.0, krylov.coupling),
    )
    return restarted, kept


def _orthogonalise(basis: Array, vector: Array) -> tuple[Array, Array]:
    """Part of `vector` (D,) orthogonal to the rows of `basis`, and its coefficients.

    Classical Gram-Schmidt, twice: once more than that changes nothing. In float32 one dot
    product per row where these are long: XLA's product of a wide matrix and a vector on
    the CPU is off by 1e-3 at D = 1e7 where its dot product is exact to rounding.
    Elsewhere the product, which reads the basis at twice the speed or better.
    """
    chex.assert_shape(vector, basis.shape[1:])
    coefficients = jnp.zeros(len(basis), vector.dtype)
    by_row = vector.dtype == jnp.float32 and len(vector) > _WIDE
    for _ in range(2):
        if by_row:
            row_dot = partial(dot, vector)
            change = jax.lax.map(row_dot, basis)
        else:
            change = matmul(basis, vector)
        vector = vector - matmul(change, basis)
        coefficients = coefficients + change
    return vector, coefficients


def _random_orthogonal(key: Array, basis: Array) -> Array:
    """Random unit vector orthogonal to the rows of `basis` (m, D)."""
    vector = jax.random.normal(key, basis.shape[1:], basis.dtype)
    vector, _ = _orthogonalise(basis, vector)
    return vector / jnp.linalg.norm(vector)


def _norm(vector: Array) -> Array:
    """Euclidean norm without overflow or underflow."""
    unit = power_of_two(vector)
    return unit * jnp.linalg.norm(vector / unit)
