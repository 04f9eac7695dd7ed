"""Test how far a trained network's last layer is from optimal, as a peeled model."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp

import ncjax
from experiments import _legs, _training
from experiments._last_layer import describe
from experiments._runs import cli, files, folders, precision
from experiments._runs.errors import BadUse, RunFailed, checks
from experiments._runs.progress import tqdm
from ncjax import plotting
from ncjax.flow.solve import SUCCESS

NAME = "peel"
OUTPUTS = ("metrics.csv", "peel.csv", "peel.md", "flow.png", "flow.pdf")


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Compute certificate, curvature and flow of the last layer of a trained network.

    Example: python -m experiments.peel --run=runs/train_resnet/20261124-120000
    """

    run: str = cli.path_flag(
        "", "run folder of a network, with its checkpoints; required", cli.DATA
    )
    index: int = cli.flag(0, "number of the network, for a run of several seeds", cli.DATA)
    per_class: int = cli.flag(
        20, "n, number of first training images of each class; 0 for all", cli.DATA
    )
    balance: bool = cli.flag(
        True, "rescale W and H to equal norms first; no logit changes", cli.MODEL
    )
    log_t_max: float = cli.flag(
        1000.0, "last time of the flow, as natural log of physical time t", cli.TIME
    )
    num_times: int = cli.flag(
        100, f"times measured, rounded up to a multiple of {_legs.LEGS}", cli.TIME
    )
    data_dir: str = cli.path_flag(
        "", "folder of TFDS; if empty, TFDS_DATA_DIR or its default", cli.DATA
    )
    cpu_devices: int = cli.flag(
        1, "JAX devices that a CPU is split into; 1 is fastest", cli.MACHINE
    )
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)
    resume: bool = cli.flag(False, "resume the run in workdir", cli.FOLDER)


def run(config: Config) -> Path:
    """Run the experiment and return its folder.

    Write config.json, peel.csv and peel.md (the network's point and the end of the flow
    from it), metrics.csv (along the flow), flow.png, flow.pdf and summary.json. This needs
    `jax_enable_x64`.

    Raises:
      BadUse: a setting is out of range, or a folder cannot be used.
      OSError: the training set cannot be read, or a file cannot be written.
      RunFailed: the flow failed.
    """
    _check(config)
    source = (Path(config.run), config.data_dir, config.index)
    _training.stored_run(*source)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, finished):
        if not finished:
            _run(config, _training.load_trained(*source), folder)
    return folder


def _run(config: Config, trained: _training.Trained, folder: Path) -> None:
    """Do the rest of the run in its folder."""
    network = _peel(trained, config.per_class)
    start = _balance(network) if config.balance else network
    log_times = _legs.log_times(config.log_t_max, config.num_times)
    starts = jax.tree.map(lambda leaf: leaf[None], start)
    columns, steps, ends = _legs.solve(starts, log_times, _legs.measure_collapse, folder)
    if steps[-1, 0, 2] != SUCCESS:
        raise RunFailed(
            f"the flow failed in leg {len(steps)} of {_legs.LEGS}, with result code "
            f"{steps[-1, 0, 2]} of ncjax.gradient_flow: give a smaller --log_t_max"
        )
    end = jax.tree.map(lambda leaf: leaf[0], ends)
    points = {"network": network, "balanced": start, f"at_log_t_{log_times[-1]:g}": end}
    if not config.balance:
        del points["balanced"]
    with tqdm(points.items(), desc="describe") as progress:
        descriptions = {title: describe(point) for title, point in progress}
    _write(folder, trained, log_times, columns, descriptions)


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    precision.check_float64()
    if not config.run:
        raise BadUse("--run=DIR is needed: the folder of a training run")
    if config.workdir and Path(config.workdir).resolve() == Path(config.run).resolve():
        raise BadUse("--workdir must differ from --run")
    if config.per_class < 0:
        raise BadUse(f"--per_class must not be negative, got {config.per_class}")
    if not (math.isfinite(config.log_t_max) and config.log_t_max > 1):
        raise BadUse(f"--log_t_max must be above 1 and finite, got {config.log_t_max}")
    if config.num_times < 1:
        raise BadUse(f"--num_times must be at least 1, got {config.num_times}")
    _legs.check_memory(1, 2, 1, 1, config.num_times)


@checks()
def _peel(trained: _training.Trained, per_class: int) -> ncjax.Params:
    """Return the last layer as a point, in float64."""
    bias = None if trained.bias is None else trained.bias.astype(jnp.float64)
    return ncjax.peel(
        trained.features.astype(jnp.float64),
        trained.labels,
        trained.weight.astype(jnp.float64),
        bias,
        per_class=per_class or None,
    )


@checks()
def _balance(network: ncjax.Params) -> ncjax.Params:
    """Return the point with equal norms of W and H."""
    return ncjax.balance_norms(network)


def _write(folder: Path, trained, log_times, columns, points) -> None:
    """Write the tables, the figure and last summary.json, which marks the end."""
    names = next(iter(points.values())).keys()
    rows = [
        {"quantity": name} | {title: point[name] for title, point in points.items()}
        for name in names
    ]
    files.write_table(folder / "peel", rows)
    files.write_csv(folder / "metrics.csv", log_times, columns)
    figure = plotting.figure_over_log_log_t(log_times, plotting.collapse_panels(columns))
    files.write_files(folder / "flow", plotting.render(figure))
    summary = {"network": trained.title, "points": points} | folders.provenance("flax")
    folders.write_summary(folder, summary, OUTPUTS)
    folders.drop_checkpoint(folder)
    print(f"{trained.title}\n\n{(folder / 'peel.md').read_text()}")


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
