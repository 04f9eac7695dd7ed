"""Differences of logits, which are the margins, of params and of a network's samples.

The functions that reduce margins over the classes j != k use no infinity as a placeholder,
because `jax_debug_infs` and `jax_debug_nans` would report it at healthy points.
"""

import chex
import jax
import jax.numpy as jnp

from ncjax.numerics import einsum
from ncjax.types import Array, Params

# From this size on W is transposed before the product. Within a loop on CPU, XLA's product
# with a transposed right factor takes three times as long; the copy takes hardly any time.
_LARGE = 2**14


def without_offset(W: Array) -> Array:
    """Subtract the first row of W (K, d) from all: a common offset would cost digits."""
    return W - W[:1]


def margins_of_params(params: Params) -> tuple[Array, Array]:
    """`(w_k - w_j)·h_ki` (K, n, K) and the mask (K, 1, K) of j != k."""
    W, H = without_offset(params.W), params.H
    num_classes, per_class, dim = H.shape
    chex.assert_shape(W, (num_classes, dim))
    transposed = W.T
    if W.size >= _LARGE:
        transposed = jax.lax.optimization_barrier(transposed)
    logits = einsum("kid,dj->kij", H, transposed)
    own = einsum("kid,kd->ki", H, W)
    others = ~jnp.eye(num_classes, dtype=bool)[:, None, :]
    chex.assert_shape([logits, own], [(num_classes, per_class, num_classes), H.shape[:2]])
    return own[..., None] - logits, others


def margins_of_samples(logits: Array, labels: Array) -> tuple[Array, Array]:
    """`z_{a y_a} - z_aj` (N, K) of logits (N, K), and the mask (N, K) of j != y_a."""
    own, others = own_and_others(logits, labels)
    return own - logits, others


def own_and_others(logits: Array, labels: Array) -> tuple[Array, Array]:
    """`z_{a y_a}` (N, 1) of logits (N, K), NaN for label K, and the mask of j != y_a."""
    labels = labels.astype(jnp.int32)  # K may exceed the range of a narrow type
    own = jnp.take_along_axis(logits, labels[:, None], axis=1, mode="fill")
    return own, labels[:, None] != jnp.arange(logits.shape[1], dtype=jnp.int32)[None]


def least_of_others(margins: Array, others: Array) -> Array:
    """Return the least margin over the classes j != k, the last axis, which is dropped."""
    # The margin of the next class stands in for j = k.
    return jnp.min(jnp.where(others, margins, jnp.roll(margins, -1, axis=-1)), axis=-1)


def log_odds_of_error(margins: Array, others: Array) -> Array:
    """`logsumexp over j != k of -margins` along the last axis, which is dropped."""
    highest = -jax.lax.stop_gradient(least_of_others(margins, others))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    exponents = jnp.where(others, -margins - highest[..., None], 0)
    return jnp.log(jnp.sum(jnp.exp(exponents), axis=-1, where=others)) + highest
