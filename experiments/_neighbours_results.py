"""Tables, figures and the page of the comparison, from the arrays of its parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import _neighbours_figures, _neighbours_minority, _neighbours_path
from experiments._neighbours_minority import (
    LARGE,
    MODELS,
    NUM_CLASSES,
    RATIOS,
    flow_ratios,
)
from experiments._neighbours_models import ULPM, Model
from experiments._runs import page

Row = dict[str, Any]


class Results(NamedTuple):
    """What a run writes."""

    tables: dict[str, list[Row]]  # models, path, minority
    flows: list[Row]  # distance over time
    figures: dict[str, Figure]


def of(
    stored: Mapping[str, np.ndarray], models: Mapping[str, Model], decay: float
) -> Results:
    """Return the results of all parts; `models` by the names of their parts."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, values in stored.items():
        part, _, key = name.partition(":")
        parts.setdefault(part, {})[key] = values
    rows = [_model_row(models[name], parts[name]) for name in models]
    tables = {"models": rows, "path": _path_rows(parts), "minority": _minority_rows(parts)}
    flows = [row for name in models for row in _flow_rows(models[name], parts[name])]
    figures = {
        "flows": _flows_figure(models, parts, decay),
        "path": _path_figure(parts),
        "minority": _minority_figure(parts),
    }
    return Results(tables, flows, figures)


def _model_row(model: Model, part: Mapping[str, np.ndarray]) -> Row:
    """Compare optimum, certificate and rate of one model with the closed form."""
    optimum = float(part["optimum"])
    error = np.abs(part["value"] / optimum - 1)
    return {
        "model": model.label,
        "classes": model.kind,
        "optimum": optimum,
        "value_error_median": float(np.median(error)),
        "value_error_worst": float(error.max()),
        "bound_gap_worst": float(np.max(part["bound_gap"])),
        "sigma_error_worst": float(np.abs(part["sigma_ratio"] - 1).max()),
        "rate_predicted": float(part["rate_predicted"]),
        "rate_fitted": float(np.median(part["rate_fitted"])),
        "rate_error_worst": float(
            np.abs(part["rate_fitted"] / part["rate_predicted"] - 1).max()
        ),
        "proved": bool(part["proved"]),
        "failed": int(part["failed"]),
    }


def _flow_rows(model: Model, part: Mapping[str, np.ndarray]) -> list[Row]:
    """Return a row for each time, quartiles over starts."""
    quartiles = np.quantile(part["distance"], (0.25, 0.5, 0.75), axis=0)
    return [
        {
            "model": model.label,
            "classes": model.kind,
            "log_t": float(log_t),
            "distance_q25": float(low),
            "distance_median": float(median),
            "distance_q75": float(high),
        }
        for log_t, low, median, high in zip(part["log_times"], *quartiles, strict=True)
    ]


def _path_rows(parts: Mapping[str, Mapping[str, np.ndarray]]) -> list[Row]:
    """Return the scaled deviations from SELI, and their limits, for each ratio."""
    rows = []
    for ratio in _neighbours_path.RATIOS:
        part = parts[f"path/{ratio}"]
        flow = part["flow_logits"][:, -1] * part["flow_log_times"][-1]
        x, _, logits = part["decay"]
        rows.append(
            {"ratio": ratio}
            | {
                f"cosine_at_{mu:g}": float(value)
                for mu, value in zip(
                    _neighbours_path.REFERENCES, part["references"], strict=True
                )
            }
            | {
                "cosine_limit": float(part["limits"][0]),
                "logits_at_end": float(logits[-1] * x[-1]),
                "logits_of_flow": float(np.median(flow)),
                "logits_limit": float(part["limits"][1]),
            }
        )
    return rows


def _minority_rows(parts: Mapping[str, Mapping[str, np.ndarray]]) -> list[Row]:
    """Compare the end of the flows with the closed form, for each model and ratio."""
    rows = []
    for model in MODELS:
        for weighted in (False, True):
            name = _name(model, weighted)
            for place, ratio in enumerate(flow_ratios(model)):
                for size, large in enumerate(LARGE):
                    predicted = float(parts[name]["at_flows"][size, place])
                    found = parts[f"{name}/{ratio}"]["cosine"][size]
                    rows.append(
                        {
                            "model": model,
                            "class_weights": "1/n_k" if weighted else "1",
                            "large_classes": large,
                            "ratio": ratio,
                            "predicted": predicted,
                            "found": float(np.median(found)),
                            "error_worst": float(np.abs(found - predicted).max()),
                        }
                    )
    return rows


def _name(model: str, weighted: bool) -> str:
    return f"minority/{model}/{'weighted' if weighted else 'plain'}"


def _flows_figure(models, parts, decay: float) -> Figure:
    curves = [
        _neighbours_figures.Decay(
            model.label,
            model.kind != "balanced",
            parts[name]["log_times"],
            parts[name]["distance"],
            float(parts[name]["rate_predicted"]),
        )
        for name, model in models.items()
    ]
    ufm = next(curve for curve in curves if curve.label == "UFM" and not curve.step)
    small = [(decay, ufm)]
    for name, part in parts.items():
        kind, _, mu = name.partition("/")
        if kind == "small":
            rate = float(mu)
            small.append((rate, ufm._replace(**part, rate=rate)))
    return _neighbours_figures.flows_figure(curves, small)


def _path_figure(parts) -> Figure:
    paths = []
    for ratio in _neighbours_path.RATIOS:
        part = parts[f"path/{ratio}"]
        paths.append(
            _neighbours_figures.Path(
                ratio,
                tuple(part["decay"]),
                tuple(part["ball"]),
                (part["flow_log_times"], part["flow_logits"]),
                tuple(part["limits"]),
            )
        )
    return _neighbours_figures.path_figure(paths)


_TITLES = {
    "LPM": "LPM, norms of class means bounded",
    "UFM": "UFM, mean loss + decay",
    "ULPM": "ULPM, limit of the flow",
}

_WEIGHTED = ", class weights $1/n_k$"


def _minority_figure(parts) -> Figure:
    rows = []
    for weighted in (False, True):
        row: list[_neighbours_figures.Minority] = []
        for model in MODELS:
            name = _name(model, weighted)
            places = flow_ratios(model)
            cosines = [parts[f"{name}/{ratio}"]["cosine"] for ratio in places]
            letter = "abcdef"[3 * weighted + len(row)]
            row.append(
                _neighbours_figures.Minority(
                    f"({letter}) {model + _WEIGHTED if weighted else _TITLES[model]}",
                    _neighbours_minority.ratios(model),
                    parts[name]["predicted"],
                    places,
                    np.stack(cosines),
                    [np.inf] * 3 if weighted else _neighbours_minority.thresholds(model),
                    parts[name].get("features"),
                )
            )
        rows.append(row)
    return _neighbours_figures.minority_figure(rows, LARGE, NUM_CLASSES)


def report(summary: Mapping[str, Any]) -> str:
    """Return the printed table."""
    lines = [
        f"{'model':<26}{'classes':<10}{'optimum':>11}{'worst error':>13}{'gap':>10}"
        f"{'rate':>9}{'predicted':>11}"
    ]
    for row in summary["models"]:
        lines.append(
            f"{row['model']:<26}{row['classes']:<10}{row['optimum']:>11.6g}"
            f"{row['value_error_worst']:>13.1e}{row['bound_gap_worst']:>10.1e}"
            f"{row['rate_fitted']:>9.5f}{row['rate_predicted']:>11.5f}"
        )
    lines.append(
        "the rate of the ULPM is the power p in (log t)^-p, of others the slowest "
        "eigenvalue in e^(-rate t)"
    )
    for row in summary["path"]:
        lines.append(
            f"path, R = {row['ratio']}: cosine's deviation times log(1/mu) "
            f"{row['cosine_at_1e-16']:.5f} at mu = 1e-16, limit {row['cosine_limit']:.5f}"
        )
    for model in MODELS:
        lines.append(
            f"minority cosines, {model}: flows differ from the closed form by at most "
            f"{_worst(summary, model):.1e}"
        )
    return "\n".join(lines)


def _worst(summary: Mapping[str, Any], model: str) -> float:
    """Return the largest error of a cosine; where both are undefined there is none."""
    errors = [row["error_worst"] for row in summary["minority"] if row["model"] == model]
    return max((e for e in errors if e is not None and np.isfinite(e)), default=np.nan)


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report optimum, certificate and rate of each model, the path, and the minority."""
    failed = sum(row["failed"] for row in summary["models"])
    regularised = [row for row in summary["models"] if row["model"] != ULPM.upper()]
    error = max(row["value_error_worst"] for row in regularised)
    gap = max(row["bound_gap_worst"] for row in regularised if row["bound_gap_worst"])
    verdict = (
        f"{len(summary['models'])} models; with decay or a ball the flows reach the closed "
        f"form to {page.number(error)}, certified to {page.number(gap)}"
    )
    if failed:
        verdict += f"; {failed} flows failed"
    sound = not failed and error < 1e-8
    tables = [_models_table(summary), _path_table(summary), _minority_table(summary)]
    return page.Findings(page.GOOD if sound else page.BAD, verdict, tables)


def _models_table(summary: Mapping[str, Any]) -> page.Table:
    columns = (
        *("optimum", "value_error_worst", "bound_gap_worst", "sigma_error_worst"),
        *("rate_fitted", "rate_predicted"),
    )
    return page.Table(
        "Each model: optimum in closed form; end of the flows, worst start; rate: the "
        "power of log t for the ULPM, else of e^(-rate t)",
        [
            *("model", "optimum", "relative error", "certified gap", "|σ_max/μ - 1|"),
            *("rate", "predicted"),
        ],
        [
            [
                f"{row['model']}, {row['classes']}",
                *(page.number(row[column]) for column in columns),
            ]
            for row in summary["models"]
        ],
    )


def _path_table(summary: Mapping[str, Any]) -> page.Table:
    columns = [name for name in summary["path"][0] if name != "ratio"]
    return page.Table(
        "Deviation from SELI times log(1/μ): cosine of two minority classifiers, and unit "
        "logits at the end of the path and of the flow",
        ["R", *(name.replace("_", " ") for name in columns)],
        [
            [str(row["ratio"]), *(page.number(row[name]) for name in columns)]
            for row in summary["path"]
        ],
    )


def _minority_table(summary: Mapping[str, Any]) -> page.Table:
    keys = dict.fromkeys((r["model"], r["class_weights"]) for r in summary["minority"])
    rows = []
    for model, weights in keys:
        chosen = [
            r
            for r in summary["minority"]
            if (r["model"], r["class_weights"]) == (model, weights)
            and r["large_classes"] == 5
        ]
        cosines = {r["ratio"]: page.number(r["found"]) for r in chosen}
        cells = [cosines.get(ratio, "") for ratio in RATIOS]
        rows.append([f"{model}, weights {weights}", *cells])
    return page.Table(
        f"Cosine of two minority classifiers at the end of the flows, 5 large classes of "
        f"{NUM_CLASSES}",
        ["model", *(f"R = {ratio}" for ratio in RATIOS)],
        rows,
    )


PAGE = page.Page(
    title="The models of Table 1",
    figures={
        "flows.png": "Distance to the optimum over time: exponential with decay or a ball, "
        "a power of log t without. Dotted: predicted slopes.",
        "path.png": "The regularisation path tends to SELI like 1/log(1/μ). Dotted: the "
        "limit of first order.",
        "minority.png": "Minority collapse over the imbalance R. Lines: closed forms; "
        "markers: ends of the flows; dotted: the ratio from which on the minority merges.",
    },
    show=_findings,
)
