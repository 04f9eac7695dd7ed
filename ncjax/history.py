"""Keep the collapse reports of several epochs: rows, a table and a figure."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Columns of the table, by the names of a report.
_TITLES = {
    "epoch": "epoch",
    "within_class_variation": "NC1",
    "cdnv": "CDNV",
    "mean_norm_variation": "NC2 norms",
    "mean_cosine_deviation": "NC2 angles",
    "self_duality": "NC3",
    "ncc_mismatch": "NC4",
    "accuracy": "accuracy",
    "samples": "samples",
}
_WHOLE = ("epoch", "samples")


class History:
    """Collapse reports of several epochs, one dict of floats each, in order.

    >>> from ncjax.history import History
    >>> history = History()
    >>> history.append({"cdnv": 0.5, "accuracy": 0.75})
    >>> history.append({"cdnv": 0.25, "accuracy": 1.0}, epoch=10)
    >>> print(history)
    epoch      CDNV  accuracy
        1       0.5      0.75
       10      0.25         1
    >>> history.columns()["cdnv"]
    array([0.5 , 0.25])
    """

    def __init__(self):
        self._rows: list[dict[str, float]] = []

    def append(self, report: Any, epoch: int | None = None) -> None:
        """Add a report.

        Args:
          report: a `CollapseReport`, or a mapping of names to numbers.
          epoch: number of the epoch; None takes the next one, from 1.

        Raises:
          ValueError: the epoch is not after the last one.
        """
        last = int(self._rows[-1]["epoch"]) if self._rows else 0
        number = last + 1 if epoch is None else epoch
        if self._rows and number <= last:
            raise ValueError(f"epoch must be above {last}, the last one, got {epoch}")
        values = report if isinstance(report, Mapping) else report.as_dict()
        self._rows.append({"epoch": number, **values})

    def __len__(self) -> int:
        """Return the number of epochs."""
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Iterate over the rows."""
        return iter(self._rows)

    def __getitem__(self, index: int) -> dict[str, float]:
        """Return a row, the epoch included."""
        return self._rows[index]

    def columns(self) -> dict[str, np.ndarray]:
        """Return arrays (T,) by name, for T epochs; a value that is missing is NaN."""
        names = dict.fromkeys(name for row in self._rows for name in row)
        return {
            name: np.array([row.get(name, np.nan) for row in self._rows]) for name in names
        }

    def __str__(self) -> str:
        """Return a table of the main metrics; a metric that is always NaN has no column."""
        columns = {
            _TITLES[name]: values
            for name, values in self.columns().items()
            if name in _TITLES and not np.isnan(values).all()
        }
        ordered = [title for title in _TITLES.values() if title in columns]
        widths = {title: max(len(title), 8) for title in ordered} | {"epoch": 5}
        lines = ["  ".join(title.rjust(widths[title]) for title in ordered)]
        for number in range(len(self)):
            cells = (_cell(t, columns[t][number]).rjust(widths[t]) for t in ordered)
            lines.append("  ".join(cells))
        return "\n".join(lines)

    def plot(self, path=None):
        """Return a Matplotlib figure of NC1 to NC3 over the epochs; needs Matplotlib.

        It starts from Matplotlib's defaults, not from your matplotlibrc.

        Args:
          path: file to save the figure to, such as "collapse.png"; None saves none.

        Raises:
          ValueError: there is no epoch, or the reports lack fields of `CollapseMetrics`.
        """
        from ncjax import plotting

        if not self._rows:
            raise ValueError("a plot needs an epoch, got none: append a report first")
        columns = {name: values[None] for name, values in self.columns().items()}
        try:
            panels = plotting.collapse_panels(columns)
        except KeyError as error:
            raise ValueError(
                f"a plot needs the fields of CollapseMetrics, got reports without {error}: "
                "append what CollapseMeter.compute returns"
            ) from error
        figure = plotting.figure_over_epochs(columns["epoch"][0], panels)
        if path is not None:
            with plotting.style():
                figure.savefig(path, dpi=200, bbox_inches="tight")
        return figure


def _cell(title: str, value: float) -> str:
    return f"{value:.0f}" if title in _WHOLE else f"{value:.4g}"
