"""Moving pictures of four classes in three dimensions, and their GIF."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import LogLocator
from PIL import Image

from ncjax import plotting

# Distinct with protanopia, deuteranopia and tritanopia too: by the matrices of Machado
# et al. (2009) the CIE76 distance of every pair stays above 20.
COLOURS = np.array([to_rgb(c) for c in ("#1b6ca8", "#b8432f", "#f2b134", "#6fb3a0")])
_INK, _TEXT, _AXIS, _AHEAD, _SIMPLEX = "#262626", "#4d4d4d", "#8a8a8a", "#d0d0d0", "#a6a6a6"
_STYLE: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SIZE = (8.0, 4.8)  # inches, at --width / 8 dots per inch
_SCENE_SHARE = 0.6  # of the width; the panels have the rest
_TICKS = (0, 1, 3, 10, 30, 100, 1000, 10_000, 100_000, 1_000_000)  # log t
# The camera.
_DISTANCE = 6.0
_ELEVATION = 0.26  # radians
_FIRST_ANGLE, _TURN = -0.5, 2.86  # radians
_HALF_WIDTHS = (1.72, 1.13)  # of the picture, first and last
_CENTRES = (0.1, 0.17)  # height that the middle of the picture shows, first and last
_ZOOMED_AT = 0.55  # share of the frames
# Steps from each colour to white. With white, and the transparent colour that Pillow adds
# for "as in the frame before", they make 64 colours: six bits a pixel. Pillow's search is
# coarse and would draw white in a grey that is much nearer to it.
_STEPS, _GREY_STEPS = 10, 22


class Scene(NamedTuple):
    """Four classes at F times, in one unit of length."""

    log_times: np.ndarray  # (F,) natural logarithms of time, -inf at first
    clock: np.ndarray  # (F,) x = log(1 + log(1 + t))
    features: np.ndarray  # (F, 4, n, 3)
    classifier: np.ndarray  # (F, 4, 3)
    simplex: np.ndarray  # (4, 3)


class Curve(NamedTuple):
    """A metric and the panel that shows it."""

    title: str
    formula: str
    values: np.ndarray  # (F,)


class _Shot(NamedTuple):
    """Position and zoom of the camera in one frame."""

    angle: float
    half_width: float
    centre: float


def pictures(scene: Scene, curves: Sequence[Curve], width: int) -> Iterator[Image.Image]:
    """Yield the frames in RGB, `width` pixels wide and 0.6 times as high."""
    with plotting.style(_STYLE):
        figure = Figure(figsize=_SIZE, dpi=width / _SIZE[0])
        canvas = FigureCanvasAgg(figure)
        parts: list[_Space | _Clock | _Panels] = [
            _Space(figure, scene),
            _Clock(figure, scene),
            _Panels(figure, scene, curves),
        ]
        moving = [artist for part in parts for artist in part.moving]
        for artist in moving:
            artist.set_animated(True)
        canvas.draw()
        still = canvas.copy_from_bbox(figure.bbox)
        for frame in range(scene.clock.size):
            canvas.restore_region(still)
            for part in parts:
                part.show(frame)
            for artist in sorted(moving, key=lambda artist: artist.get_zorder()):
                artist.draw(canvas.get_renderer())
            yield Image.fromarray(np.array(canvas.buffer_rgba())[..., :3])


def gif(frames: Iterable[Image.Image], milliseconds: int, last: int) -> bytes:
    """Return an endless GIF of frames in RGB, in one palette and without dithering.

    Args:
      frames: at least two.
      milliseconds: time that a frame is shown.
      last: time that the last frame is shown, in milliseconds.
    """
    palette = _palette()
    first, *others = [
        frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
    ]
    buffer = io.BytesIO()
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=others,
        duration=[milliseconds] * len(others) + [last],
        loop=0,
        optimize=True,
    )
    return buffer.getvalue()


def last_frame(animation: bytes) -> bytes:
    """Return the last frame of a GIF as PNG."""
    with Image.open(io.BytesIO(animation)) as image:
        image.seek(getattr(image, "n_frames", 1) - 1)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _palette() -> Image.Image:
    """Return a palette of white, and of the colours of classes and ink in steps to it."""
    steps = [
        *((colour, _STEPS) for colour in COLOURS),
        (np.array(to_rgb(_INK)), _GREY_STEPS),
    ]
    ramps = [
        _pale(colour, np.linspace(1, 0, count, endpoint=False)[:, None])
        for colour, count in steps
    ]
    colours = np.concatenate([np.ones((1, 3)), *ramps])
    image = Image.new("P", (1, 1))
    image.putpalette(np.rint(255 * colours).astype(np.uint8).tobytes())
    return image


class _Space:
    """Samples, class means, classifier and simplex, on the left."""

    def __init__(self, figure: Figure, scene: Scene):
        self._scene = scene
        self._axis = axis = figure.add_axes((0, 0, _SCENE_SHARE, 1))
        axis.set_axis_off()
        self._edges, self._spokes = (LineCollection([], zorder=z) for z in (1, 2))
        axis.add_collection(self._edges)
        axis.add_collection(self._spokes)
        self._samples = axis.scatter([], [], zorder=3, edgecolors="white", linewidths=0.5)
        self._means = axis.scatter([], [], zorder=4, linewidths=1.5)
        self._rows = [_arrow(colour) for colour in COLOURS]
        for row in self._rows:
            axis.add_patch(row)
        lines, points = [self._edges, self._spokes], [self._samples, self._means]
        self.moving: list[Artist] = [*lines, *points, *self._rows]
        _legend(figure)

    def show(self, frame: int) -> None:
        shot = _shot(frame / (self._scene.clock.size - 1))
        half_height = shot.half_width * _SIZE[1] / (_SCENE_SHARE * _SIZE[0])
        self._axis.set_xlim(-shot.half_width, shot.half_width)
        self._axis.set_ylim(shot.centre - half_height, shot.centre + half_height)
        self._show_simplex(shot)
        self._show_features(self._scene.features[frame], shot)
        self._show_classifier(self._scene.classifier[frame], shot)

    def _show_simplex(self, shot: _Shot) -> None:
        corners, nearness = _project(self._scene.simplex, shot.angle)
        pairs = np.stack(np.triu_indices(4, k=1), axis=1)
        near = nearness[pairs].mean(axis=1)
        self._edges.set(
            segments=corners[pairs],
            color=_fade(np.array(to_rgb(_SIMPLEX)), near[:, None]),
            linewidths=1.1 + 0.5 * near,
        )

    def _show_features(self, features: np.ndarray, shot: _Shot) -> None:
        zoom = _HALF_WIDTHS[1] / shot.half_width
        points, nearness = _project(features, shot.angle)
        means, mean_nearness = _project(features.mean(axis=1), shot.angle)
        per_class = features.shape[1]
        spokes = np.stack(np.broadcast_arrays(points, means[:, None]), axis=2)
        self._spokes.set(
            segments=spokes.reshape(-1, 2, 2),
            color=np.repeat(_pale(COLOURS, 0.3), per_class, axis=0),
            linewidths=0.6,
        )
        order = np.argsort(nearness.ravel())
        near = nearness.ravel()[order]
        self._samples.set(
            offsets=points.reshape(-1, 2)[order],
            facecolor=_fade(COLOURS[order // per_class], near[:, None]),
            sizes=36 * zoom * (1 + 0.3 * near),
        )
        order = np.argsort(mean_nearness)
        self._means.set(
            offsets=means[order],
            facecolor=_pale(COLOURS[order], 0.4),
            edgecolor=COLOURS[order],
            sizes=190 * zoom * (1 + 0.25 * mean_nearness[order]),
        )

    def _show_classifier(self, classifier: np.ndarray, shot: _Shot) -> None:
        tips, nearness = _project(classifier, shot.angle)
        for row, tip, near in zip(self._rows, tips, nearness, strict=True):
            row.set_positions((0, 0), tip)
            row.set_zorder(5 + 0.1 * near)


class _Clock:
    """The time, above on the left."""

    def __init__(self, figure: Figure, scene: Scene):
        self._log_times = scene.log_times
        self._log_t = figure.text(0.025, 0.9, "", fontsize=25, color=_INK)
        self._t = figure.text(0.027, 0.845, "", fontsize=13.5, color=_AXIS)
        self.moving: list[Artist] = [self._log_t, self._t]

    def show(self, frame: int) -> None:
        log_t = float(self._log_times[frame])
        shown = r"-\infty" if np.isinf(log_t) else f"{log_t:.1f}"
        self._log_t.set_text(rf"$\log t = {shown}$")
        self._t.set_text(f"${_plain_time(log_t)}$")


def _plain_time(log_t: float) -> str:
    if log_t < np.log(1000):
        return f"t = {np.exp(log_t):.3g}"
    return rf"t \approx 10^{{{log_t / np.log(10):.0f}}}"


class _Panels:
    """The metrics so far, on the right."""

    def __init__(self, figure: Figure, scene: Scene, curves: Sequence[Curve]):
        self._x, self._curves = scene.clock, curves
        self._lines: list[tuple[Line2D, Line2D]] = []
        for place, curve in enumerate(curves):
            bottom = 0.735 - 0.3 * place
            axis = figure.add_axes((0.66, bottom, 0.31, 0.185))
            axis.plot(scene.clock, curve.values, color=_AHEAD, lw=1.5)
            (line,) = axis.plot([], [], color=_INK, lw=1.9)
            (dot,) = axis.plot([], [], "o", color=_INK, ms=7, clip_on=False)
            self._lines.append((line, dot))
            _finish(axis, scene, curve)
        axis.set_xlabel(r"$\log t$", fontsize=12, color=_TEXT, labelpad=1)
        self.moving: list[Artist] = [artist for pair in self._lines for artist in pair]

    def show(self, frame: int) -> None:
        for (line, dot), curve in zip(self._lines, self._curves, strict=True):
            line.set_data(self._x[: frame + 1], curve.values[: frame + 1])
            dot.set_data(self._x[[frame]], curve.values[[frame]])


def _finish(axis: Axes, scene: Scene, curve: Curve) -> None:
    """Set scales, ticks and words of a panel."""
    axis.set_yscale("log")
    decades = np.log10(curve.values[curve.values > 0])
    axis.set_ylim(10 ** np.floor(decades.min()), 10 ** np.ceil(decades.max()))
    axis.yaxis.set_major_locator(LogLocator(numticks=4))
    axis.minorticks_off()
    axis.set_xlim(0, scene.clock[-1])
    ticks = [log_t for log_t in _TICKS if log_t <= scene.log_times[-1]]
    positions = [0, *np.log1p(np.logaddexp(0, ticks))]
    axis.set_xticks(positions, [r"$-\infty$", *(f"{log_t}" for log_t in ticks)])
    axis.tick_params(labelsize=10.5, length=2.5, color=_AXIS, labelcolor=_TEXT)
    axis.spines[["left", "bottom"]].set_color(_AXIS)
    axis.set_title(curve.title, loc="left", fontsize=13, color=_INK, pad=5)
    axis.text(
        *(0.03, 0.06, curve.formula),
        transform=axis.transAxes,
        fontsize=11.5,
        color=_TEXT,
    )


def _arrow(colour: np.ndarray) -> FancyArrowPatch:
    return FancyArrowPatch(
        *((0, 0), (1, 0)),
        arrowstyle="-|>,head_width=3.6,head_length=7.5",
        color=tuple(colour),
        lw=2.6,
        shrinkA=0,
        shrinkB=0,
        joinstyle="miter",
    )


def _legend(figure: Figure) -> None:
    grey: dict[str, Any] = {"color": _AXIS, "ls": ""}
    handles = [
        Line2D([], [], marker="o", ms=5.5, mew=0, **grey),
        Line2D([], [], marker="o", ms=11, mfc="#d6d6d6", mew=1.4, **grey),
        Line2D([], [], marker=r"$\rightarrow$", ms=17, **grey),
        Line2D([], [], color=_SIMPLEX, lw=1.2),
    ]
    figure.legend(
        handles,
        ["sample", "class mean", "classifier", "simplex"],
        loc="lower left",
        bbox_to_anchor=(0.012, 0.005),
        ncols=4,
        frameon=False,
        fontsize=12.5,
        labelcolor=_TEXT,
        handlelength=1.3,
        handletextpad=0.45,
        columnspacing=1.3,
    )


def _shot(share: float) -> _Shot:
    """Return the camera after this share of the frames: it turns and comes nearer."""
    way = np.clip(share / _ZOOMED_AT, 0, 1)
    way = way * way * (3 - 2 * way)
    return _Shot(
        angle=_FIRST_ANGLE + _TURN * (1 - (1 - share) ** 1.5),
        half_width=(1 - way) * _HALF_WIDTHS[0] + way * _HALF_WIDTHS[1],
        centre=(1 - way) * _CENTRES[0] + way * _CENTRES[1],
    )


def _project(points: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (..., 2) in perspective, and nearness (...), of `points`."""
    x, y, z = np.moveaxis(points, -1, 0)
    right = np.cos(angle) * x - np.sin(angle) * y
    away = np.sin(angle) * x + np.cos(angle) * y
    up = np.cos(_ELEVATION) * z + np.sin(_ELEVATION) * away
    away = np.cos(_ELEVATION) * away - np.sin(_ELEVATION) * z
    scale = _DISTANCE / (_DISTANCE + away)
    return np.stack([scale * right, scale * up], axis=-1), -away


def _fade(colours: np.ndarray, nearness: np.ndarray) -> np.ndarray:
    """Return colours (..., 3), paler with the distance from the eye."""
    return _pale(colours, np.clip(0.78 + 0.3 * nearness, 0.35, 1))


def _pale(colours: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Mix colours (..., 3) with white; `share` is the share of the colours."""
    return 1 - share * (1 - colours)
