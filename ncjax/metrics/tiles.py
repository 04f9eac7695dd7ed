"""Reduce (K, K) and (B, K) arrays tile by tile, so that no such array is in memory.

A tile is a block of `TILE` rows of a (K, d) matrix. The last tile starts early enough to
fit, so it overlaps the one before; overlapping rows count once. Pairs are numbered in the
order of `numpy.triu_indices`. Programs compute their indices, because a table of them would
be a constant of megabytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ncjax import sizes
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
    pairs = tiles * (tiles + 1) // 2
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)

    def body(total, step):
        number = step * devices + device
        # A device without a pair left repeats the last one, which then does not count.
        tile = pair_of_tiles(jnp.minimum(number, pairs - 1), tiles)
        return jax.tree.map(jnp.add, total, sums(*tile, number < pairs)), None

    def zero(leaf):
        start = jnp.zeros(leaf.shape, leaf.dtype)
        return start if axis_name is None else jax.lax.pcast(start, axis_name, to="varying")

    shapes = jax.eval_shape(lambda: sums(jnp.int32(0), jnp.int32(0)))
    steps = jnp.arange(-(-pairs // devices), dtype=jnp.int32)
    total, _ = jax.lax.scan(body, jax.tree.map(zero, shapes), steps)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def pair_of_tiles(number: Array, tiles: int) -> tuple[Array, Array]:
    """Return the pair i <= j of tiles with this number, as int32."""
    i, j = _pair_of_rows(number, tiles + 1)
    return i, j - 1


@jax.jit
def above_diagonal(matrix: Array) -> Array:
    """Return the entries (K(K-1)/2,) of a matrix (K, K) above its diagonal, by row."""
    size = len(matrix)
    numbers = jnp.arange(size * (size - 1) // 2, dtype=jnp.int32)
    return matrix[_pair_of_rows(numbers, size)]


def _pair_of_rows(number: Array, size: int) -> tuple[Array, Array]:
    """Return the pair j < k of `size` rows with this number, as int32.

    The rows j from the last one on have 1, 2, 3, ... pairs: m (m + 1) / 2 before row m, at
    most 2^31 pairs. The square root is off by less than 1 at that size in float32.
    """
    backwards = (size * (size - 1) // 2 - 1 - number).astype(jnp.uint32)
    root = jnp.sqrt(8 * backwards.astype(jnp.float32) + 1)
    m = ((root - 1) / 2).astype(jnp.uint32)
    m = m - (m * (m + 1) // 2 > backwards).astype(jnp.uint32)
    m = m + ((m + 1) * (m + 2) // 2 <= backwards).astype(jnp.uint32)
    within = (backwards - m * (m + 1) // 2).astype(jnp.int32)
    return size - 2 - m.astype(jnp.int32), size - 1 - within


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

    def to_all(row, others):
        return jnp.sum((others - row[None]) ** 2, axis=1)

    def one_by_one(rows, others):
        return jax.lax.map(lambda row: to_all(row, others), rows)

    def in_groups(rows, others):
        size = max(1, sizes.CHUNK_BYTES // 4 // others.size)
        return jax.lax.map(lambda row: to_all(row, others), rows, batch_size=size)

    if rows.shape[0] * others.size <= FEW_DIFFERENCES:
        return jax.vmap(to_all, (0, None))(rows, others)
    return jax.lax.platform_dependent(rows, others, cpu=one_by_one, default=in_groups)


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
