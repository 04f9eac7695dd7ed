r"""Non-negative least squares, $\min_{x \ge 0} |A x - b|$, as one program of fixed shapes.

Each proximal step minimises $|A z - b|^2 + \varepsilon |z - x|^2$ over $z \ge 0$, x the last
minimiser. The added term makes the minimiser unique where columns depend on each other, and
leaves the minimum of $|A x - b|$ as it is. The right-hand sides come from the residual
$b - A x$, so that every step also corrects the rounding of $A^\top A$. The minimiser is
found by block principal pivoting: all coefficients of the wrong sign change places at once,
and one at a time where that does not help.

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
    count: Array  # ()    factorisations


def nonnegative_least_squares(matrix: Array, target: Array, allowed: Array) -> Array:
    r"""Return $\arg\min_{x \ge 0} |A x - b|$, with 0 where a column is not allowed.

    Args:
      matrix: A (M, P).
      target: b (M,).
      allowed: (P,) bool.

    Returns:
      x (P,), near the shortest minimiser for columns of length 1 if there are several; NaN
      if an entry is not finite.
    """
    lengths, size = _positive(jnp.linalg.norm(matrix, axis=0)), len(allowed)
    length = _positive(jnp.linalg.norm(target))
    unit, goal = matrix / lengths[None], target / length
    eps = float(jnp.finfo(matrix.dtype).eps)
    gram = matmul(unit.T, unit) + eps ** (2 / 3) * jnp.eye(size, dtype=matrix.dtype)

    def step(state: _Pivoting) -> _Pivoting:
        slope = matmul(unit.T, goal - matmul(unit, state.x))
        change = _minimise(gram, slope, state)
        ascent = matmul(gram, change) - slope
        wrong = jnp.where(state.passive, state.x + change < 0, ascent < -_SLOPE * eps)
        return _exchange(state, change, wrong & allowed)

    def unfinished(state: _Pivoting) -> Array:
        goes_on = state.count < _FACTORISATIONS * size
        return goes_on & (state.proximal < _PROXIMAL_STEPS)

    zero = jnp.zeros((), jnp.int32)
    start = _Pivoting(
        x=jnp.zeros_like(lengths),
        passive=allowed,
        fewest=zero + size + 1,
        patience=zero + _PATIENCE,
        proximal=zero,
        count=zero,
    )
    x = jax.lax.while_loop(unfinished, step, start).x
    finite = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(target))
    return jnp.where(finite, x / lengths * length, jnp.nan)


def _positive(lengths: Array) -> Array:
    """Return the lengths, 1 where they are zero."""
    return jnp.where(lengths > 0, lengths, 1)


def _minimise(gram: Array, slope: Array, state: _Pivoting) -> Array:
    """Return the change of x to the proximal minimiser whose other coefficients are zero."""
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
        count=state.count + 1,
    )
