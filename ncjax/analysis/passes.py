"""Read features in chunks, once for statistics and once against a classifier."""

from collections.abc import Callable, Iterator

import numpy as np

from ncjax import sizes
from ncjax.analysis.inputs import Data, refuse_features
from ncjax.metrics.meter import CollapseMeter
from ncjax.metrics.report import CollapseReport

# Is called after each chunk with the samples read and the samples to read.
Progress = Callable[[int, int], None]

_CHUNK_BYTES = 2**24  # of a chunk on CPU, in float32


def measure(
    data: Data,
    centres,
    min_count: int | None,
    chunk_size: int | None,
    progress: Progress | None,
) -> tuple[CollapseReport, np.ndarray]:
    """Return the report of both passes, or of one without W, and the class means (K, d).

    Raises:
      ValueError: a sample that is not ignored has features that are not finite, or whose
        squares overflow.
    """
    samples, dim = data.features.shape
    numbers = sizes.chunk_bytes(sizes.platform_of(data.features), _CHUNK_BYTES) // 4
    size = min(chunk_size or max(1, numbers // dim), samples)
    # With a second pass no metric needs the within-class scatter (d, d).
    meter = CollapseMeter(
        data.num_classes, dim, min_count=min_count, within_scatter=data.W is None
    )
    passes = 1 if data.W is None else 2
    for features, labels, read in _chunks(data, size):
        meter.update(features, labels)
        if progress:
            progress(read, passes * samples)
    try:
        means = np.asarray(meter.class_means)
    except ValueError:  # of sums that are not finite
        refuse_features(data.features, data.labels, size)
    if data.W is None:
        return meter.compute(), means
    second = meter.second_pass(data.W, data.b, centres=centres)
    for features, labels, read in _chunks(data, size):
        second.update(features, labels)
        if progress:
            progress(samples + read, passes * samples)
    return second.compute(), means


def _chunks(data: Data, size: int) -> Iterator[tuple]:
    """Yield features (B, d), labels (B,) and the samples read with them."""
    samples = data.features.shape[0]
    if size == samples:
        yield data.features, data.labels, samples
        return
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        yield data.features[start:stop], data.labels[start:stop], stop
