"""Animate four classes in three dimensions along the exact flow."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ncjax
from experiments import _legs, _scene
from experiments._labels import LABELS
from experiments._runs import cli, files, folders, memory, page, precision
from experiments._runs.errors import BadUse, RunFailed
from experiments._runs.progress import tqdm
from ncjax.flow.solve import SUCCESS

NAME = "animation"
OUTPUTS = ("collapse.gif", "collapse.png")
K, D = 4, 3
# Place of a frame on the clock, as a power of its share: above 1 the start has more frames.
_EASE = 2
_MILLISECONDS, _LAST_MILLISECONDS = 50, 2000
_PIXELS = (200, 4000)
_PANELS = {
    "within_class_quotient": (
        "NC1  samples meet their mean",
        r"$\mathrm{Tr}\,\Sigma_W \,/\, \mathrm{Tr}\,\Sigma_B$",
    ),
    "mean_cosine_deviation": (
        "NC2  class means form a simplex",
        r"mean $\vert\,\cos\angle + 1/3\,\vert$",
    ),
    "centred_self_duality": (
        "NC3  classifier meets the means",
        r"$\Vert\, W/\Vert W\Vert - M/\Vert M\Vert\, \Vert$",
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Animate the collapse of 4 classes in 3 dimensions, in half a minute.

    Example: python -m experiments.animation --workdir=results/animation
    """

    per_class: int = cli.flag(12, "n, samples of each class", cli.MODEL)
    seed: int = cli.flag(61, "seed of the random start", cli.SEEDS)
    log_t_max: float = cli.flag(
        100.0, "last time, as natural log of physical time t", cli.TIME
    )
    frames: int = cli.flag(120, "pictures, 20 a second", cli.OUTPUT)
    width: int = cli.flag(800, "width in pixels; the height is 0.6 times it", cli.OUTPUT)
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)


def run(config: Config) -> Path:
    """Run the experiment and return its folder.

    Write config.json, collapse.gif, collapse.png (its last frame) and summary.json. This
    needs `jax_enable_x64`.

    The picture shows the features minus their global mean, divided by their root mean
    square length, because lengths grow without bound; the classifier likewise. `arrange`
    turns both so that the simplex stands upright. The metrics see none of this.

    Raises:
      BadUse: a setting is out of range, or the folder cannot be used.
      OSError: a file cannot be written.
      RunFailed: the flow failed.
    """
    _check(config)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, _):
        _run(config, folder)
    return folder


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    precision.check_float64()
    if config.per_class < 2:
        raise BadUse(f"--per_class must be at least 2, got {config.per_class}")
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    if not (math.isfinite(config.log_t_max) and config.log_t_max > 1):
        raise BadUse(f"--log_t_max must be above 1 and finite, got {config.log_t_max}")
    if config.frames < 2:
        raise BadUse(f"--frames must be at least 2, got {config.frames}")
    low, high = _PIXELS
    if not low <= config.width <= high:
        raise BadUse(f"--width must lie in [{low}, {high}], got {config.width}")
    numbers = K * D * (config.per_class + 1)
    pixels = 0.6 * config.width**2
    memory.check(
        config.frames * (8.0 * numbers + pixels), "--frames, --per_class or --width"
    )


def _run(config: Config, folder: Path) -> None:
    """Do the run in its folder."""
    clock, log_times = frame_times(config.log_t_max, config.frames)
    states, columns = _flow(config, log_times)
    scene = _scene.Scene(log_times, clock, *arrange(states))
    curves = [_scene.Curve(*words, columns[name]) for name, words in _PANELS.items()]
    pictures = _scene.pictures(scene, curves, config.width)
    with tqdm(pictures, desc="draw", total=config.frames, unit="frame") as progress:
        animation = _scene.gif(progress, _MILLISECONDS, _LAST_MILLISECONDS)
    _write(folder, animation, log_times, columns)


def _flow(
    config: Config, log_times: np.ndarray
) -> tuple[ncjax.Params, dict[str, np.ndarray]]:
    """Return states (F, ...) along the flow, and collapse metrics (F,) by name."""
    flow = ncjax.gradient_flow(
        ncjax.init_params(jax.random.key(config.seed), K, config.per_class, D),
        log_times,
        record=_observe,
        max_steps=_legs.step_limit(config.log_t_max),
    )
    if flow.result != SUCCESS:
        raise RunFailed(
            f"the flow failed, with result code {int(flow.result)} of ncjax.gradient_flow: "
            "give a smaller --log_t_max"
        )
    states, metrics = jax.tree.map(np.asarray, flow.recorded)
    return states, metrics._asdict()


def _observe(params: ncjax.Params) -> tuple[ncjax.Params, ncjax.CollapseMetrics]:
    return params, ncjax.collapse_metrics(params)


def frame_times(log_t_max: float, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clock x = log(1 + log(1 + t)) (F,) and log t (F,) of each frame.

    The first frame is at t = 0, the last at log t = `log_t_max`.
    """
    last = np.log1p(np.logaddexp(0, log_t_max))
    clock = last * np.linspace(0, 1, frames) ** _EASE
    u = np.expm1(clock)  # log(1 + t)
    with np.errstate(divide="ignore"):
        log_times = u + np.log(-np.expm1(-u))
    log_times[-1] = log_t_max
    return clock, log_times


def arrange(params: ncjax.Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (F, K, n, 3), classifier (F, K, 3) and simplex (K, 3) as shown.

    At each time, subtract the global mean of the features and divide by the root mean
    square of their lengths; do the same with the rows of the classifier. Then apply to
    all times the one orthogonal matrix that brings the last class means nearest to a
    simplex with a corner on top (Procrustes).
    """
    W, H = (np.asarray(leaf) for leaf in params)
    centred_W = W - W.mean(axis=1, keepdims=True)
    centred_H = H - H.mean(axis=(1, 2), keepdims=True)
    simplex = _upright_simplex()
    left, _, right = np.linalg.svd(centred_H[-1].mean(axis=1).T @ simplex)
    turn = left @ right
    features, classifier = (_at_unit_length(rows) @ turn for rows in (centred_H, centred_W))
    return features, classifier, simplex


def _at_unit_length(rows: np.ndarray) -> np.ndarray:
    """Divide `rows` (F, ..., 3) by their root mean square length at each time."""
    axes = tuple(range(1, rows.ndim - 1))
    squares = np.sum(rows**2, axis=-1, keepdims=True)
    return rows / np.sqrt(squares.mean(axis=axes, keepdims=True))


def _upright_simplex() -> np.ndarray:
    """Return the simplex ETF (K, 3) with its first corner at (0, 0, 1)."""
    etf = np.asarray(ncjax.simplex_etf(K, D))
    axes, _ = np.linalg.qr(np.stack([etf[0], etf[1], etf[2]], axis=1))
    axes = axes[:, [1, 2, 0]] * np.sign(axes[:, 0] @ etf[0])
    return etf @ axes


def _write(
    folder: Path, animation: bytes, log_times: np.ndarray, columns: dict[str, np.ndarray]
) -> None:
    """Write the animation, its last frame and last summary.json, which marks the end."""
    stills = {".gif": animation, ".png": _scene.last_frame(animation)}
    files.write_files(folder / "collapse", stills)
    points = {
        name: {"log_t": float(log_times[frame])}
        | {metric: float(values[frame]) for metric, values in columns.items()}
        for name, frame in (("first_frame", 0), ("last_frame", -1))
    }
    size = {"frames": log_times.size, "bytes": len(animation)}
    summary = points | size | folders.provenance("matplotlib", "pillow")
    folders.write_summary(folder, summary, OUTPUTS)
    print(f"{log_times.size} frames, {len(animation) / 1e6:.2f} MB")


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report the metrics of the first and the last frame."""
    frames = [summary["first_frame"], summary["last_frame"]]
    rows = [
        [LABELS[name], *(page.number(frame[name]) for frame in frames)]
        for name in LABELS
        if name in frames[0]
    ]
    last = page.number(frames[-1]["log_t"])
    table = page.Table(
        "Collapse metrics of the first and the last frame",
        ["metric", "first frame, t = 0", f"last frame, log t = {last}"],
        rows,
    )
    verdict = f"{summary['frames']} frames, {summary['bytes'] / 1e6:.2f} MB"
    return page.Findings(page.GOOD, verdict, [table])


PAGE = page.Page(
    title="Animation of the collapse of four classes in three dimensions",
    figures={
        "collapse.png": "The last frame: features and classifier meet at the corners of a "
        "simplex."
    },
    show=_findings,
)


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
