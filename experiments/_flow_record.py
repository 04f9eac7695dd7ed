"""The record of a network flow: rows of metrics.csv, figures and tables of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _fits
from experiments._record import METRICS_FILE, median, rounded
from experiments._runs import files
from ncjax import plotting

_KINDS = {"seed": int, "gradients": int, "split": str}
_HEAD = ("split", "seed", "log_t", "gradients", "excess")
# Values of log t in the table, as far as the run comes.
_TIMES = (10.0, 100.0, 300.0, 1000.0)
_GRID_POINTS = 300


def row(split: str, head: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Return a row, with values rounded as in the file: a resumed run has the same rows."""
    numbers = {**head, **values}
    cells = {
        name: value if isinstance(value, int) else rounded(value)
        for name, value in numbers.items()
    }
    return {"split": split} | cells


def next_time(log_t: float, per_decade: int) -> float:
    """Return the first time after `log_t` of the grid 10^(i / per_decade), i >= 0."""
    if log_t < 1:
        return 1.0
    return 10 ** ((math.floor(per_decade * math.log10(log_t) + 1e-6) + 1) / per_decade)


def on_grid(rows: Sequence[dict[str, Any]], per_decade: int) -> list[dict[str, Any]]:
    """Leave out the rows of the end of a run that goes on, unless the grid has them."""
    points = sorted({(row["gradients"], row["log_t"]) for row in rows})
    times = [0.0, *(log_t for _, log_t in points)]
    if points and times[-1] < next_time(times[-2], per_decade):
        return [row for row in rows if row["gradients"] < points[-1][0]]
    return list(rows)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv; none if there is no such file.

    Raises:
      BadUse: the file is damaged.
    """
    return files.read_rows(folder / METRICS_FILE, _KINDS)


def series(rows: Sequence[Mapping[str, Any]], split: str) -> list[dict[str, np.ndarray]]:
    """Return the columns of each seed by name, each (T,); T differs between seeds."""
    seeds = sorted({row["seed"] for row in rows})
    names = [name for name in rows[0] if name not in ("split", "seed")]
    chosen = [
        [row for row in rows if (row["split"], row["seed"]) == (split, seed)]
        for seed in seeds
    ]
    return [
        {name: np.array([row[name] for row in part], float) for name in names}
        for part in chosen
        if part
    ]


def far(parts: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Leave out the seeds that ended before 0.9 of the last log t of the farthest one.

    Figures, tables and exponents are of the others: `endings` in summary.json has all.
    """
    last = max((float(part["log_t"][-1]) for part in parts), default=0.0)
    least = last - 0.1 * abs(last)
    return [part for part in parts if part["log_t"][-1] >= least]


def interpolate(
    parts: Sequence[Mapping[str, np.ndarray]],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return common log times (T,), and the columns (S, T) of S seeds at these times.

    The solver chooses the times, so they differ between seeds. One seed keeps its own.
    Several are interpolated in log log t, on the times that all have.
    """
    if len(parts) == 1:
        return parts[0]["log_t"], {k: v[None] for k, v in parts[0].items()}
    parts = [{k: v[part["log_t"] > 1] for k, v in part.items()} for part in parts]
    parts = [part for part in parts if part["log_t"].size]
    low, high = (f(part["log_t"][i] for part in parts) for f, i in ((max, 0), (min, -1)))
    log_times = np.geomspace(low, high, _GRID_POINTS)
    columns = {
        name: np.stack(
            [
                np.interp(np.log(log_times), np.log(part["log_t"]), part[name])
                for part in parts
            ]
        )
        for name in parts[0]
    }
    return log_times, columns


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the figures of a run over log log t."""
    of_train = far(series(rows, "train"))
    if of_train[0]["log_t"][-1] <= 1 or len(of_train[0]["log_t"]) < 2:
        return
    log_times, columns = interpolate(of_train)
    figures = {
        "collapse": plotting.collapse_panels(columns),
        "margins": plotting.margin_panels(columns),
        "duality": plotting.duality_panels(columns),
    }
    if "norm_growth" in columns:
        figures["homogeneity"] = plotting.homogeneity_panels(columns)
    for name, panels in figures.items():
        figure = plotting.figure_over_log_log_t(log_times, panels)
        files.write_files(folder / name, plotting.render(figure))


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per metric: medians over seeds at some times and at the end."""
    of_train, of_test = far(series(rows, "train")), far(series(rows, "test"))
    times = [
        time
        for time in _TIMES
        if all((part["log_t"][:-1] >= time).any() for part in of_train)
    ]
    result = []
    for name in of_train[0]:
        if name in _HEAD:
            continue
        cells: dict[str, Any] = {"metric": name}
        for time in times:
            values = [part[name][np.argmax(part["log_t"] >= time)] for part in of_train]
            cells[f"log_t_{time:g}"] = median(values)
        cells["at_the_end"] = median([part[name][-1] for part in of_train])
        if of_test:
            cells["test_at_the_end"] = median([part[name][-1] for part in of_test])
        result.append(cells)
    return result


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return p of (log t)^-p, fitted in windows, for each metric of the training set."""
    parts = far(series(rows, "train"))
    if parts[0]["log_t"][-1] <= 1:
        return {}
    log_times, columns = interpolate(parts)
    fitted = {name: v for name, v in columns.items() if name not in _HEAD}
    return _fits.exponent_table(log_times, fitted)
