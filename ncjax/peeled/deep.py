r"""Points of several linear layers, with logits $W_L \cdots W_1 h$: starts and checks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ncjax.arrays import as_array
from ncjax.checks import (
    check_finite,
    check_integer,
    check_key,
    check_scale,
    check_sizes,
    float_dtype,
)
from ncjax.types import Array, DeepParams


def init_deep_params(
    key: Array,
    num_classes: int,
    per_class: int,
    widths: Sequence[int],
    scale: float = 0.1,
    dtype=None,
) -> DeepParams:
    """Draw every entry of all layers and of `H` from `N(0, scale²)`, independently.

    Args:
      key: PRNG key; `jax.vmap` over an array of keys gives one start per seed.
      num_classes: `K`, at least 2.
      per_class: `n`, samples of each class, at least 1.
      widths: `(d_0, ..., d_{L-1})`, each at least 1: the dimension of the features and the
        outputs of all layers but the last. Their number is the number L of layers.
      scale: standard deviation of an entry, not negative.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `DeepParams` with `layers` W_1 (d_1, d_0), ..., W_L (K, d_{L-1}) and `H` (K, n, d_0).

    Raises:
      ValueError: a size or the scale is out of range, dtype is not floating, or `key` is
        not one PRNG key.

    >>> import jax, ncjax
    >>> start = ncjax.init_deep_params(jax.random.key(0), 6, 1, widths=(8, 7))
    >>> [layer.shape for layer in start.layers], start.H.shape
    ([(7, 8), (6, 7)], (6, 1, 8))
    """
    check_sizes(num_classes=num_classes, per_class=per_class)
    widths = _check_widths(widths)
    check_key("key", key)
    dtype = float_dtype(dtype)
    check_scale(scale, dtype)
    shapes: list[tuple[int, ...]] = [(num_classes, per_class, widths[0])]
    shapes.extend(zip((*widths[1:], num_classes), widths, strict=True))
    keys = jax.random.split(key, len(shapes))
    deviation = jnp.asarray(scale, dtype)
    H, *layers = (
        deviation * jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return DeepParams(tuple(layers), H)


def _check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not len(widths):
        raise ValueError(
            "widths must be a tuple (d_0, ..., d_{L-1}) with a width for each of the L "
            f"layers, such as (8, 8), got {widths!r}"
        )
    for width in widths:
        check_integer("widths", width, least=1)
    return tuple(int(width) for width in widths)


def check_deep_params(params: DeepParams, *, finite: bool = False) -> DeepParams:
    """Return a point of several linear layers as JAX arrays.

    Args:
      params: `layers` W_1 (d_1, d_0), ..., W_L (K, d_{L-1}) and `H` (K, n, d_0), with
        L >= 1 and K >= 2, floating, of one dtype.
      finite: as in `ncjax.checks.check_params`.

    Raises:
      ValueError: there is no layer, shapes or dtypes do not fit, or a value is not finite.
    """
    if not isinstance(params, DeepParams):
        given = type(params).__name__
        raise ValueError(f"expected ncjax.DeepParams(layers, H), got {given}")
    if not isinstance(params.layers, tuple | list) or not params.layers:
        given = type(params.layers).__name__
        is_empty = isinstance(params.layers, tuple | list)
        raise ValueError(
            "layers must be a tuple of at least one array, W_1 to W_L, got "
            f"{'an empty ' if is_empty else ''}{given}"
        )
    layers = tuple(as_array(name, W) for name, W in _named(params.layers))
    H = as_array("H", params.H)
    _check_shapes(layers, H)
    dtypes = sorted({str(leaf.dtype) for leaf in (*layers, H)})
    if len(dtypes) > 1 or not jnp.issubdtype(H.dtype, jnp.floating):
        raise ValueError(
            f"expected layers and H of one floating dtype, got {', '.join(dtypes)}"
        )
    if finite:
        for name, W in _named(layers):
            check_finite(name, W)
        check_finite("H", H)
    return DeepParams(layers, H)


def _named(layers) -> list[tuple[str, Array]]:
    """Return the layers with their names in messages, W_1 to W_L."""
    return [(f"W_{number}", W) for number, W in enumerate(layers, start=1)]


def _check_shapes(layers: tuple[Array, ...], H: Array) -> None:
    given = ", ".join(f"{name} {W.shape}" for name, W in _named(layers))
    given = f"{given} and H {H.shape}"
    if H.ndim != 3 or any(W.ndim != 2 for W in layers):
        many = H.ndim == 4 and all(W.ndim == 3 for W in layers)
        advice = ": for models on a leading axis use jax.vmap" if many else ""
        raise ValueError(
            "expected layers W_1 (d_1, d_0), ..., W_L (K, d_{L-1}) and H (K, n, d_0), got "
            f"{given}{advice}"
        )
    check_sizes(num_classes=H.shape[0], per_class=H.shape[1], dim=H.shape[2])
    width = H.shape[2]
    for name, W in _named(layers):
        if W.shape[1] != width:
            raise ValueError(
                f"expected {name} of {width} columns, one for each entry of its input, "
                f"got {given}"
            )
        width = W.shape[0]
        check_integer(f"the number of rows of {name}", width, least=1)
    if width != H.shape[0]:
        raise ValueError(
            f"expected a last layer with a row for each of the K = {H.shape[0]} classes of "
            f"H, got {given}"
        )
