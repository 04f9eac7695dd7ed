"""Checks of the settings of an `Objective`, in one line each."""

import math
from numbers import Real

import jax
import numpy as np

from ncjax.checks import concrete

_PAIRS = {
    "weight_decay": "(lambda_W, lambda_H)",
    "ball": "the bounds (a, b) on |W|^2 and |H|^2",
}
_POSITIVE = ("ball", "temperature")
_BOUNDS = ("weight_decay", "ball", "temperature")


def check_settings(objective) -> None:
    """Raise ValueError unless the settings are in range and go together.

    Known numbers become Python floats, which have a hash and take the dtype of the point.
    Traced numbers are not checked.
    """
    for name in ("smoothing", "gamma", "weight_decay", "ball", "bias", "temperature"):
        value = getattr(objective, name)
        if value is not None:
            read = read_pair if name in _PAIRS else _read
            object.__setattr__(objective, name, read(name, value))
    if not isinstance(objective.fixed_classifier, bool):
        raise ValueError(
            f"fixed_classifier must be True or False, got {objective.fixed_classifier!r}"
        )
    _check_loss(objective)
    _check_together(objective)


def read_pair(name: str, value) -> tuple:
    """Return a pair of numbers as a tuple; raise ValueError for anything else."""
    is_array = isinstance(value, np.ndarray | jax.Array) and value.ndim > 0
    if not (isinstance(value, list | tuple) or is_array) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, {_PAIRS[name]}, got {value!r}")
    return tuple(_read(name, number) for number in value)


def _read(name: str, value):
    """Return a number as a float, a tracer or an array for `jax.vmap` as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    is_array = isinstance(value, np.ndarray | jax.Array)
    if isinstance(value, bool) or not (is_array or isinstance(value, Real)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    known = concrete(value)
    if known is None:
        return value
    if known.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be a number, got {value!r}")
    _check_range(name, known, value)
    return value if known.ndim else float(known)


def _check_range(name: str, known: np.ndarray, value) -> None:
    if name == "smoothing":
        fits, kind = (known >= 0) & (known < 1), "lie in [0, 1)"
    elif name in _POSITIVE:
        fits, kind = (known > 0) & (known < math.inf), "be positive and finite"
    else:
        fits, kind = (known >= 0) & (known < math.inf), "be finite and not negative"
    if not fits.all():
        raise ValueError(f"{name} must {kind}, got {value!r}")


def _check_loss(objective) -> None:
    if objective.loss == "focal" and objective.gamma is None:
        raise ValueError("the focal loss needs gamma, such as gamma=2, got None")
    for name, loss in (("gamma", "focal"), ("smoothing", "cross_entropy")):
        if getattr(objective, name) is not None and objective.loss != loss:
            raise ValueError(f"{name} is for loss={loss!r}, got loss={objective.loss!r}")


def _check_together(objective) -> None:
    bounds = [name for name in _BOUNDS if getattr(objective, name) is not None]
    if len(bounds) > 1:
        raise ValueError(
            f"choose one of weight_decay, ball and temperature, got {' and '.join(bounds)}"
        )
    if objective.temperature is not None and objective.bias is not None:
        raise ValueError(f"temperature takes no bias, got bias={objective.bias!r}")
