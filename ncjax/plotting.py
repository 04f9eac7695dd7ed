"""Draw the figures of the paper over the iterated logarithm of time.

Figures start from Matplotlib's defaults, not from the user's matplotlibrc or style. The
functions that return a `Figure` draw it under `style()`; save it under `style()` too.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ncjax.checks import check_installed

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError:
    check_installed("experiments", "matplotlib")
    raise

STYLE: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "pdf.fonttype": 42,
}
_WHOLE = "#222222"
_MEANS, _CLASSIFIER, _SHADE, _GUIDE = "#1b6ca8", "#c8553d", "#ececec", "#8a8a8a"
COLOURS = (_MEANS, _CLASSIFIER, "#5b8c5a")
_SPLITS = {"train": "training set", "test": "test set"}
_EXPONENTS = (1, 2, 4, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000)
_MOST_TICKS = 9
_EPOCHS = (2, 3, 5, 10, 20, 50, 100, 200, 350, 500, 1000, 2000, 5000, 10_000)


@contextlib.contextmanager
def style(settings: Mapping[str, Any] = STYLE) -> Iterator[None]:
    """Set Matplotlib to its defaults, changed by `settings`, until the context ends.

    The user's matplotlibrc, style and `rcParams` have no effect inside, except for the
    backend. Save figures inside too, because Matplotlib makes ticks and reads the options
    of files only then:

        with plotting.style():
            figure.savefig("collapse.pdf", bbox_inches="tight")

    Args:
      settings: entries of `matplotlib.rcParams`.
    """
    chosen: dict[Any, Any] = {
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if not name.startswith("backend")
    }
    chosen.update(settings)
    with matplotlib.rc_context(chosen):
        yield


class Curve(NamedTuple):
    """One quantity over time for several seeds."""

    values: np.ndarray  # (S, T), one row per seed
    label: str
    colour: str
    style: str = "-"
    width: float = 1.4  # points


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    curves: Sequence[Curve]
    guide: int = 1  # p of the dotted line (log t)^-p below the first curve; 0: none
    scale: str = "log"  # of the vertical axis


class Ruler(NamedTuple):
    """The horizontal axis: log log of time."""

    x: np.ndarray  # (T,) increasing
    ticks: Sequence[float]
    tick_labels: Sequence[str]
    label: str


def collapse_panels(metrics: Mapping[str, np.ndarray]) -> list[Panel]:
    """Return the four panels of Figure 2 of Ji et al. (ICLR 2022).

    Args:
      metrics: fields of `ncjax.CollapseMetrics` by name, each (S, T) for S seeds and T
        times.
    """

    def three(means: str, classifier: str) -> list[Curve]:
        return [
            Curve(metrics[means], "class means", _MEANS, width=3.2),
            Curve(metrics[f"centred_{classifier}"], "classifier, centred", _CLASSIFIER),
            Curve(metrics[classifier], "classifier, raw", _CLASSIFIER, "--"),
        ]

    return [
        Panel(
            "(a) norms: std / mean",
            three("mean_norm_variation", "classifier_norm_variation"),
        ),
        Panel(
            r"(b) within-class variation: $\mathrm{Tr}(\Sigma_W \Sigma_B^+)\,/\,K$",
            [Curve(metrics["within_class_variation"], "features", _MEANS)],
            guide=3,
        ),
        Panel(
            r"(c) angles: mean $|\cos + 1/(K-1)|$",
            three("mean_cosine_deviation", "classifier_cosine_deviation"),
        ),
        Panel(
            r"(d) self-duality: $|W/|W|_F - M/|M|_F|_F$",
            [
                Curve(metrics["centred_self_duality"], "classifier, centred", _CLASSIFIER),
                Curve(metrics["self_duality"], "classifier, raw", _CLASSIFIER, "--"),
            ],
        ),
    ]


def training_panels(
    train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]
) -> list[Panel]:
    """Return the panels of a training run: error, loss, margin and NC4.

    Zeros have no logarithm and are left out.

    Args:
      train: fields of `ncjax.CollapseMetrics` and `ncjax.LastLayer` by name, each (S, T)
        for S seeds, on the training set.
      test: the same on the test set, or empty.
    """

    def both(of: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> list[Curve]:
        curves = [Curve(of(train), "training set", _MEANS, width=2.4)]
        return [*curves, Curve(of(test), "test set", _CLASSIFIER)] if test else curves

    return [
        Panel(
            "(a) share misclassified",
            both(lambda metrics: _positive(1 - metrics["accuracy"])),
        ),
        Panel("(b) mean cross entropy", both(lambda metrics: metrics["loss"])),
        Panel(
            "(c) least margin over the largest at norms |W|, |H|",
            both(lambda metrics: metrics["balanced_margin_ratio"]),
            scale="linear",
        ),
        Panel(
            "(d) share where classifier and nearest mean disagree",
            both(lambda metrics: _positive(metrics["ncc_mismatch"])),
        ),
    ]


def margin_panels(metrics: Mapping[str, np.ndarray]) -> list[Panel]:
    """Return the panels of a network flow: margins, KKT angle, quotient, loss.

    Args:
      metrics: fields of `ncjax.CollapseMetrics` and `ncjax.LastLayer` by name, each (S, T)
        for S seeds and T times.
    """
    return [
        Panel(
            r"(a) margin deficit: 1 - least margin / largest at $|W|$, $|H|$",
            [Curve(1 - metrics["balanced_margin_ratio"], "last layer", _MEANS)],
            guide=0,
        ),
        Panel(
            r"(b) KKT angle at equal norms: $\sqrt{1-\beta^2}$",
            [Curve(metrics["balanced_kkt_angle"], "last layer", _MEANS)],
            guide=0,
        ),
        Panel(
            r"(c) within-class variation: $\mathrm{Tr}\,\Sigma_W / \mathrm{Tr}\,\Sigma_B$",
            [Curve(metrics["within_class_quotient"], "features", _MEANS)],
        ),
        Panel(
            r"(d) $-\log L$, the loss $L$ summed over samples",
            [Curve(-metrics["log_loss"], "training set", _MEANS)],
            guide=0,
        ),
    ]


def duality_panels(metrics: Mapping[str, np.ndarray]) -> list[Panel]:
    """Return the panels on what remains of self-duality and of the angles.

    Args:
      metrics: fields of `ncjax.CollapseMetrics` and `ncjax.DualityParts` by name, each
        (S, T) for S seeds and T times.
    """
    return [
        Panel(
            "(a) self-duality and its two causes",
            [
                Curve(metrics["centred_self_duality"], "self-duality", _WHOLE, width=2.4),
                Curve(metrics["multiplier_distance"], "history", _CLASSIFIER),
                Curve(metrics["multiplier_duality"], "unequal multipliers", COLOURS[2]),
            ],
            guide=0,
        ),
        Panel(
            "(b) classifier outside the span of the means",
            [Curve(metrics["outside_means"], "share of the norm", _CLASSIFIER)],
            guide=0,
        ),
        Panel(
            "(c) multipliers over pairs of classes: std / mean",
            [Curve(metrics["multiplier_variation"], "std / mean", COLOURS[2])],
            guide=0,
        ),
        Panel(
            r"(d) angles: mean $|\cos + 1/(K-1)|$",
            [
                Curve(metrics["mean_cosine_deviation"], "class means", _MEANS, width=2.4),
                Curve(
                    metrics["centred_classifier_cosine_deviation"],
                    "classifier, centred",
                    _CLASSIFIER,
                    "--",
                ),
            ],
            guide=0,
        ),
    ]


def homogeneity_panels(metrics: Mapping[str, np.ndarray]) -> list[Panel]:
    """Return the panels of a homogeneous network: margin, KKT angle, the two constants.

    Args:
      metrics: columns of the flow of a homogeneous network, each (S, T) for S seeds and T
        times: `margin`, `log_smoothed_margin`, `theta_kkt_angle`, `norm_growth`,
        `loss_growth`.
    """
    smoothed = np.exp(metrics["log_smoothed_margin"])
    return [
        Panel(
            r"(a) normalised margin",
            [
                Curve(metrics["margin"], r"$q_{\min}/|\theta|^p$", _MEANS, width=2.4),
                Curve(smoothed, "smoothed", _CLASSIFIER),
            ],
            guide=0,
        ),
        Panel(
            r"(b) KKT angle of all parameters: $\sqrt{1-\beta^2}$",
            [Curve(metrics["theta_kkt_angle"], "parameters", _MEANS)],
            guide=0,
        ),
        Panel(
            r"(c) $|\theta|^2 / (\log t)^{2/p}$",
            [Curve(metrics["norm_growth"], "parameters", _MEANS)],
            guide=0,
        ),
        Panel(
            r"(d) $t\,L\,(\log t)^{2-2/p}$",
            [Curve(metrics["loss_growth"], "training set", _MEANS)],
            guide=0,
        ),
    ]


def _positive(values: np.ndarray) -> np.ndarray:
    """Replace values that are not positive by NaN, which no curve shows."""
    return np.where(values > 0, values, np.nan)


def figure_over_log_log_t(
    log_times: np.ndarray,
    panels: Sequence[Panel],
    *,
    reach: float | None = None,
    reach_label: str = "",
) -> Figure:
    """Draw panels over log log t: the median over seeds and the band between quartiles.

    Args:
      log_times: (T,) natural logarithms of time; only values above 1 are drawn.
      panels: four panels.
      reach: natural logarithm of the time up to which the background is shaded.
      reach_label: meaning of the shade.

    Raises:
      ValueError: no time is above 1, the panels are not four, or a curve is not (S, T).
    """
    shown = log_times > 1
    if not shown.any():
        raise ValueError(f"expected a log time above 1, got {log_times}")
    x = np.log(log_times[shown])
    powers = [p for p in _EXPONENTS if x[0] <= np.log(p * np.log(10)) <= x[-1]]
    powers = powers[:: -(-len(powers) // _MOST_TICKS)] if powers else []
    ruler = Ruler(
        x,
        [float(np.log(p * np.log(10))) for p in powers],
        ["10" if p == 1 else f"$10^{{{p}}}$" for p in powers],
        r"time $t$ (axis: $\log\,\log\,t$)",
    )
    edge = None if reach is None else float(np.log(reach))
    return _four_panels(ruler, _cut(panels, shown), edge, reach_label)


def figure_over_log_log_epochs(
    epochs: np.ndarray, panels: Sequence[Panel], *, until: int | None = None
) -> Figure:
    """Draw panels over log log of the epoch, as the paper does for networks.

    Args:
      epochs: (T,) numbers of epochs; only epochs from 2 on are drawn.
      panels: four panels.
      until: epoch up to which the background is shaded: the first one with zero training
        error.

    Raises:
      ValueError: no epoch is 2 or later, the panels are not four, or a curve is not
        (S, T).
    """
    shown = epochs >= 2
    if not shown.any():
        raise ValueError(f"expected an epoch from 2 on, got {epochs}")
    x = np.log(np.log(epochs[shown]))
    ticks = [n for n in _EPOCHS if epochs[shown][0] <= n <= epochs[-1]]
    ruler = Ruler(
        x,
        [float(np.log(np.log(epoch))) for epoch in ticks],
        [str(epoch) for epoch in ticks],
        r"epoch (axis: $\log\,\log$)",
    )
    edge = float(np.log(np.log(until))) if until and until >= 2 else None
    note = "shaded: before the training error is zero for good" if edge else ""
    return _four_panels(ruler, _cut(panels, shown), edge, note)


def figure_over_epochs(epochs: np.ndarray, panels: Sequence[Panel]) -> Figure:
    """Draw panels over the number of epochs, without the guides of power laws.

    Args:
      epochs: (T,) increasing numbers of epochs.
      panels: four panels.

    Raises:
      ValueError: the panels are not four, or a curve is not (S, T).
    """
    epochs = np.asarray(epochs)
    plain = [panel._replace(guide=0) for panel in _cut(panels, np.ones(epochs.shape, bool))]
    places = MaxNLocator(5, integer=True).tick_values(epochs[0], epochs[-1])
    ticks = [float(place) for place in places if epochs[0] <= place <= epochs[-1]]
    ruler = Ruler(epochs, ticks, [f"{tick:.0f}" for tick in ticks], "epoch")
    return _four_panels(ruler, plain, None, "")


def _cut(panels: Sequence[Panel], shown: np.ndarray) -> list[Panel]:
    """Keep the times where `shown` is true.

    Raises:
      ValueError: the panels are not four with curves of shape (S, T).
    """
    if len(panels) != 4 or not all(panel.curves for panel in panels):
        counts = [len(panel.curves) for panel in panels]
        raise ValueError(
            f"expected four panels with at least one curve each, got {counts} curves"
        )
    for curve in (curve for panel in panels for curve in panel.curves):
        if np.shape(curve.values)[1:] != shown.shape:
            raise ValueError(
                f"curve {curve.label!r} must be (S, T) at the T = {shown.size} times, got "
                f"shape {np.shape(curve.values)}"
            )
    return [
        panel._replace(
            curves=[curve._replace(values=curve.values[:, shown]) for curve in panel.curves]
        )
        for panel in panels
    ]


def _four_panels(
    ruler: Ruler, panels: Sequence[Panel], edge: float | None, note: str
) -> Figure:
    """Draw four panels over one ruler, shaded up to `edge`."""
    with style():
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True).ravel()
        for axis, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                _draw(axis, ruler.x, curve, panel.scale)
            _draw_guide(axis, ruler.x, panel.curves[0].values, panel.guide)
            _finish(axis, panel, ruler, edge)
        for axis in axes[2:]:
            axis.set_xlabel(ruler.label)
        _legend(figure, [a for a, p in zip(axes, panels, strict=True) if p.curves[1:]])
        if edge is not None:
            figure.text(0.5, -0.03, note, ha="center", fontsize=8.5, color="#555555")
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend above all `axes`; curves of one label share an entry."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            [*handles.values()],
            [*handles],
            loc="outside upper center",
            ncols=len(handles),
        )


def _draw(axis: Axes, x: np.ndarray, curve: Curve, scale: str = "log") -> None:
    """Draw the median and the band between quartiles over seeds with finite values."""
    x, low, median, high = _quartiles(x, curve.values)
    if scale == "log":
        median = np.where(median > 0, median, np.nan)
    if not np.isfinite(median).any():
        return
    line = axis.plot(x, median, curve.style, color=curve.colour, lw=curve.width)
    line[0].set(label=curve.label, marker="o" if x.size == 1 else "")
    if curve.values.shape[0] > 1:
        axis.fill_between(x, low, high, color=curve.colour, alpha=0.2, lw=0)


def _quartiles(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return x, lower quartile, median and upper quartile where any seed is finite."""
    values = np.where(np.isfinite(values), values, np.nan)
    finite = np.isfinite(values).any(axis=0)
    if not finite.any():
        return x[finite], *np.zeros((3, 0))
    return x[finite], *np.nanquantile(values[:, finite], (0.25, 0.5, 0.75), axis=0)


def _draw_guide(axis: Axes, x: np.ndarray, values: np.ndarray, exponent: int) -> None:
    """Draw a dotted power law below the last sixth of a curve that reaches late times."""
    x, _, median, _ = _quartiles(x, values)
    if x.size == 0 or median[-1] <= 0:
        return
    late = x > x[-1] - (x[-1] - x[0]) / 6
    if not exponent or np.exp(x[-1]) < 300 or late.sum() < 2:
        return
    line = np.exp(-exponent * (x[late] - x[-1]))
    shares = median[late] / line
    line *= 0.4 * np.min(shares[shares > 0])
    axis.plot(x[late], line, ":", color=_GUIDE, lw=1.2)
    power = "" if exponent == 1 else f"^{exponent}"
    axis.annotate(
        rf"$1/\log{power} t$",
        (x[late][0], line[0]),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=_GUIDE,
        fontsize=8.5,
    )


def _finish(axis: Axes, panel: Panel, ruler: Ruler, edge: float | None) -> None:
    """Set scale, title, ticks, grid and shade."""
    axis.set_yscale(panel.scale)
    axis.set_title(panel.title, loc="left")
    if ruler.x[0] < ruler.x[-1]:
        axis.set_xlim(ruler.x[0], ruler.x[-1])
    axis.set_xticks(ruler.ticks, ruler.tick_labels)
    axis.grid(visible=True, axis="y", lw=0.4, color="#dddddd")
    axis.set_axisbelow(True)
    if panel.scale == "log":
        _number_short_axis(axis)
    if edge is not None:
        axis.axvspan(ruler.x[0], min(edge, ruler.x[-1]), color=_SHADE, lw=0, zorder=0)


def _number_short_axis(axis: Axes) -> None:
    """Label a short logarithmic axis with round numbers: it holds few powers of ten."""
    low, high = axis.get_ylim()
    decades = np.log10(high) - np.log10(low)  # a loss may span more than float64
    if decades > 2:
        return
    locator = (
        LogLocator(subs=(1, 2, 5)) if decades > 1 else MaxNLocator(5, steps=[1, 2, 5, 10])
    )
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def saddle_figure(
    *,
    log_times: np.ndarray,
    stationarity: np.ndarray,
    excess: np.ndarray,
    escapes: Sequence[tuple[str, np.ndarray, np.ndarray, float]],
    angles: np.ndarray,
    descents: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> Figure:
    """Draw KKT residuals along the flow, escapes from saddles, descents on the sphere.

    Args:
      log_times: (T,) natural logarithms of time of `stationarity` and `excess`.
      stationarity: (S, T) KKT residual.
      excess: (S, T) distance of sigma_max from 1.
      escapes: label, log times (T',), unstable part of Z/|Z| (S', T'), predicted exponent.
      angles: (A,), in radians.
      descents: label, log L along the circle over |Z|² (A,), its parabola (A,).
    """
    with style():
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        flow, escape, descent = figure.subplots(1, 3)
        for values, label, colour in (
            (stationarity, "KKT residual", _MEANS),
            (excess, r"$|\sigma_{\max} - 1|$", _CLASSIFIER),
        ):
            curve = Curve(values, label, colour)
            _draw(flow, log_times, curve)
        flow.set(xscale="log", yscale="log", xlabel=r"$\log t$")
        flow.set_title("(a) flow from random starts", loc="left")
        for (label, times, unstable, exponent), colour in zip(
            escapes, COLOURS, strict=False
        ):
            _draw(escape, times, Curve(unstable, label, colour))
            line = np.median(unstable[:, -1]) * (times / times[-1]) ** exponent
            escape.plot(times, line, ":", color=_GUIDE, lw=1.2)
        escape.set(xscale="log", yscale="log", xlabel=r"$\log t$")
        escape.set_title(r"(b) unstable part of $Z/|Z|$ off a saddle", loc="left")
        for (label, computed, predicted), colour in zip(descents, COLOURS, strict=False):
            descent.plot(angles, computed, color=colour, lw=1.4, label=label)
            descent.plot(angles, predicted, ":", color=_GUIDE, lw=1.2)
        descent.set(xlabel="angle from the saddle (radians)")
        descent.set_title(r"(c) change of $\log L\,/\,|Z|^2$ on the sphere", loc="left")
        for axis in (flow, escape, descent):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="best")
            axis.grid(visible=True, axis="y", lw=0.4, color="#dddddd")
        figure.text(0.5, -0.05, "dotted: predicted", ha="center", color="#555555")
    return figure


def layers_figure(reports: Mapping[str, Any]) -> Figure:
    """Draw data separation, accuracy, ranks and NC2 over the layers of a network.

    Shaded is the tunnel of the last split, the test set if there is one. Dotted lines mark
    the start of the tunnel of each split.

    Args:
      reports: results of `ncjax.layerwise` by split, "train" and then "test", of the same
        layers.

    Raises:
      ValueError: there is no report, or the layers differ.
    """
    names = {report.names for report in reports.values()}
    if len(names) != 1:
        raise ValueError(f"expected reports of the same layers, got {sorted(names)}")
    (layers,) = names
    *_, (split, last) = reports.items()
    with style():
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True).ravel()
        for report, colour, label in zip(
            reports.values(), (_MEANS, _CLASSIFIER), reports, strict=False
        ):
            _draw_layers(axes, report, colour, _SPLITS.get(label, label))
        for axis in axes:
            _finish_layers(axis, layers, int(last.tunnel.start))
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(loc="lower left")
        handles = axes[1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=len(reports))
        shaded = f"shaded: the tunnel of the {_SPLITS.get(split, split)}"
        note = f"{shaded}; dotted: its start" + (" in both" if len(reports) > 1 else "")
        figure.text(0.5, -0.03, note, ha="center", fontsize=8.5, color="#555555")
    return figure


def _draw_layers(axes: Sequence[Axes], report: Any, colour: str, label: str) -> None:
    """Draw the curves of one split."""
    fuzziness, accuracy, rank, frame = axes
    metrics, law = report.metrics, report.law
    depths = np.arange(len(report.names))
    fuzziness.plot(depths, metrics.fuzziness, "o", color=colour, ms=4)
    if np.isfinite(law.slope):  # one layer has no line
        line = np.exp(float(law.intercept) + float(law.slope) * depths)
        text = rf"$\rho$ = {float(law.decay_ratio):.2f}, $R^2$ = {float(law.r_squared):.3f}"
        fuzziness.plot(depths, line, "--", color=colour, lw=1.0, label=text)
    line_style: Any = {"color": colour, "ms": 3.5, "lw": 1.4}
    accuracy.plot(depths, metrics.ncc_accuracy, "-o", label=label, **line_style)
    if int(report.tunnel.start) < depths.size:
        accuracy.axvline(int(report.tunnel.start), color=colour, lw=0.9, ls=":")
    rank.plot(depths, metrics.numerical_rank, "-o", **line_style)
    rank.plot(depths, metrics.effective_rank, ":s", **line_style | {"mfc": "white"})
    frame.plot(depths, metrics.mean_cosine_deviation, "-o", **line_style)
    frame.plot(depths, metrics.mean_norm_variation, ":s", **line_style | {"mfc": "white"})
    fuzziness.set(yscale="log")
    rank.set(yscale="log")
    fuzziness.set_title(
        r"(a) separation fuzziness $D = \mathrm{Tr}(\Sigma_W\,\mathrm{SS}_b^+)$", loc="left"
    )
    accuracy.set_title("(b) accuracy of the nearest class mean", loc="left")
    rank.set_title("(c) rank: numerical (solid), effective (dotted)", loc="left")
    frame.set_title(r"(d) means: $|\cos + 1/(K-1)|$ (solid), norms (dotted)", loc="left")


def _finish_layers(axis: Axes, layers: Sequence[str], start: int) -> None:
    """Set the names of the layers, the grid and the shade of the tunnel."""
    size = len(layers)
    axis.set_xticks(range(size), layers, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.4, size - 0.6)
    axis.grid(visible=True, axis="y", lw=0.4, color="#dddddd")
    axis.set_axisbelow(True)
    if axis.get_yscale() == "log":
        _number_short_axis(axis)
    if start < size:
        axis.axvspan(start, size - 0.6, color=_SHADE, lw=0, zorder=0)


def render(figure: Figure) -> dict[str, bytes]:
    """Return the bytes of `.png` and `.pdf` files by suffix; the PDF has no date.

    Both have one layout, which is computed once because that takes a third of the time.
    """
    options: dict[str, dict[str, Any]] = {
        ".png": {"dpi": 200},
        ".pdf": {"metadata": {"CreationDate": None}},
    }
    files = {}
    layout = figure.get_layout_engine()
    for suffix, chosen in options.items():
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=suffix[1:], bbox_inches="tight", **chosen)
        files[suffix] = buffer.getvalue()
        figure.set_layout_engine("none")  # the layout of the first file serves the others
    figure.set_layout_engine(layout)
    return files
