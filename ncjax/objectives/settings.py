"""Checks of the settings of an `Objective`, in one line each."""

import math
from numbers import Real

import jax
import numpy as np


def check_settings(objective) -> None:
    """Raise ValueError unless the settings are in range and go together.

    Traced numbers are not checked.
    """
    for name in ("weight_decay", "ball"):
        _as_pair(objective, name)
    _check_ranges(objective)
    _check_loss(objective)
    _check_together(objective)


def _as_pair(objective, name: str) -> None:
    """Turn a list or array of two numbers into a tuple, which has a hash."""
    value = getattr(objective, name)
    if isinstance(value, list | np.ndarray):
        object.__setattr__(objective, name, tuple(value))
    value = getattr(objective, name)
    is_number = isinstance(value, Real | jax.Array)
    if is_number or (isinstance(value, tuple) and len(value) != 2):
        raise ValueError(f"{name} must be a pair of numbers, {_PAIRS[name]}, got {value!r}")


_PAIRS = {
    "weight_decay": "(lambda_W, lambda_H)",
    "ball": "the bounds (a, b) on |W|^2 and |H|^2",
}


def _check_ranges(objective) -> None:
    for decay in objective.weight_decay or ():
        _check("weight_decay", decay, positive=False)
    for bound in objective.ball or ():
        _check("ball", bound, positive=True)
    _check("bias", objective.bias, positive=False)
    _check("gamma", objective.gamma, positive=False)
    _check("temperature", objective.temperature, positive=True)
    smoothing = objective.smoothing
    if _is_number(smoothing) and not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing!r}")


def _check(name: str, value, *, positive: bool) -> None:
    """Raise ValueError if a value is known and not finite, or too small."""
    if isinstance(value, str | bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not _is_number(value):
        return
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {kind}, got {value!r}")


def _is_number(value) -> bool:
    """Whether a value is known: no tracer, and no stand-in of a pytree."""
    return isinstance(value, Real)


def _check_loss(objective) -> None:
    if objective.loss == "focal" and objective.gamma is None:
        raise ValueError("the focal loss needs gamma, such as gamma=2, got None")
    for name, loss in (("gamma", "focal"), ("smoothing", "cross_entropy")):
        if getattr(objective, name) is not None and objective.loss != loss:
            raise ValueError(f"{name} is for loss={loss!r}, got loss={objective.loss!r}")


def _check_together(objective) -> None:
    bounds = [
        name
        for name in ("weight_decay", "ball", "temperature")
        if getattr(objective, name) is not None
    ]
    if len(bounds) > 1:
        raise ValueError(
            f"choose one of weight_decay, ball and temperature, got {' and '.join(bounds)}"
        )
    if objective.temperature is not None and objective.bias is not None:
        raise ValueError("temperature takes no bias, got bias=" + repr(objective.bias))
