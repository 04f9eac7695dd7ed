"""Differences of logits, which are the margins, of params and of a network's samples."""

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
    labels = labels.astype(jnp.int32)  # K may exceed the range of a narrow type
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    others = labels[:, None] != jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    return own - logits, others
