"""Reduce (K, K) and (B, K) arrays tile by tile, so that no such array is in memory.

A tile is a block of `TILE` rows of a (K, d) matrix. The last tile starts early enough to
fit, so it overlaps the one before; overlapping rows count once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.numerics import matmul
from ncjax.types import Array

TILE = 1024
# Up to this many classes, arrays of (K, K) and (B, K) are small: 16 MB of float32.
FEW_CLASSES = 2048
# Entries of an array (t, K): 64 MB of float32.
_MOST_PRODUCTS = 2**24
# Up to this many differences are taken at once: 16 MB of float32.
FEW_DIFFERENCES = 2**22


def mean_over_pairs(of_tile: Callable, rows, mask: Array | None = None, axis_name=None):
    """Return the mean of `of_tile` over the pairs j < k of K rows.

    Args:
      of_tile: function of two tiles and of the mask (t, t) of the pairs that count. A tile
        is the pytree `rows` restricted to t rows. It returns arrays (t, t), or a pytree.
      rows: pytree of arrays (K, ...), one row for each class.
      mask: (K,) booleans; pairs with a row at False are left out. None for all.
      axis_name: axis of `jax.shard_map` over whose devices the tiles are divided; all of
        them return the mean.

    Returns:
      Scalar, or the pytree that `of_tile` returns with a scalar for each array.
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    length = min(size, TILE)
    kept = jnp.ones(size, bool) if mask is None else mask

    def sums(j_tile, k_tile, active=True):
        (left, j, left_kept), (right, k, right_kept) = (
            _tile((rows, kept), tile, size, length) for tile in (j_tile, k_tile)
        )
        counted = (j[:, None] < k[None]) & left_kept[:, None] & right_kept[None] & active
        # Sums of sums: an error of 1e-7 a row instead of 1e-4 over a million entries.
        return jax.tree.map(
            lambda values: jnp.sum(jnp.sum(jnp.where(counted, values, 0), axis=1)),
            of_tile(left, right, counted),
        )

    if size <= length and axis_name is None:
        total = sums(0, 0)
    else:
        total = _scan(sums, -(-size // length), axis_name)
    return jax.tree.map(lambda value: value / _pairs(kept, value.dtype), total)


def _tile(arrays, tile, size: int, length: int):
    """Return rows of a tile, their numbers, and whether they count in this tile."""
    arrays, kept = arrays
    if size == length:
        return arrays, jnp.arange(size, dtype=jnp.int32), kept
    start = jnp.minimum(tile * length, size - length)
    arrays, kept = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, length), (arrays, kept)
    )
    numbers = start + jnp.arange(length, dtype=jnp.int32)
    return arrays, numbers, kept & (numbers >= tile * length)


def _scan(sums: Callable, tiles: int, axis_name: str | None):
    """Return the sum over the pairs of tiles, divided over the devices of an axis."""
    pairs = jnp.asarray(_tile_pairs(tiles, 1)[:, 0])
    if axis_name is not None:
        shares = jnp.asarray(_tile_pairs(tiles, jax.lax.axis_size(axis_name)))
        pairs = shares[:, jax.lax.axis_index(axis_name)]

    def body(total, pair):
        tile = jnp.maximum(pair, 0)
        new = sums(tile[0], tile[1], pair[0] >= 0)
        return jax.tree.map(jnp.add, total, new), None

    def zero(leaf):
        start = jnp.zeros(leaf.shape, leaf.dtype)
        return start if axis_name is None else jax.lax.pcast(start, axis_name, to="varying")

    shapes = jax.eval_shape(lambda: sums(jnp.int32(0), jnp.int32(0)))
    total, _ = jax.lax.scan(body, jax.tree.map(zero, shapes), pairs)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _tile_pairs(tiles: int, devices: int) -> np.ndarray:
    """Return the pairs of tiles i <= j in turn by device (steps, devices, 2); -1: none."""
    pairs = np.stack(np.triu_indices(tiles), axis=1).astype(np.int32)
    padding = np.full((-len(pairs) % devices, 2), -1, np.int32)
    return np.concatenate([pairs, padding]).reshape(-1, devices, 2)


def _pairs(kept: Array, dtype) -> Array:
    """Return the number of pairs of the rows kept."""
    count = jnp.sum(kept, dtype=jnp.int32).astype(dtype)
    return count * (count - 1) / 2


def sum_over_tiles(of_tile: Callable, rows: Array, mask: Array) -> Array:
    """Return the sum of `of_tile` over the tiles of rows (K, d).

    A tile has so few rows t that arrays (t, K) stay small.

    Args:
      of_tile: function of a tile (t, d), the numbers (t,) of its rows and the mask (t,) of
        the rows that count. It returns a scalar.
      rows: (K, d).
      mask: (K,) booleans, False for rows to leave out.
    """
    size = len(rows)
    length = min(size, TILE, max(1, _MOST_PRODUCTS // size))

    def body(total, tile):
        return total + of_tile(*_tile((rows, mask), tile, size, length)), None

    tiles = jnp.arange(-(-size // length), dtype=jnp.int32)
    return jax.lax.scan(body, jnp.zeros((), rows.dtype), tiles)[0]


def squared_differences(rows: Array, others: Array) -> Array:
    """Return squared distances (K, J) of `rows` (K, d) to `others`, by differences."""

    def to_all(row):
        return jnp.sum((others - row[None]) ** 2, axis=1)

    if rows.shape[0] * others.size <= FEW_DIFFERENCES:
        return jax.vmap(to_all)(rows)
    return jax.lax.map(to_all, rows)


def largest_product(
    samples: Array, rows: Array, offset: Array, mask: Array | None = None
) -> Array:
    r"""Return $\arg\max_k (v_k^\top x_i + o_k)$ (B,) int32, the lowest index of equal ones.

    One scan over tiles of the rows keeps the largest value so far, so that no array is
    (B, K).

    Args:
      samples: (B, d), the $x_i$.
      rows: (K, d), the $v_k$.
      offset: (K,), the $o_k$.
      mask: (K,) booleans; rows at False are left out. None for all.
    """
    size = rows.shape[0]
    length = min(size, TILE)
    least = jnp.finfo(samples.dtype).min
    kept = jnp.ones(size, bool) if mask is None else mask

    def body(best, tile):
        (left, shift), numbers, counts = _tile(((rows, offset), kept), tile, size, length)
        values = matmul(left, samples.T) + shift[:, None]
        values = jnp.where(counts[:, None], values, least)
        # XLA runs these two reductions several times as fast as one argmax.
        value = jnp.max(values, axis=0)
        winners = jnp.where(values == value[None], numbers[:, None], size)
        better = value > best[0]
        return (
            jnp.where(better, value, best[0]),
            jnp.where(better, jnp.min(winners, axis=0), best[1]),
        ), None

    # The start depends on the samples, as the result does, for the types of shard_map.
    least_value = jnp.where(samples[:, 0] == 0, -jnp.inf, -jnp.inf)
    start = least_value.astype(samples.dtype), jnp.zeros_like(least_value, jnp.int32)
    tiles = jnp.arange(-(-size // length), dtype=jnp.int32)
    return jax.lax.scan(body, start, tiles)[0][1]
