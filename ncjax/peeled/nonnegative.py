r"""Non-negative least squares, $\min_{x \ge 0} |A x - b|$, as one program of fixed shapes.

Each proximal step minimises $|A z - b|^2 + \varepsilon |z - x|^2$ over $z \ge 0$, x being
the minimiser of the step before. The added term makes the minimiser unique if columns
depend on each other, and the steps still converge to the minimum of $|A x - b|$. The
right-hand sides come from the residual $b - A x$, so every step also corrects the rounding
of $A^\top A$.

Block principal pivoting finds the minimiser of a step. A coefficient is wrong if it is
negative, or if it is zero and the distance falls as it grows. All wrong coefficients change
places at once, between the passive ones and the zeros; if their number does not fall, one
changes at a time.

Source: Portugal, Júdice, Vicente (1994), block principal pivoting; Rockafellar (1976),
proximal steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from ncjax.numerics import matmul
from ncjax.types import Array

# Slopes that count as zero, in units of the rounding, for columns and a target of length 1.
_SLOPE = 100
# The added term, in units of the rounding of the largest eigenvalue.
_ADDED = 4
# Exchanges of all coefficients in a row that may fail to lessen the wrong ones.
_PATIENCE = 3
_PROXIMAL_STEPS = 6
# Factorisations for each column, before the method gives up; SciPy has the same bound.
_FACTORISATIONS = 3


class _Pivoting(NamedTuple):
    x: Array  # (P,)  coefficients after the last proximal step
    passive: Array  # (P,)  bool, coefficients that may differ from zero
    fewest: Array  # ()    least number of wrong coefficients in this proximal step
    patience: Array  # ()    exchanges of all that are left
    proximal: Array  # ()    proximal steps that are done
    factorisations: Array  # ()    number so far


def nonnegative_least_squares(matrix: Array, target: Array, allowed: Array) -> Array:
    r"""Return $\arg\min_{x \ge 0} |A x - b|$, with 0 where a column is not allowed.

    Args:
      matrix: A (M, P).
      target: b (M,).
      allowed: (P,) bool.

    Returns:
      x (P,), near the shortest minimiser for columns of length 1 if there are several; NaN
      if an entry is not finite, or no minimiser is found within the bound. That happens at
      450 columns that depend on each other but for 1e-6.
    """
    lengths, size = _positive(jnp.linalg.norm(matrix, axis=0)), len(allowed)
    length = _positive(jnp.linalg.norm(target))
    unit, goal = matrix / lengths[None], target / length
    eps = float(jnp.finfo(matrix.dtype).eps)
    gram = matmul(unit.T, unit)
    # The largest sum of a row bounds the eigenvalues. A smaller term is lost in rounding.
    added = _ADDED * eps * jnp.max(jnp.sum(jnp.abs(gram), axis=0))
    gram = gram + added * jnp.eye(size, dtype=matrix.dtype)

    def step(state: _Pivoting) -> _Pivoting:
        slope = matmul(unit.T, goal - matmul(unit, state.x))
        change = _minimise(gram, slope, state)
        ascent = matmul(gram, change) - slope
        wrong = jnp.where(state.passive, state.x + change < 0, ascent < -_SLOPE * eps)
        return _exchange(state, change, wrong & allowed)

    def unfinished(state: _Pivoting) -> Array:
        goes_on = state.factorisations < _FACTORISATIONS * size
        return goes_on & (state.proximal < _PROXIMAL_STEPS)

    zero = jnp.zeros((), jnp.int32)
    start = _Pivoting(
        x=jnp.zeros_like(lengths),
        passive=allowed,
        fewest=zero + size + 1,
        patience=zero + _PATIENCE,
        proximal=zero,
        factorisations=zero,
    )
    last = jax.lax.while_loop(unfinished, step, start)
    found = last.proximal > 0
    found = found & jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(target))
    return jnp.where(found, last.x / lengths * length, jnp.nan)


def _positive(lengths: Array) -> Array:
    """Return the lengths, 1 where they are zero."""
    return jnp.where(lengths > 0, lengths, 1)


def _minimise(gram: Array, slope: Array, state: _Pivoting) -> Array:
    """Return the change of x to the minimiser over the passive coefficients."""
    passive = state.passive
    removed = jnp.where(passive, 0, -state.x)
    both = passive[:, None] & passive[None]
    block = jnp.where(both, gram, jnp.eye(len(gram), dtype=gram.dtype))
    right = jnp.where(passive, slope - matmul(gram, removed), 0)
    return removed + cho_solve((jnp.linalg.cholesky(block), True), right)


def _exchange(state: _Pivoting, change: Array, wrong: Array) -> _Pivoting:
    """Let wrong coefficients change places, or accept the minimiser if there is none."""
    number = jnp.sum(wrong, dtype=jnp.int32)
    solved, fewer = number == 0, number < state.fewest
    index = jnp.arange(len(wrong))
    last = index == jnp.max(jnp.where(wrong, index, -1))
    patience = jnp.where(fewer, _PATIENCE, state.patience - 1)
    flipped = wrong & (last | fewer | (state.patience > 0))
    return _Pivoting(
        x=jnp.where(solved, jnp.maximum(state.x + change, 0), state.x),
        passive=state.passive ^ flipped,
        fewest=jnp.where(solved, len(wrong) + 1, jnp.minimum(number, state.fewest)),
        patience=jnp.where(solved, _PATIENCE, patience),
        proximal=state.proximal + solved.astype(jnp.int32),
        factorisations=state.factorisations + 1,
    )
