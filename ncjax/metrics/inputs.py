"""Features, labels, classifier and bias from outside, checked."""

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_finite, check_sizes
from ncjax.types import Array


def check_features(features, labels, W, b=None, num_classes=None):
    """Features, labels, classifier and bias as arrays of one dtype, once they are sound.

    Raises:
      ValueError: as in `collapse_metrics_from_features`.
    """
    W, shape = jnp.asarray(W), jnp.shape(features)
    if W.ndim != 2 or len(shape) != 2 or shape[1] != W.shape[1]:
        turned = W.ndim == 2 and len(shape) == 2 and shape[1] == W.shape[0]
        raise ValueError(
            f"expected features (N, d) and W (K, d), got {shape} and {W.shape}"
            + (": transpose W" if turned else "")
        )
    if num_classes is not None and num_classes != W.shape[0]:
        raise ValueError(f"num_classes is {num_classes} but W has {W.shape[0]} rows")
    features, labels = check_samples(features, labels, W.shape[0])
    W, b = check_classifier(W, b, W.shape)
    dtype = computing_dtype(features.dtype)
    W = _floating("W", W, dtype)
    return features, labels, W, None if b is None else _floating("b", b, dtype)


def check_samples(features, labels, num_classes: int) -> tuple[Array, Array]:
    """Features (N, d) and labels (N,) as arrays, labels as int32, once they are sound.

    Raises:
      ValueError: as in `collapse_metrics_from_features`.
    """
    features = jnp.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"expected features (N, d), got {features.shape}")
    labels = _integers(labels, features.shape[0])
    check_sizes(num_classes=num_classes, dim=features.shape[1])
    features = _floating("features", features, features.dtype)
    _check_labels(labels, num_classes)
    if features.shape[0] < num_classes:  # under jit labels cannot tell
        raise ValueError(
            f"expected a sample of each of {num_classes} classes, got features "
            f"{features.shape}"
        )
    return features, labels.astype(jnp.int32)


def check_batch(features, labels, mask, dim: int) -> tuple[Array, Array, Array | None]:
    """Features (B, d), labels (B,) and mask (B,) or None as arrays, once they fit.

    Values are not looked at, so that a batch costs no wait for the device: a label outside
    [0, K) leaves its sample out.

    Raises:
      ValueError: says what was given and what is expected.
    """
    features = jnp.asarray(features)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"expected features (B, {dim}), got {features.shape}")
    labels = _integers(labels, features.shape[0])
    if mask is None:
        return features, labels, None
    mask = jnp.asarray(mask)
    if mask.shape != labels.shape or mask.dtype != bool:
        raise ValueError(
            f"expected mask of booleans {labels.shape}, got {mask.dtype} {mask.shape}"
        )
    return features, labels, mask


def check_classifier(W, b, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """W (K, d) and b (K,), or None, as arrays, once they have these shapes.

    Raises:
      ValueError: says what was given and what is expected.
    """
    W, b = jnp.asarray(W), None if b is None else jnp.asarray(b)
    if W.shape != shape:
        turned = W.shape == shape[::-1]
        raise ValueError(
            f"expected W {shape}, got {W.shape}" + (": transpose W" if turned else "")
        )
    if b is not None and b.shape != shape[:1]:
        raise ValueError(f"expected b ({shape[0]},), got {b.shape}")
    return W, b


def check_rows(*matrices) -> tuple[Array, ...]:
    """Matrices as arrays, once they are floating and all (K, d).

    Raises:
      ValueError: says what was given and what is expected.
    """
    arrays = tuple(jnp.asarray(matrix) for matrix in matrices)
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        given = " and ".join(map(str, shapes))
        raise ValueError(f"expected rows of one shape (K, d), got {given}")
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"rows must be floating, got {array.dtype}")
    return arrays


def computing_dtype(dtype) -> jnp.dtype:
    """float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _integers(labels, num_samples: int) -> Array:
    """`labels` as an array of integers (N,), or what to do about others."""
    kind = getattr(getattr(labels, "dtype", None), "kind", "")
    if kind in ("O", "S", "U"):  # no array of JAX can hold them
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
    """`array` in `dtype`, once floating and, where it is known, finite there."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {array.dtype}")
    array = array.astype(dtype)
    check_finite(name, array)
    return array


def _check_labels(labels: Array, num_classes: int) -> None:
    """Raise ValueError unless concrete labels lie in [0, K) and leave no class out."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        from_one = values.min() > 0 and values.max() == num_classes
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {values.min()} to {values.max()}"
            + (": number the classes from 0" if from_one else "")
        )
    missing = np.flatnonzero(
        np.bincount(values.astype(np.int64), minlength=num_classes) == 0
    )
    if missing.size:
        raise ValueError(
            f"every class needs a sample, none has label {missing.tolist()}: add samples, "
            "or leave these classes out of W and b and number the others anew"
        )
