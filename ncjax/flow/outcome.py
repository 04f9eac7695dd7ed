"""The outcome of a solve: result codes, and NaN in rows that were not reached."""

import diffrax
import jax.numpy as jnp

from ncjax.types import Array

# Values of `result`.
SUCCESS = 0
STEP_LIMIT = 1
STEP_TOO_SMALL = 2  # the state or its gradient is not finite, or the dtype too coarse
BAD_TIMES = 3  # under jit, which cannot raise an error for times out of order


def nan_unless(reached: Array, leaf: Array, like) -> Array:
    """Return `leaf` (T, ...) in the dtype of `like`, with NaN or 0 in rows not reached."""
    rows = reached.reshape(reached.shape + (1,) * (leaf.ndim - 1))
    missing = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.where(rows, leaf, jnp.asarray(missing, leaf.dtype)).astype(like.dtype)


def result_code(result: diffrax.RESULTS) -> Array:
    """Return SUCCESS, STEP_LIMIT or STEP_TOO_SMALL for a result of diffrax."""
    success = result == diffrax.RESULTS.successful
    limit = result == diffrax.RESULTS.max_steps_reached
    return jnp.where(success, SUCCESS, jnp.where(limit, STEP_LIMIT, STEP_TOO_SMALL))
