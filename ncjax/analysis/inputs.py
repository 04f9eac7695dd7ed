"""Check features, labels and classifier before anything reads all features."""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, read_array
from ncjax.checks import check_finite, check_integer, check_label_range, check_sizes
from ncjax.metrics.inputs import check_classifier, check_counts, integer_labels
from ncjax.types import Array

IGNORED = -100  # label of samples that are left out, as in PyTorch


class Data(NamedTuple):
    """Checked inputs; the features may be larger than memory."""

    features: Any  # (N, d) NumPy, JAX or PyTorch, read in slices of rows
    labels: np.ndarray  # (N,) integers, IGNORED or in [0, K)
    W: Array | None  # (K, d)
    b: Array | None  # (K,)
    num_classes: int


def check_data(features, labels, W, b, num_classes, min_count) -> Data:
    """Return the inputs of `analyze`; raise ValueError if they do not fit.

    Of the features only shape and dtype are checked, because their values may be on disk.
    """
    features = features if hasattr(features, "shape") else read_array("features", features)
    shape = tuple(features.shape)
    if len(shape) != 2:
        advice = ": reshape them to (-1, d)" if len(shape) > 2 else ""
        raise ValueError(f"expected features (N, d), got {shape}{advice}")
    if not shape[0]:
        raise ValueError(f"expected features (N, d) of at least one sample, got {shape}")
    if not shape[1]:
        raise ValueError(f"expected features (N, d) with d of at least 1, got {shape}")
    dtype = _dtype(features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"features must be floating, got {dtype}: cast them")
    labels = np.asarray(integer_labels(labels, shape[0]))
    if W is not None:
        W, b = _classifier(shape, W, b)
    elif b is not None:
        raise ValueError("a bias b needs the weight W of its layer: pass W, or no b")
    num_classes = _num_classes(labels, W, num_classes)
    _check_labels(labels, num_classes, min_count)
    return Data(features, labels, W, b, num_classes)


def _dtype(features):
    """Return the dtype that JAX or NumPy gives the features, without reading them."""
    if isinstance(features, jax.Array):
        return features.dtype
    return read_array("features", features[:0]).dtype


def _classifier(shape, W, b) -> tuple[Array, Array | None]:
    W = as_array("W", W)
    if W.ndim != 2 or W.shape[1] != shape[1]:
        transposed = W.ndim == 2 and W.shape[0] == shape[1]
        raise ValueError(
            f"expected features (N, d) and W (K, d), got {shape} and {W.shape}"
            + (": transpose W" if transposed else "")
        )
    W, b = check_classifier(W, b, W.shape)
    for name, array in (("W", W), ("b", b)):
        if array is not None:
            check_finite(name, array)
    return W, b


def _num_classes(labels: np.ndarray, W: Array | None, num_classes: int | None) -> int:
    """Return K: the rows of W, else the number given, else one more than the last label."""
    if W is not None:
        if num_classes not in (None, W.shape[0]):
            raise ValueError(f"num_classes is {num_classes} but W has {W.shape[0]} rows")
        num_classes = W.shape[0]
    elif num_classes is None:
        num_classes = int(labels.max()) + 1
        if num_classes < 2:
            raise ValueError(
                f"expected labels of at least two classes, got none above {labels.max()}"
            )
    check_sizes(num_classes=num_classes)
    return int(num_classes)


def _check_labels(labels: np.ndarray, num_classes: int, min_count: int | None) -> None:
    if min_count is not None:
        check_integer("min_count", min_count, least=1)
    kept = labels[labels != IGNORED]
    if kept.min(initial=0) < 0:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {kept.min()}: mark samples to "
            f"leave out by {IGNORED}"
        )
    check_label_range(kept, num_classes)
    check_counts(np.bincount(kept.astype(np.int64), minlength=num_classes), min_count)


def refuse_features(features, labels: np.ndarray, chunk_size: int) -> NoReturn:
    """Raise ValueError that names the first sample whose features are not finite.

    Called after a pass whose sums are not finite: if all samples are, their squares
    overflow.
    """
    for start in range(0, len(labels), chunk_size):
        rows = np.asarray(as_array("features", features[start : start + chunk_size]))
        bad = ~np.isfinite(rows).all(axis=1) & (labels[start : start + chunk_size] >= 0)
        if bad.any():
            raise ValueError(
                f"features must be finite, got NaN or infinity in {rows.dtype} in sample "
                f"{start + int(bad.argmax())} of {len(labels)}: leave such samples out, by "
                f"the label {IGNORED}"
            )
    raise ValueError(
        f"features are too large, their squares overflow in {rows.dtype}: divide all "
        "features by a number"
    )
