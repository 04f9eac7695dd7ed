"""Measure neural collapse as a metric of Flax NNX; needs the extra `networks`."""

from functools import partial

import jax
import jax.numpy as jnp

from ncjax.checks import check_installed

try:
    from flax import nnx
except ModuleNotFoundError:
    check_installed("networks", "flax")
    raise

from ncjax.arrays import as_array
from ncjax.checks import float_dtype
from ncjax.metrics import collapse, statistics
from ncjax.types import Array


class Collapse(nnx.Metric):
    """Collapse metrics of the samples since the last reset, alone or in `nnx.MultiMetric`.

    Its state are arrays, so `update` and `compute` work inside `nnx.jit`. One pass reads
    the samples; therefore NC4 and the accuracy are NaN.

    Args:
      num_classes: K.
      dim: d, the number of features.
      min_count: classes measured, as in `ncjax.CollapseMeter`.
      dtype: dtype of the statistics.

    Raises:
      ValueError: num_classes is below 2, dim is below 1, or dtype is not floating.
    """

    W: nnx.metrics.MetricState  # beside one for each field of ClassStatistics

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        min_count: int | None = None,
        dtype=jnp.float32,
    ):
        self.min_count = min_count
        self._shape, self._dtype = (num_classes, dim), float_dtype(dtype)
        for name, array in self._empty().items():
            setattr(self, name, nnx.metrics.MetricState(array))

    def _empty(self) -> dict[str, Array]:
        first = statistics.init(*self._shape, self._dtype)
        return {**first._asdict(), "W": jnp.full(self._shape, jnp.nan, self._dtype)}

    def reset(self) -> None:
        """Forget all samples."""
        self._set(self._empty())

    def update(  # type: ignore[override]
        self, *, features, labels, kernel=None, mask=None, **_
    ) -> None:
        """Add a batch.

        Args:
          features: (..., d), the inputs of the last layer.
          labels: (...) integers; samples with a label outside [0, K) are left out.
          kernel: (d, K) kernel of the last layer, for example `model.head.kernel`. The
            last one counts. If none was given, the metrics of the classifier are NaN.
          mask: (...) booleans; samples at False are left out.

        Raises:
          ValueError: shapes or dtypes do not fit.
        """
        features, labels = as_array("features", features), as_array("labels", labels)
        if features.ndim > 2 and labels.shape == features.shape[:-1]:
            features, labels = features.reshape(-1, features.shape[-1]), labels.ravel()
            mask = None if mask is None else as_array("mask", mask).ravel()
        first = statistics.update(self._statistics(), features, labels, mask)
        changed = first._asdict()
        if kernel is not None:
            kernel = as_array("kernel", kernel)
            if kernel.shape != self._shape[::-1]:
                raise ValueError(
                    f"expected kernel {self._shape[::-1]}, got {kernel.shape}: pass the "
                    "kernel (d, K) of the last layer"
                )
            changed["W"] = kernel.T.astype(self._dtype)
        self._set(changed)

    def compute(self) -> dict[str, Array]:
        """Return scalars: the fields of `CollapseMetrics`, and `samples`.

        Raises:
          ValueError: (outside jit) a class has no sample and `min_count` is None.
        """
        first = self._statistics()
        statistics.measured_classes(first, self.min_count)
        metrics = _metrics(first, self.W[...], self.min_count)
        return {**metrics._asdict(), "samples": jnp.sum(first.counts)}

    def _statistics(self) -> statistics.ClassStatistics:
        names = statistics.ClassStatistics._fields
        return statistics.ClassStatistics(*(getattr(self, name)[...] for name in names))

    def _set(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            getattr(self, name)[...] = array


@partial(jax.jit, static_argnums=2)
def _metrics(first, W, min_count):
    second = statistics.init_comparison(W.shape[0], W.dtype)
    return collapse.metrics_from_statistics(first, second, W, min_count=min_count)
