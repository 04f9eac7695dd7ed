r"""Compute 3x3 convolutions by Winograd's fast algorithm, for CPUs.

A tile of 4x4 outputs depends on 6x6 inputs. Inputs and kernel are evaluated at six points
each way, multiplied there and interpolated: 36 products in place of 144 by the definition.
The sums over channels at the 36 points are matrix products. The gradients have the same
form. A few images at a time keep everything in the cache.

The result equals the definition up to rounding. Its rounding error in float32 is about 1e-6
of the output, in root mean square: XLA's convolution has a third to a half of this. The
points 0, ±1/√2, ±√2 and infinity have the smallest rounding error of the usual choices.

Source: Lavin and Gray (CVPR 2016), Section 4.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.networks.grouping import map_groups, sum_groups
from ncjax.numerics import matmul
from ncjax.types import Array

WINDOW = 3
_TILE = 4
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))
# Tiles times channels of one pass: enough for a fast matrix product on all cores, few
# enough for the cache. Passes that do not add to one sum run side by side. They are
# smaller, and their transforms keep all cores busy.
_ELEMENTS_AT_ONCE = 2**15
_ABREAST = 4
# With fewer tiles, products with a large kernel are slow.
_FEWEST_TILES = 128


def _transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the transforms of inputs (36, 36), taps (36, 9) and outputs (16, 36)."""
    size = len(_POINTS) + 1
    inputs, taps, outputs = (np.zeros((size, n)) for n in (size, WINDOW, _TILE))
    for row, point in enumerate(_POINTS):
        others = [p for p in _POINTS if p != point]
        inputs[row, :-1] = np.poly(others)[::-1]
        taps[row] = point ** np.arange(WINDOW) / np.prod(point - np.array(others))
        outputs[row] = point ** np.arange(_TILE)
    # At infinity the value is the leading coefficient.
    inputs[-1] = np.poly(_POINTS)[::-1]
    taps[-1, -1] = outputs[-1, -1] = 1
    return np.kron(inputs, inputs), np.kron(taps, taps), np.kron(outputs, outputs).T


_INPUTS, _TAPS, _OUTPUTS = _transforms()


def count_tiles(size) -> int:
    """Count the tiles of an output of height and width `size`."""
    return math.prod(_grid(size))


def correlate(x: Array, kernel: Array) -> Array:
    """Return the cross-correlation with a border of zeros.

    Args:
      x: (B, height, width, C).
      kernel: (3, 3, C, O).

    Returns:
      (B, height, width, O).
    """
    size, channels = x.shape[1:3], kernel.shape[2:]
    taps = kernel.reshape(WINDOW**2, -1)
    points = _product(_TAPS, taps).reshape(-1, *channels)

    def of_images(images):
        at_points = matmul(_evaluate(images), points)
        chex.assert_shape(at_points, (len(points), None, channels[1]))
        tiles = _product(_OUTPUTS, at_points.reshape(len(points), -1))
        return _assemble(tiles.reshape(-1, channels[1]), len(images), size)

    each = _images_at_once(size, channels, _ELEMENTS_AT_ONCE // 2)
    return map_groups(of_images, each, x, abreast=_ABREAST)


def kernel_gradient(x: Array, cotangent: Array) -> Array:
    """Return the cotangent of the kernel of `correlate`.

    Args:
      x: (B, height, width, C).
      cotangent: (B, height, width, O), cotangent of the result.

    Returns:
      (3, 3, C, O).
    """
    channels = (x.shape[3], cotangent.shape[3])

    def of_images(images, cotangents):
        tiles = _product(_OUTPUTS.T, _disassemble(cotangents))
        tiles = tiles.reshape(len(_TAPS), -1, channels[1])
        over_tiles = ((1,), (1,)), ((0,), (0,))
        return jax.lax.dot_general(
            _evaluate(images), tiles, over_tiles, precision="highest"
        )

    each = _images_at_once(x.shape[1:3], channels, _ELEMENTS_AT_ONCE)
    total = sum_groups(of_images, each, x, cotangent)
    taps = _product(_TAPS.T, total.reshape(len(_TAPS), -1))
    return taps.reshape(WINDOW, WINDOW, *channels)


def _images_at_once(size, channels, elements: int) -> int:
    return _tiles_at_once(max(channels), elements) // count_tiles(size)


def _tiles_at_once(channels: int, elements: int) -> int:
    return max(_FEWEST_TILES, elements // channels)


def _product(matrix: np.ndarray, rows: Array) -> Array:
    return matmul(matrix.astype(rows.dtype), rows)


def _grid(size) -> tuple[int, int]:
    """Return the numbers of rows and columns of tiles."""
    return -(-size[0] // _TILE), -(-size[1] // _TILE)


def _padded(images: Array, border: int) -> Array:
    """Pad images with zeros to whole tiles, then by `border` on every side."""
    sides = [
        (border, _TILE * tiles + border - length)
        for tiles, length in zip(_grid(images.shape[1:3]), images.shape[1:3], strict=True)
    ]
    return jnp.pad(images, ((0, 0), *sides, (0, 0)))


def _evaluate(images: Array) -> Array:
    """Evaluate images (B, height, width, C) at the points: (36, tiles, C)."""
    rows, columns = _grid(images.shape[1:3])
    padded = _padded(images, 1)
    width = _TILE + WINDOW - 1
    inputs = jnp.stack([_strided(padded, i, rows, axis=1) for i in range(width)])
    inputs = jnp.stack([_strided(inputs, j, columns, axis=3) for j in range(width)], axis=1)
    chex.assert_shape(inputs, (width, width, len(images), rows, columns, None))
    values = _product(_INPUTS, inputs.reshape(width**2, -1))
    return values.reshape(width**2, -1, images.shape[3])


def _strided(array: Array, start: int, count: int, axis: int) -> Array:
    """Take every fourth entry along `axis`, `count` entries from `start`."""
    stop = start + _TILE * (count - 1) + 1
    return jax.lax.slice_in_dim(array, start, stop, _TILE, axis)


def _assemble(tiles: Array, count: int, size) -> Array:
    """Join tiles, (16 * tiles, O) point by point, to images (count, height, width, O)."""
    rows, columns = _grid(size)
    chex.assert_shape(tiles, (_TILE**2 * count * rows * columns, None))
    tiles = tiles.reshape(_TILE, _TILE, count, rows, columns, -1).transpose(
        2, 3, 0, 4, 1, 5
    )
    images = tiles.reshape(count, rows * _TILE, columns * _TILE, -1)
    return images[:, : size[0], : size[1]]


def _disassemble(images: Array) -> Array:
    """Apply the transpose of `_assemble`: (16, tiles * O), zeros beyond the border."""
    rows, columns = _grid(images.shape[1:3])
    tiles = _padded(images, 0).reshape(len(images), rows, _TILE, columns, _TILE, -1)
    return tiles.transpose(2, 4, 0, 1, 3, 5).reshape(_TILE**2, -1)
