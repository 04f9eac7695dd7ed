"""Tables, figure and page of the deep experiment, from the arrays of its cells."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import _deep_figures
from experiments._deep_cells import Cell
from experiments._deep_ends import BETWEEN, NEAR, Row, codes_of, end_rows, share_rows
from experiments._runs import page

Parts = Mapping[str, Mapping[str, np.ndarray]]


class Results(NamedTuple):
    """What a run writes."""

    tables: dict[str, list[Row]]  # shares, codes
    ends: list[Row]
    trajectory: list[Row]
    figure: Figure
    totals: dict[str, Any]  # of the whole run, for summary.json


class Chosen(NamedTuple):
    """A start whose path is shown."""

    cell: Cell
    start: int
    code: str


def of(cells: Sequence[Cell], stored: Mapping[str, np.ndarray]) -> Results:
    """Return the results of all cells."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in stored.items():
        part, _, key = name.partition(":")
        parts.setdefault(part, {})[key] = values
    by_cell = {cell: end_rows(cell, parts[cell.name]) for cell in cells}
    shares = [row for cell, rows in by_cell.items() for row in share_rows(cell, rows)]
    ends = [row for rows in by_cell.values() for row in rows]
    chosen = _choose(by_cell)
    return Results(
        tables={"shares": shares, "codes": _code_rows(cells)},
        ends=ends,
        trajectory=[row for each in chosen for row in _path_rows(each, parts)],
        figure=_figure(cells, shares, chosen, parts),
        totals=_totals(ends),
    )


def _totals(ends: Sequence[Row]) -> dict[str, Any]:
    """Return the numbers of starts, and how near the settled ones are to the theory."""
    settled = [row for row in ends if row["code"] != BETWEEN]
    errors = [abs(row["value"] / row["value_of_code"] - 1) for row in settled]
    return {
        "starts": len(ends),
        "settled": len(settled),
        "failed": sum(row["failed"] for row in ends),
        "value_error_median": float(np.median(errors)) if errors else math.nan,
        "value_error_worst": max(errors, default=math.nan),
        "near": NEAR,
    }


def _code_rows(cells: Sequence[Cell]) -> list[Row]:
    """Return the theory's value of each code, for each number of classes and factors."""
    rows = []
    for cell in {(cell.num_classes, cell.factors): cell for cell in cells}.values():
        codes = codes_of(cell)
        least = next(iter(codes.values())).value
        rows += [
            {
                "num_classes": cell.num_classes,
                "factors": cell.factors,
                "code": name,
                "rank": code.rank,
                "value": float(code.value),
                "over_least": float(code.value / least),
            }
            for name, code in codes.items()
        ]
    return rows


def _choose(by_cell: Mapping[Cell, Sequence[Row]]) -> list[Chosen]:
    """Choose the start nearest to each of the two commonest codes of one K, p and width.

    They are the smallest K and width, and the smallest p of at least three, if any.
    """
    first = min(
        by_cell,
        key=lambda c: (c.num_classes, c.factors < 3, abs(c.factors - 3), c.width, c.scale),
    )
    settled: dict[str, list[tuple[float, Chosen]]] = {}
    for cell, rows in by_cell.items():
        if cell.shape != first.shape:
            continue
        for row in rows:
            if row["code"] != BETWEEN:
                found = Chosen(cell, row["start"], row["code"])
                settled.setdefault(row["code"], []).append((row["distance"], found))
    commonest = sorted(settled.values(), key=len, reverse=True)[:2]
    return [min(starts, key=lambda pair: pair[0])[1] for starts in commonest]


def _path_rows(chosen: Chosen, parts: Parts) -> list[Row]:
    """Return a row for each time of a chosen start."""
    cell, start, code = chosen
    part = parts[cell.name]
    rows = []
    for time, log_t in enumerate(part["log_times"]):
        sigma = part["singular_values"][start, time]
        quotient = part["within_class_quotient"][start, time]
        rows.append(
            {
                "num_classes": cell.num_classes,
                "factors": cell.factors,
                "width": cell.width,
                "scale": cell.scale,
                "start": start,
                "code": code,
                "log_t": float(log_t),
                "log_loss": float(part["log_loss"][start, time]),
                "squared_norm": float(part["squared_norm"][start, time]),
                "least_margin": float(part["least_margin"][start, time]),
            }
            | {f"sigma_{i}": float(value) for i, value in enumerate(sigma, 1)}
            | {f"within_class_{i}": float(value) for i, value in enumerate(quotient)}
        )
    return rows


def _figure(cells, shares, chosen: Sequence[Chosen], parts: Parts) -> Figure:
    by_size: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        by_size.setdefault((cell.num_classes, cell.width), []).append(cell)
    basins = {size: _basins(size, chosen) for size, chosen in by_size.items()}
    starts = next(iter(parts.values()))["least_margin"].shape[0]
    for row in shares:
        found = basins[row["num_classes"], row["width"]].shares
        found.setdefault(row["code"], {})[row["factors"], row["scale"]] = row["share"]
    paths = [
        _deep_figures.Path(
            *(cell.num_classes, cell.factors, cell.scale, code),
            parts[cell.name]["log_times"],
            parts[cell.name]["singular_values"][start],
        )
        for cell, start, code in chosen
    ]
    deepest = max(cells, key=lambda c: (-c.num_classes, -c.width, c.factors, c.scale))
    part = parts[deepest.name]
    layers = _deep_figures.Layers(
        *(deepest.num_classes, deepest.factors, deepest.scale),
        part["log_times"],
        np.nanmedian(part["within_class_quotient"], axis=0),
    )
    return _deep_figures.basins_figure([*basins.values()], paths, layers, starts)


def _basins(size: tuple[int, int], cells: Sequence[Cell]) -> _deep_figures.Basins:
    least = {cell.factors: next(iter(codes_of(cell))) for cell in cells}
    scales = sorted({cell.scale for cell in cells})
    return _deep_figures.Basins(*size, scales, least, {})


def report(summary: Mapping[str, Any]) -> str:
    """Return the printed table."""
    lines = [
        f"{'K':>3}{'p':>3}{'d':>4}{'scale':>8}  {'code':<24}{'share':>8}{'V':>11}"
        f"{'found':>11}"
    ]
    for row in summary["shares"]:
        share = f"{row['share']:.0%}"
        lines.append(
            f"{row['num_classes']:>3}{row['factors']:>3}{row['width']:>4}"
            f"{row['scale']:>8g}  {row['code']:<24}{share:>8}{_value(row['value']):>11}"
            f"{_value(row['value_found']):>11}"
        )
    lines.append(
        f"{summary['settled']} of {summary['starts']} starts have logits within "
        f"{summary['near']:.0%} of a code's, {summary['failed']} failed, "
        f"{summary['seconds']} s"
    )
    return "\n".join(lines)


def _value(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.5g}"


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report the shares of each code and the theory's values."""
    verdict = (
        f"{summary['starts']} starts, {summary['settled']} with logits within "
        f"{summary['near']:.0%} of a code's; their |Z̃|²/2 exceeds the code's V by "
        f"{page.number(summary['value_error_median'])} in the median"
    )
    if summary["failed"]:
        verdict += f"; {summary['failed']} flows failed"
    state = page.BAD if summary["failed"] else page.GOOD
    return page.Findings(state, verdict, [_shares_table(summary), _codes_table(summary)])


def _shares_table(summary: Mapping[str, Any]) -> page.Table:
    """Return a row for each cell, a column for each code."""
    names = list(dict.fromkeys(row["code"] for row in summary["shares"]))
    names.sort(key=lambda name: name == BETWEEN)
    keys = ("num_classes", "factors", "width", "scale")
    rows = []
    for key, cell in itertools.groupby(summary["shares"], lambda r: [r[k] for k in keys]):
        cells = {row["code"]: row for row in cell}
        shares = [
            f"{row['share']:.0%} ({row['share_low']:.0%}–{row['share_high']:.0%})"
            if (row := cells.get(name)) and row["starts"]
            else ""
            for name in names
        ]
        least = next(iter(cells.values()))["least_code"]
        rows.append([", ".join(map(page.number, key)), *shares, least])
    return page.Table(
        "Share of the starts at each code at the last time, with its 95 % interval",
        ["K, p, width, scale", *names, "least V"],
        rows,
    )


def _codes_table(summary: Mapping[str, Any]) -> page.Table:
    """Return V of each code, a column for each K and p."""
    names = list(dict.fromkeys(row["code"] for row in summary["codes"]))
    keys = list(dict.fromkeys((r["num_classes"], r["factors"]) for r in summary["codes"]))
    values = {
        (row["code"], row["num_classes"], row["factors"]): row["value"]
        for row in summary["codes"]
    }
    return page.Table(
        "V = |Z̃|²/2 of the codes of closed form",
        ["code", *(f"K = {k}, p = {p}" for k, p in keys)],
        [
            [
                name,
                *(
                    page.number(values[name, *key]) if (name, *key) in values else ""
                    for key in keys
                ),
            ]
            for name in names
        ],
    )


PAGE = page.Page(
    title="Softmax codes of deep models",
    figures={
        "basins.png": "Codes that the flow ends at, over the number p of factors, the "
        "width and the scale of the starts; singular values of the logits on the way to "
        "two codes; within-class variation of every layer."
    },
    show=_findings,
)
