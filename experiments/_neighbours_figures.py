"""Figures of the neighbouring models: speed of collapse, path, minority collapse."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncjax import plotting

_GREY, _GRID, _INK = "#8a8a8a", "#dddddd", "#222222"
_BLUE, _RED, _GREEN = plotting.COLOURS
_PURPLE, _GOLD = "#7b5ea7", "#c69214"
# Of models with one rate, the fastest first.
_BY_RATE = (_GREEN, _BLUE, _PURPLE, _RED, _GOLD)
_FLOOR = 1e-14  # distances below are rounding
_POWERS = (1, 2, 4, 10, 100, 1000, 4000)
_FIRST_LOG_T = 2.0
_COLUMN = np.log(60)  # place of labels, log log t


class Decay(NamedTuple):
    """Distances from the optimum over time, of one model."""

    label: str
    step: bool  # STEP counts, drawn dashed
    log_times: np.ndarray  # (T,)
    distance: np.ndarray  # (S, T)
    rate: float  # predicted; the power of log t for the ULPM


class Path(NamedTuple):
    """Deviations from SELI along the regularisation path, of one imbalance ratio."""

    ratio: int
    decay: tuple[np.ndarray, np.ndarray, np.ndarray]  # log(1/mu), cosine, logits
    ball: tuple[np.ndarray, np.ndarray, np.ndarray]
    flow: tuple[np.ndarray, np.ndarray]  # log t (T,), logits (S, T)
    limits: tuple[float, float]  # of cosine and logits, times log(1/mu)


class Minority(NamedTuple):
    """Cosines of minority classifiers of one model over the ratio R."""

    title: str
    ratios: np.ndarray  # (R,)
    predicted: np.ndarray  # (K_A, R)
    flow_ratios: Sequence[int]
    found: np.ndarray  # (R', K_A, S)
    thresholds: Sequence[float]  # (K_A,)
    features: np.ndarray | None = None  # (K_A, R)


def flows_figure(models: Sequence[Decay], small: Sequence[tuple[float, Decay]]) -> Figure:
    """Draw all models over t, and the UFM of small decay over log log t.

    Args:
      models: all models, the ULPM first.
      small: decay mu and flow of the UFM, largest decay first.
    """
    with plotting.style():
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        over_t, over_log = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _over_time(over_t, models)
        _over_log_log_time(over_log, models, small)
        over_t.set_ylabel(r"$1 - \cos\angle(Z, Z^*)$, up to rotation")
        figure.text(
            0.5,
            -0.04,
            "dashed: STEP counts; dotted: predicted slope",
            ha="center",
            color=_GREY,
        )
    return figure


def _over_time(axis: Axes, models: Sequence[Decay]) -> None:
    """Draw the distances over t: an exponential is a straight line."""
    groups: dict[str, list[Decay]] = {}
    for model in sorted(models[2:], key=lambda model: -round(model.rate, 4)):
        groups.setdefault(f"{model.rate:.4f}", []).append(model)
    colours = [_BY_RATE[place % len(_BY_RATE)] for place in range(len(groups))]
    last = max(map(partial(_draw_group, axis), groups.values(), colours))
    _list_groups(axis, groups, colours)
    for model in models[:2]:
        shown = model.log_times < np.log(2 * last)
        t = np.exp(model.log_times[shown])
        style = "--" if model.step else "-"
        axis.plot(t, _median(model.distance)[shown], style, color=_INK, lw=2.2)
    place = (0.97 * last, 2.2 * _median(models[0].distance)[shown][-1])
    axis.annotate("ULPM, no decay", place, ha="right", va="bottom", color=_INK)
    axis.set(yscale="log", xlabel=r"time $t$", xlim=(0, last), ylim=(_FLOOR, 3))
    axis.set_title("(a) all models; numbers: predicted rates", loc="left")
    _grid(axis)


def _draw_group(axis: Axes, models: Sequence[Decay], colour: str) -> float:
    """Draw models of one rate and the predicted slope; return the last time."""
    last = 0.0
    for model in models:
        t, median = np.exp(model.log_times), _median(model.distance)
        shown = median > _FLOOR
        style = "--" if model.step else "-"
        axis.plot(t[shown], median[shown], style, color=colour, lw=1.2)
        last = max(last, t[shown][-1])
    t, median = np.exp(models[0].log_times), _median(models[0].distance)
    line = (median > 1e-11) & (median < 1e-7)
    axis.plot(
        t[line], 0.01 * median[line][-1] * _fall(models[0], t[line]), ":", color=colour
    )
    return 1.1 * last


def _fall(model: Decay, t: np.ndarray) -> np.ndarray:
    """Return the predicted fall of the distance: twice the rate, as it is quadratic."""
    return np.exp(-2 * model.rate * (t - t[-1]))


def _list_groups(
    axis: Axes, groups: Mapping[str, Sequence[Decay]], colours: Sequence[str]
) -> None:
    """Name the models of each rate, in the colour of their curves."""
    height = 0.8
    for (rate, members), colour in zip(groups.items(), colours, strict=True):
        balanced = [model.label for model in members if not model.step]
        names = balanced or [f"{model.label} (STEP)" for model in members]
        lines = textwrap.wrap(f"{rate}: {', '.join(names)}", 27)
        axis.text(
            0.64,
            height,
            "\n".join(lines),
            transform=axis.transAxes,
            va="top",
            color=colour,
            fontsize=8.5,
            linespacing=1.1,
        )
        height -= 0.05 * len(lines) + 0.018


def _over_log_log_time(axis: Axes, models, small) -> None:
    """Draw the ULPM and the UFM of small decay: who leaves the power of log t, and when."""
    for model in models[:2]:
        late = model.log_times > _FIRST_LOG_T
        x, median = np.log(model.log_times[late]), _median(model.distance)[late]
        axis.plot(x, median, "--" if model.step else "-", color=_INK, lw=2.2)
    x, median = np.log(models[0].log_times[late]), _median(models[0].distance)[late]
    line = x > x[-1] - np.log(50)
    guide = 0.35 * median[-1] * np.exp(x[-1] - x[line])
    axis.plot(x[line], guide, ":", color=_GREY, lw=1.4)
    offset: Any = {"textcoords": "offset points", "va": "center"}
    at = (x[line][0], guide[0])
    axis.annotate(r"$1/\log t$", at, xytext=(-3, -3), ha="right", color=_GREY, **offset)
    middle = len(x) // 2
    at = (x[middle], median[middle])
    axis.annotate("ULPM, no decay", at, xytext=(6, 8), color=_INK, **offset)
    heights = np.geomspace(1e-12, 1e-7, len(small))
    for (mu, model), colour, height in zip(
        small, _shades(len(small)), heights, strict=True
    ):
        shown = (model.log_times > _FIRST_LOG_T) & (_median(model.distance) > _FLOOR)
        x, median = np.log(model.log_times[shown]), _median(model.distance)[shown]
        axis.plot(x, median, color=colour, lw=1.4)
        at = (np.interp(-np.log(height), -np.log(median), x), height)
        axis.annotate(
            rf"UFM, $\mu = {_power(mu)}$",
            at,
            xytext=(_COLUMN, height),
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5},
        )
    places = [np.log(p * np.log(10)) for p in _POWERS]
    labels = ["10" if p == 1 else f"$10^{{{p}}}$" for p in _POWERS]
    axis.set_xticks(places, labels)
    last = np.log(models[0].log_times[-1])
    axis.set(yscale="log", ylim=(_FLOOR, 3), xlim=(np.log(_FIRST_LOG_T), last))
    axis.set_xlabel(r"time $t$ (axis: $\log\,\log\,t$)")
    axis.set_title(r"(b) UFM of small decay $\mu$ against the ULPM", loc="left")
    _grid(axis)


def _shades(count: int) -> list[Any]:
    """Return colours from blue to a lighter blue."""
    share = np.linspace(0, 0.55, count)[:, None]
    return list((1 - share) * matplotlib.colors.to_rgb(_BLUE) + share)


def _power(value: float) -> str:
    """Write a number, as a power of ten if it is one."""
    exponent = np.log10(value)
    is_power = abs(exponent - round(exponent)) < 1e-9
    return f"10^{{{round(exponent)}}}" if is_power else f"{value:g}"


def path_figure(paths: Sequence[Path]) -> Figure:
    """Draw the deviations from SELI over log(1/mu), with the limits of first order."""
    with plotting.style():
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for path, colour in zip(paths, plotting.COLOURS, strict=True):
            _draw_cosines(left, path, colour)
            _draw_logits(right, path, colour)
        left.set(xscale="log", xlabel=r"$\log(1/\mu)$", ylim=(0, None), xlim=(0.8, 1500))
        left.set_title(
            r"(a) $(\cos(w_B, w_B') - \cos_{\mathrm{SELI}}) \cdot \log(1/\mu)$", loc="left"
        )
        right.set(
            xscale="log", yscale="log", xlabel=r"$\log(1/\mu)$, or $\log t$ of the flow"
        )
        right.set_title("(b) distance of the unit logits from SELI", loc="left")
        right.text(
            0.03, 0.05, "classes of one size: 0 at every $\\mu$", transform=right.transAxes
        )
        for axis in (left, right):
            _grid(axis)
        handles: list[Any] = [
            matplotlib.lines.Line2D([], [], color=_INK, lw=1.4, label="UFM, over decay"),
            _marker("o", "LPM, over the multiplier"),
            _marker("+", r"flow of the ULPM, over $\log t$"),
            matplotlib.lines.Line2D([], [], color=_GREY, ls=":", label="first order"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _marker(marker: str, label: str):
    return matplotlib.lines.Line2D(
        [], [], color=_INK, marker=marker, ls="", mfc="white", ms=4.5, label=label
    )


def _draw_cosines(axis: Axes, path: Path, colour: str) -> None:
    x, cosine, _ = path.decay
    axis.plot(x, cosine * x, color=colour, lw=1.4)
    x, cosine, _ = path.ball
    axis.plot(x, cosine * x, "o", color=colour, mfc="white", ms=4)
    axis.axhline(path.limits[0], color=colour, ls=":", lw=1.0)
    axis.annotate(
        f"$R = {path.ratio}$\n{path.limits[0]:.5f}",
        (1.4 * x[-1], path.limits[0]),
        va="center",
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _draw_logits(axis: Axes, path: Path, colour: str) -> None:
    x, _, logits = path.decay
    axis.plot(x, logits, color=colour, lw=1.4)
    axis.plot(x[x > 20], path.limits[1] / x[x > 20], ":", color=_GREY, lw=1.2)
    x, _, logits = path.ball
    axis.plot(x, logits, "o", color=colour, mfc="white", ms=4)
    log_times, distances = path.flow
    axis.plot(log_times, _median(distances), "+", color=colour, ms=6)


def minority_figure(
    rows: Sequence[Sequence[Minority]], sizes: Sequence[int], num_classes: int
) -> Figure:
    """Draw cosines of minority classifiers over R, a row of panels for each weighting."""
    with plotting.style():
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        axes = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=True)
        for axis, entry in zip(
            axes.ravel(), [entry for row in rows for entry in row], strict=True
        ):
            _draw_minority(axis, entry)
        for axis in axes[-1]:
            axis.set_xlabel(r"imbalance $R = n_A / n_B$")
        for axis in axes[:, 0]:
            axis.set_ylabel(r"$\cos(w_B, w_B')$")
        handles: list[Any] = [
            matplotlib.lines.Line2D(
                [], [], color=colour, lw=1.4, label=f"{size} large classes of {num_classes}"
            )
            for size, colour in zip(sizes, plotting.COLOURS, strict=True)
        ]
        handles.append(_marker("o", "end of the flow"))
        handles.append(_marker("x", "$w_B = 0$ beyond"))
        handles.append(
            matplotlib.lines.Line2D([], [], color=_GREY, ls="--", label="features (ULPM)")
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure


def _draw_minority(axis: Axes, entry: Minority) -> None:
    for place, colour in enumerate(plotting.COLOURS):
        axis.plot(entry.ratios, entry.predicted[place], color=colour, lw=1.4)
        finite = np.isfinite(entry.predicted[place])
        if not finite.all():
            axis.plot(entry.ratios[finite][-1], 1, "x", color=colour, ms=6)
        if entry.features is not None:
            axis.plot(entry.ratios, entry.features[place], "--", color=colour, lw=0.9)
        median = np.median(entry.found[:, place], axis=-1)
        axis.plot(entry.flow_ratios, median, "o", color=colour, mfc="white", ms=4.5)
        if np.isfinite(entry.thresholds[place]):
            axis.axvline(entry.thresholds[place], color=colour, lw=0.9, ls=":")
            axis.annotate(
                f"{entry.thresholds[place]:.4g}",
                (entry.thresholds[place], -0.5 + 0.1 * place),
                xytext=(-2, 0),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=8,
            )
    axis.set(xscale="log", ylim=(-0.56, 1.1))
    axis.set_title(entry.title, loc="left")
    _grid(axis)


def _median(values: np.ndarray) -> np.ndarray:
    return np.nanmedian(values, axis=0)


def _grid(axis: Axes) -> None:
    axis.grid(visible=True, axis="y", lw=0.4, color=_GRID)
    axis.set_axisbelow(True)
