r"""Convolve and max-pool by the formula that is fast for the shape and platform.

All formulas compute the same sums. On accelerators they are XLA's own. On CPU, some of
XLA's are up to a hundred times slower than the same arithmetic as matrix products and
shifted slices: convolutions of 1x1 and 2x2 maps, the gradient of the window maximum, and,
within the body of a loop, the gradient of a convolution by its kernel (jax-ml/jax#12868).
Most 3x3 convolutions run by Winograd's algorithm with a quarter of the products.
"""

import math
from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_integer
from ncjax.networks import winograd
from ncjax.networks.grouping import map_groups, sum_groups
from ncjax.networks.platforms import by_platform
from ncjax.types import Array

# Up to this many input positions, one dense matrix maps all inputs to all outputs.
_DENSE_POSITIONS = 4
# Below either bound, Winograd's transforms cost more than the products they save.
_WINOGRAD_CHANNELS = 16
_WINOGRAD_TILES = 64
# With fewer channels, XLA's strided convolution is faster than gathered windows.
_GATHER_CHANNELS = 16
# Elements of the windows gathered at a time: they fit into the cache.
_GATHER_ELEMENTS = 2**19


def convolve(
    x: Array, kernel: Array, stride: int = 1, padding: int = 0, *, winograd: bool = True
) -> Array:
    r"""Return the convolution (cross-correlation) of images with zero padding.

    $$y_{b,p,q,o} = \sum_{i,j,c} x_{b,\, s p + i - r,\, s q + j - r,\, c}\, k_{i,j,c,o}$$

    Args:
      x: (B, height, width, C).
      kernel: (h, w, C, O).
      stride: s, in both directions.
      padding: r, number of zeros on every side.
      winograd: whether Winograd's algorithm may be used; the benchmark compares both.

    Returns:
      (B, height', width', O), height' = (height + 2 r - h) // s + 1. It has a reverse
      derivative, which can be differentiated again in either mode, but no forward
      derivative. A program has the formula of the platform that it is lowered for.

    Raises:
      ValueError: shapes or dtypes do not match, or the padded image is smaller than the
        kernel.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"expected x (B, height, width, C) and kernel (h, w, C, O), got {x.shape} and "
            f"{kernel.shape}"
        )
    if x.dtype != kernel.dtype or not math.prod(kernel.shape[:2]):
        raise ValueError(
            "expected x and a kernel of one dtype with h and w at least 1, got "
            f"{x.dtype} and {kernel.dtype} {kernel.shape}"
        )
    _output_size(x.shape[1:3], kernel.shape[:2], stride, padding)
    formula = _formula(x.shape, kernel.shape, stride, padding, x.dtype, winograd)
    if formula is convolve_lax:
        return convolve_lax(x, kernel, stride, padding)
    on_cpu, elsewhere = (
        partial(each, stride=stride, padding=padding) for each in (formula, convolve_lax)
    )
    return by_platform(on_cpu, elsewhere)(x, kernel)


def _formula(
    x_shape, kernel_shape, stride: int, padding: int, dtype, with_winograd: bool = True
):
    """Return the fastest formula on CPU, as measured at batches of 128 within a loop."""
    window, channels = kernel_shape[:2], min(kernel_shape[2:])
    if 0 in (*x_shape, *kernel_shape):
        return convolve_lax
    if window == (1, 1):
        return convolve_pointwise if padding == 0 else convolve_lax
    if math.prod(x_shape[1:3]) <= _DENSE_POSITIONS:
        return convolve_dense
    tiles = x_shape[0] * winograd.count_tiles(x_shape[1:3])
    if (
        with_winograd
        and (*window, stride, padding) == (3, 3, 1, 1)
        and channels >= _WINOGRAD_CHANNELS
        and tiles >= _WINOGRAD_TILES
        and jnp.finfo(dtype).bits >= 32
    ):
        return convolve_winograd
    # XLA 0.10 aborts on the gradient of some strided kernels that are not square.
    if stride > 1 and (channels >= _GATHER_CHANNELS or window[0] != window[1]):
        return convolve_gathered
    return convolve_canonical


def convolve_lax(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolve by `jax.lax.conv_general_dilated`."""
    return _lax(x, kernel, (stride, stride), ((padding, padding), (padding, padding)))


def _lax(x: Array, kernel: Array, strides, pads, spread=(1, 1)) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=pads,
        lhs_dilation=spread,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_canonical(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolve by XLA, with gradients in the one layout that XLA runs fast on CPU."""
    return convolve_lax(x, kernel, stride, padding)


def _canonical_forward(x, kernel, stride, padding):
    return convolve_lax(x, kernel, stride, padding), (x, kernel)


def _canonical_backward(stride, padding, saved, cotangent):
    x, kernel = saved
    window = kernel.shape[:2]
    # Convolve the cotangent, spread by the stride, with the mirrored kernel.
    pads = [
        (width - 1 - padding, length + padding - (out - 1) * stride - 1)
        for length, width, out in zip(
            x.shape[1:3], window, cotangent.shape[1:3], strict=True
        )
    ]
    by_x = _lax(cotangent, _mirrored(kernel), (1, 1), pads, (stride, stride))
    return by_x, _by_kernel(x, cotangent, window, stride, padding)


convolve_canonical.defvjp(_canonical_forward, _canonical_backward)


def _mirrored(kernel: Array) -> Array:
    """Return the kernel of the gradient by the input."""
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _by_kernel(x: Array, cotangent: Array, window, stride: int, padding: int) -> Array:
    """Return the gradient by the kernel: gathered windows times the cotangent."""

    def of_images(x, cotangent):
        windows = _gathered(x, window, stride, padding)
        return jnp.tensordot(windows, cotangent, axes=((0, 1, 2), (0, 1, 2)))

    each = _images_at_once(cotangent.shape, window, x.shape[3])
    total = sum_groups(of_images, each, x, cotangent)
    chex.assert_shape(total, (math.prod(window) * x.shape[3], cotangent.shape[3]))
    return total.reshape(*window, x.shape[3], cotangent.shape[3])


def _gathered(x: Array, window, stride: int, padding: int) -> Array:
    """Gather the windows side by side: (B, height', width', h w C)."""
    return jnp.concatenate(_windows(x, window, stride, padding, 0), axis=-1)


def _images_at_once(out_shape, window, channels: int) -> int:
    return _GATHER_ELEMENTS // math.prod((*out_shape[1:3], *window, channels))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_winograd(x: Array, kernel: Array, stride: int = 1, padding: int = 1) -> Array:
    """Convolve with 3x3, stride 1 and padding 1, by Winograd's algorithm."""
    return winograd.correlate(x, kernel)


def _winograd_forward(x, kernel, stride, padding):
    return winograd.correlate(x, kernel), (x, kernel)


def _winograd_backward(stride, padding, saved, cotangent):
    x, kernel = saved
    by_x = winograd.correlate(cotangent, _mirrored(kernel))
    return by_x, winograd.kernel_gradient(x, cotangent)


convolve_winograd.defvjp(_winograd_forward, _winograd_backward)


def convolve_pointwise(x: Array, kernel: Array, stride: int, padding: int = 0) -> Array:
    """Convolve with 1x1 and no padding: one matrix product over all kept positions."""
    return jnp.matmul(x[:, ::stride, ::stride], kernel[0, 0])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_gathered(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolve as gathered windows times one matrix."""
    return _gathered_product(x, kernel, stride, padding)


def _gathered_product(x, kernel, stride, padding):
    window, channels = kernel.shape[:2], kernel.shape[2:]
    matrix = kernel.reshape(-1, channels[1])

    def of_images(x):
        return jnp.matmul(_gathered(x, window, stride, padding), matrix)

    size = _output_size(x.shape[1:3], window, stride, padding)
    each = _images_at_once((len(x), *size), window, channels[0])
    return map_groups(of_images, each, x)


def _gathered_forward(x, kernel, stride, padding):
    return _gathered_product(x, kernel, stride, padding), (x, kernel)


def _gathered_backward(stride, padding, saved, cotangent):
    x, kernel = saved
    window, channels = kernel.shape[:2], kernel.shape[2:]
    matrix = kernel.reshape(-1, channels[1]).T

    def of_images(cotangent):
        # Transpose the gathering: spread the part of each tap by the stride, add all up.
        parts = jnp.matmul(cotangent, matrix).reshape(*cotangent.shape[:3], -1, channels[0])
        total = jnp.zeros((), parts.dtype)
        for tap in range(math.prod(window)):
            spread = [
                (place, length + 2 * padding - place - (out - 1) * stride - 1, stride - 1)
                for place, length, out in zip(
                    divmod(tap, window[1]), x.shape[1:3], cotangent.shape[1:3], strict=True
                )
            ]
            total = total + jax.lax.pad(
                parts[:, :, :, tap],
                jnp.zeros((), parts.dtype),
                ((0, 0, 0), *spread, (0, 0, 0)),
            )
        height, width = x.shape[1:3]
        return total[:, padding : padding + height, padding : padding + width]

    each = _images_at_once(cotangent.shape, window, channels[0])
    by_x = map_groups(of_images, each, cotangent)
    return by_x, _by_kernel(x, cotangent, window, stride, padding)


convolve_gathered.defvjp(_gathered_forward, _gathered_backward)


def convolve_dense(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Convolve by one matrix from all input positions to all output positions."""
    size = x.shape[1:3]
    out = _output_size(size, kernel.shape[:2], stride, padding)
    taps = _taps(size, out, kernel.shape[:2], stride, padding)
    channels = kernel.shape[2:]
    with_zero = jnp.pad(kernel.reshape(-1, *channels), ((0, 1), (0, 0), (0, 0)))
    matrix = with_zero[taps].transpose(0, 2, 1, 3)
    chex.assert_shape(matrix, (math.prod(size), channels[0], math.prod(out), channels[1]))
    matrix = matrix.reshape(math.prod(size) * channels[0], math.prod(out) * channels[1])
    return jnp.matmul(x.reshape(x.shape[0], -1), matrix).reshape(
        x.shape[0], *out, channels[1]
    )


def max_pool(x: Array, size: int, stride: int, padding: int = 0) -> Array:
    r"""Return the maximum over square windows, as `torch.nn.MaxPool2d` does.

    Args:
      x: (B, height, width, C).
      size: height and width of the window.
      stride: step between windows, in both directions.
      padding: number of entries, minus infinity, on every side.

    Returns:
      (B, height', width', C), height' = (height + 2 padding - size) // stride + 1. The
      gradient of equal maxima is shared on CPU and goes to the first elsewhere.

    Raises:
      ValueError: x has another rank, a size is out of range, the padded image is smaller
        than the window, or the padding is more than half the window.
    """
    check_integer("size", size, least=1)
    if x.ndim != 4 or padding > size // 2:
        raise ValueError(
            "expected x (B, height, width, C) and padding of at most half the window, got "
            f"{x.shape} and padding {padding} of {size}"
        )
    _output_size(x.shape[1:3], (size, size), stride, padding)
    on_cpu, elsewhere = (
        partial(pool, size=size, stride=stride, padding=padding)
        for pool in (_pool_slices, _pool_windows)
    )
    return by_platform(on_cpu, elsewhere)(x)


def _pool_windows(x: Array, size: int, stride: int, padding: int) -> Array:
    """Return the maxima by XLA's own formula."""
    return jax.lax.reduce_window(
        x,
        np.array(-np.inf, x.dtype),
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    )


def _pool_slices(x: Array, size: int, stride: int, padding: int) -> Array:
    """Return the maxima as the maximum of shifted slices."""
    return reduce(jnp.maximum, _windows(x, (size, size), stride, padding, -np.inf))


def _output_size(size, window, stride: int, padding: int) -> tuple[int, int]:
    """Return height and width of the output."""
    check_integer("stride", stride, least=1)
    check_integer("padding", padding, least=0)
    padded = [length + 2 * padding for length in size]
    if any(length < width for length, width in zip(padded, window, strict=True)):
        raise ValueError(
            f"an image of {size[0]}x{size[1]} with padding {padding} is smaller than the "
            f"window of {window[0]}x{window[1]}"
        )
    height, width = (
        (length - width) // stride + 1 for length, width in zip(padded, window, strict=True)
    )
    return height, width


def _windows(x: Array, window, stride: int, padding: int, fill: float) -> list[Array]:
    """Return the (B, height', width', C) values at each place of the window, by rows."""
    height, width = _output_size(x.shape[1:3], window, stride, padding)
    border = (padding, padding)
    padded = jnp.pad(x, ((0, 0), border, border, (0, 0)), constant_values=fill)
    return [
        padded[
            :,
            i : i + (height - 1) * stride + 1 : stride,
            j : j + (width - 1) * stride + 1 : stride,
        ]
        for i in range(window[0])
        for j in range(window[1])
    ]


def _taps(size, out, window, stride: int, padding: int) -> np.ndarray:
    """Return the tap of the kernel, by rows, that links each input to each output.

    Returns:
      (inputs, outputs) integers; h * w, one past the last tap, if no tap links them.
    """
    rows, columns = (
        np.arange(n)[:, None] + padding - stride * np.arange(m)[None]
        for n, m in zip(size, out, strict=True)
    )
    i, j = rows[:, None, :, None], columns[None, :, None, :]
    inside = (i >= 0) & (i < window[0]) & (j >= 0) & (j < window[1])
    taps = np.where(inside, i * window[1] + j, math.prod(window))
    return taps.reshape(math.prod(size), math.prod(out))
