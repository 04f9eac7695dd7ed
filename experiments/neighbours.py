"""Compare the models of Table 1: optimum, speed, certificate, minority collapse."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import _legs, _neighbours_parts, _neighbours_results
from experiments._neighbours_models import Sizes
from experiments._runs import cli, files, folders, memory, precision
from experiments._runs.errors import BadUse
from experiments._runs.progress import tqdm
from ncjax import plotting

NAME = "neighbours"
OUTPUTS = (
    *("models.csv", "models.md", "flows.csv", "flows.png", "flows.pdf"),
    *("path.csv", "path.md", "path.png", "path.pdf"),
    *("minority.csv", "minority.md", "minority.png", "minority.pdf"),
)
_MOST_DECAY = 0.5
_SECONDS = "seconds"  # in the checkpoint


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Compare ULPM, UFM, LPM and their variants: closed forms against flows.

    Example: python -m experiments.neighbours --seeds=8
    """

    num_classes: int = cli.flag(4, "K, number of classes of all models", cli.MODEL)
    per_class: int = cli.flag(3, "n, samples of each class if balanced", cli.MODEL)
    ratio: int = cli.flag(
        4, "R, samples of the large classes if imbalanced; the small have 1", cli.MODEL
    )
    dim: int = cli.flag(6, "d, feature dimension, at least K", cli.MODEL)
    decay: float = cli.flag(
        0.1, "weight decay of W and H, for a loss summed over samples", cli.MODEL
    )
    seeds: int = cli.flag(8, "random starts of each flow", cli.SEEDS)
    seed: int = cli.flag(0, "seed of all random starts", cli.SEEDS)
    log_t_max: float = cli.flag(
        1e4, "last log t of the flows without decay; others converge", cli.TIME
    )
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)
    resume: bool = cli.flag(False, "resume the run in workdir", cli.FOLDER)


def run(config: Config) -> Path:
    """Run the experiment and return its folder.

    Write config.json; the tables models, path and minority as .csv and .md; flows.csv; the
    figures flows, path and minority as .png and .pdf; and summary.json. This needs
    `jax_enable_x64`.

    The path has classes of 2 sizes in d = 5, and minority collapse has 10 classes, whatever
    the flags for the sizes of the models.

    Raises:
      BadUse: a setting is out of range or the folder cannot be used.
      OSError: a file cannot be written.
    """
    _check(config)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, finished):
        if not finished:
            _run(config, folder)
    return folder


def _run(config: Config, folder: Path) -> None:
    """Do the rest of the run in its folder, and save after each part."""
    start = time.perf_counter()
    stored = folders.load_checkpoint(folder) or {}
    done = {name.partition(":")[0] for name in stored}
    before = float(stored.pop(_SECONDS, 0.0))
    parts = _neighbours_parts.parts(sizes_of(config), config)
    with tqdm(parts.items(), desc=NAME, unit="part") as progress:
        for name, compute in progress:
            progress.set_postfix_str(name)
            if name in done:
                continue
            stored |= {f"{name}:{key}": value for key, value in compute().items()}
            seconds = before + time.perf_counter() - start
            folders.save_checkpoint(folder, stored | {_SECONDS: np.asarray(seconds)})
    _write(config, folder, stored, round(before + time.perf_counter() - start, 1))


def sizes_of(config: Config) -> Sizes:
    """Return the sizes of the models."""
    return Sizes(
        config.num_classes, config.per_class, config.dim, config.ratio, config.decay
    )


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    precision.check_float64()
    minimums = {"num_classes": 3, "per_class": 1, "ratio": 2, "seeds": 1}
    for name, bound in minimums.items():
        if getattr(config, name) < bound:
            raise BadUse(f"--{name} must be at least {bound}, got {getattr(config, name)}")
    if config.dim < config.num_classes:
        raise BadUse(
            f"--dim must be at least --num_classes = {config.num_classes}, because the "
            f"squared error needs K dimensions, got {config.dim}"
        )
    if not 0 < config.decay <= _MOST_DECAY:
        raise BadUse(
            f"--decay must lie in (0, {_MOST_DECAY}], where no minimiser is 0, got "
            f"{config.decay}"
        )
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    if not (math.isfinite(config.log_t_max) and config.log_t_max >= 100):
        raise BadUse(f"--log_t_max must be finite and at least 100, got {config.log_t_max}")
    per_class = max(config.per_class, config.ratio)
    _legs.check_memory(config.seeds, config.num_classes, per_class, config.dim, 1000)
    variables = config.num_classes * (per_class + 1) * config.dim
    memory.check(16.0 * variables**2, "--num_classes, --per_class, --ratio or --dim")


def _write(
    config: Config, folder: Path, stored: Mapping[str, np.ndarray], seconds: float
) -> None:
    """Write tables, figures and last summary.json, which marks the end."""
    models = _neighbours_parts.labels(sizes_of(config))
    results = _neighbours_results.of(stored, models, config.decay)
    for name, rows in results.tables.items():
        files.write_table(folder / name, rows)
    files.write_rows(folder / "flows.csv", results.flows)
    for name, figure in results.figures.items():
        files.write_files(folder / name, plotting.render(figure))
    summary = {"seconds": seconds, **results.tables} | folders.provenance()
    folders.write_summary(folder, summary, OUTPUTS)
    folders.drop_checkpoint(folder)
    print(_neighbours_results.report(summary))


PAGE = _neighbours_results.PAGE


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
