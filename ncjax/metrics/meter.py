"""`CollapseMeter`: measure neural collapse batch by batch.

The meter is an object around the pure functions of `ncjax.metrics.one_pass` and
`ncjax.statistics`. It converts, splits and pads batches, and compiles one program for them.
"""

from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_finite, check_integer, check_sizes, sum_dtype
from ncjax.metrics import collapse, one_pass, statistics
from ncjax.metrics.batches import Batches
from ncjax.metrics.collapse import CollapseMetrics
from ncjax.metrics.devices import Mesh, OneDevice
from ncjax.metrics.inputs import check_centres, check_classifier
from ncjax.metrics.one_pass import OnePass
from ncjax.metrics.report import CollapseReport, report
from ncjax.metrics.statistics import ClassStatistics, Comparison, Reference
from ncjax.metrics.tiles import FEW_CLASSES
from ncjax.numerics import at_unit_scale, power_of_two, wide_dtype
from ncjax.types import Array

# The (d, d) scatter is kept up to this many entries: 256 MB of float32, d = 8192.
_MOST_SCATTER = 2**26


class CollapseMeter:
    r"""Measure neural collapse of features that arrive in batches.

    One pass gives all metrics but `ncc_mismatch` (NC4) and `accuracy`. These two compare
    samples with class means that are complete only at the end, so they need `second_pass`,
    or `centres` and `classifier` that are known beforehand.

    Memory: two (K, d) arrays for the class means, and the (d, d) within-class scatter.

    Args:
      num_classes: K.
      dim: d, the dimension of the features.
      ignore_index: label of samples to leave out, as in PyTorch's cross entropy. None if
        there is no such label.
      min_count: classes measured, as in `ncjax.collapse_metrics_from_features`.
      dtype: dtype of the sums. None takes float64 for float64 features if x64 is on, else
        float32, from the first batch.
      within_scatter: whether to keep the (d, d) scatter, which `within_class_variation`
        needs in one pass. None keeps it up to d = 8192.
      centres: (K, d) class centres of NC4 known beforehand, for example `class_means` of a
        meter of the training set. A row with NaN is no centre. Needs `classifier`.
      classifier: `W` (K, d), or a pair of `W` and the bias `b` (K,), known beforehand.
      mesh: `jax.sharding.Mesh` of one axis, over whose devices each batch is divided; None
        for one device. With several processes each passes its own samples, in batches of
        the size of its first one, and all make the same calls.

    Raises:
      ValueError: a size, dtype or shape does not fit.

    >>> import numpy as np, ncjax
    >>> rng = np.random.default_rng(0)
    >>> labels, W = np.arange(60) % 3, rng.normal(size=(3, 5))
    >>> meter = ncjax.CollapseMeter(num_classes=3, dim=5)
    >>> for batch in np.split(labels, 4):
    ...     _ = meter.update(W[batch] + 1e-3 * rng.normal(size=(15, 5)), batch)
    >>> bool(meter.compute(W).metrics.within_class_variation < 1e-4)
    True
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        ignore_index: int | None = -100,
        min_count: int | None = None,
        dtype=None,
        within_scatter: bool | None = None,
        centres=None,
        classifier=None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        check_sizes(num_classes=num_classes, dim=dim)
        if min_count is not None:
            check_integer("min_count", min_count, least=1)
        if ignore_index is not None:
            check_integer("ignore_index", ignore_index, least=-(2**31))
        if (centres is None) != (classifier is None):
            raise ValueError(
                "expected both centres and classifier, or neither: NC4 compares the two"
            )
        self._shape = num_classes, dim
        self._min_count = min_count
        self._dtype = None if dtype is None else sum_dtype(dtype)
        self._scatter = within_scatter
        if within_scatter is None:
            self._scatter = dim * dim <= _MOST_SCATTER
        self._classifier = None
        if classifier is not None:
            W, b = classifier if isinstance(classifier, tuple) else (classifier, None)
            self._classifier = _known_classifier(W, b, self._shape)
            self._centres = check_centres(centres, self._shape)
        self._devices = OneDevice() if mesh is None else Mesh(mesh)
        self._batches = Batches(num_classes, dim, ignore_index, self._devices.of_samples)
        self.reset()

    def reset(self) -> Self:
        """Forget all samples."""
        self._state: OnePass | None = None
        self._known: _Known | None = None
        self._shared = False  # whether somebody else holds the arrays of the state
        return self

    def update(self, features, labels, mask=None) -> Self:
        """Add a batch.

        Args:
          features: (B, d), or (..., d) with labels of the same leading axes: NumPy, JAX or
            PyTorch. B may change from batch to batch. A batch is padded to a size seen
            before where that is near, so that few programs are compiled.
          labels: (B,) integers in [0, K), or `ignore_index`.
          mask: (B,) booleans; samples at False are left out.

        Raises:
          ValueError: a shape or dtype does not fit, or a label lies outside [0, K). Labels
            on a device are not read here: `compute` raises for them.
        """
        for batch in self._batches(features, labels, mask):
            if self._state is None:
                self._state = self._devices.spread(self._empty(batch[0].dtype))
            self._state = self._devices.update(self._state, batch, self._shared)
            self._shared = False
            if self._classifier is not None:
                dtype = self._state.first.anchor.dtype
                self._known = self._compared(batch, *self._classifier, dtype)
        return self

    def _empty(self, dtype) -> OnePass:
        num_classes, dim = self._shape
        dtype = self._dtype or wide_dtype(dtype)
        return one_pass.init(num_classes, dim, dtype, scatter=bool(self._scatter))

    def _compared(self, batch, W: Array, b: Array | None, dtype) -> "_Known":
        """Return the comparison with the centres known beforehand, with a batch added."""
        known = self._known or self._nothing_known(W, b, dtype)
        comparison = self._devices.compare(
            known.comparison,
            *(known.statistics, known.against, batch, known.W, known.b),
        )
        return known._replace(comparison=comparison)

    def _nothing_known(self, W: Array, b: Array | None, dtype) -> "_Known":
        first, against = _of_centres(self._centres.astype(dtype))
        first, against, W, b = self._devices.replicated((first, against, W, b))
        empty = statistics.init_comparison(self._shape[0], dtype)
        return _Known(first, against, W, b, self._devices.spread(empty))

    def merge(self, other: "CollapseMeter") -> Self:
        """Add the samples of another meter, disjoint from the samples of this one.

        Raises:
          ValueError: the other meter has other sizes, settings, centres or classifier.
        """
        if not isinstance(other, CollapseMeter) or self._settings() != other._settings():
            raise ValueError(
                "expected a meter of the same sizes and settings, got "
                f"{_description(other)} for {_description(self)}"
            )
        if not self._compares_as(other):
            raise ValueError(
                "expected a meter with the same centres and classifier, got others: NC4 "
                "and accuracy would be of two problems"
            )
        if other._state is None:
            return self
        if self._state is None:
            self._state, self._known = other._state, other._known
            self._shared = other._shared = True
            if self._known is not None:  # the next batch takes the memory of these sums
                sums = jax.tree.map(jnp.copy, self._known.comparison)
                self._known = self._known._replace(comparison=sums)
            return self
        self._state = self._devices.merge(self._state, other._state)
        self._shared = False
        if self._known is not None and other._known is not None:
            both = self._known.comparison, other._known.comparison
            self._known = self._known._replace(comparison=jax.tree.map(jnp.add, *both))
        return self

    def _settings(self):
        return *self._shape, self._scatter, self._devices.mesh

    def _compares_as(self, other: "CollapseMeter") -> bool:
        """Whether both meters know the same centres and classifier beforehand."""
        if self._classifier is None or other._classifier is None:
            return self._classifier is other._classifier
        ours, others = (
            jax.device_get(jax.tree.leaves((meter._centres, meter._classifier)))
            for meter in (self, other)
        )
        return len(ours) == len(others) and all(
            np.array_equal(*pair, equal_nan=True) for pair in zip(ours, others, strict=True)
        )

    def compute(self, W=None, b=None, *, min_count: int | None = None) -> CollapseReport:
        """Return the metrics of all samples so far.

        Args:
          W: (K, d) weight of the last layer; None takes the `classifier` of the meter, or,
            if there is none, leaves the metrics of the classifier NaN.
          b: (K,) bias. It enters NC4 and accuracy only, which one pass does not have.
          min_count: classes measured; None takes the number of the meter.

        Returns:
          `CollapseReport`. `ncc_mismatch` and `accuracy` are NaN, unless `centres` and
          `classifier` were given at the start.

        Raises:
          ValueError: a shape does not fit, no sample was seen, a label was outside [0, K),
            a value is NaN or infinite, the features are so large or small that their
            squares leave the dtype, or a class has no sample and min_count is None.
        """
        min_count = self._min_count if min_count is None else min_count
        if W is None and self._classifier is not None:
            W, b = self._classifier
        if W is not None:
            W, b = _known_classifier(W, b, self._shape)
        state = self._checked()
        statistics.measured_classes(state.first, min_count)  # outside jit it raises
        with jax.debug_nans(False):  # NaN stands for a metric that is unknown
            metrics = self._devices.metrics(state, self._or_unknown(W, state), min_count)
        if self._known is not None:
            comparison = self._devices.total(self._known.comparison)
            metrics = _with_shares(metrics, comparison, state.first, min_count)
        return report(metrics, _classifier_sums(W), state.norm, state.first.counts)

    def _or_unknown(self, W: Array | None, state: OnePass) -> Array:
        dtype = state.first.anchor.dtype
        return jnp.full(self._shape, jnp.nan, dtype) if W is None else W.astype(dtype)

    def _checked(self) -> OnePass:
        """Return the sums over all devices, or raise ValueError as `compute` does."""
        if self._state is None:
            raise ValueError("expected samples before compute: call update first")
        state = self._devices.merged(self._state)
        outside, norm, scatter = jax.device_get(
            (state.outside, state.norm, state.first.scatter)
        )
        if outside:
            raise ValueError(
                f"labels must lie in [0, {self._shape[0]}), got {outside} that do not: "
                "leave them out by mask or ignore_index"
            )
        if not np.isfinite(norm):
            raise ValueError(
                "features must be finite, got NaN or infinity in a batch: leave such "
                "samples out by mask"
            )
        _check_scale(norm, scatter)
        return state

    def second_pass(self, W, b=None, *, centres=None) -> "SecondPass":
        """Return a pass over the same samples that adds NC4 and accuracy.

        Args:
          W: (K, d) weight of the last layer.
          b: (K,) bias; None for a layer without bias.
          centres: (K, d) class centres of NC4; None takes the class means. A row with NaN
            is no centre.

        Raises:
          ValueError: as in `compute`.
        """
        W, b = _known_classifier(W, b, self._shape)
        state = self._checked()
        self._shared = True
        return SecondPass(
            self._devices, self._batches, state, W, b, centres, self._min_count
        )

    @property
    def statistics(self) -> ClassStatistics:
        """`ncjax.statistics.ClassStatistics` of all samples."""
        self._shared = True
        return self._checked().first

    @property
    def class_means(self) -> Array:
        """Class means (K, d), NaN for a class without samples."""
        return statistics.class_means(self.statistics)


class SecondPass:
    """Second pass of a `CollapseMeter`, made by `CollapseMeter.second_pass`.

    `update` must see the samples of the first pass again, in any order.
    """

    def __init__(self, devices, batches, state, W, b, centres, min_count):
        first = state.first
        self._devices, self._batches, self._state = devices, batches, state
        self._W, self._min_count = W, min_count
        statistics.measured_classes(first, min_count)
        if centres is not None:
            centres = check_centres(centres, first.anchor.shape)
        against = _reference(first, centres, min_count)
        self._compared = devices.replicated((first, against)), devices.replicated((W, b))
        empty = statistics.init_comparison(len(first.counts), first.anchor.dtype)
        self._comparison = devices.spread(empty)

    def update(self, features, labels, mask=None) -> Self:
        """Add a batch; arguments and errors as in `CollapseMeter.update`."""
        for batch in self._batches(features, labels, mask):
            means, classifier = self._compared
            self._comparison = self._devices.compare(
                self._comparison, *means, batch, *classifier
            )
        return self

    def compute(self) -> CollapseReport:
        """Return all metrics.

        Raises:
          ValueError: the second pass has read other samples than the first.
        """
        first = self._state.first
        metrics = collapse.metrics_from_statistics(
            first,
            self._devices.total(self._comparison),
            at_unit_scale(self._W),
            min_count=self._min_count,
        )
        sums = _classifier_sums(self._W)
        return report(metrics, sums, self._state.norm, first.counts)


class _Known(NamedTuple):
    """Centres known beforehand, in the form that `statistics.compare` takes."""

    statistics: ClassStatistics
    against: Reference
    W: Array
    b: Array | None
    comparison: Comparison


@jax.jit
def _of_centres(centres: Array) -> tuple[ClassStatistics, Reference]:
    """Return statistics whose class means are the centres, and their reference."""
    candidates = jnp.all(jnp.isfinite(centres), axis=1)
    origin = jnp.mean(centres, axis=0, where=candidates[:, None])
    anchor = jnp.where(candidates[:, None], centres, origin[None])
    centred = anchor - origin[None]
    few = len(centres) <= FEW_CLASSES
    return ClassStatistics(
        counts=candidates.astype(statistics.count_dtype()),
        anchor=anchor,
        offset=jnp.zeros_like(anchor),
        scatter=jnp.zeros(len(anchor), anchor.dtype),
    ), Reference(
        centred=centred,
        centres=centred,
        distances=statistics.squared_distances(centred) if few else None,
        whitening=jnp.zeros((1, anchor.shape[1]), anchor.dtype),
        measured=None,
        candidates=candidates,
    )


_reference = jax.jit(
    lambda first, centres, min_count: statistics.reference(
        first, centres=centres, min_count=min_count
    ),
    static_argnums=2,
)


@partial(jax.jit, static_argnums=3)
def _with_shares(metrics, comparison, first, min_count) -> CollapseMetrics:
    """Return the metrics with NC4 and accuracy of the classes measured."""
    measured = statistics.measured_classes(first, min_count)
    dtype = first.anchor.dtype

    def total(counts):
        return statistics.total(counts, dtype, measured)

    samples = total(comparison.counts)
    return metrics._replace(
        ncc_mismatch=total(comparison.mismatches) / samples,
        accuracy=1 - total(comparison.errors) / samples,
    )


def _known_classifier(W, b, shape: tuple[int, int]) -> tuple[Array, Array | None]:
    """Return W and b, floating and at least float32; raise ValueError unless finite."""
    W, b = check_classifier(W, b, shape)
    check_finite("W", W)
    if b is None:
        return W.astype(wide_dtype(W.dtype)), None
    check_finite("b", b)
    return W.astype(wide_dtype(W.dtype)), b.astype(wide_dtype(b.dtype))


@jax.jit
def _norms_of_sum(W: Array) -> tuple[Array, Array]:
    scale = power_of_two(W)
    total = jnp.linalg.norm(jnp.sum(W / scale, axis=0))
    return scale * total, total / jnp.sum(jnp.linalg.norm(W / scale, axis=1))


def _classifier_sums(W: Array | None):
    """Return |Σ_k w_k|, and the same over Σ_k |w_k|; NaN without a classifier."""
    return (np.nan, np.nan) if W is None else _norms_of_sum(W)


def _check_scale(norm: np.floating, scatter: np.ndarray) -> None:
    """Raise ValueError if squares of features or deviations leave the dtype."""
    least, most = one_pass.norm_range(norm.dtype)
    if norm and not (least < norm < most and np.isfinite(scatter).all()):
        raise ValueError(
            f"features must have a mean norm from {least:.0e} to {most:.0e} for sums of "
            f"squares in {norm.dtype}, got {norm:.1e}: multiply features and b by one "
            "factor, which changes no collapse metric"
        )


def _description(meter) -> str:
    if not isinstance(meter, CollapseMeter):
        return f"a {type(meter).__name__}"
    num_classes, dim = meter._shape
    return f"CollapseMeter(num_classes={num_classes}, dim={dim})"
