"""Reproduce Figure 2 of the paper: the flow of the layer-peeled model collapses."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _fits, _legs
from experiments._labels import LABELS
from experiments._runs import cli, files, folders, page, precision, processes
from experiments._runs.errors import BadUse, RunFailed
from ncjax import plotting
from ncjax.flow.methods import SOLVERS
from ncjax.flow.solve import SUCCESS

NAME = "ulpm_flow"
OUTPUTS = ("metrics.csv", "figure2.png", "figure2.pdf")
# The time that gradient descent reaches in a million steps of size 0.1.
DESCENT_REACH = math.log(1e6 * 0.1)
_NOT_DECAYING = ("accuracy", "ncc_mismatch")
_PRINTED_METRICS = (
    "within_class_variation",
    "within_class_quotient",
    "mean_norm_variation",
    "centred_classifier_norm_variation",
    "mean_cosine_deviation",
    "centred_classifier_cosine_deviation",
    "centred_self_duality",
    "self_duality",
    "kkt_angle",
    "margin_deficit",
)


@dataclasses.dataclass(frozen=True)
class Config(cli.SeveralProcesses):
    """Solve the gradient flow of the layer-peeled model from many starts: does it collapse?

    Example: python -m experiments.ulpm_flow --seeds=32 --log_t_max=1000
    """

    seeds: int = cli.flag(32, "number of random starts, solved side by side", cli.SEEDS)
    seed: int = cli.flag(0, "seed of all starts", cli.SEEDS)
    num_classes: int = cli.flag(10, "K, number of classes", cli.MODEL)
    per_class: int = cli.flag(5, "n, samples of each class", cli.MODEL)
    dim: int = cli.flag(20, "d, feature dimension", cli.MODEL)
    init_scale: float = cli.flag(
        0.1, "standard deviation of the entries of W and H at t = 0", cli.MODEL
    )
    log_t_max: float = cli.flag(
        1000.0, "last time, as natural log of physical time t", cli.TIME
    )
    num_times: int = cli.flag(
        200, f"times measured, rounded up to a multiple of {_legs.LEGS}", cli.TIME
    )
    dtype: str = cli.flag("float64", "float64 or float32", cli.TIME)
    solver: str = cli.flag(
        "auto",
        "explicit, stabilised (log t from 2e3), implicit (from 5e4), or auto",
        cli.TIME,
    )
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)
    resume: bool = cli.flag(False, "resume the run in workdir", cli.FOLDER)
    cpu_devices: int = cli.flag(
        0, "JAX devices that a CPU is split into; 0: one per core", cli.MACHINE
    )


def run(config: Config) -> Path:
    """Run the experiment and return its folder.

    Write config.json, metrics.csv (one row per seed and time), summary.json, figure2.png
    and figure2.pdf. With --dtype=float64 this needs `jax_enable_x64`.

    Raises:
      BadUse: a setting is out of range or the folder cannot be used.
      OSError: a file cannot be written.
      RunFailed: every seed failed.
    """
    _check(config)
    with processes.open_config(config, NAME, OUTPUTS) as (folder, finished):
        if not finished:
            _run(config, folder)
        if processes.is_first():
            _check_reached(config, folder)
    return folder


def _run(config: Config, folder: Path) -> None:
    """Do the rest of the run in its folder."""
    starts = _starts(config)
    log_times = _legs.log_times(config.log_t_max, config.num_times)
    start_time = time.perf_counter()
    columns, steps, _ = _legs.solve(
        starts, log_times, _legs.measure_collapse, folder, config.solver
    )
    stats = _solver_stats(config, steps)
    if not processes.is_first():
        return
    stats["seconds"] = round(time.perf_counter() - start_time, 2)
    columns["margin_deficit"] = 1 - columns["margin_ratio"]
    if stats["failed_seeds"]:
        num_reached = (
            np.isfinite(columns["log_loss"][stats["failed_seeds"]]).sum(axis=1).min()
        )
        stats["failed_after_log_t"] = (
            float(log_times[num_reached - 1]) if num_reached else None
        )
    summary = _summarise(config, log_times, columns, stats)
    _write(folder, log_times, columns, summary)
    print(_table(config, summary))


def _check_reached(config: Config, folder: Path) -> None:
    """Raise RunFailed if no seed came to the end, also if an earlier process found so."""
    summary = files.read_json(folder / folders.SUMMARY)
    if len(summary["solver"]["failed_seeds"]) == config.seeds:
        raise RunFailed(
            f"all {config.seeds} seeds failed before log t = {summary['log_t']:g}; "
            f"{folder / 'metrics.csv'} holds what they reached"
        )


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    for name in ("seeds", "num_classes", "per_class", "dim", "num_times"):
        minimum = 2 if name == "num_classes" else 1
        value = getattr(config, name)
        if value < minimum:
            raise BadUse(f"--{name} must be at least {minimum}, got {value}")
    if not (math.isfinite(config.log_t_max) and config.log_t_max > 1):
        raise BadUse(f"--log_t_max must be above 1 and finite, got {config.log_t_max}")
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    if config.dtype not in ("float64", "float32"):
        raise BadUse(f"--dtype must be float64 or float32, got {config.dtype!r}")
    if config.dtype == "float64":
        precision.check_float64("--dtype=float32")
    largest = float(np.finfo(config.dtype).max)
    if not 0 < config.init_scale <= largest:
        raise BadUse(
            f"--init_scale must be positive and at most {largest:.3g} with "
            f"--dtype={config.dtype}, got {config.init_scale}"
        )
    if config.solver not in SOLVERS:
        raise BadUse(f"--solver must be one of {', '.join(SOLVERS)}, got {config.solver!r}")
    _legs.check_memory(
        config.seeds, config.num_classes, config.per_class, config.dim, config.num_times
    )


def _starts(config: Config) -> ncjax.Params:
    """Return one start per seed, with a leading axis (seeds,)."""

    def start(key):
        return ncjax.init_params(
            key,
            config.num_classes,
            config.per_class,
            config.dim,
            config.init_scale,
            jnp.dtype(config.dtype),
        )

    return jax.vmap(start)(jax.random.split(jax.random.key(config.seed), config.seeds))


def _solver_stats(config: Config, steps: np.ndarray) -> dict[str, Any]:
    """Return steps and failures, from (legs, seeds, 3) steps, rejections and results."""
    failed = np.flatnonzero((steps[:, :, 2] != SUCCESS).any(axis=0)).tolist()
    if (steps[0, :, 2] != SUCCESS).all():
        raise RunFailed(
            f"all {config.seeds} seeds failed at once: the start or its gradient is too "
            f"large for {config.dtype}"
        )
    return {
        "steps_per_seed": int(np.median(steps[:, :, 0].sum(axis=0))),
        "rejected_per_seed": int(np.median(steps[:, :, 1].sum(axis=0))),
        "failed_seeds": failed,
    }


def _summarise(config, log_times, columns, stats) -> dict[str, Any]:
    """Return the content of summary.json."""
    log_t = log_times[-1]
    optimum = None  # if no simplex ETF fits, the theory predicts no limit
    if config.dim >= config.num_classes - 1:
        optimum = (config.num_classes - 1) * math.sqrt(config.per_class)
    norm = columns["squared_norm"][:, -1] / log_t
    product = np.exp(log_t + columns["log_loss"][:, -1] + math.log(log_t))
    fields = (*ncjax.CollapseMetrics._fields, "kkt_angle", "margin_deficit")
    decaying = {k: columns[k] for k in fields if k not in _NOT_DECAYING}
    return {
        "log_t": float(log_t),
        "solver": stats,
        "final": {name: _fits.spread(v[:, -1]) for name, v in columns.items()},
        "exponents": _fits.exponent_table(log_times, decaying),
        "sharp_constants": {
            "|Z|^2 / log t": {"predicted": optimum and 2 * optimum} | _fits.spread(norm),
            "t L log t": {"predicted": optimum and optimum / 2} | _fits.spread(product),
        },
        "largest_drift": {
            name: _fits.spread(np.nanmax(columns[f"{name}_drift"], axis=1))
            for name in ("balance", "classifier_sum")
        },
    } | folders.provenance()


def _write(folder: Path, log_times, columns: Mapping[str, np.ndarray], summary) -> None:
    """Write metrics.csv, the figure and last summary.json, which marks the end."""
    files.write_csv(folder / "metrics.csv", log_times, columns)
    figure = plotting.figure_over_log_log_t(
        log_times,
        plotting.collapse_panels(columns),
        reach=DESCENT_REACH,
        reach_label="shaded: reached by a million steps of gradient descent of size 0.1",
    )
    files.write_files(folder / "figure2", plotting.render(figure))
    folders.write_summary(folder, summary, OUTPUTS)
    folders.drop_checkpoint(folder)


def _table(config: Config, summary: Mapping[str, Any]) -> str:
    """Return the printed result."""
    window, fitted = ([*summary["exponents"].items()] or [("", {})])[-1]
    collapses = _fits.collapses(summary)
    head = f"p in (log t)^-p, {window}" if window else ""
    lines = [
        f"{config.seeds} seeds, K={config.num_classes} n={config.per_class} "
        f"d={config.dim}, {config.dtype}, log t = {summary['log_t']:g}, "
        f"{summary['solver']['steps_per_seed']} steps, {summary['solver']['seconds']} s",
        "",
        f"{'median over seeds':<37}{'value':>11}   {head}".rstrip(),
    ]
    for name in _PRINTED_METRICS:
        value = _number(summary["final"][name]["median"], ".3e")
        exponent = _number(fitted.get(name, {}).get("median"), ".2f")
        limit = f"   tends to {_fits.PREDICTED[name]}" if collapses else ""
        lines.append(f"{name:<37}{value:>11}   {exponent:<5}{limit}".rstrip())
    for name, entry in summary["sharp_constants"].items():
        value = _number(entry["median"], ".6g")
        limit = f"   tends to {entry['predicted']:.6g}" if collapses else ""
        lines.append(f"{name:<37}{value:>11}{limit}")
    for name, entry in summary["largest_drift"].items():
        drift = _number(entry["median"], ".1e")
        lines.append(f"{name + ' drift':<37}{drift:>11}   the solver's error, 0 if exact")
    if summary["solver"]["failed_seeds"]:
        lines.append(_failures(config, summary))
    if collapses and config.log_t_max < 10 * _fits.SETTLED_FROM:
        lines.append(
            f"(p is near its limit from log t of about {_fits.SETTLED_FROM:g} on: "
            f"--log_t_max={10 * _fits.SETTLED_FROM:g})"
        )
    return "\n".join(lines)


def _failures(config: Config, summary: Mapping[str, Any]) -> str:
    """Return the failed seeds, how far they came, and what to try."""
    solver = summary["solver"]
    seeds, last_log_t = solver["failed_seeds"], solver["failed_after_log_t"]
    other = "--dtype=float64 or " if config.dtype == "float32" else ""
    when = "at the start" if last_log_t is None else f"after log t = {last_log_t:.4g}"
    return (
        f"failed seeds: {', '.join(map(str, seeds))} ({len(seeds)} of {config.seeds}), the "
        f"first of them {when}; metrics.csv holds what they reached: "
        f"try {other}a lower --log_t_max"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report final medians, exponents against the theory, constants and drift."""
    solver, failed = summary["solver"], summary["solver"]["failed_seeds"]
    verdict = (
        f"{summary['final']['log_loss']['seeds']} starts to log t = "
        f"{page.number(summary['log_t'])}, {solver['steps_per_seed']} solver steps each, "
        f"{page.number(solver['seconds'])} s"
    )
    if failed:
        verdict += f"; failed seeds: {', '.join(map(str, failed))}"
    tables = [_metrics_table(summary), _constants_table(summary)]
    return page.Findings(page.BAD if failed else page.GOOD, verdict, tables)


def _metrics_table(summary: Mapping[str, Any]) -> page.Table:
    """Return a row for each metric, with its exponents in the last two windows."""
    final, fitted = summary["final"], summary["exponents"]
    windows = list(fitted)[-2:]
    limits = _fits.PREDICTED if _fits.collapses(summary) else {}
    rows = []
    for name in filter(final.__contains__, LABELS):
        medians = [fitted[window].get(name, {}).get("median") for window in windows]
        powers = [page.number(None if p is None else round(p, 3)) for p in medians]
        values = [page.number(final[name][q]) for q in ("median", "q25", "q75")]
        rows.append([LABELS[name], *values, *powers, limits.get(name, "–")])
    return page.Table(
        f"At log t = {page.number(summary['log_t'])}, over seeds; exponents p of "
        "(log t)^-p fitted in two windows, and predicted",
        [
            *("metric", "median", "lower quartile", "upper quartile"),
            *(f"p, {window}" for window in windows),
            "p predicted",
        ],
        rows,
    )


def _constants_table(summary: Mapping[str, Any]) -> page.Table:
    """Return the sharp constants and the drift of the conserved quantities."""
    constants = [
        [name, page.number(entry["median"]), page.number(entry["predicted"])]
        for name, entry in summary["sharp_constants"].items()
    ]
    drifts = [
        [f"{name.replace('_', ' ')}, largest drift", page.number(entry["median"]), "0"]
        for name, entry in summary["largest_drift"].items()
    ]
    return page.Table(
        "Sharp constants, and drift of what the flow conserves, the solver's own error",
        ["quantity", "median over seeds", "predicted limit"],
        constants + drifts,
    )


PAGE = page.Page(
    title="Gradient flow of the layer-peeled model",
    figures={
        "figure2.png": "Collapse along the exact flow: medians and quartiles over starts, "
        "against log log t. Dotted: the predicted slope."
    },
    show=_findings,
)


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
