"""Check features, labels, classifier and bias that a caller passes."""

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_finite, check_integer, check_sizes
from ncjax.types import Array


def check_features(features, labels, W, b=None, num_classes=None, min_count=None):
    """Return features, labels, classifier and bias as arrays; raise ValueError if unsound.

    W and b come in the dtype of the computation, labels as int32. `min_count` says which
    classes need samples, as in `check_counts`.

    Raises:
      ValueError: as in `collapse_metrics_from_features`.
    """
    W, shape = jnp.asarray(W), jnp.shape(features)
    if W.ndim != 2 or len(shape) != 2 or shape[1] != W.shape[1]:
        transposed = W.ndim == 2 and len(shape) == 2 and shape[1] == W.shape[0]
        raise ValueError(
            f"expected features (N, d) and W (K, d), got {shape} and {W.shape}"
            + (": transpose W" if transposed else "")
        )
    if num_classes is not None and num_classes != W.shape[0]:
        raise ValueError(f"num_classes is {num_classes} but W has {W.shape[0]} rows")
    features, labels = check_samples(features, labels, W.shape[0], min_count)
    W, b = check_classifier(W, b, W.shape)
    dtype = computing_dtype(features.dtype)
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
    features = jnp.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"expected features (N, d), got {features.shape}")
    labels = _integers(labels, features.shape[0])
    check_sizes(num_classes=num_classes, dim=features.shape[1])
    features = _floating("features", features, features.dtype)
    _check_labels(labels, num_classes, min_count)
    if min_count is None and features.shape[0] < num_classes:  # labels may have no values
        raise ValueError(
            f"expected a sample of each of {num_classes} classes, got features "
            f"{features.shape}"
        )
    return features, labels.astype(jnp.int32)


def check_batch(features, labels, mask, dim: int) -> tuple[Array, Array, Array | None]:
    """Return features (B, d), labels (B,) and mask (B,) or None as arrays.

    Only shapes and dtypes are checked, because values would have to wait for the device.
    A sample with a label outside [0, K) is left out later.

    Raises:
      ValueError: a shape or dtype does not fit; the message gives the expected one.
    """
    features = jnp.asarray(features)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"expected features (B, {dim}), got {features.shape}")
    labels = _integers(labels, features.shape[0])
    if mask is None:
        return features, labels, None
    mask = jnp.asarray(mask)
    is_boolean = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    if mask.shape != labels.shape or not is_boolean:
        raise ValueError(
            f"expected mask of booleans {labels.shape}, got {mask.dtype} {mask.shape}"
        )
    return features, labels, mask.astype(bool)


def check_classifier(W, b, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Return W (K, d) and b (K,) or None as arrays.

    Raises:
      ValueError: a shape does not fit; the message gives the expected one.
    """
    W, b = jnp.asarray(W), None if b is None else jnp.asarray(b)
    if W.shape != shape:
        transposed = W.shape == shape[::-1]
        raise ValueError(
            f"expected W {shape}, got {W.shape}" + (": transpose W" if transposed else "")
        )
    if b is not None and b.shape != shape[:1]:
        raise ValueError(f"expected b ({shape[0]},), got {b.shape}")
    return W, b


def check_rows(*matrices) -> tuple[Array, ...]:
    """Return matrices in the dtype of the computation.

    Raises:
      ValueError: they are not floating, or not of one shape (K, d).
    """
    arrays = tuple(jnp.asarray(matrix) for matrix in matrices)
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        given = " and ".join(map(str, shapes))
        raise ValueError(f"expected rows of one shape (K, d), got {given}")
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"rows must be floating, got {array.dtype}")
    return tuple(array.astype(computing_dtype(array.dtype)) for array in arrays)


def computing_dtype(dtype) -> jnp.dtype:
    """Return the dtype of the computation: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _integers(labels, num_samples: int) -> Array:
    """Return `labels` as an array of integers (N,); raise ValueError with advice if not."""
    kind = getattr(getattr(labels, "dtype", None), "kind", "")
    if kind in ("O", "S", "U"):  # JAX has no arrays of objects or strings
        raise ValueError(
            f"expected labels of integers ({num_samples},), got {labels.dtype}: number the "
            "classes by np.unique(labels, return_inverse=True)[1]"
        )
    labels = jnp.asarray(labels)
    if labels.shape == (num_samples,) and jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    advice = ""
    if labels.ndim == 2 and labels.shape[0] == num_samples:
        advice = (
            ": take labels[:, 0]" if labels.shape[1] == 1 else ": take labels.argmax(1)"
        )
    elif labels.shape == (num_samples,):
        advice = ": cast them"
    raise ValueError(
        f"expected labels of integers ({num_samples},), got {labels.dtype} "
        f"{labels.shape}{advice}"
    )


def _floating(name: str, array: Array, dtype) -> Array:
    """Return `array` in `dtype`; raise ValueError unless it is floating and finite."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {array.dtype}")
    array = array.astype(dtype)
    check_finite(name, array)
    return array


def _check_labels(labels: Array, num_classes: int, min_count: int | None) -> None:
    """Raise ValueError unless concrete labels lie in [0, K) and are frequent enough."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        from_one = values.min() > 0 and values.max() == num_classes
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {values.min()} to {values.max()}"
            + (": number the classes from 0" if from_one else "")
        )
    check_counts(np.bincount(values.astype(np.int64), minlength=num_classes), min_count)


def check_counts(counts: np.ndarray, min_count: int | None) -> None:
    """Raise ValueError unless enough of the K classes have samples.

    Args:
      counts: (K,) samples of each class.
      min_count: None if every class needs a sample, else two classes need so many.
    """
    missing = np.flatnonzero(counts == 0)
    if min_count is None and missing.size:
        raise ValueError(
            f"every class needs a sample, none has label {missing.tolist()}: add samples, "
            "or leave these classes out, by min_count=1 or by renumbering the others"
        )
    if min_count is not None and np.count_nonzero(counts >= min_count) < 2:
        raise ValueError(
            f"expected two classes with at least min_count = {min_count} samples, got "
            f"counts {counts.tolist()}"
        )
