"""Checks of arguments. Each raises ValueError with the expected and the given value."""

import importlib.util
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ncjax import sizes
from ncjax.arrays import as_array, read_array
from ncjax.types import Array, BiasedParams, DeepParams, Params


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer in range (`num_classes >= 2`)."""
    for name, size in sizes.items():
        check_integer(name, size, least=2 if name == "num_classes" else 1)


def check_integer(name: str, value: int, *, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_count(name: str, value: int, *, least: int) -> None:
    """Raise ValueError unless `value` is an integer that JAX can count to."""
    check_integer(name, value, least=least)
    most = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64)).max
    if value > most:
        raise ValueError(f"{name} must be an integer of at most {most}, got {value}")


def check_counts(counts) -> tuple[int, ...]:
    """Return the class sizes n_k (K,) as integers; raise ValueError if they do not fit."""
    if isinstance(counts, jax.core.Tracer):
        raise ValueError(
            "counts must be known, because they decide shapes, got a traced array: pass "
            "them to jax.jit as a static tuple"
        )
    sizes = np.asarray(read_array("counts", counts))
    if sizes.ndim != 1 or sizes.size < 2:
        raise ValueError(
            "counts must hold the number of samples of each of K >= 2 classes, such as "
            f"(4, 4, 1, 1), got {counts!r}"
        )
    for size in sizes.tolist():
        check_integer("counts", size, least=1)
    return tuple(sizes.tolist())


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name: str, value, dtype=None) -> None:
    """Raise ValueError if `value` is known and not a positive, finite number.

    Args:
      name: name of the argument, for the message.
      value: the argument.
      dtype: the dtype of the computation. A cast to it may round `value` to 0 or infinity.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except TypeError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if dtype is None:
        return
    limits = jnp.finfo(dtype)
    if not float(limits.tiny) <= number <= float(limits.max):
        raise ValueError(f"{name} must be positive and finite in {dtype}, got {value}")


def check_nonnegative(name: str, value) -> None:
    """Raise ValueError if `value` is known and negative or not finite."""
    if not isinstance(value, jax.core.Tracer) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_scale(scale: float, dtype) -> None:
    """Raise ValueError unless the scale of a random start is a number >= 0 of `dtype`."""
    if not 0 <= scale <= float(jnp.finfo(dtype).max):
        raise ValueError(f"scale must be finite and not negative in {dtype}, got {scale}")


def check_key(name: str, key) -> None:
    """Raise ValueError unless `key` is one PRNG key, of `jax.random.key` or `PRNGKey`."""
    batch = _key_batch(key)
    if batch is None:
        seed = key if isinstance(key, int | np.integer) else 0
        given = (
            f"{key.dtype} of shape {key.shape}"
            if isinstance(key, jax.Array | np.ndarray)
            else repr(key)
        )
        raise ValueError(
            f"{name} must be a PRNG key, such as jax.random.key({seed}), got {given}"
        )
    if batch:
        raise ValueError(
            f"{name} must be one PRNG key, got keys of shape {batch}: use jax.vmap for them"
        )


def _key_batch(key) -> tuple[int, ...] | None:
    """Return the shape of an array of keys, () for one key; None if it holds no keys."""
    if not isinstance(key, jax.Array | np.ndarray):
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape
    if key.dtype != np.uint32:
        return None
    try:
        return jax.eval_shape(jax.random.wrap_key_data, key).shape
    except (TypeError, ValueError):  # not the shape of the key data
        return None


def check_params(params: Params, *, finite: bool = False) -> Params:
    """Return `params` as JAX arrays, or raise ValueError if they do not fit.

    Args:
      params: `W` (K, d) and `H` (K, n, d) with K >= 2, floating, of one dtype.
      finite: also refuse NaN and infinity. Values are unknown under `jax.jit` and
        `jax.vmap`, which skip this check.

    Raises:
      ValueError: shapes or dtypes do not fit, or a value is not finite.
    """
    pair = isinstance(params, tuple) and len(params) == 2
    if not pair or isinstance(params, DeepParams):
        advice = ": ncjax.collapse_by_layer measures several layers"
        given = type(params).__name__ + (advice if isinstance(params, DeepParams) else "")
        raise ValueError(f"expected ncjax.Params(W, H), got {given}")
    W, H = (as_array(name, leaf) for name, leaf in zip("WH", params, strict=True))
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


def check_biased_params(params: BiasedParams, *, finite: bool = False) -> BiasedParams:
    """Return a point with a bias as JAX arrays, or raise ValueError if it does not fit.

    Args:
      params: `W` (K, d), `H` (K, n, d) and `b` (K,) with K >= 2, floating, of one dtype.
      finite: as in `check_params`.

    Raises:
      ValueError: shapes or dtypes do not fit, or a value is not finite.
    """
    if not (isinstance(params, tuple) and len(params) == 3):
        raise ValueError(
            f"expected ncjax.BiasedParams(W, H, b), got {type(params).__name__}"
        )
    W, H = check_params(Params(*params[:2]), finite=finite)
    b = as_array("b", params[2])
    if b.shape != W.shape[:1] or b.dtype != W.dtype:
        raise ValueError(
            f"expected b {W.dtype} of shape (K,) = {W.shape[:1]}, got {b.dtype} {b.shape}"
        )
    if finite:
        check_finite("b", b)
    return BiasedParams(W, H, b)


def _advice(W: Array, H: Array) -> str:
    """Return advice for two common mistakes, else nothing."""
    if W.ndim == 3 and H.ndim == 4 and len(W) == len(H):
        return f": for {len(W)} models on a leading axis use jax.vmap"
    if W.ndim == 2 and H.ndim == 2 and H.shape[1] == W.shape[1]:
        return ": ncjax.peel sorts features (N, d) by their labels"
    return ""


def check_label_range(labels, num_classes: int) -> None:
    """Raise ValueError if known integers `labels`, as the caller gave them, leave [0, K).

    A cast before this check would hide labels: without x64 JAX reads 2^32 + k as k.
    """
    values = concrete(labels)
    if values is None or not values.size:
        return
    if values.min() < 0 or values.max() >= num_classes:
        from_one = values.min() > 0 and values.max() == num_classes
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {values.min()} to {values.max()}"
            + (": number the classes from 0" if from_one else "")
        )


def concrete(array: Array) -> np.ndarray | None:
    """Return the value of `array`, or None if it is unknown here.

    Under `jax.jit` it is unknown, and so is an array that other processes hold in part.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return None
    return jax.device_get(array)


def check_finite(name: str, array: Array) -> None:
    """Raise ValueError if a concrete `array` holds NaN or infinity."""
    bad = count_not_finite(array)
    if bad:
        raise ValueError(
            f"{name} must be finite, got {bad} of {array.size} entries NaN or infinite in "
            f"{array.dtype}"
        )


def check_computes(name: str, array: Array) -> None:
    """Raise ValueError if a float64 array lies on a TPU, which has no float64."""
    if array.dtype == jnp.float64 and sizes.platform_of(array) == "tpu":
        raise ValueError(
            f"{name} must be float32 on a TPU, which does not compute in float64, got "
            f"{array.dtype}: cast it, or put it on a CPU by jax.default_device"
        )


def count_not_finite(array: Array) -> int:
    """Return how many entries of `array` are NaN or infinite, 0 if it is unknown here.

    On CPU NumPy reads the memory of the array. An accelerator counts by itself, so that
    only the number is copied to the host.
    """
    if isinstance(array, jax.Array) and sizes.platform_of(array) not in ("cpu", None):
        return int(_count_not_finite(array)) if array.is_fully_addressable else 0
    value = concrete(array)
    return 0 if value is None else int(np.count_nonzero(~np.isfinite(value)))


@jax.jit
def _count_not_finite(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array), dtype=jnp.uint32)


def float_dtype(dtype) -> jnp.dtype:
    """Return `dtype`, or JAX's default floating dtype if None.

    Raises:
      ValueError: dtype is not floating, or is float64 while x64 is disabled.
    """
    resolved = jnp.zeros((), float).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype must be floating, got {resolved}")
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(
            f"dtype {resolved} needs jax.config.update('jax_enable_x64', True)"
        )
    return resolved


def sum_dtype(dtype) -> jnp.dtype:
    """Return the dtype of sums over many samples.

    Raises:
      ValueError: as in `float_dtype`, or dtype is half precision.
    """
    resolved = float_dtype(dtype)
    if resolved.itemsize < 4:
        raise ValueError(
            f"dtype must be float32 or float64, got {resolved}: features in half precision "
            "are summed in float32"
        )
    return resolved


def check_installed(extra: str, *modules: str) -> None:
    """Raise ModuleNotFoundError with the extra to install if a module is missing."""
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not found: pip install 'ncjax[{extra}]'", name=missing[0]
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
