"""Time all collapse metrics of features that lie on the device, in bytes per second."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._accelerator_timing import costs, memory_rate, timed


class Case(NamedTuple):
    """Features (N, d) of K classes."""

    samples: int
    dim: int
    num_classes: int
    dtype: str


CASES = (
    Case(50_000, 512, 10, "float32"),
    Case(50_000, 512, 10, "float64"),
    Case(50_000, 512, 10, "bfloat16"),
    Case(1_281_167, 512, 1000, "float32"),
    Case(1_281_167, 2048, 1000, "float32"),
)
TINY = (Case(300, 16, 3, "float32"),)
_MEASURES: dict[str, Callable] = {
    "collapse_metrics_from_features": ncjax.collapse_metrics_from_features,
    "last_layer": ncjax.last_layer,
}


def checks(setting: Setting) -> list[Check]:
    """Return a check for each set of features and each function."""
    copied = 2**16 if setting.tiny else 2**31
    return [
        Check(
            f"{name}, N={case.samples} d={case.dim} K={case.num_classes}, {case.dtype}",
            partial(_measure, name, case, copied),
        )
        for case in (TINY if setting.tiny else CASES)
        for name in _MEASURES
    ]


def draw(case: Case):
    """Draw features around Gaussian class means on the device, labels, and the means."""
    dtype = jnp.dtype(case.dtype)
    keys = jax.random.split(jax.random.key(0))
    means = jax.random.normal(keys[0], (case.num_classes, case.dim), dtype)
    labels = jnp.arange(case.samples, dtype=jnp.int32) % case.num_classes
    noise = jax.random.normal(keys[1], (case.samples, case.dim), dtype)
    return means[labels] + jnp.asarray(0.1, dtype) * noise, labels, means


def _measure(name: str, case: Case, copied: int) -> Finding:
    arrays = draw(case)
    found, timing = timed(lambda: _MEASURES[name](*arrays))
    rate = arrays[0].nbytes / timing.seconds
    details = {
        "ms": 1e3 * timing.seconds,
        "share_of_copy": rate / memory_rate(copied),
        **costs(timing),
    }
    is_finite = bool(np.isfinite(np.asarray(found, float)).all())
    return Finding(is_finite, rate / 1e9, "GB/s", details)
