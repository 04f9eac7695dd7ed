r"""Lanczos iterations for a symmetric operator given as a function of a flat vector.

The iteration builds an orthonormal basis of the Krylov space span(v, A v, A² v, ...) and
takes eigenpairs of A restricted to it: Ritz values and Ritz vectors. It reorthogonalises
fully, and restarts thickly: a full basis shrinks to its best Ritz vectors. Shapes are
fixed, so it runs under `jax.jit`. It adds two steps that libraries leave out:

- Breakdown: if the Krylov space is invariant, the iteration continues with a random vector
  orthogonal to it. Without this matfree 0.6.3 returns 1 and 3 on `2 I`, and NaN on zero.
- Multiplicity: a Krylov space holds only one vector of each eigenspace. Therefore a fresh
  random start, orthogonal to the vectors found, must find nothing new before the
  iteration ends. So multiple eigenvalues appear with all their copies.
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

# Ritz pairs are locked once their estimated residual falls to this share of the tolerance.
# Later fresh starts ignore these residuals, which therefore must stay well below it.
_LOCK = 0.1
# A fresh start has found nothing new once the residual of its best Ritz value falls below
# this share of its distance to the eigenvalues already found.
_CLEAR = 0.1
# Up to this length the error of XLA's float32 matrix-vector product on the CPU is at most
# 1e-6, and the second pass of Gram-Schmidt corrects it.
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

    basis: Array  # (m, D) orthonormal rows, zero if not yet computed
    projected: Array  # (m, m)  T
    remainder: Array  # (D,)  r, orthogonal to the basis
    coupling: Array  # ()  |r|; zero after a breakdown, and before a fresh start
    scale: Array  # ()  largest |A v| or |Ritz value| so far, an estimate of the norm of A
    key: Array


class _State(NamedTuple):
    krylov: _Krylov
    kept: Array  # ()  rows of the basis that survived the restart
    locked: Array  # (k,)  requested Ritz values at the last fresh start
    fresh: Array  # ()  bool, a fresh start has happened
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
    r"""Return eigenpairs at one end or both ends of the spectrum of a symmetric operator.

    Args:
      matvec: `v -> A v`, (D,) to (D,), symmetric and linear.
      dim: D.
      key: PRNG key for the start vectors.
      count: number of eigenpairs, at least 1; for "both" the sum of both ends.
      which: "smallest", "largest" or "both".
      tol: a pair has converged once its residual is below `tol` times the norm of A.
      eps: relative rounding error of `matvec`.
      num_vectors: m, size of the basis; at least `min(dim, count + 4)`, at most `dim`.
      max_matvecs: after this many products no new restart begins.
      dtype: floating dtype of the vectors.
      report: called on the host at each restart with the number of products, the largest
        residual in units of the norm of A, and whether this was the last.

    Returns:
      `EigenPairs`. `converged` is False for a pair whose residual is too large, and for
      all pairs if multiplicity was not settled within `max_matvecs`. NaN if the operator
      gives NaN or infinity.
    """
    ends = 2 if which == "both" else 1
    order = _order(which, num_vectors)
    exhaustive = num_vectors == dim
    # With one eigenvalue per end no second copy can be missing.
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
    r"""Return Rayleigh quotients of the rows of `vectors` (k, D), ascending, and residuals.

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
    r"""Return the Gauss rule of the spectral measure of a random unit vector u.

    $$u^\top f(A)\, u \approx \sum_i w_i f(x_i)$$

    The rule is exact for polynomials f up to degree `2 num_steps - 1`. It stays exact after
    a breakdown, because nodes that belong to other vectors have weight 0.

    Args:
      matvec: `v -> A v`, (D,) to (D,), symmetric and linear.
      dim: D.
      key: PRNG key for u and for the random vectors after a breakdown.
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
    """Return the indices that put the requested ones of `size` ascending values first."""
    up, down = np.arange(size), np.arange(size)[::-1]
    if which == "both":
        return np.stack([up, down], axis=1).reshape(-1)[:size]
    return up if which == "smallest" else down


def _empty(num_vectors: int, dim: int, dtype, key: Array) -> _Krylov:
    """Return a state without a basis; the first step draws a random vector."""
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
    """Take Lanczos steps until the basis is full, starting at row `kept`."""
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
    """Return Ritz values (m,) in `order`, and their vectors as columns (m, m)."""
    chex.assert_shape(projected, (len(order), len(order)))
    unit = power_of_two(projected)
    theta, rotation = jnp.linalg.eigh(projected / unit)
    return theta[order] * unit, rotation[:, order]


def _is_clear(theta, estimate, count: int, ends: int, tolerance: Array) -> Array:
    """Return whether the next Ritz values certainly lie beyond the requested ones."""
    requested, beyond = theta[count - ends : count], theta[count : count + ends]
    gap = jnp.abs(beyond - requested)
    error = estimate[count : count + ends]
    return jnp.all(error <= jnp.maximum(tolerance, _CLEAR * gap))


def _restart(krylov: _Krylov, theta, rotation, count: int, fresh) -> tuple[_Krylov, Array]:
    """Keep the best Ritz vectors; continue with r, or with a random vector if `fresh`."""
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
    """Return the part of `vector` (D,) orthogonal to the rows of `basis`, and coefficients.

    Classical Gram-Schmidt runs twice; a third pass would change nothing. On CPU long
    float32 rows take one dot product each: the error of XLA's wide matrix-vector product is
    1e-3 at D = 1e7 there, whereas its dot product is exact to rounding. Otherwise a
    matrix-vector product is used, because it reads the basis at least twice as fast.
    """
    chex.assert_shape(vector, basis.shape[1:])
    coefficients = jnp.zeros(len(basis), vector.dtype)
    by_row = vector.dtype == jnp.float32 and len(vector) > _WIDE
    for _ in range(2):
        if by_row:
            change = jax.lax.platform_dependent(
                basis, vector, cpu=_row_dots, default=matmul
            )
        else:
            change = matmul(basis, vector)
        vector = vector - matmul(change, basis)
        coefficients = coefficients + change
    return vector, coefficients


def _row_dots(basis: Array, vector: Array) -> Array:
    """Return `basis @ vector` by one dot product for each row."""
    return jax.lax.map(partial(dot, vector), basis)


def _random_orthogonal(key: Array, basis: Array) -> Array:
    """Draw a random unit vector orthogonal to the rows of `basis` (m, D)."""
    vector = jax.random.normal(key, basis.shape[1:], basis.dtype)
    vector, _ = _orthogonalise(basis, vector)
    return vector / jnp.linalg.norm(vector)


def _norm(vector: Array) -> Array:
    """Return the Euclidean norm without overflow or underflow."""
    unit = power_of_two(vector)
    return unit * jnp.linalg.norm(vector / unit)
