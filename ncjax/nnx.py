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
from ncjax.checks import sum_dtype
from ncjax.metrics import one_pass, statistics
from ncjax.types import Array


class Collapse(nnx.Metric):
    """Collapse metrics of the samples since the last reset, alone or in `nnx.MultiMetric`.

    Its state are arrays, so `update` and `compute` work inside `nnx.jit`. One pass reads
    the samples; therefore NC4 and the accuracy are NaN.

    Args:
      num_classes: K.
      dim: d, the number of features.
      min_count: classes measured, as in `ncjax.CollapseMeter`.
      within_scatter: whether to keep the (d, d) scatter that NC1 needs in one pass.
      dtype: dtype of the sums.

    Raises:
      ValueError: num_classes is below 2, dim is below 1, or dtype is not floating.
    """

    W: nnx.metrics.MetricState  # beside one for each array of the sums

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        min_count: int | None = None,
        within_scatter: bool = True,
        dtype=jnp.float32,
    ):
        self.min_count = min_count
        self._shape, self._dtype = (num_classes, dim), sum_dtype(dtype)
        self._scatter = within_scatter
        for name, array in self._empty().items():
            setattr(self, name, nnx.metrics.MetricState(array))

    def _empty(self) -> dict[str, Array]:
        empty = one_pass.init(*self._shape, self._dtype, scatter=self._scatter)
        return _arrays(empty) | {"W": jnp.full(self._shape, jnp.nan, self._dtype)}

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
        changed = _arrays(_updated(self._sums(), features, labels, mask))
        if kernel is not None:
            changed["W"] = self._weight(kernel)
        self._set(changed)

    def _weight(self, kernel) -> Array:
        kernel = as_array("kernel", kernel)
        expected = self._shape[::-1]
        if kernel.shape != expected:
            raise ValueError(
                f"expected kernel {expected}, got {kernel.shape}: pass the kernel of "
                "the last layer, (d, K)"
            )
        return kernel.T.astype(self._dtype)

    def compute(self) -> dict[str, Array]:
        """Return scalars: the fields of `CollapseMetrics`, and `samples`.

        Raises:
          ValueError: (outside jit) a class has no sample and `min_count` is None.
        """
        sums = self._sums()
        statistics.measured_classes(sums.first, self.min_count)
        metrics = _metrics(sums, self.W[...], self.min_count)
        return {**metrics._asdict(), "samples": jnp.sum(sums.first.counts)}

    def _sums(self) -> one_pass.OnePass:
        def held(name):
            return getattr(self, name)[...]

        return one_pass.OnePass(
            first=statistics.ClassStatistics(
                *map(held, statistics.ClassStatistics._fields)
            ),
            within=held("within") if self._scatter else None,
            norm=held("norm"),
            outside=held("outside"),
        )

    def _set(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            getattr(self, name)[...] = array


def _arrays(sums: one_pass.OnePass) -> dict[str, Array]:
    """Return the arrays of the sums by name."""
    arrays = {**sums.first._asdict(), **sums._asdict()}
    return {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}


# Outside nnx.jit every operation would be compiled alone.
_updated = jax.jit(one_pass.update)


@partial(jax.jit, static_argnums=2)
def _metrics(sums, W, min_count):
    return one_pass.metrics(sums, W, min_count=min_count)
