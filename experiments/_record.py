"""The record of a training run: rows of metrics.csv, figures and table of them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._runs import files
from experiments._runs.errors import BadUse
from ncjax import plotting

METRICS_FILE = "metrics.csv"
# Columns that do not fall to zero.
_NOT_FALLING = (
    *("log_t", "accuracy", "loss", "log_loss", "least_margin"),
    *("margin_ratio", "balanced_margin_ratio"),
)


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.csv, a row for each measured epoch, split and seed."""
    files.write_rows(folder / METRICS_FILE, rows)


def read_rows(folder: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv up to an epoch; none if there is no such file.

    Raises:
      BadUse: the file is damaged.
    """
    path, kinds = folder / METRICS_FILE, {"epoch": int, "seed": int, "split": str}
    rows = files.read_rows(path, kinds)
    if not all("epoch" in row for row in rows):
        raise BadUse(f"{path} is damaged")
    return [row for row in rows if row["epoch"] <= up_to]


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of metrics.csv with these rows."""
    return hashlib.sha256(files.csv_of(rows)).hexdigest()


def columns(rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, np.ndarray]:
    """Return the metrics of one split by name, each (S, T): seeds, measured epochs."""
    selected = [row for row in rows if row["split"] == split]
    seeds = max((row["seed"] for row in selected), default=-1) + 1
    names = [name for name in rows[0] if name not in ("split", "seed")]
    return {
        name: np.asarray([row[name] for row in selected], float).reshape(-1, seeds).T
        for name in names
        if seeds
    }


def zero_error_epoch(measured: Mapping[str, np.ndarray]) -> int | None:
    """Return the first measured epoch from which on no seed has a training error."""
    errors = np.flatnonzero(~(measured["accuracy"] == 1).all(axis=0))
    first = errors[-1] + 1 if errors.size else 0
    epochs = measured["epoch"][0]
    return int(epochs[first]) if first < epochs.size else None


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the figures of a run: four panels of collapse, four of training."""
    of_train, of_test = columns(rows, "train"), columns(rows, "test")
    epochs = of_train["epoch"][0]
    if epochs[-1] < 3:
        return
    zero = zero_error_epoch(of_train)
    figure = plotting.figure_over_log_log_epochs(
        epochs, plotting.collapse_panels(of_train), until=zero
    )
    files.write_files(folder / "collapse", plotting.render(figure))
    panels = plotting.training_panels(of_train, of_test)
    figure = plotting.figure_over_log_log_epochs(epochs, panels, until=zero)
    files.write_files(folder / "training", plotting.render(figure))


def table(of_train, of_test, zero: int | None) -> list[dict[str, Any]]:
    """Return a row per metric: medians over seeds at zero training error and at the end."""
    epochs = of_train["epoch"][0].astype(int).tolist()
    at_zero = epochs.index(zero) if zero else None
    rows = []
    for name, values in of_train.items():
        if name == "epoch":
            continue
        first = math.nan if at_zero is None else median(values[:, at_zero])
        last = median(values[:, -1])
        compared = first > 0 and name not in _NOT_FALLING and zero < epochs[-1]
        row = {
            "metric": name,
            "at_zero_error": first,
            "at_the_end": last,
            "fell": str(last < first) if compared else "",
        }
        if of_test:
            row["test_at_the_end"] = median(of_test[name][:, -1])
        rows.append(row)
    return rows


def rounded(value: float) -> float:
    """Round as in metrics.csv, so that a resumed run has the same rows."""
    return float(f"{value:.9g}")


def median(values: Any) -> float:
    """Return the median over the seeds that have not diverged."""
    values = np.asarray(values)
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
