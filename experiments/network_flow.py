"""Follow the gradient flow of a network to times at which it collapses."""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

from experiments import _flow_record, _record, _training
from experiments._flow_loop import CHECKPOINTS, ENDINGS, Loop
from experiments._flow_setup import set_up, training_config
from experiments._runs import cli, files, folders, memory
from experiments._runs.errors import BadUse, RunFailed
from experiments._runs.interruption import Interruption
from ncjax.networks import checkpoint, flow, models

NAME = "network_flow"
OUTPUTS = (
    *(_record.METRICS_FILE, CHECKPOINTS),
    *("collapse.png", "collapse.pdf", "margins.png", "margins.pdf"),
    *("duality.png", "duality.pdf", "homogeneity.png", "homogeneity.pdf"),
    *("collapse.csv", "collapse.md", "peel.csv", "peel.md"),
)
_PACKAGES = ("flax", "optax", "orbax-checkpoint", "tensorflow-datasets")
# Settings that a resumed run may change.
_EXTENDABLE = ("log_t_max", "max_gradients")
_LARGEST = 2**31 - 1
_RANGES = {
    "max_stages": (2, 1000),  # the tables of a method have as many rows and columns
    "max_gradients": (1, _LARGEST),
    "num_groups": (1, _LARGEST),
    "warm_epochs": (0, _LARGEST),
}


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Follow the gradient flow of a network, without weight decay, until it collapses.

    Example: python -m experiments.network_flow --model=convnet --per_class=50
    """

    model: str = cli.flag(
        "resnet18", "resnet18, 34, 50, vgg11, 13, 16, 19, mlp or convnet", cli.MODEL
    )
    width: float = cli.flag(
        1.0, "factor of the number of channels of every layer", cli.MODEL
    )
    stem: str = cli.flag(
        "cifar", "of ResNet: cifar (3x3) or imagenet (7x7, then max pooling)", cli.MODEL
    )
    norm: str = cli.flag(
        "batch", "batch, or none: homogeneous, without normalisation and biases", cli.MODEL
    )
    use_bias: bool = cli.flag(True, "a bias in the classifier", cli.MODEL)
    init_scale: float = cli.flag(1.0, "factor of all initial weights", cli.MODEL)
    dataset: str = cli.flag("digits", "digits (no download), or a set of TFDS", cli.DATA)
    train_split: str = cli.flag(
        "train", "such as 'train[:20%]', as TFDS writes splits", cli.DATA
    )
    test_split: str = cli.flag("", "measured, never trained on; empty for none", cli.DATA)
    data_dir: str = cli.path_flag(
        "", "folder of TFDS; if empty, TFDS_DATA_DIR or its default", cli.DATA
    )
    per_class: int = cli.flag(
        0, "first n training images of each class; 0 for all", cli.DATA
    )
    image_size: int = cli.flag(
        0, "pixels that images are padded to with zeros; 0: as needed", cli.DATA
    )
    random_labels: bool = cli.flag(
        False, "shuffle the training labels, as a control", cli.DATA
    )
    num_groups: int = cli.flag(
        1, "parts of the set that batch normalisation sees, one at a time", cli.DATA
    )
    seed: int = cli.flag(0, "seed of all initial weights", cli.SEEDS)
    seeds: int = cli.flag(1, "networks, one after the other", cli.SEEDS)
    log_t_max: float = cli.flag(
        300.0, "last time, as natural log of physical time t", cli.TIME
    )
    method: str = cli.flag("stabilised", "stabilised, or descent", cli.TIME)
    max_stages: int = cli.flag(
        flow.MAX_STAGES, "most gradients in a step of the stabilised method", cli.TIME
    )
    max_gradients: int = cli.flag(
        10_000, "gradients of the whole set, at most, per seed", cli.TIME
    )
    measurements: int = cli.flag(
        20, "rows of metrics.csv per factor of ten in log t, at most", cli.TIME
    )
    warm_epochs: int = cli.flag(
        0, "epochs of mini-batches before t = 0, for large sets", cli.TRAINING
    )
    batch_size: int = cli.flag(50, "images of a mini-batch of a warm epoch", cli.TRAINING)
    learning_rate: float = cli.flag(
        0.05, "step size of a warm epoch, with momentum 0.9", cli.TRAINING
    )
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)
    resume: bool = cli.flag(False, "resume the run in workdir", cli.FOLDER)
    cpu_devices: int = cli.flag(
        1, "JAX devices that a CPU is split into; 1 is fastest", cli.MACHINE
    )


def run(config: Config) -> Path:
    """Follow the flow, measure, and return the run folder.

    Write config.json, metrics.csv (a row for each time, split and seed), collapse, margins
    and duality as .png and .pdf, collapse.csv and .md (metrics over time), peel.csv and .md
    (the last layer at the end, with its certificate), checkpoints/ and, last, summary.json.

    Raises:
      BadUse: a setting is out of range, the data do not fit, or the folder cannot be used;
        raised before anything is compiled.
      OSError: the data cannot be read, or a file cannot be written.
      RunFailed: no seed came to `log_t_max`; what was reached is saved.
    """
    check(config)
    setup = set_up(config)
    changes = {name: functools.partial(_check_change, config, name) for name in _EXTENDABLE}
    with folders.open_config(config, NAME, OUTPUTS, changes) as (folder, finished):
        if not finished:
            start = time.perf_counter()
            with Interruption("step") as interruption:
                loop = Loop(config, setup, folder, folder / CHECKPOINTS)
                endings = loop.run(interruption)
            _finish(config, setup, folder, loop, endings, time.perf_counter() - start)
        _check_reached(folder)
    return folder


def check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    if config.method not in flow.METHODS:
        raise BadUse(
            f"--method must be one of {', '.join(flow.METHODS)}, got {config.method!r}"
        )
    if not (math.isfinite(config.log_t_max) and config.log_t_max > 1):
        raise BadUse(f"--log_t_max must be above 1 and finite, got {config.log_t_max}")
    if not 0 < config.init_scale < math.inf:
        raise BadUse(f"--init_scale must be positive and finite, got {config.init_scale}")
    for name, (least, most) in _RANGES.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise BadUse(
                f"--{name} must be at least {least}, and at most {most}, got {value}"
            )
    if config.stem != "cifar" and not config.model.startswith("resnet"):
        raise BadUse(f"--stem={config.stem} is for a ResNet, got --model={config.model}")
    if config.norm not in models.NORMS:
        raise BadUse(
            f"--norm must be one of {', '.join(models.NORMS)}, got {config.norm!r}"
        )
    if config.norm == "none" and config.model.startswith("resnet"):
        raise BadUse(f"--norm={config.norm} is not for --model={config.model}")
    if config.random_labels and config.test_split:
        raise BadUse("--random_labels leaves nothing to test: drop --test_split")
    _training.check(training_config(config))
    rows = 10.0 * config.measurements * math.log10(config.log_t_max + 10)
    memory.check(8.0 * 40 * rows * config.seeds, "--measurements or --seeds")


def _check_change(config: Config, name: str, folder: Path) -> None:
    """Raise BadUse if a setting is made smaller than what the run in `folder` reached."""
    if name == "log_t_max":
        rows = _flow_record.read_rows(folder)
        reached = max((row["log_t"] for row in rows), default=-math.inf)
    else:
        seeds = (folder / CHECKPOINTS).glob("seed*")
        reached = max((checkpoint.newest_epoch(seed) or 0 for seed in seeds), default=0)
    known = folders.known_settings(folder, folders.defaults(config))
    stored, new = known[name], getattr(config, name)
    if new < min(stored, reached):
        raise BadUse(
            f"the run in {str(folder)!r} has already come to {reached:.6g}, with "
            f"--{name}={stored}: give at least {min(stored, reached):.6g}, got {new}"
        )


def _finish(config: Config, setup, folder: Path, loop: Loop, endings, seconds) -> None:
    """Write figures, tables and last summary.json, which marks the end."""
    rows = loop.rows
    summary: dict[str, Any] = {
        "parameters": models.count_parameters(
            setup.model, setup.train_set.images.shape[1:]
        ),
        "training_images": len(setup.train_set.labels),
        "endings": endings,
        "seconds_of_this_process": round(seconds, 1),
    }
    if rows:
        _flow_record.draw(folder, rows)
        table = _flow_record.table(rows)
        files.write_table(folder / "collapse", table)
        summary |= {"metrics": {row["metric"]: row for row in table}}
        summary |= {"exponents": _flow_record.exponents(rows)}
    summary |= loop.describe_end()
    folders.write_summary(folder, summary | folders.provenance(*_PACKAGES), OUTPUTS)
    if rows:
        print((folder / "collapse.md").read_text())
    print("\n".join(_ending(seed, ending) for seed, ending in enumerate(endings)))


def _ending(seed: int, ending: dict[str, Any]) -> str:
    """Return one line on the end of a seed."""
    return (
        f"seed {seed}: {ENDINGS[ending['result']]}: log t = {ending['log_t']:.5g}, "
        f"log L = {ending['log_loss']:.5g}, {ending['gradients']} gradients, "
        f"{ending['refused']} steps refused"
    )


def _check_reached(folder: Path) -> None:
    """Raise RunFailed if no seed came to the end, also if an earlier process found so."""
    endings = files.read_json(folder / folders.SUMMARY)["endings"]
    if all(ending["result"] for ending in endings):
        reasons = {ENDINGS[ending["result"]] for ending in endings}
        raise RunFailed(
            f"no seed came to --log_t_max: {'; '.join(sorted(reasons))}; {folder} holds "
            "what was reached"
        )


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
