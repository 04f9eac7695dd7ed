"""Figure of the deep experiment: basin shares, singular values, collapse by layer."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments._deep_ends import BETWEEN
from ncjax import plotting

_GRID, _INK = "#dddddd", "#222222"
_BLUE, _RED, _GREEN = plotting.COLOURS
_OTHER, _GOLD, _BETWEEN = "#7b5ea7", "#c69214", "#d9d9d9"
_COLOURS = {"simplex": _BLUE, "pairs": _RED, "polygon": _GREEN}
_LABELS = {
    "simplex": "simplex: collapse",
    "pairs": "antipodal pairs",
    "polygon": "polygon",
}
_SHORT = {"simplex": "collapse"}
_FIRST_LOG_T = 0.5
_POWERS = (1, 10, 100, 1000, 10_000, 100_000)


class Basins(NamedTuple):
    """Shares of the codes of one number of classes and one width."""

    num_classes: int
    width: int
    scales: Sequence[float]
    least: Mapping[int, str]  # code of the least norm known, by p
    shares: dict[str, dict[tuple[int, float], float]]  # by code, then p and scale


class Path(NamedTuple):
    """Singular values on the way to a code, of one start."""

    num_classes: int
    factors: int
    scale: float
    code: str
    log_times: np.ndarray  # (T,)
    singular_values: np.ndarray  # (T, K)


class Layers(NamedTuple):
    """Within-class variation of every layer, the median over the starts of a cell."""

    num_classes: int
    factors: int
    scale: float
    log_times: np.ndarray  # (T,)
    quotient: np.ndarray  # (T, L)


def basins_figure(
    basins: Sequence[Basins], paths: Sequence[Path], layers: Layers, starts: int
) -> Figure:
    """Draw the shares of each code above, and the paths and the layers below."""
    with plotting.style():
        rows = math.ceil(len(basins) / 2)
        figure = Figure(figsize=(9.6, 2.5 + 2.7 * rows), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.15 * rows, 1))
        above, below = halves
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        grid = above.subplots(rows, min(len(basins), 2), sharey=True, squeeze=False)
        for axis, basin in itertools.zip_longest(grid.flat, basins):
            if basin is None:
                axis.set_visible(False)
            else:
                _draw_basins(axis, basin, next(letters))
        for axis in grid[:, 0]:
            axis.set_ylabel(f"share of {starts} starts")
        above.legend(
            handles=_handles(basins), loc="outside upper center", ncols=5, handlelength=1.2
        )
        axes = below.subplots(1, len(paths) + 1, squeeze=False)[0]
        for axis, path in zip(axes, paths, strict=False):
            _draw_path(axis, path, next(letters))
        axes[0].set_ylabel(r"$\sigma_i / (\sigma_1 + \dots + \sigma_K)$ of the logits")
        _draw_layers(axes[-1], layers, next(letters))
    return figure


def _handles(basins: Sequence[Basins]) -> list[Any]:
    """Return a patch for each kind of code that some start ends at."""
    kinds = {
        _kind(code)
        for basin in basins
        for code, shares in basin.shares.items()
        if any(shares.values())
    }
    order = (*_LABELS.values(), "another code", BETWEEN)
    return [
        Patch(color=_colour_of_kind(kind), label=kind) for kind in order if kind in kinds
    ]


def _kind(code: str) -> str:
    return code if code == BETWEEN else _LABELS.get(code, "another code")


def _colour_of_kind(kind: str) -> str:
    colours = {_LABELS[code]: colour for code, colour in _COLOURS.items()}
    return (colours | {BETWEEN: _BETWEEN}).get(kind, _OTHER)


def _draw_basins(axis: Axes, basin: Basins, letter: str) -> None:
    """Draw a group of bars for each p, a bar for each scale."""
    wide = len(basin.scales) + 0.8
    codes = sorted(basin.shares, key=lambda code: (code == BETWEEN, *_order(code)))
    ticks, labels = [], []
    for group, (factors, least) in enumerate(sorted(basin.least.items())):
        for place, scale in enumerate(basin.scales):
            x, bottom = group * wide + place, 0.0
            for code in codes:
                share = basin.shares[code].get((factors, scale), 0.0)
                colour = _colour_of_kind(_kind(code))
                axis.bar(x, share, 0.86, bottom, color=colour, lw=0)
                bottom += share
            ticks.append(x)
            labels.append(f"{scale:g}")
        middle = group * wide + (len(basin.scales) - 1) / 2
        axis.annotate(
            f"$p = {factors}$\nleast $V$: {least}",
            (middle, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -20),
            textcoords="offset points",
            ha="center",
            va="top",
            annotation_clip=False,
        )
    axis.set_xticks(ticks, labels, fontsize=7.5)
    axis.tick_params(axis="x", length=0)
    axis.set(ylim=(0, 1), xlim=(-0.7, len(basin.least) * wide - 1.1))
    axis.set_title(
        f"({letter}) $K = {basin.num_classes}$, width {basin.width}: code at the end, over "
        "the scale of the start",
        loc="left",
    )
    _grid(axis)


def _order(code: str) -> tuple[int, str]:
    names = list(_COLOURS)
    return (names.index(code) if code in names else len(names)), code


def _draw_path(axis: Axes, path: Path, letter: str) -> None:
    """Draw the singular values over log log t, each over the sum of all."""
    shown = path.log_times >= _FIRST_LOG_T
    x = np.log(path.log_times[shown])
    sigma = path.singular_values[shown]
    colour = _COLOURS.get(path.code, _OTHER)
    axis.plot(x, sigma / sigma.sum(axis=1, keepdims=True), color=colour, lw=1.4)
    axis.set_title(
        f"({letter}) to {_SHORT.get(path.code, path.code)}: $K = {path.num_classes}$, "
        f"$p = {path.factors}$, scale {path.scale:g}",
        loc="left",
    )
    axis.set_ylim(0, 1)
    _over_log_log_time(axis, x)


def _draw_layers(axis: Axes, layers: Layers, letter: str) -> None:
    """Draw the within-class variation of every layer over log log t."""
    shown = layers.log_times >= _FIRST_LOG_T
    x = np.log(layers.log_times[shown])
    depth = layers.quotient.shape[1]
    colours = (_GOLD, _RED, _OTHER, _BLUE)
    for layer, row in enumerate(layers.quotient[shown].T):
        label = "$H$" if layer == 0 else f"layer {layer}"
        axis.plot(x, row, color=colours[layer % 4], lw=1.4, label=label)
    axis.set_yscale("log")
    axis.set_ylabel(r"$\mathrm{Tr}\,\Sigma_W / \mathrm{Tr}\,\Sigma_B$")
    axis.set_title(
        f"({letter}) layers: $K = {layers.num_classes}$, $p = {layers.factors}$, "
        f"scale {layers.scale:g}",
        loc="left",
    )
    axis.legend(loc="lower left", ncols=1 if depth < 4 else 2)
    _over_log_log_time(axis, x)


def _over_log_log_time(axis: Axes, x: np.ndarray) -> None:
    inside = [p for p in _POWERS if x[0] <= np.log(p * np.log(10)) <= x[-1]]
    labels = ["10" if p == 1 else f"$10^{{{p}}}$" for p in inside]
    axis.set_xticks([np.log(p * np.log(10)) for p in inside], labels)
    axis.set(xlim=(x[0], x[-1]), xlabel=r"time $t$ (axis: $\log\,\log\,t$)")
    _grid(axis)


def _grid(axis: Axes) -> None:
    axis.grid(visible=True, axis="y", lw=0.4, color=_GRID)
    axis.set_axisbelow(True)
