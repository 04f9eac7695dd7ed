"""What a report says of a run: its figures, tables and verdicts, by kind of experiment."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from experiments import _fits
from experiments._runs import folders

GOOD, BAD, OPEN = "good", "bad", "open"
_COLOURS = 256
_MOST_PIXELS = 50_000_000
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError)


class Figure(NamedTuple):
    """A picture, inlined."""

    source: str  # data URI
    width: int  # pixels
    height: int
    caption: str


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """One run on the page."""

    anchor: str
    kind: str
    title: str
    folder: str
    state: str  # GOOD, BAD or OPEN
    verdict: str  # a line
    notes: Sequence[str]  # what could not be read
    figures: Sequence[Figure]
    tables: Sequence[Table]
    settings: Mapping[str, str]
    provenance: Mapping[str, str]
    summary: Mapping[str, Any]  # as read; empty if the run is unfinished or damaged


class Kind(NamedTuple):
    """How runs of one experiment are shown."""

    title: str
    figures: Mapping[str, str]  # file name to caption
    show: Callable[[Mapping[str, Any]], tuple[str, str, list[Table]]]


# Symbols of the metrics.
METRICS = {
    "within_class_variation": "NC1  Tr(Σ_W Σ_B⁺)/K",
    "within_class_quotient": "NC1  Tr Σ_W / Tr Σ_B",
    "cdnv": "NC1  class-distance normalised variance",
    "mean_norm_variation": "NC2  norms of class means",
    "centred_classifier_norm_variation": "NC2  norms of the centred classifier",
    "classifier_norm_variation": "NC2  norms of the raw classifier",
    "mean_cosine_deviation": "NC2  angles of class means",
    "centred_classifier_cosine_deviation": "NC2  angles of the centred classifier",
    "classifier_cosine_deviation": "NC2  angles of the raw classifier",
    "etf_gram_error": "NC2  Gram matrix of means against the ETF",
    "centred_self_duality": "NC3  self-duality, centred classifier",
    "self_duality": "NC3  self-duality, raw classifier",
    "product_etf_error": "NC3  W Mᵀ against the ETF",
    "ncc_mismatch": "NC4  classifier against nearest mean",
    "kkt_angle": "KKT angle √(1-β²)",
    "balanced_kkt_angle": "KKT angle at equal norms",
    "margin_deficit": "margin deficit 1 - 2(K-1)√n q_min/|Z|²",
    "margin_ratio": "margin ratio 2(K-1)√n q_min/|Z|²",
    "balanced_margin_ratio": "margin ratio at equal norms",
    "accuracy": "accuracy",
    "loss": "mean cross entropy",
    "log_loss": "log of the summed cross entropy",
    "least_margin": "least margin q_min",
    "squared_norm": "|Z|²",
    "sigma_max": "σ_max(S), 1 at the optimum",
    "smallest_riemannian_eigenvalue": "least eigenvalue of the Riemannian Hessian",
    "kkt_stationarity": "KKT stationarity",
    "kkt_complementarity": "KKT complementarity",
    "duality_gap": "duality gap",
    "excess_over_the_minimum_norm": "excess over the minimum norm",
}
_SIDE_BY_SIDE = (
    ("within_class_variation", "NC1"),
    ("mean_norm_variation", "norms of means"),
    ("mean_cosine_deviation", "angles of means"),
    ("centred_self_duality", "self-duality, centred"),
    ("ncc_mismatch", "NC4 mismatch"),
)


def number(value: Any, digits: int = 4) -> str:
    """A number to some digits; as a power of ten, or less than 1, where that says more."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{value:.0f}".replace("-", "−")
    if 0.999 < value < 1:
        return f"1\u00a0−\u00a0{number(1 - value, digits)}"
    if 1e-3 <= abs(value) < 1e5:
        places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{places}f}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa}\u00a0×\u00a010{power}".replace("-", "−")


def label(name: str) -> str:
    """What a report calls a metric."""
    return METRICS.get(name, name.replace("_", " "))


def kind_of(folder: Path) -> str:
    """The experiment that a run folder is of, one of `KINDS`.

    Raises:
      ValueError: it holds no run, or one of an unknown kind.
    """
    folders.stored_config(folder)
    stored = folders.read_json(folder / folders.CONFIG)
    command = stored.get("command", "")
    words = command.split() if isinstance(command, str) else []
    modules = [word for word in words if word.startswith("experiments.")]
    asked = "".join(modules[:1]).removeprefix("experiments.")
    name = str(stored.get("experiment", asked))
    if name not in KINDS:
        raise ValueError(
            f"{str(folder)!r} is a run of an unknown kind, {name!r}: expected one of "
            f"{', '.join(KINDS)}"
        )
    return name


def view(folder: Path) -> Section:
    """The section of one run folder of a known kind."""
    kind = kind_of(folder)
    stored = folders.read_json(folder / folders.CONFIG)
    notes: list[str] = []
    summary, state, verdict, tables = _read_summary(folder, kind, notes)
    figures = [
        figure
        for name, caption in KINDS[kind].figures.items()
        if (figure := _figure(folder / name, caption, notes))
    ]
    source = summary or stored
    return Section(
        anchor="run-" + "".join(c if c.isalnum() else "-" for c in str(folder)).strip("-"),
        kind=kind,
        title=_title(KINDS[kind].title, stored["config"]),
        folder=str(folder),
        state=state,
        verdict=verdict,
        notes=notes,
        figures=figures,
        tables=tables,
        settings={name: str(value) for name, value in stored["config"].items()},
        provenance=_provenance(source),
        summary=summary,
    )


def _read_summary(folder: Path, kind: str, notes: list[str]):
    """Summary, state, verdict and tables of a run; a note of what is amiss."""
    if not (folder / folders.SUMMARY).exists():
        notes.append(f"There is no {folders.SUMMARY}: the run has not come to its end.")
        return {}, OPEN, "unfinished", []
    try:
        summary = folders.read_json(folder / folders.SUMMARY)
        state, verdict, tables = KINDS[kind].show(summary)
    except (*_DAMAGED, OSError):
        notes.append(f"{folders.SUMMARY} is damaged, or not of a run of {kind}.")
        return {}, BAD, "cannot be read", []
    for name in folders.changed_files(folder, summary):
        notes.append(f"{name} is missing or damaged: not as the run has written it.")
    return summary, state, verdict, tables


def _figure(path: Path, caption: str, notes: list[str]) -> Figure | None:
    """A PNG inlined, in a palette, a third of its size; None and a note without it."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError("too many pixels")
            reduced = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    except FileNotFoundError:
        notes.append(f"There is no {path.name}.")
        return None
    except Exception:  # whatever a damaged picture raises
        notes.append(f"{path.name} is damaged.")
        return None
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Figure(f"data:image/png;base64,{text}", *reduced.size, caption)


def _title(title: str, config: Mapping[str, Any]) -> str:
    """The title, with network and data set where the run has them."""
    return title.format_map({name: config.get(name, "?") for name in ("model", "dataset")})


def _provenance(source: Mapping[str, Any]) -> dict[str, str]:
    """Command, date, device and versions, as far as they are stored."""
    versions = source.get("versions", {})
    listed = versions.items() if isinstance(versions, Mapping) else ()
    known = {
        name: str(source[name])
        for name in ("command", "date", "device", "platform")
        if name in source
    }
    return known | {"versions": ", ".join(f"{name} {version}" for name, version in listed)}


def _flow(summary: Mapping[str, Any]) -> tuple[str, str, list[Table]]:
    """Final medians with quartiles, exponents against the theory, constants, drift."""
    final, fitted = summary["final"], summary["exponents"]
    windows, limits = list(fitted)[-2:], _fits.PREDICTED if _fits.collapses(summary) else {}
    rows = []
    for name, symbol in METRICS.items():
        if name in final:
            values = [number(final[name][q]) for q in ("median", "q25", "q75")]
            powers = [
                number(_round(fitted[w].get(name, {}).get("median"))) for w in windows
            ]
            rows.append([symbol, *values, *powers, limits.get(name, "–")])
    tables = [
        Table(
            f"At log t = {number(summary['log_t'])}, over seeds; exponents p of (log t)^-p "
            "fitted in two windows, and predicted",
            ["metric", "median", "lower quartile", "upper quartile"]
            + [f"p, {window}" for window in windows]
            + ["p predicted"],
            rows,
        ),
        Table(
            "Sharp constants, and drift of what the flow conserves, the solver's own error",
            ["quantity", "median over seeds", "predicted limit"],
            [
                [name, number(entry["median"]), number(entry["predicted"])]
                for name, entry in summary["sharp_constants"].items()
            ]
            + [
                [f"{name.replace('_', ' ')}, largest drift", number(entry["median"]), "0"]
                for name, entry in summary["largest_drift"].items()
            ],
        ),
    ]
    failed, solver = summary["solver"]["failed_seeds"], summary["solver"]
    seeds = final["log_loss"]["seeds"]
    verdict = (
        f"{seeds} starts to log t = {number(summary['log_t'])}, "
        f"{solver['steps_per_seed']} solver steps each, {number(solver['seconds'])} s"
    )
    if failed:
        return BAD, f"{verdict}; failed seeds: {', '.join(map(str, failed))}", tables
    return GOOD, verdict, tables


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _theorems(summary: Mapping[str, Any]) -> tuple[str, str, list[Table]]:
    """A line for each statement."""
    statements = summary["statements"]
    held = sum(entry["passed"] is True for entry in statements)
    table = Table(
        "Every statement, what it was checked on, the number found and its bound. Source "
        "ncjax: a result of this software, not of the paper",
        ["source", "statement", "checked on", "found", "at most", "verdict"],
        [
            [
                *(entry["source"], entry["statement"], entry["on"]),
                *(number(entry["number"]), number(entry["bound"])),
                "holds" if entry["passed"] is True else "FAILS",
            ]
            for entry in statements
        ],
    )
    verdict = f"{held} of {len(statements)} statements hold"
    return (GOOD if held == len(statements) else BAD), verdict, [table]


def _saddles(summary: Mapping[str, Any]) -> tuple[str, str, list[Table]]:
    """The block family, certificates of flows, escapes and descents."""
    family, flow = summary["family"], summary["directions"]
    wrong = family["wrong_multiplicity_or_verdict"]
    counts = [
        ["members of the block family", number(family["members"])],
        ["largest error of an eigenvalue", number(family["largest_eigenvalue_error"])],
        ["largest error of σ_max", number(family["largest_sigma_max_error"])],
        ["wrong multiplicities or verdicts", number(len(wrong))],
        [
            "collapsed points where the plain Hessian has negative eigenvalues too",
            f"{family['collapsed_with_negative_plain_hessian']} of {family['collapsed']}",
        ],
        [
            f"flows certified optimal at log t = {number(flow['log_t'])}",
            f"{flow['globally_optimal']} of {flow['seeds']}",
        ],
        ["their σ_max, median", number(flow["sigma_max"]["median"])],
        ["their KKT residual, median", number(flow["stationarity"]["median"])],
    ]
    tables = [Table("Closed forms against computation", ["quantity", "value"], counts)]
    for title, rows, found in (
        ("Escape off a saddle: exponent of log t", summary["escape"], "fitted_exponent"),
        ("Descent on the sphere: curvature", summary["descent"], "curvature"),
    ):
        predicted = "predicted_exponent" if found == "fitted_exponent" else "predicted"
        tables.append(
            Table(
                title,
                ["saddle", "found", "predicted"],
                [[_block(row), number(row[found]), number(row[predicted])] for row in rows],
            )
        )
    sound = not wrong and flow["globally_optimal"] == flow["seeds"]
    verdict = (
        f"{family['members']} members, {len(wrong)} wrong; {flow['globally_optimal']} of "
        f"{flow['seeds']} flows certified optimal"
    )
    return (GOOD if sound else BAD), verdict, tables


def _block(row: Mapping[str, Any]) -> str:
    return (
        f"{row['num_blocks']} blocks of {row['block_size']} classes, n = "
        f"{row['per_class']}, d = {row['dim']}"
    )


def _train(summary: Mapping[str, Any]) -> tuple[str, str, list[Table]]:
    """Metrics at zero training error and at the end."""
    rows = [summary["metrics"][n] for n in METRICS if n in summary["metrics"]]
    tested = any("test_at_the_end" in row for row in rows)
    compared = [row for row in rows if row["fell"] and "kkt" not in row["metric"]]
    compared = [row for row in compared if row["at_zero_error"]]
    fell = sum(row["fell"] == "True" for row in compared)
    head = ["metric", "at zero error", "at the end"]
    table = Table(
        "Training set in evaluation mode, medians over seeds",
        [*head, *(["test set, at the end"] if tested else []), "fell"],
        [
            [
                *(label(row["metric"]), number(row["at_zero_error"])),
                number(row["at_the_end"]),
                *([number(row.get("test_at_the_end"))] if tested else []),
                {"True": "yes", "False": "no"}.get(row["fell"], ""),
            ]
            for row in rows
        ],
    )
    zero = summary["zero_training_error_from_epoch"]
    size = f"{summary['parameters']:,} parameters, {summary['training_images']:,} images"
    if zero is None:
        return OPEN, f"{size}; the training error is not zero at the end", [table]
    verdict = (
        f"{size}; no training error from epoch {zero}, and {fell} of {len(compared)} "
        "metrics lower at the end"
    )
    return (GOOD if fell == len(compared) else OPEN), verdict, [table]


def _peel(summary: Mapping[str, Any]) -> tuple[str, str, list[Table]]:
    """The network's last layer, and where the flow takes it."""
    points = summary["points"]
    names = [n for n in METRICS if n in next(iter(points.values()))]
    titles = [title.replace("at_log_t_", "at log t = ") for title in points]
    rows = [
        [label(name), *(number(point[name]) for point in points.values())] for name in names
    ]
    rows.append(["verdict", *(str(point["verdict"]) for point in points.values())])
    table = Table(
        "The last layer as a point of the layer-peeled model, and the end of the exact "
        "flow from there",
        ["quantity", *titles],
        rows,
    )
    ratios = [number(point["margin_ratio"]) for point in points.values()]
    return GOOD, f"{summary['network']}; margin ratio {' → '.join(ratios)}", [table]


_COLLAPSE = "NC1 to NC3 over log log of the epoch; white: no training error any more."
_TRAINING = "Error, loss, margin and NC4."
_NETWORK = Kind(
    "{model} on {dataset}", {"collapse.png": _COLLAPSE, "training.png": _TRAINING}, _train
)
KINDS: dict[str, Kind] = {
    "ulpm_flow": Kind(
        "Gradient flow of the layer-peeled model",
        {
            "figure2.png": "Collapse along the exact flow: medians and quartiles over "
            "starts, against log log t. Dotted: the predicted slope."
        },
        _flow,
    ),
    "saddle_analysis": Kind(
        "Saddles, certificates, escapes",
        {
            "saddles.png": "(a) certificates along flows from random starts, (b) escapes "
            "from saddles, (c) the loss along the certified direction of descent. Dotted: "
            "predicted."
        },
        _saddles,
    ),
    "theorems": Kind("Every statement of the theory", {}, _theorems),
    "train_resnet": _NETWORK,
    "train_vgg": _NETWORK,
    "train_small": _NETWORK,
    "peel": Kind(
        "The last layer of a network, taken on by the flow",
        {"flow.png": "From the network's last layer, along the exact flow."},
        _peel,
    ),
}


def side_by_side(sections: Sequence[Section]) -> Table | None:
    """Networks in one table, each metric at zero training error → at the end."""
    networks = [s for s in sections if s.kind.startswith("train_") and s.summary]
    if len(networks) < 2:
        return None
    return Table(
        "Networks side by side: at zero training error → at the end",
        ["network", "images", "epochs", "no error from", *(t for _, t in _SIDE_BY_SIDE)],
        [_network_row(section) for section in networks],
    )


def _network_row(section: Section) -> list[str]:
    summary, metrics = section.summary, section.summary["metrics"]
    return [
        section.title,
        number(summary["training_images"]),
        section.settings.get("epochs", "–"),
        number(summary["zero_training_error_from_epoch"]),
        *(
            "\u00a0→ ".join(
                number(metrics[n][k], 3) for k in ("at_zero_error", "at_the_end")
            )
            for n, _ in _SIDE_BY_SIDE
        ),
    ]
