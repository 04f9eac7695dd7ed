"""Draw cosines between class means and classifier rows, and the metrics on a log axis."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ncjax.analysis.verdict import ANGLES, DUALITY, NORMS, WITHIN
from ncjax.plotting import COLOURS, STYLE, style

_MOST_CELLS, _MOST_ROWS = 100, 1000  # classes of a heat map, of a histogram
_ROOM = 0.02  # of a histogram, beyond the least and the largest cosine
_MAP = "RdBu_r"
# Bars from top to bottom: label, field of `CollapseMetrics`, of the classifier or not, and
# the largest value that the verdict calls collapsed.
_BARS = (
    ("NC1  quotient of traces", "within_class_quotient", False, WITHIN),
    ("NC1  $\\mathrm{Tr}(\\Sigma_W\\Sigma_B^+)/K$", "within_class_variation", False, None),
    ("NC1  CDNV", "cdnv", False, None),
    ("NC2  norms of means", "mean_norm_variation", False, NORMS),
    ("NC2  angles of means", "mean_cosine_deviation", False, ANGLES),
    ("NC2  norms of rows", "centred_classifier_norm_variation", True, None),
    ("NC2  angles of rows", "centred_classifier_cosine_deviation", True, None),
    ("NC3  self-duality", "centred_self_duality", True, DUALITY),
    ("NC4  disagreement", "ncc_mismatch", True, None),
)


def draw(
    class_means: np.ndarray, W: np.ndarray | None, values: Mapping[str, float]
) -> Figure:
    """Return the figure of `Analysis.plot`.

    Args:
      class_means: (K, d) means of the classes measured.
      W: (K, d) rows of the classifier, or None.
      values: fields of `ncjax.CollapseMetrics` by name.
    """
    matrices = [("class means", class_means)]
    if W is not None:
        matrices.append(("classifier rows", W))
    with style(STYLE | {"axes.titlesize": 9, "font.size": 8.5}):
        widths = [*(1.0 for _ in matrices), 0.95]
        figure = Figure(figsize=(2.5 * sum(widths), 2.35), layout="constrained")
        *left, bars = figure.subplots(1, len(widths), width_ratios=widths)
        for axis, (name, _), letter in zip(left, matrices, "ab", strict=False):
            axis.set_title(f"({letter}) cosines of {name}", loc="left")
        if len(class_means) > _MOST_CELLS:
            _draw_histograms(left, [rows for _, rows in matrices])
        else:
            _draw_maps(figure, left, [rows for _, rows in matrices])
        bars.set_title(f"({'abc'[len(left)]}) metrics", loc="left")
        _draw_bars(bars, values)
    return figure


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Return the cosines (K, K) of centred rows, of at most 1000 evenly spaced ones."""
    rows = rows.astype(np.float64)
    rows = rows - rows.mean(axis=0)
    chosen = rows[:: -(-len(rows) // _MOST_ROWS)]
    norms = np.linalg.norm(chosen, axis=1, keepdims=True)
    unit = chosen / np.where(norms > 0, norms, np.nan)
    return np.clip(unit @ unit.T, -1, 1)


def _draw_histograms(axes: Sequence[Axes], matrices: Sequence[np.ndarray]) -> None:
    for axis, rows, colour in zip(axes, matrices, COLOURS, strict=False):
        cosines, simplex = _cosines(rows), -1 / (len(rows) - 1)
        pairs = cosines[np.triu_indices(len(cosines), k=1)]
        pairs = pairs[np.isfinite(pairs)]
        # Some room at both ends, because all cosines of an exact simplex are equal.
        ends = (min(pairs, default=0) - _ROOM, max(pairs, default=0) + _ROOM)
        axis.hist(pairs, bins=60, range=ends, color=colour, density=True)
        axis.axvline(simplex, color="#222222", ls=":", lw=1.2)
        axis.set(xlabel=f"cosine (dotted: simplex, {simplex:.2g})", yticks=[])
        axis.spines["left"].set_visible(False)


def _draw_maps(figure: Figure, axes: list[Axes], matrices: Sequence[np.ndarray]) -> None:
    """Draw heat maps whose white is the simplex, with one scale of colours."""
    num_classes = len(matrices[0])
    simplex = -1 / (num_classes - 1)
    # With two classes the simplex is the end of the scale.
    norm = TwoSlopeNorm(vcenter=simplex, vmin=min(-1, simplex - 1e-3), vmax=1)
    for axis, rows in zip(axes, matrices, strict=True):
        cosines = _cosines(rows)
        np.fill_diagonal(cosines, np.nan)
        axis.set_facecolor("#dcdcdc")
        image = axis.imshow(cosines, cmap=_MAP, norm=norm, interpolation="nearest")
        ends = [0, num_classes - 1]
        axis.set_xticks(ends, [str(end) for end in ends])
        axis.set_yticks(ends, [str(end) for end in ends])
        axis.tick_params(length=0)
        axis.set_xlabel("class", labelpad=-6)
        axis.spines[:].set_visible(False)
    ticks = sorted({-1.0, simplex, 1.0})
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=18, pad=0.02, ticks=ticks)
    labels = [f"{t:.2g}" + ("\nsimplex" if t == simplex else "") for t in ticks]
    bar.ax.set_yticklabels(labels, fontsize=8)
    bar.ax.spines[:].set_visible(False)


def _draw_bars(axis: Axes, values: Mapping[str, float]) -> None:
    """Draw the metrics that are numbers; 0 has no bar and is written out."""
    shown = [bar for bar in _BARS if np.isfinite(values[bar[1]])]
    sizes = [values[name] for _, name, _, _ in shown if values[name] > 0]
    low = 10 ** np.floor(np.log10(min([*sizes, WITHIN]) / 2))
    high = 10 ** np.ceil(np.log10(max([*sizes, DUALITY]) * 1.01))
    for y, (_, name, of_classifier, threshold) in enumerate(shown):
        value, colour = values[name], COLOURS[int(of_classifier)]
        if value > 0:
            axis.barh(y, value - low, left=low, height=0.62, color=colour)
        place = axis.get_yaxis_transform()
        axis.text(1.03, y, f"{value:.2g}", transform=place, va="center", fontsize=8)
        if threshold is not None:
            axis.plot([threshold] * 2, [y - 0.45, y + 0.45], color="#222222", lw=1.4)
    axis.set(xscale="log", xlim=(low, high), ylim=(len(shown) - 0.4, -0.6))
    axis.set_yticks(range(len(shown)), [label for label, *_ in shown], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("stroke: largest value called collapsed", fontsize=8)
