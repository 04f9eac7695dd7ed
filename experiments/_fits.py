"""Fits of power laws in log t, and quartiles over seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# In log t. Gradient descent reaches the first; the last ones are asymptotic.
WINDOWS = ((2, 12), (30, 300), (100, 1000), (1e3, 1e4), (1e4, 1e5), (1e5, 1e6))
# The exponents are near their limits from about this log t on.
SETTLED_FROM = 1e3
# Limits of p in (log t)^-p that the theory predicts.
PREDICTED = {
    "within_class_variation": "3",
    "within_class_quotient": "1",
    "mean_norm_variation": "1",
    "centred_classifier_norm_variation": "1",
    "classifier_norm_variation": "1/2",
    "mean_cosine_deviation": "1",
    "centred_classifier_cosine_deviation": "1",
    "classifier_cosine_deviation": "1/2",
    "centred_self_duality": "1",
    "self_duality": "1/2",
    "kkt_angle": "1/2",
    "margin_deficit": "1",
}
_LEAST_POINTS = 5


def collapses(summary: Mapping[str, Any]) -> bool:
    """Return whether the theory predicts the limits of the flow in `summary`."""
    constants = summary["sharp_constants"].values()
    return all(entry["predicted"] is not None for entry in constants)


def spread(values: np.ndarray) -> dict[str, float | int | None]:
    """Return median and quartiles over seeds, and the number of finite seeds."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return {"median": None, "q25": None, "q75": None, "seeds": 0}
    low, median, high = np.quantile(finite, (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "q25": float(low),
        "q75": float(high),
        "seeds": int(finite.size),
    }


def exponents(
    log_times: np.ndarray, values: np.ndarray, window: tuple[float, float]
) -> np.ndarray:
    r"""Fit the exponent p of $v \sim (\log t)^{-p}$ per seed, by least squares in logs.

    Args:
      log_times: (T,) natural logarithms of time.
      values: (S, T) positive; others count as missing.
      window: bounds on log t, both included.

    Returns:
      (S,) exponents; NaN for a seed with fewer than five points.
    """
    inside = (log_times >= window[0]) & (log_times <= window[1])
    x = np.log(log_times[inside])
    fitted = np.full(len(values), np.nan)
    for seed, row in enumerate(values[:, inside]):
        usable = np.isfinite(row) & (row > 0)
        if usable.sum() >= _LEAST_POINTS:
            fitted[seed] = -np.polyfit(x[usable], np.log(row[usable]), 1)[0]
    return fitted


def windows(log_times: np.ndarray) -> list[tuple[float, float]]:
    """Return the windows of `WINDOWS` that the times cover."""
    return [(low, high) for low, high in WINDOWS if high <= log_times[-1] * (1 + 1e-9)]


def exponent_table(
    log_times: np.ndarray, columns: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict]]:
    """Return the `spread` of `exponents` of every column in every window covered."""
    return {
        f"log t in [{low:g}, {high:g}]": {
            name: spread(exponents(log_times, values, (low, high)))
            for name, values in columns.items()
        }
        for low, high in windows(log_times)
    }
