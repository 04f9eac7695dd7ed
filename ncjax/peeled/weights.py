"""Weights of samples: classes of any size in one array, and class weights."""

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, read_array
from ncjax.checks import (
    check_counts,
    check_finite,
    check_params,
    concrete,
    float_dtype,
)
from ncjax.numerics import widen
from ncjax.types import Array, Params


def sample_weights(counts, class_weights=None, dtype=None) -> Array:
    r"""Return weights (K, n) for classes of different sizes, with $n = \max_k n_k$.

    $$\omega_{ki} = \omega_k \text{ for } i \le n_k, \qquad \omega_{ki} = 0 \text{ beyond}$$

    Every function of the library with an argument `weights` multiplies the loss of a sample
    by its weight. Weight 0 leaves the sample out, so classes of any size fit into one array
    `H` (K, n, d).

    Args:
      counts: (K,) integers of at least 1, the number of samples of each class; K >= 2.
      class_weights: (K,) positive weights of the classes; 1 if None.
      dtype: floating dtype; JAX's default if None.

    Returns:
      (K, n) array.

    Raises:
      ValueError: counts are no integers or below 1, or class_weights do not fit.

    >>> import ncjax
    >>> ncjax.sample_weights((3, 1)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    """
    counts = np.asarray(check_counts(counts))
    dtype = float_dtype(dtype)
    kept = np.arange(counts.max())[None] < counts[:, None]
    by_class = np.ones(len(counts)) if class_weights is None else class_weights
    by_class = _real_array("class_weights", by_class).astype(dtype)
    _check_class_weights(by_class, len(counts))
    return jnp.where(jnp.asarray(kept), by_class[:, None], 0).astype(dtype)


def read_class_weights(class_weights, num_classes: int) -> np.ndarray:
    """Return class weights (K,) in float64 on the host; 1 if None.

    Raises:
      ValueError: class_weights do not fit, or are traced.
    """
    if class_weights is None:
        return np.ones(num_classes)
    _check_class_weights(_real_array("class_weights", class_weights), num_classes)
    if isinstance(class_weights, jax.core.Tracer):
        raise ValueError(
            "class_weights must be known, got a traced array: closed forms are computed on "
            "the host, outside of jax.jit and jax.vmap"
        )
    return np.asarray(read_array("class_weights", class_weights), float)


def _check_class_weights(weights: Array, num_classes: int) -> None:
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must have shape (K,) = ({num_classes},), got {weights.shape}"
        )
    values = concrete(weights)
    if values is None:
        return
    fits = np.isfinite(values) & (values > 0)
    if not fits.all():
        k = int(np.argmin(fits))
        raise ValueError(
            f"class_weights must be positive and finite, got {values[k]:g} for class {k}: "
            "leave a class out by leaving it out of counts"
        )


def _real_array(name: str, value) -> Array:
    """Return an array of real numbers."""
    array = as_array(name, value)
    if jnp.iscomplexobj(array):
        raise ValueError(f"{name} must be real, got {array.dtype}")
    return array


def check_weights(weights, params) -> Array | None:
    """Return `weights` (K, n) in the dtype of checked `params`, or None for None.

    Args:
      weights: (K, n) weights of samples or (K,) weights of classes, not negative; None for
        weights of 1.
      params: `Params` or `BiasedParams` that are checked already.

    Raises:
      ValueError: the shape does not fit, or (outside jit) a weight is negative or not
        finite, or a class has no sample of positive weight.
    """
    if weights is None:
        return None
    weights = _real_array("weights", weights)
    shape = params.H.shape[:2]
    if weights.shape not in (shape, shape[:1]):
        raise ValueError(
            f"weights must have shape (K, n) = {shape} for samples or (K,) = "
            f"{shape[:1]} for classes, got {weights.shape}"
        )
    if weights.ndim == 1:
        weights = jnp.broadcast_to(weights[:, None], shape)
    rounded = weights.astype(params.H.dtype)
    check_finite("weights", rounded)
    values = concrete(weights)
    if values is not None:
        _check_weight_values(values, rounded.dtype)
    return rounded


def _check_weight_values(values: np.ndarray, dtype) -> None:
    if (values < 0).any():
        raise ValueError(f"weights must not be negative, got {values.min():g}")
    # Smaller numbers count as 0 on some devices.
    least, kept = float(jnp.finfo(dtype).tiny), values > 0
    if (values[kept] < least).any():
        raise ValueError(
            f"weights must be 0 or at least {least:.3g} in {dtype}, got "
            f"{values[kept].min():g}"
        )
    empty = np.flatnonzero(~kept.any(axis=1))
    if empty.size:
        raise ValueError(
            f"weights must be positive for a sample of every class, got none for class "
            f"{empty[0]}: drop the class from W and H"
        )


def without_left_out(params, weights: Array | None):
    """Return the point with zeros for the features of samples of weight 0.

    Args:
      params: `Params` or `BiasedParams` that are checked already.
      weights: (K, n) weights from `check_weights`; None returns params unchanged.
    """
    if weights is None:
        return params
    return params._replace(H=jnp.where(weights[..., None] > 0, params.H, 0))


def check_point(params, weights, *, finite: bool = False) -> tuple[Params, Array | None]:
    """Return a point without the samples left out, and weights (K, n) or None.

    Half precision becomes float32.

    Args:
      params: `Params`.
      weights: as in `check_weights`.
      finite: as in `check_params`.

    Raises:
      ValueError: as `check_params` and `check_weights`.
    """
    return counted_point(check_params(params, finite=finite), weights)


def counted_point(params, weights):
    """Return a checked point without the samples left out, and weights (K, n) or None.

    Half precision becomes float32.

    Args:
      params: `Params` or `DeepParams` that are checked already.
      weights: as in `check_weights`.

    Raises:
      ValueError: as `check_weights`.
    """
    params = widen(params)
    weights = check_weights(weights, params)
    return without_left_out(params, weights), weights


def weighted(losses: Array, weights: Array | None) -> Array:
    """Return the losses of samples (K, n) times their weights."""
    return losses if weights is None else jnp.where(weights > 0, weights * losses, 0)
