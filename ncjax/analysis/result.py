"""`analyze`: one call from features, labels and a classifier to all that ncjax says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ncjax.analysis import table
from ncjax.analysis import verdict as words
from ncjax.analysis.inputs import IGNORED, Data, check_data
from ncjax.analysis.passes import Progress, measure
from ncjax.checks import check_choice, check_integer
from ncjax.metrics.inputs import check_centres
from ncjax.metrics.report import CollapseReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """What `analyze` found. `str` gives a table, a notebook shows it by itself."""

    report: CollapseReport  # all metrics, as arrays
    class_means: np.ndarray  # (K, d)
    W: np.ndarray | None  # (K, d) classifier, None if there is none
    min_count: int | None  # least count of a class measured, None if all are
    ignored: int  # samples left out because of their label
    convention: str | None  # name in `ncjax.conventions` of `published`
    published: Mapping[str, float]  # numbers of that convention by its own names

    @property
    def measured(self) -> np.ndarray:
        """Classes that the metrics measure, (K,) booleans."""
        return self.report.counts >= (self.min_count or 1)

    @property
    def verdict(self) -> str:
        """One sentence: collapsed or not, by the thresholds of `ncjax.analysis.verdict`."""
        counts = self.report.counts[self.measured]
        return words.verdict(self._metrics(), counts, self.class_means.shape[1])

    @property
    def notes(self) -> list[str]:
        """Sentences on what limits the verdict; none if nothing does."""
        found = words.notes(self._metrics(), self.report.counts, self.min_count)
        if self.ignored:
            has, is_ = ("has", "is") if self.ignored == 1 else ("have", "are")
            some = words.counted(self.ignored, "sample")
            found.append(f"{some} {has} the label {IGNORED} and {is_} left out.")
        return found

    def as_dict(self) -> dict[str, float]:
        """Return all numbers by name; numbers of a convention as `CONVENTION/NAME`."""
        published = {f"{self.convention}/{k}": x for k, x in self.published.items()}
        return self.report.as_dict() | published

    def plot(self) -> "Figure":
        """Return a figure: cosines of class means and of classifier rows, metrics.

        Above 100 classes the cosines are drawn as histograms, of at most 1000 classes. The
        figure starts from Matplotlib's defaults, not from your matplotlibrc. To save it so
        as well, call `savefig` under `ncjax.plotting.style()`.

        Raises:
          ModuleNotFoundError: matplotlib is not installed.
        """
        from ncjax.analysis.figure import draw

        W = None if self.W is None else self.W[self.measured]
        return draw(self.class_means[self.measured], W, self._metrics())

    def __str__(self) -> str:
        """Return the table, the verdict and the notes."""
        shown = table.text(self._head(), self._sections())
        return "\n".join([shown, "", self.verdict, *self.notes])

    def _repr_html_(self) -> str:
        return table.as_html(self._head(), self._sections(), [self.verdict, *self.notes])

    def _metrics(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.report.metrics._asdict().items()}

    def _head(self) -> str:
        num_classes, dim = self.class_means.shape
        samples = words.counted(self.report.samples, "sample")
        return f"{samples} of {num_classes} classes in {words.counted(dim, 'dimension')}"

    def _sections(self) -> list[tuple[str, Mapping[str, float]]]:
        found: list = table.sections(self.report.as_dict())
        if self.convention is not None:
            found.append((f"Convention {self.convention}", self.published))
        return found


def analyze(
    features,
    labels,
    W=None,
    b=None,
    *,
    convention: str | None = None,
    centres=None,
    min_count: int | None = None,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    r"""Measure the collapse of features and a classifier, and put it into words.

    The features are read in chunks: twice with a classifier, else once. A memory-mapped
    array may be larger than memory.

    Args:
      features: (N, d) floating, the input of the last layer: NumPy, also memory-mapped,
        JAX or PyTorch.
      labels: (N,) integers in [0, K), or -100 for samples to leave out.
      W: (K, d) weight of the last layer. None measures the features alone: NC1 and NC2.
      b: (K,) bias; None for a layer without bias.
      convention: a name in `ncjax.conventions.NAMES`, whose own numbers are added.
      centres: (K, d) class centres of NC4, as in `ncjax.collapse_metrics_from_features`.
      min_count: None requires a sample of every class. A number m measures the classes
        with at least m samples, as in `ncjax.collapse_metrics_from_features`.
      num_classes: K; None takes the rows of W, else one more than the largest label.
      chunk_size: samples in a chunk; None takes 16 MB of float32.
      progress: function that is called after each chunk with the samples read and the
        samples to read, of both passes.

    Returns:
      `Analysis`: report, table, verdict in one sentence, notes, figure, dict of numbers.

    Raises:
      ValueError: shapes or dtypes do not fit, labels lie out of range, a class has no
        sample, a value is NaN or infinite, or the convention is unknown. The message says
        what was given, what is expected, and how to get there.

    >>> import numpy as np, ncjax
    >>> rng, labels = np.random.default_rng(0), np.arange(90) % 3
    >>> means = np.eye(3, 5)
    >>> features = means[labels] + 1e-3 * rng.normal(size=(90, 5))
    >>> print(ncjax.analyze(features, labels, means).verdict[:9])
    Collapsed
    """
    if convention is not None:
        _check_convention(convention, W)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, least=1)
    data = check_data(features, labels, W, b, num_classes, min_count)
    if centres is not None:
        if data.W is None:
            raise ValueError("centres are for NC4, which needs the weight W: pass W too")
        centres = check_centres(centres, data.W.shape)
    report, means = measure(data, centres, min_count, chunk_size, progress)
    return Analysis(
        report=report,
        class_means=means,
        W=None if data.W is None else np.asarray(data.W),
        min_count=min_count,
        ignored=int(np.count_nonzero(data.labels == IGNORED)),
        convention=convention,
        published={} if convention is None else _published(convention, data, min_count),
    )


def _check_convention(name: str, W) -> None:
    from ncjax.metrics import conventions

    check_choice("convention", name, conventions.NAMES)
    if W is None:
        raise ValueError(
            f"convention {name!r} needs the weight W of the last layer: pass W"
        )


def _published(name: str, data: Data, min_count: int | None) -> dict[str, float]:
    from ncjax.metrics import conventions

    features, labels, kept = data.features, data.labels, data.labels != IGNORED
    if not kept.all():
        features, labels = features[kept], labels[kept]
    return conventions.measure(name, features, labels, data.W, data.b, min_count=min_count)
