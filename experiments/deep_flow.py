"""Follow the flow of deep models from many starts, and count the codes they end at."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import _deep_cells, _deep_flows, _deep_results
from experiments._deep_cells import Cell
from experiments._runs import cli, files, folders, memory, precision, processes
from experiments._runs.errors import BadUse
from experiments._runs.progress import tqdm
from ncjax import plotting

NAME = "deep_flow"
OUTPUTS = (
    *("ends.csv", "shares.csv", "shares.md", "codes.csv", "codes.md", "trajectory.csv"),
    *("basins.png", "basins.pdf"),
)
_SECONDS = "seconds"  # in the checkpoint
_MOST_FACTORS = 20
_MOST_CLASSES = 20


@dataclasses.dataclass(frozen=True)
class Config(cli.SeveralProcesses):
    """Count the softmax codes that flows of p linear factors end at, by depth and scale.

    Example: python -m experiments.deep_flow --num_classes=6 --factors=3 --scales=0.3,3
    """

    num_classes: str = cli.flag("4,6", "K, numbers of classes", cli.MODEL)
    factors: str = cli.flag(
        "2,3,4", "p, numbers of factors: p - 1 layers and the features", cli.MODEL
    )
    widths: str = cli.flag("1,3", "widths of all layers, in multiples of K", cli.MODEL)
    scales: str = cli.flag(
        "0.25,0.75,2.5",
        "scales of the starts: deviation of an entry times the root of the width",
        cli.MODEL,
    )
    per_class: int = cli.flag(2, "n, samples of each class", cli.MODEL)
    seeds: int = cli.flag(64, "random starts of each K, p, width and scale", cli.SEEDS)
    seed: int = cli.flag(0, "seed of all random starts", cli.SEEDS)
    log_t_max: float = cli.flag(1e4, "last log t", cli.TIME)
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

    Write config.json; ends.csv with a row for each start; shares and codes as .csv and .md;
    trajectory.csv; basins.png and basins.pdf; and summary.json. This needs
    `jax_enable_x64`.

    Raises:
      BadUse: a setting is out of range or the folder cannot be used.
      OSError: a file cannot be written.
    """
    cells = _check(config)
    with processes.open_config(config, NAME, OUTPUTS) as (folder, finished):
        if not finished:
            _run(config, cells, folder)
    return folder


def _run(config: Config, cells: list[Cell], folder: Path) -> None:
    """Do the rest of the run in its folder, and save after each cell."""
    start = time.perf_counter()
    first = processes.is_first()
    stored = folders.load_checkpoint(folder) if first else None
    stored = processes.exchange_arrays(stored or {})[0]
    done = {name.partition(":")[0] for name in stored}
    before = float(stored.pop(_SECONDS, 0.0))
    with tqdm(cells, desc=NAME, unit="cell", disable=not first) as progress:
        for cell in progress:
            progress.set_postfix_str(cell.name)
            if cell.name in done:
                continue
            found = _deep_flows.flow_of(cell, config.seeds, config.seed, config.log_t_max)
            stored |= {f"{cell.name}:{key}": value for key, value in found.items()}
            seconds = before + time.perf_counter() - start
            if first:
                folders.save_checkpoint(folder, stored | {_SECONDS: np.asarray(seconds)})
    if first:
        _write(cells, folder, stored, round(before + time.perf_counter() - start, 1))


def _check(config: Config) -> list[Cell]:
    """Return the cells; raise BadUse if a setting is out of range, before any work."""
    precision.check_float64()
    minimums = {"per_class": 1, "seeds": 1}
    for name, bound in minimums.items():
        if getattr(config, name) < bound:
            raise BadUse(f"--{name} must be at least {bound}, got {getattr(config, name)}")
    cells = _deep_cells.cells(config)
    if max(cell.num_classes for cell in cells) > _MOST_CLASSES:
        raise BadUse(
            f"--num_classes must be at most {_MOST_CLASSES}, because every start is "
            f"compared with all codes, got {config.num_classes!r}"
        )
    if max(cell.factors for cell in cells) > _MOST_FACTORS:
        raise BadUse(f"--factors must be at most {_MOST_FACTORS}, got {config.factors!r}")
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    if not (math.isfinite(config.log_t_max) and config.log_t_max >= 10):
        raise BadUse(f"--log_t_max must be finite and at least 10, got {config.log_t_max}")
    for cell in cells:
        _check_memory(cell, config.seeds)
    return cells


def _check_memory(cell: Cell, seeds: int) -> None:
    """Raise BadUse if the states on the way exceed the memory."""
    samples = cell.num_classes * cell.per_class
    squares = (cell.factors - 2) * cell.width**2
    numbers = (samples + cell.num_classes) * cell.width + squares
    flags = "--seeds, --num_classes, --per_class, --widths or --factors"
    memory.check(8.0 * seeds * _deep_flows.NUM_TIMES * numbers, flags)


def _write(
    cells: list[Cell], folder: Path, stored: Mapping[str, np.ndarray], seconds: float
) -> None:
    """Write tables, figure and last summary.json, which marks the end."""
    results = _deep_results.of(cells, stored)
    for name, rows in results.tables.items():
        files.write_table(folder / name, rows)
    files.write_rows(folder / "ends.csv", results.ends)
    files.write_rows(folder / "trajectory.csv", results.trajectory)
    files.write_files(folder / "basins", plotting.render(results.figure))
    summary = {"seconds": seconds, **results.tables, **results.totals}
    folders.write_summary(folder, summary | folders.provenance(), OUTPUTS)
    folders.drop_checkpoint(folder)
    print(_deep_results.report(summary))


PAGE = _deep_results.PAGE


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
