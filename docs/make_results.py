"""Write the tables of README.md and of four pages of docs/ from the committed results.

    python docs/make_results.py

A line `<!-- results: NAME -->` and the lines below it, up to the next blank one, belong to
the function NAME of `TABLES`, which reads `results/*/summary.json`,
`results/reference_features/*.json` or `benchmarks/results.json`. All other text is written
by hand. `tests/test_docs.py` fails while a page is out of date.
"""

import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("results", "network_flow", "reference_features", "objectives", "deep")
    ),
)
NETWORKS = {
    "vgg13_mnist": "VGG13, MNIST",
    "vgg13_kmnist": "VGG13, KMNIST",
    "vgg13_cifar10": "VGG13, CIFAR-10",
    "resnet18_mnist": "ResNet18, MNIST",
    "resnet18_kmnist": "ResNet18, KMNIST",
    "resnet18_cifar10": "ResNet18, CIFAR-10",
}
# Runs of `network_flow`: label, and share of the set that the paper uses.
FLOWS = {
    "resnet18_mnist": ("ResNet18, MNIST", "0.8 % of it"),
    "resnet18_fashion_mnist": ("ResNet18, Fashion-MNIST", "1.5 %"),
    "resnet18_kmnist": ("ResNet18, KMNIST", "0.8 %"),
    "resnet18_cifar10": ("ResNet18, CIFAR-10", "1 %"),
    "vgg13_mnist": ("VGG13, MNIST", "0.8 %"),
    "vgg13_fashion_mnist": ("VGG13, Fashion-MNIST", "0.8 %"),
    "vgg13_kmnist": ("VGG13, KMNIST", "0.8 %"),
    "vgg13_cifar10": ("VGG13, CIFAR-10", "1 %"),
}
FURTHER = {
    "resnet18_mnist_random": ("ResNet18, MNIST, random labels", ""),
    "convnet_digits": ("ConvNet, digits", ""),
    "convnet_digits_homogeneous": ("ConvNet without normalisation, digits", ""),
}
# Runs with weight decay 5e-4 and the schedule of Zhu et al., on the same images.
CONTROLS = {
    "resnet18_mnist_decay2000": "ResNet18, MNIST",
    "vgg13_cifar10_decay": "VGG13, CIFAR-10",
}
COLUMNS = {
    "within_class_variation": "NC1",
    "within_class_quotient": "Tr Σ_W / Tr Σ_B",
    "mean_norm_variation": "NC2, norms",
    "mean_cosine_deviation": "NC2, angles",
    "centred_self_duality": "NC3",
}
DUALITY = {
    "multiplier_distance": "NC3: history, |W/|W| - G/|G||",
    "multiplier_duality": "NC3: unequal multipliers, |G/|G| - M/|M||",
    "outside_means": "centred W outside the span of the means",
    "multiplier_variation": "multipliers λ_kj: std / mean",
}
# Metric: its label, and the exponent p of (log t)^-p that the theory predicts.
METRICS = {
    "within_class_variation": ("NC1: Tr(Σ_W Σ_B⁺) / K", "3"),
    "within_class_quotient": ("NC1: Tr Σ_W / Tr Σ_B", "1"),
    "cdnv": ("NC1: class-distance normalised variance", "1"),
    "mean_norm_variation": ("NC2: norms of class means", "1"),
    "centred_classifier_norm_variation": ("NC2: norms of the centred classifier", "1"),
    "classifier_norm_variation": ("NC2: norms of the raw classifier", "1/2"),
    "mean_cosine_deviation": ("NC2: angles of class means", "1"),
    "centred_classifier_cosine_deviation": ("NC2: angles of the centred classifier", "1"),
    "classifier_cosine_deviation": ("NC2: angles of the raw classifier", "1/2"),
    "etf_gram_error": ("NC2: Gram matrix of means against the ETF", "1"),
    "centred_self_duality": ("NC3: self-duality, centred classifier", "1"),
    "self_duality": ("NC3: self-duality, raw classifier", "1/2"),
    "product_etf_error": ("NC3: W Mᵀ against the ETF, raw classifier", "1/2"),
    "ncc_mismatch": ("NC4: classifier against nearest class mean", ""),
    "kkt_angle": ("KKT angle √(1 - β²)", "1/2"),
    "margin_deficit": ("margin deficit 1 - 2(K-1)√n q_min / |Z|²", "1"),
}
PEELED = {
    "margin_ratio": "margin ratio",
    "kkt_angle": "KKT angle",
    "sigma_max": "σ_max of the certificate",
    "smallest_riemannian_eigenvalue": "least Riemannian eigenvalue",
    "duality_gap": "duality gap",
    "excess_over_the_minimum_norm": "excess over the minimum norm",
    "squared_norm": "|Z|²",
    "log_loss": "log of the loss",
    "least_margin": "least margin q_min",
    "kkt_stationarity": "KKT stationarity",
    "kkt_complementarity": "KKT complementarity",
    "verdict": "verdict",
    "accuracy": "accuracy",
}
NORM, LOSS = "|Z|^2 / log t", "t L log t"
# A space at which no line is broken.
_SPACE = "\0"


def run(name: str) -> dict[str, Any]:
    """Return the summary of a committed run, with its config as one more entry."""
    folder = ROOT / "results" / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary | {"config": json.loads((folder / "config.json").read_text())["config"]}


def number(value: float, digits: int = 3) -> str:
    """Write a number to some digits: below 1e-3 as a power of ten, near 1 as 1 - x."""
    if value in (0, 1) or isinstance(value, int):
        return f"{value}".removesuffix(".0")
    if 0.999 < value < 1:
        return f"1 - {number(1 - value, digits)}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a bar within a cell is escaped."""
    cells = [[cell.replace("|", "&#124;") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "| --- " * len(head) + "|", *lines[1:]])


def sources(*runs: tuple[Mapping[str, Any], str], folder: bool = True) -> str:
    """Write commands with notes, then seed, date, versions and machine once."""
    shared: dict[str, list[str]] = {}
    for summary, note in runs:
        command = summary["command"]
        if not folder:
            command = re.sub(r" --workdir=\S+", "", command)
        command = f"`{command}`".replace(" ", _SPACE)
        shared.setdefault(_facts(summary), []).append(f"{command} ({note})")
    lines = [
        textwrap.fill(
            f"{' and '.join(commands)}: {facts}.",
            width=100,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for facts, commands in shared.items()
    ]
    return "\n".join(lines).replace(_SPACE, " ")


def _facts(summary: Mapping[str, Any]) -> str:
    names = {"python": "Python", "jax": "JAX", "diffrax": "diffrax", "numpy": "NumPy"}
    names |= {"flax": "Flax", "optax": "Optax", "orbax-checkpoint": "Orbax"}
    versions = summary["versions"]
    shown = [f"{names[name]} {versions[name]}" for name in names if name in versions]
    seed = [f"seed {summary['config']['seed']}"] if "seed" in summary["config"] else []
    return ", ".join([*seed, summary["date"][:10], *shown, _machine(summary)])


def _machine(summary: Mapping[str, Any]) -> str:
    system, cores = summary["platform"].split(", ")
    count, kind = summary["device"].split(" x ")
    if kind != "cpu":
        return f"{summary['device']}, {system}"
    if cores == f"{count} cores":
        return f"{count} CPU cores, {system}"
    return f"{count} CPU device on {cores}, {system}"


def found() -> str:
    """Compare six numbers of the flow and of the saddles with the theory."""
    near, family = run("ulpm_flow"), run("saddle_analysis")["family"]
    constants, exponents = (
        near["sharp_constants"],
        near["exponents"]["log t in [1000, 10000]"],
    )
    rows = []
    for text, name, limit in (
        ("squared norm over log t, |Z|² / log t", NORM, "2(K-1)√n"),
        ("loss times t log t, t · L · log t", LOSS, "(K-1)√n / 2"),
    ):
        entry = constants[name]
        rows.append([text, f"{entry['median']:.3f}", f"{limit} = {entry['predicted']:.3f}"])
    for text, name, exponent in (
        ("decay exponent of NC1, Tr(Σ_W Σ_B⁺) / K", "within_class_variation", "3"),
        ("decay exponent of NC3, centred", "centred_self_duality", "1"),
        ("decay exponent of the KKT angle", "kkt_angle", "1/2"),
    ):
        rows.append([text, f"{exponents[name]['median']:.3f}", exponent])
    text = f"least Hessian eigenvalue at {family['members']} critical points: worst error"
    rows.append([text, f"{family['largest_eigenvalue_error']:.0e}", "0 (closed form)"])
    return table(["quantity", "found", "predicted"], rows)


def found_by() -> str:
    """Name the runs behind `found`."""
    near, saddles = run("ulpm_flow"), run("saddle_analysis")
    starts = near["config"]["seeds"]
    note = f"rows 1 to 5, medians of {starts} starts"
    return sources((near, note), (saddles, "row 6"), folder=False)


def flow() -> str:
    """List every metric at the end of both flows, with fitted and predicted exponents."""
    near, far = run("ulpm_flow"), run("ulpm_flow_far")
    windows = "log t in [1000, 10000]", "log t in [100000, 1e+06]"
    rows = []
    for name, (label, predicted) in METRICS.items():
        row = [label]
        for summary, window in zip((near, far), windows, strict=True):
            fitted = summary["exponents"][window].get(name)
            row.append(number(summary["final"][name]["median"]))
            row.append("" if fitted is None else f"{fitted['median']:.3f}")
        rows.append([*row, predicted])
    head = ["median over starts", "at log t = 10 000", "fitted p"]
    return table([*head, "at log t = 1 000 000", "fitted p", "predicted p"], rows)


def constants() -> str:
    """List the two sharp constants, the drift of the invariants and the solver's work."""
    runs = run("ulpm_flow"), run("ulpm_flow_far")
    rows = []
    for text, name in (("|Z|² / log t", NORM), ("t · L · log t", LOSS)):
        entries = [summary["sharp_constants"][name] for summary in runs]
        cells = [
            f"{entry['median']:.6f} ({entry['q25']:.6f} to {entry['q75']:.6f})"
            for entry in entries
        ]
        rows.append([text, *cells, f"{entries[0]['predicted']:.6f}"])
    for text, name in (
        ("drift of WᵀW - Σhhᵀ over |Z|²", "balance"),
        ("drift of Σ w_k, relative", "classifier_sum"),
    ):
        drifts = [number(summary["largest_drift"][name]["median"], 1) for summary in runs]
        rows.append([text, *drifts, "0"])
    solvers = [summary["solver"] for summary in runs]
    for text, name in (
        ("solver steps of a start, rejected ones included", "steps_per_seed"),
        ("rejected steps", "rejected_per_seed"),
        ("seconds, compilation included", "seconds"),
    ):
        rows.append([text, *(number(solver[name]) for solver in solvers), ""])
    head = ["median (quartiles) over starts", "at log t = 10 000", "at log t = 1 000 000"]
    return table([*head, "predicted"], rows)


def flow_by() -> str:
    """Name the runs behind `flow` and `constants`."""
    runs = run("ulpm_flow"), run("ulpm_flow_far")
    return sources(*((one, f"{one['config']['seeds']} starts") for one in runs))


def saddles() -> str:
    """Summarise the block family and the certified flows."""
    summary = run("saddle_analysis")
    family, flows = summary["family"], summary["directions"]
    wrong = len(family["wrong_multiplicity_or_verdict"])
    negative = family["collapsed_with_negative_plain_hessian"]
    rows = [
        ["members of the block family", f"{family['members']}"],
        [
            "worst error of the least eigenvalue",
            f"{family['largest_eigenvalue_error']:.0e}",
        ],
        ["worst error of σ_max", f"{family['largest_sigma_max_error']:.0e}"],
        ["wrong multiplicities or verdicts", f"{wrong}"],
        [
            "collapsed points where the plain Hessian is negative too",
            f"{negative} of {family['collapsed']}",
        ],
        [
            f"flows to log t = {flows['log_t']:.0f} that are certified optimal",
            f"{flows['globally_optimal']} of {flows['seeds']}",
        ],
        ["KKT residual there, median", number(flows["stationarity"]["median"])],
        ["σ_max there, median", number(flows["sigma_max"]["median"])],
        [
            "least Riemannian eigenvalue there, median",
            number(flows["eigenvalue"]["median"]),
        ],
    ]
    return table(["quantity", "found"], rows)


def escapes() -> str:
    """List escape exponents and curvatures of descent at saddles."""
    summary = run("saddle_analysis")
    rows = [
        [
            f"{escape['num_blocks']} blocks of {escape['block_size']}, "
            f"n = {escape['per_class']}, d = {escape['dim']}",
            f"{escape['fitted_exponent']:.4f}",
            f"{escape['predicted_exponent']}",
            f"{descent['curvature']:.5f}",
            f"{descent['predicted']:.5f}",
        ]
        for escape, descent in zip(summary["escape"], summary["descent"], strict=True)
    ]
    head = ["saddle", "escape exponent", "predicted", "curvature of descent", "predicted"]
    return table(head, rows)


def theorems() -> str:
    """List every statement of the theory with the number that was computed for it."""
    summary = run("theorems")
    rows = [
        [
            statement["source"],
            statement["statement"],
            statement["on"],
            number(statement["number"]),
            f"{statement['bound']:g}",
            "holds" if statement["passed"] else "fails",
        ]
        for statement in summary["statements"]
    ]
    head = ["source", "statement", "checked on", "number", "bound", "verdict"]
    return table(head, rows)


def theory_by() -> str:
    """Name the runs behind `theorems`, `saddles` and `escapes`."""
    statements = run("theorems")
    seconds = f"{statements['seconds']:.0f} s"
    return sources((statements, seconds), (run("saddle_analysis"), "5 min"))


def neighbours_models() -> str:
    """Compare the flow of each model of Table 1 with its closed form."""
    rows = [
        [
            f"{row['model']}, {row['classes']}",
            f"{row['optimum']:.6f}",
            f"{row['value_error_worst']:.0e}",
            f"{row['bound_gap_worst']:.0e}",
            "" if row["sigma_error_worst"] is None else f"{row['sigma_error_worst']:.0e}",
            f"{row['rate_fitted']:.5f}",
            f"{row['rate_predicted']:.5f}",
        ]
        for row in run("neighbours")["models"]
    ]
    head = ["model", "optimum", "error of the flow", "certified gap", "|σ_max/μ - 1|"]
    return table([*head, "rate fitted", "predicted"], rows)


def neighbours_path() -> str:
    """List deviations from SELI times log(1/mu), and their limits of first order."""
    names = ("cosine_at_0.01", "cosine_at_1e-08", "cosine_at_1e-16", "cosine_limit")
    names += ("logits_at_end", "logits_of_flow", "logits_limit")
    rows = [
        [str(row["ratio"]), *(f"{row[name]:.5f}" for name in names)]
        for row in run("neighbours")["path"]
    ]
    head = ["R", "cosine, μ = 1e-2", "1e-8", "1e-16", "limit"]
    head += ["unit logits, μ = 1e-150", "flow of the ULPM, log t = 1000", "limit"]
    return table(head, rows)


def neighbours_minority() -> str:
    """List cosines of minority classifiers, 5 of 10 classes large, over the imbalance."""
    every = run("neighbours")["minority"]
    ratios = sorted({row["ratio"] for row in every})
    rows = []
    for kind in dict.fromkeys((row["model"], row["class_weights"]) for row in every):
        of_kind = [r for r in every if (r["model"], r["class_weights"]) == kind]
        errors = [r["error_worst"] for r in of_kind if r["error_worst"] is not None]
        chosen = {r["ratio"]: r["found"] for r in of_kind if r["large_classes"] == 5}
        cells = [f"{chosen[ratio]:.4f}" if ratio in chosen else "" for ratio in ratios]
        rows.append(["{}, class weights {}".format(*kind), *cells, f"{max(errors):.0e}"])
    head = ["end of the flow, 5 large classes", *(f"R = {ratio}" for ratio in ratios)]
    return table([*head, "largest error, 3, 5 or 7 large classes"], rows)


def neighbours_by() -> str:
    """Name the run behind the tables of the other objectives."""
    summary = run("neighbours")
    seconds = f"{summary['config']['seeds']} starts, {summary['seconds'] / 60:.0f} min"
    return sources((summary, seconds))


def deep_shares() -> str:
    """List the codes that the flows of deep models end at, by depth, width and scale."""
    return _share_table("deep_flow")


def deep_far() -> str:
    """List the codes at a later time, for six classes."""
    return _share_table("deep_flow_far")


def _share_table(name: str) -> str:
    every = run(name)["shares"]
    scales = sorted({row["scale"] for row in every})
    rows = []
    for K, p, d in dict.fromkeys(
        (row["num_classes"], row["factors"], row["width"]) for row in every
    ):
        cell = [
            r for r in every if (r["num_classes"], r["factors"], r["width"]) == (K, p, d)
        ]
        by_scale = [_shares([r for r in cell if r["scale"] == scale]) for scale in scales]
        rows.append([str(K), str(p), str(d), cell[0]["least_code"], *by_scale])
    head = ["K", "p", "width", "least V", *(f"scale {scale:g}" for scale in scales)]
    return table(head, rows)


def _shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the shares of the codes, the largest first."""
    found = sorted((row for row in rows if row["starts"]), key=lambda row: -row["share"])
    return ", ".join(f"{row['code']} {100 * row['share']:.0f} %" for row in found)


def deep_by() -> str:
    """Name the runs behind the tables of deep models."""
    runs = [run(name) for name in ("deep_flow", "deep_flow_far")]
    return sources(
        *((r, f"{r['starts']} starts, {r['seconds'] / 60:.0f} min") for r in runs)
    )


def log_time(summary: Mapping[str, Any]) -> float:
    """Return the log of training time: rate / (1 - momentum) times number of steps."""
    config = summary["config"]
    steps = config["epochs"] * (summary["training_images"] // config["batch_size"])
    return math.log(config["learning_rate"] / (1 - config["momentum"]) * steps)


def change(entry: Mapping[str, Any]) -> str:
    """Write a metric of a network, at zero training error and at the end."""
    return f"{_short(entry['at_zero_error'])} → {_short(entry['at_the_end'])}"


def _short(value: float) -> str:
    return number(value, 1) if value < 1e-3 else f"{value:.3f}"


def networks() -> str:
    """List the networks on the clock of the loss, and the controls with weight decay."""
    rows = []
    for name, (label, share) in FLOWS.items():
        summary = run(f"network_flow/{name}")
        ends = [entry["log_t"] for entry in summary["endings"]]
        gradients = [entry["gradients"] for entry in summary["endings"]]
        if len(ends) > 1:
            label += f", median of {len(ends)} seeds"
        rows.append(
            [
                f"{label}, {share}",
                f"{statistics.median(ends):.0f}",
                f"{statistics.median(gradients):.0f}",
                *_ends(summary),
            ]
        )
    name, label = next(iter(CONTROLS.items()))
    rows.append(_control(name, label))
    return table(["network, data", "log t", "gradients", *COLUMNS.values()], rows)


def controls() -> str:
    """List the networks that were trained with weight decay on the same images."""
    rows = [_control(name, label) for name, label in CONTROLS.items()]
    return table(["network, data", "log t", "steps", *COLUMNS.values()], rows)


def _control(name: str, label: str) -> list[str]:
    """Return the row of a network that was trained with weight decay."""
    summary = run(f"train/{name}")
    config = summary["config"]
    steps = config["epochs"] * summary["training_images"] // config["batch_size"]
    label = f"*{label}, SGD with weight decay*"
    return [label, "", f"{steps} steps", *_ends(summary)]


def _ends(summary: Mapping[str, Any]) -> list[str]:
    """Write the main metrics at the end to two digits."""
    return [number(summary["metrics"][metric]["at_the_end"], 2) for metric in COLUMNS]


def flow_metrics() -> str:
    """List the metrics of ResNet18 on MNIST over log t."""
    metrics = run("network_flow/resnet18_mnist")["metrics"]
    times = [name for name in metrics["cdnv"] if name not in ("metric", "test_at_the_end")]
    labels = {name: label for name, (label, _) in METRICS.items()} | DUALITY
    rows = [
        [label, *(number(metrics[name][time], 3) for time in times)]
        for name, label in labels.items()
        if name in metrics and name != "ncc_mismatch"
    ]
    head = [time.replace("log_t_", "log t = ").replace("_", " ") for time in times]
    return table(["median of three seeds", *head], rows)


def flow_exponents() -> str:
    """List exponents fitted to ResNet18 on MNIST, and the layer-peeled model's."""
    fitted = run("network_flow/resnet18_mnist")["exponents"]
    labels = {name: label for name, (label, _) in METRICS.items()} | DUALITY
    rows = [
        [
            label,
            *(_exponent(window.get(name, {})) for window in fitted.values()),
            METRICS.get(name, ("", ""))[1],
        ]
        for name, label in labels.items()
        if name in next(iter(fitted.values())) and name != "ncc_mismatch"
    ]
    return table(["exponent p of (log t)^-p", *fitted, "layer-peeled model"], rows)


def _exponent(entry: Mapping[str, Any]) -> str:
    value = entry.get("median")
    return "" if value is None else f"{value:.2f}"


def flow_runs() -> str:
    """List images, gradients, time and command of every network flow."""
    rows = []
    for name, (label, _) in (FLOWS | FURTHER).items():
        summary = run(f"network_flow/{name}")
        endings = summary["endings"]
        rows.append(
            [
                f"[{label}](../results/network_flow/{name}/collapse.png)",
                f"{summary['training_images']}",
                ", ".join(f"{entry['log_t']:.0f}" for entry in endings),
                ", ".join(f"{entry['gradients']}" for entry in endings),
                f"{summary['seconds_of_this_process'] / 60:.0f}",
                f"{summary['last_layer']['balanced_margin_ratio']:.3f}",
                summary["last_layer"]["verdict"],
                summary["date"][:10],
                f"`{summary['command']}`",
            ]
        )
    head = ["network", "images", "log t", "gradients", "min", "margin ratio", "verdict"]
    return table([*head, "date", "command"], rows)


def network_metrics() -> str:
    """List every metric of every network, at zero training error and at the end."""
    summaries = {label: run(f"train/{name}") for name, label in NETWORKS.items()}
    rows = [
        [label, *(change(summary["metrics"][name]) for summary in summaries.values())]
        for name, (label, _) in METRICS.items()
        if name not in ("margin_deficit", "kkt_angle")
    ]
    extra = {
        "balanced_margin_ratio": "margin ratio at equal norms",
        "balanced_kkt_angle": "KKT angle at equal norms",
        "least_margin": "least margin q_min",
    }
    for name, label in extra.items():
        entries = [summary["metrics"].get(name) for summary in summaries.values()]
        rows.append([label, *("" if entry is None else change(entry) for entry in entries)])
    fell = []
    for summary in summaries.values():
        entries = [
            entry
            for name, entry in summary["metrics"].items()
            if entry["fell"] and "kkt" not in name and entry["at_zero_error"]
        ]
        fell.append(f"{sum(e['fell'] == 'True' for e in entries)} of {len(entries)}")
    rows.append(["collapse metrics that fell", *fell])
    return table(["zero error → last epoch", *summaries], rows)


def network_runs() -> str:
    """List images, epochs, learning rate, time and command of every network."""
    rows = []
    for name, label in NETWORKS.items():
        summary = run(f"train/{name}")
        config = summary["config"]
        rows.append(
            [
                f"[{label}](../results/train/{name}/collapse.png)",
                f"{summary['training_images']}",
                f"{summary['zero_training_error_from_epoch']}",
                f"{config['epochs']}",
                f"{config['learning_rate']}",
                f"{log_time(summary):.1f}",
                f"{summary['seconds_of_this_process'] / 60:.0f}",
                summary["date"][:10],
                f"`{summary['command']}`",
            ]
        )
    head = [
        "network",
        "images",
        "zero error from",
        "epochs",
        "rate",
        "log t",
        "last process, min",
    ]
    return table([*head, "date", "command"], rows)


def peel() -> str:
    """Compare a network's last layer with the end of the flow from it."""
    summary = run("peel/vgg13_kmnist")
    points = summary["points"]
    labels = PEELED | {
        name: label for name, (label, _) in METRICS.items() if name not in PEELED
    }
    rows = [
        [
            label,
            *(
                point[name] if isinstance(point[name], str) else number(point[name], 4)
                for point in points.values()
            ),
        ]
        for name, label in labels.items()
        if name in points["network"]
    ]
    head = ["quantity", "network", "W and H at equal norms", "from there to log t = 10 000"]
    return table(head, rows)


def peel_by() -> str:
    """Name the run behind `peel`."""
    summary = run("peel/vgg13_kmnist")
    return sources((summary, summary["network"]))


def reference_values() -> str:
    """List what each convention gives on the reference features, and its codebase."""
    folder = ROOT / "results" / "reference_features"
    values = json.loads((folder / "values.json").read_text())
    codebases = json.loads((folder / "codebases.json").read_text())
    rows = [
        [f"`{convention}`", f"`{name}`"]
        + [
            f"{numbers[name]:.6g}" if name in numbers else "-"
            for numbers in (
                found,
                codebases.get(convention, {}),
                values["digits"][convention],
            )
        ]
        for convention, found in values["clusters"].items()
        for name in found
    ]
    head = ["convention", "number", "`clusters.npz`", "the codebase", "`digits.npz`"]
    return table(head, rows)


def speed() -> str:
    """List three rows of the benchmarks."""
    sections = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    chosen = (
        (
            "training step of ResNet18, 28 x 28 pixels, batch 128, float32",
            ("training_step", "ResNet18, 28x28, imagenet stem", "ncjax"),
            {"PyTorch": "PyTorch, eager", "plain Flax": "plain Flax"},
        ),
        (
            "all collapse metrics, K = 100, d = 512, N = 50 000, float32",
            ("metrics", "K=100, d=512, N=50000", "ncjax"),
            {
                "PyTorch, whole arrays": "PyTorch, whole arrays",
                "published loop": "PyTorch, the published package's loop",
            },
        ),
        (
            "32 flows to log t = 10 000, K = 10, n = 5, d = 20, float64",
            ("flow", "32 starts to log t = 10000", "ncjax, auto"),
            {"Dopri8 on the same clock": "Dopri8 on the clock, autodiff"},
        ),
    )
    rows = []
    processors, days = set(), set()
    for text, (section, problem, own), peers in chosen:
        processors.add(sections[section]["processor"])
        days.add(sections[section]["date"][:10])
        timed = {
            row["program"]: row
            for row in sections[section]["rows"]
            if row["problem"] == problem
        }
        ratios = [f"{peer} {timed[p]['over_ncjax']:.1f}" for peer, p in peers.items()]
        rows.append([text, f"{timed[own]['median_seconds']:.2g} s", ", ".join(ratios)])
    head = f"two CPU cores, {', '.join(sorted(processors))}; {' and '.join(sorted(days))}"
    return table([head, "ncjax", "time relative to ncjax (above 1: ncjax is faster)"], rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(found, found_by, flow, constants, flow_by, theorems, saddles, escapes, theory_by),
        *(networks, network_metrics, network_runs, peel, peel_by, speed),
        *(flow_metrics, flow_exponents, flow_runs, controls, reference_values),
        *(neighbours_models, neighbours_path, neighbours_minority, neighbours_by),
        *(deep_shares, deep_far, deep_by),
    )
}
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n)(?:.+\n)*")


def filled(text: str) -> str:
    """Return the text of a page with every table made anew from the committed results."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
