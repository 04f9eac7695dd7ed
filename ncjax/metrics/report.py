"""The numbers that a `CollapseMeter` reports."""

from typing import NamedTuple

import jax
import numpy as np

from ncjax.metrics.collapse import CollapseMetrics


class CollapseReport(NamedTuple):
    r"""Collapse metrics with sizes. All numbers lie on the host.

    NC0 is the norm of the sum of the classifier's rows. On the flow without weight decay
    the sum stays constant, with weight decay it tends to zero.
    """

    metrics: CollapseMetrics  # NumPy scalars; NaN if unknown
    classifier_sum: float  # NC0  |Σ_k w_k|
    relative_classifier_sum: float  # NC0  |Σ_k w_k| / Σ_k |w_k|
    mean_feature_norm: float  # mean of |h_i| over the samples
    counts: np.ndarray  # (K,)  samples of each class

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    def as_dict(self) -> dict[str, float]:
        """Return all numbers by name, for a logger: the metrics, NC0, norm and sizes."""
        numbers = {name: float(value) for name, value in self.metrics._asdict().items()}
        return numbers | {
            "classifier_sum": self.classifier_sum,
            "relative_classifier_sum": self.relative_classifier_sum,
            "mean_feature_norm": self.mean_feature_norm,
            "samples": float(self.samples),
            "classes": float(np.count_nonzero(self.counts)),
        }

    def __str__(self) -> str:
        """Return a table, one line for each number."""
        return "\n".join(f"{name:<38}{value:.4g}" for name, value in self.as_dict().items())


def report(metrics: CollapseMetrics, classifier_sums, norm, counts) -> CollapseReport:
    """Return a `CollapseReport` of numbers on a device, fetched at once."""
    metrics, sums, norm, counts = jax.device_get((metrics, classifier_sums, norm, counts))
    return CollapseReport(
        metrics=metrics,
        classifier_sum=float(sums[0]),
        relative_classifier_sum=float(sums[1]),
        mean_feature_norm=float(norm),
        counts=counts.astype(np.int64),
    )
