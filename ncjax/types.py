"""The state of the layer-peeled model: its container, its start, its checks."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Params(NamedTuple):
    """Free variables `Z = (W, H)` of the unconstrained layer-peeled model.

    Ji et al. (ICLR 2022), equation (1): the last layer and its features are
    optimised directly, with nothing else in between.
    """

    W: Array  # (K, d)     classifier, row w_k is the weight of class k
    H: Array  # (K, n, d)  features, h_{k,i} is the i-th sample of class k


def init_params(
    key: Array,
    num_classes: int,
    per_class: int,
    dim: int,
    scale: float = 0.1,
    dtype=None,
) -> Params:
    """Draw every entry of `W` and `H` from `N(0, scale²)`, independently.

    Args:
      key: PRNG key; `jax.vmap` over an array of keys gives one start per seed.
      num_classes: `K`, at least 2.
      per_class: `n`, samples of each class, at least 1.
      dim: `d`, feature dimension, at least 1.
      scale: standard deviation of an entry, not negative.
      dtype: floating dtype; JAX's default one if None.

    Returns:
      `Params` with `W` (K, d) and `H` (K, n, d).

    Raises:
      ValueError: a size or the scale is out of range, dtype is not floating, or key is a
        plain integer.

    Warns:
      UserWarning: `dim < num_classes - 1`, where no simplex ETF fits and neural
        collapse can therefore not be reached.
    """
    check_sizes(num_classes=num_classes, per_class=per_class, dim=dim)
    if isinstance(key, int | np.integer):
        raise ValueError(f"key must be a PRNG key, such as jax.random.key({key})")
    dtype = float_dtype(dtype)
    if not 0 <= scale <= float(jnp.finfo(dtype).max):
        raise ValueError(f"scale must be finite and not negative in {dtype}, got {scale}")
    if dim < num_classes - 1:
        warnings.warn(
            f"dim={dim} is below num_classes - 1 = {num_classes - 1}: no simplex ETF "
            "fits, so the flow cannot reach neural collapse",
            stacklevel=2,
        )
    key_W, key_H = jax.random.split(key)
    deviation = jnp.asarray(scale, dtype)
    return Params(
        W=deviation * jax.random.normal(key_W, (num_classes, dim), dtype),
        H=deviation * jax.random.normal(key_H, (num_classes, per_class, dim), dtype),
    )


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer in range (`num_classes >= 2`)."""
    for name, size in sizes.items():
        check_integer(name, size, least=2 if name == "num_classes" else 1)


def check_integer(name: str, value: int, *, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name: str, value) -> None:
    """Raise ValueError if `value` is known and not a positive, finite number."""
    if not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_params(params: Params, *, finite: bool = False) -> Params:
    """Return `params` as JAX arrays once shapes, dtypes and (if asked) values are sound.

    Args:
      params: `W` (K, d) and `H` (K, n, d) with K >= 2, floating, of one dtype.
      finite: also refuse NaN and infinity, where the values are known: under `jax.jit`
        or `jax.vmap` they are not, and the check is left out.

    Raises:
      ValueError: says what was given and what is expected.
    """
    if not (isinstance(params, tuple) and len(params) == 2):
        raise ValueError(f"expected ncjax.Params(W, H), got {type(params).__name__}")
    W, H = (jnp.asarray(leaf) for leaf in params)
    if W.ndim != 2 or H.ndim != 3 or (H.shape[0], H.shape[2]) != W.shape:
        raise ValueError(
            f"expected W (K, d) and H (K, n, d), got W {W.shape} and H {H.shape}"
            + _advice(W, H)
        )
    num_classes, per_class, dim = H.shape
    check_sizes(num_classes=num_classes, per_class=per_class, dim=dim)
    if not jnp.issubdtype(W.dtype, jnp.floating) or W.dtype != H.dtype:
        raise ValueError(
            f"expected W and H of one floating dtype, got W {W.dtype} and H {H.dtype}"
        )
    if finite:
        for name, leaf in (("W", W), ("H", H)):
            check_finite(name, leaf)
    return Params(W, H)


def _advice(W: Array, H: Array) -> str:
    """What to do with shapes that are usual and wrong."""
    if W.ndim == 3 and H.ndim == 4 and len(W) == len(H):
        return f": for {len(W)} models on a leading axis use jax.vmap"
    if W.ndim == 2 and H.ndim == 2 and H.shape[1] == W.shape[1]:
        return ": ncjax.peel sorts features (N, d) by their labels"
    return ""


def check_finite(name: str, array: Array) -> None:
    """Raise ValueError if a concrete `array` holds NaN or infinity."""
    if isinstance(array, jax.core.Tracer):
        return
    bad = int(np.count_nonzero(~np.isfinite(np.asarray(array))))
    if bad:
        raise ValueError(
            f"{name} must be finite, got {bad} of {array.size} entries NaN or infinite"
        )


def float_dtype(dtype) -> jnp.dtype:
    """The default floating dtype for None, else `dtype`, refused if not floating."""
    resolved = jnp.zeros((), float).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype must be floating, got {resolved}")
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(
            f"dtype {resolved} needs jax.config.update('jax_enable_x64', True)"
        )
    return resolved
