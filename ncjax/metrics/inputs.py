"""Check features, labels, classifier and bias that a caller passes."""

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, narrow_labels, read_array
from ncjax.checks import (
    check_finite,
    check_integer,
    check_label_range,
    check_sizes,
    concrete,
)
from ncjax.numerics import wide_dtype
from ncjax.types import Array


def check_features(features, labels, W, b=None, num_classes=None, min_count=None):
    """Return features, labels, classifier and bias as arrays; raise ValueError if unsound.

    W and b come in the dtype of the computation, labels as int32. `min_count` says which
    classes need samples, as in `check_counts`.

    Raises:
      ValueError: as in `collapse_metrics_from_features`.
    """
    features, W = as_array("features", features), as_array("W", W)
    shape = features.shape
    if W.ndim != 2 or len(shape) != 2 or shape[1] != W.shape[1]:
        transposed = W.ndim == 2 and len(shape) == 2 and shape[1] == W.shape[0]
        raise ValueError(
            f"expected features (N, d) and W (K, d), got {shape} and {W.shape}"
            + (": transpose W" if transposed else _advice(shape))
        )
    if num_classes is not None and num_classes != W.shape[0]:
        raise ValueError(f"num_classes is {num_classes} but W has {W.shape[0]} rows")
    features, labels = check_samples(features, labels, W.shape[0], min_count)
    W, b = check_classifier(W, b, W.shape)
    dtype = wide_dtype(features.dtype)
    W = _floating("W", W, dtype)
    return features, labels, W, None if b is None else _floating("b", b, dtype)


def check_samples(
    features, labels, num_classes: int, min_count: int | None = None
) -> tuple[Array, Array]:
    """Return features (N, d) and int32 labels (N,) as arrays; raise ValueError if unsound.

    Raises:
      ValueError: as in `collapse_metrics_from_features`.
    """
    if min_count is not None:
        check_integer("min_count", min_count, least=1)
    features = as_array("features", features)
    shape = features.shape
    if len(shape) != 2:
        raise ValueError(f"expected features (N, d), got {shape}{_advice(shape)}")
    labels = integer_labels(labels, shape[0])
    check_sizes(num_classes=num_classes, dim=shape[1])
    features = _floating("features", features, features.dtype)
    _check_labels(labels, num_classes, min_count)
    if min_count is None and features.shape[0] < num_classes:  # labels may have no values
        raise ValueError(
            f"expected a sample of each of {num_classes} classes, got features "
            f"{features.shape}"
        )
    return features, narrow_labels(labels)


def check_batch(
    features, labels, mask=None, dim: int | None = None
) -> tuple[Array, Array, Array | None]:
    """Return features (B, d), int32 labels (B,) and mask (B,) or None as arrays.

    Only shapes and dtypes are checked, because values would have to wait for the device.
    A sample with a label outside [0, K) is left out later. A label that int32 does not hold
    becomes -1, so that it is left out too.

    Raises:
      ValueError: a shape or dtype does not fit; the message gives the expected one.
    """
    features = as_array("features", features)
    _, labels, mask = read_batch(features, labels, mask, dim)
    mask = None if mask is None else as_array("mask", mask)
    return features, narrow_labels(labels), mask


def read_batch(features, labels, mask=None, dim: int | None = None):
    """Return features (B, d), labels (B,) and mask (B,) or None where they lie.

    Arrays on the host stay there, without a copy of the features.

    Raises:
      ValueError: as in `check_batch`.
    """
    features = read_array("features", features)
    shape = features.shape
    if len(shape) != 2 or dim not in (None, shape[1]):
        expected = "(B, d)" if dim is None else f"(B, {dim})"
        raise ValueError(f"expected features {expected}, got {shape}{_advice(shape)}")
    _check_real("features", features)
    labels = integer_labels(labels, shape[0])
    return features, labels, None if mask is None else _booleans(mask, labels.shape)


def _booleans(mask, shape: tuple[int, ...]) -> np.ndarray | Array:
    """Return `mask` as an array of booleans; raise ValueError if it does not fit."""
    mask = read_array("mask", mask)
    is_boolean = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    if mask.shape != shape or not is_boolean:
        raise ValueError(
            f"expected mask of booleans {shape}, got {mask.dtype} {mask.shape}"
        )
    return mask.astype(bool)


def check_classifier(W, b, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Return W (K, d) and b (K,) or None as arrays.

    Raises:
      ValueError: a shape does not fit; the message gives the expected one.
    """
    W, b = as_array("W", W), None if b is None else as_array("b", b)
    if W.shape != shape:
        transposed = W.shape == shape[::-1]
        raise ValueError(
            f"expected W {shape}, got {W.shape}" + (": transpose W" if transposed else "")
        )
    if b is not None and b.shape != shape[:1]:
        raise ValueError(
            f"expected b ({shape[0]},), got {b.shape}: pass one entry for each row of W"
        )
    for name, array in (("W", W), ("b", b)):
        if array is not None:
            _check_real(name, array)
    return W, b


def check_centres(centres, shape: tuple[int, ...]) -> Array:
    """Return class centres (K, d) as an array.

    Raises:
      ValueError: centres are complex or of another shape, or no known row is finite.
    """
    centres = as_array("centres", centres)
    if centres.shape != shape:
        raise ValueError(f"expected centres {shape}, got {centres.shape}")
    _check_real("centres", centres)
    known = concrete(centres)
    if known is not None and not np.isfinite(known).all(axis=1).any():
        raise ValueError("expected a centre, got NaN or infinity in every row of centres")
    return centres


def check_rows(*matrices) -> tuple[Array, ...]:
    """Return matrices in the dtype of the computation.

    Raises:
      ValueError: they are not floating, or not of one shape (K, d).
    """
    arrays = tuple(as_array("rows", matrix) for matrix in matrices)
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        given = " and ".join(map(str, shapes))
        raise ValueError(f"expected rows of one shape (K, d), got {given}")
    for array in arrays:
        _check_floating("rows", array)
    return tuple(array.astype(wide_dtype(array.dtype)) for array in arrays)


def _advice(shape: tuple[int, ...]) -> str:
    """Return advice on features with more than two axes, else nothing."""
    return ": reshape them to (-1, d), or join the batches" if len(shape) > 2 else ""


def integer_labels(labels, num_samples: int) -> np.ndarray | Array:
    """Return `labels` (N,) in the integer type that the caller gave.

    JAX without x64 would turn a label of 2^32 into 0.

    Raises:
      ValueError: labels are not integers (N,); the message gives advice.
    """
    given = read_array("labels", labels)
    if isinstance(labels, list | tuple) and not labels:  # NumPy reads floats
        given = given.astype(np.int32)
    is_integer = jnp.issubdtype(given.dtype, jnp.integer)
    if given.shape == (num_samples,) and is_integer:
        return given
    raise ValueError(
        f"expected labels of integers ({num_samples},), got {given.dtype} {given.shape}"
        + _label_advice(given, num_samples)
    )


def _label_advice(labels: np.ndarray | Array, num_samples: int) -> str:
    """Return advice for common mistakes in labels, else nothing."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "OSUM":
        return ": number the classes by np.unique(labels, return_inverse=True)[1]"
    if labels.ndim == 2 and labels.shape[0] == num_samples:
        return ": take labels[:, 0]" if labels.shape[1] == 1 else ": take labels.argmax(1)"
    if labels.shape != (num_samples,):
        return ": pass one label for each row of features"
    is_floating = jnp.issubdtype(labels.dtype, jnp.floating)
    known = is_floating and not isinstance(labels, jax.core.Tracer)
    if known and np.any(np.asarray(labels) % 1 != 0):
        return ": they are not whole numbers"
    return ": cast them"


def _check_floating(name: str, array: Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        advice = "" if jnp.issubdtype(array.dtype, jnp.complexfloating) else ": cast it"
        raise ValueError(f"{name} must be floating, got {array.dtype}{advice}")


def _check_real(name: str, array: np.ndarray | Array) -> None:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, got {array.dtype}")


def _floating(name: str, array: Array, dtype) -> Array:
    """Return `array` in `dtype`; raise ValueError unless it is floating and finite."""
    _check_floating(name, array)
    array = array.astype(dtype)
    check_finite(name, array)
    return array


def _check_labels(labels: Array, num_classes: int, min_count: int | None) -> None:
    """Raise ValueError unless concrete labels lie in [0, K) and are frequent enough."""
    check_label_range(labels, num_classes)
    values = concrete(labels)
    if values is not None:
        counts = np.bincount(values.astype(np.int64), minlength=num_classes)
        check_counts(counts, min_count)


def known_labels(given, labels: Array) -> np.ndarray:
    """Return checked `labels` on the host, where the sizes of the classes fix shapes.

    Args:
      given: the labels of the caller. They are known if a traced function only closes over
        them, although the checked ones are traced.
      labels: the checked labels.

    Raises:
      ValueError: both are traced.
    """
    if isinstance(labels, jax.core.Tracer):
        if isinstance(given, jax.core.Tracer):
            raise ValueError(
                "labels must be known, because the sizes of the classes fix shapes: call "
                "this outside jax.jit and jax.vmap, or close over the labels"
            )
        labels = given
    return np.asarray(labels)


def check_counts(counts: np.ndarray, min_count: int | None) -> None:
    """Raise ValueError unless enough of the K classes have samples.

    Args:
      counts: (K,) samples of each class.
      min_count: None if every class needs a sample, else two classes need so many.
    """
    missing = np.flatnonzero(counts == 0)
    if min_count is None and missing.size:
        raise ValueError(
            f"every class needs a sample, none has label {_first(missing)}: add samples, "
            "or leave these classes out, by min_count=1 or by renumbering the others"
        )
    if min_count is not None and np.count_nonzero(counts >= min_count) < 2:
        raise ValueError(
            f"expected two classes with at least min_count = {min_count} samples, got "
            f"counts {_first(counts)}"
        )


def _first(numbers: np.ndarray) -> str:
    """Return the numbers as text, of many the first ones and how many there are."""
    if len(numbers) <= 10:
        return str(numbers.tolist())
    return f"{str(numbers[:10].tolist())[:-1]}, ... {len(numbers)} in all]"
