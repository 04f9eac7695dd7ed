"""Measure collapse and data separation in every layer of a trained network."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _layers_network
from experiments._runs import cli, files, folders
from experiments._runs.errors import BadUse, RunFailed, checks
from experiments._runs.interruption import Interruption
from experiments._runs.progress import tqdm
from ncjax import plotting
from ncjax.metrics import layers
from ncjax.metrics.layers import LayerMetrics, Layerwise
from ncjax.networks import train

NAME = "layers"
OUTPUTS = ("layers.csv", "layers.md", "layers.png", "layers.pdf")
POOLINGS = {"flatten": "flatten", "mean": "channels_last"}
_INTEGERS = ("dim", "numerical_rank")


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Measure collapse, data separation and ranks in every layer of a trained network.

    Example: python -m experiments.layers --run=runs/train_vgg/20261128-120000
    """

    run: str = cli.path_flag(
        "", "run folder of a network, with its checkpoints; required", cli.DATA
    )
    index: int = cli.flag(0, "number of the network, for a run of several seeds", cli.DATA)
    per_class: int = cli.flag(
        100, "first images of each class in each split; 0 for all", cli.DATA
    )
    pooling: str = cli.flag(
        "flatten", "flatten, or mean: average convolutions over positions", cli.DATA
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

    Write config.json, layers.csv and layers.md (a row for each split and layer), layers.png
    and .pdf, and last summary.json (the law of data separation and the tunnel of each
    split, and how the network was trained).

    Raises:
      BadUse: a setting is out of range, or a folder cannot be used.
      OSError: the data cannot be read, or a file cannot be written.
      RunFailed: a feature of the network is NaN or infinite.
    """
    _check(config)
    source = (Path(config.run), config.data_dir, config.index)
    _layers_network.check_source(*source)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, finished):
        if not finished:
            start = time.perf_counter()
            network = _layers_network.load(*source)
            sets = _layers_network.splits(network, config.per_class)
            with Interruption("layer") as interruption:
                found = _measure(config, network, sets, folder, interruption)
            images = {split: len(dataset.labels) for split, dataset in sets.items()}
            _write(folder, network, found, images, time.perf_counter() - start)
    return folder


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    if not config.run:
        raise BadUse("--run=DIR is needed: the folder of a training run or network flow")
    if config.workdir and Path(config.workdir).resolve() == Path(config.run).resolve():
        raise BadUse("--workdir must differ from --run")
    if config.per_class < 0:
        raise BadUse(f"--per_class must not be negative, got {config.per_class}")
    if config.pooling not in POOLINGS:
        raise BadUse(
            f"--pooling must be one of {', '.join(POOLINGS)}, got {config.pooling!r}"
        )


def _measure(
    config: Config, network, sets, folder: Path, interruption: Interruption
) -> dict[str, Layerwise]:
    """Return the metrics of all layers by split; save them after each layer.

    Raises:
      KeyboardInterrupt: a signal requested a stop; the layers so far have been saved.
      RunFailed: a feature is NaN or infinite.
    """
    of_network = _layers_network.Layers(network)
    of_network.check_memory(tuple(sets.values()))
    stored = _load_rows(folder) if config.resume else {}
    rows = {split: list(stored.get(split, ())) for split in sets}
    features = {split: of_network.features(dataset) for split, dataset in sets.items()}
    classifier = train.classifier(network.variables["params"])
    with tqdm(of_network.names, desc=network.title, unit="layer") as progress:
        for depth, name in enumerate(progress):
            if depth < len(rows["train"]):
                continue
            last = name == _layers_network.FEATURES
            given = {split: features[split].pop(name) for split in sets}
            measured = _measure_layer(
                given, sets, POOLINGS[config.pooling], classifier if last else None
            )
            for split, values in measured.items():
                rows[split].append(np.array([float(value) for value in values]))
            _save_rows(folder, rows)
            if interruption.requested and not last:
                raise KeyboardInterrupt
    return {split: _over_depth(of_network.names, rows[split]) for split in sets}


def _measure_layer(given, sets, pooling: str, classifier) -> dict[str, LayerMetrics]:
    """Return the metrics of one layer by split; centres are the training means.

    Raises:
      RunFailed: a feature is NaN or infinite.
    """
    centres, measured = None, {}
    for split, features in given.items():
        if not np.isfinite(features).all():
            raise RunFailed("the network has diverged: a feature is NaN or infinite")
        dataset = sets[split]
        with checks():
            measured[split], means = layers.layer_metrics(
                features,
                dataset.labels,
                dataset.num_classes,
                classifier=classifier,
                centres=centres,
                pooling=pooling,
            )
        centres = means if split == "train" else centres
    return measured


def _save_rows(folder: Path, rows: dict[str, list[np.ndarray]]) -> None:
    """Save the metrics of the layers so far, by split."""
    folders.save_checkpoint(folder, {k: np.stack(values) for k, values in rows.items()})


def _load_rows(folder: Path) -> dict[str, np.ndarray]:
    """Return the metrics that an interrupted run has saved, by split."""
    return folders.load_checkpoint(folder) or {}


def _over_depth(names: tuple[str, ...], rows: list[np.ndarray]) -> Layerwise:
    """Join the metrics of single layers."""
    measured = [LayerMetrics(*map(jnp.asarray, row)) for row in rows]
    return layers.over_depth(names, measured)


def _write(folder: Path, network, found: dict[str, Layerwise], images, seconds) -> None:
    """Write the tables, the figure and last summary.json, which marks the end."""
    files.write_table(folder / "layers", _rows(found))
    figure = plotting.layers_figure(found)
    files.write_files(folder / "layers", plotting.render(figure))
    summary = {
        "network": network.title,
        "training": network.training,
        "layers": list(found["train"].names),
        "images": images,
        "law": {split: _numbers(part.law) for split, part in found.items()},
        "tunnel": {split: _tunnel(part) for split, part in found.items()},
        "last": {split: _metrics(part, -1) for split, part in found.items()},
        "seconds_of_this_process": round(seconds, 1),
    }
    folders.write_summary(folder, summary | folders.provenance("flax"), OUTPUTS)
    folders.drop_checkpoint(folder)
    print(f"{network.title}\n\n{(folder / 'layers.md').read_text()}")
    print("\n".join(_sentence(split, part) for split, part in found.items()))


def _rows(found: dict[str, Layerwise]) -> list[dict[str, Any]]:
    """Return a row for each split and layer."""
    return [
        {"split": split, "depth": depth, "layer": name} | _metrics(part, depth)
        for split, part in found.items()
        for depth, name in enumerate(part.names)
    ]


def _metrics(part: Layerwise, depth: int) -> dict[str, Any]:
    """Return the metrics of one layer as numbers."""
    values = jax.tree.map(lambda column: column[depth].item(), part.metrics)._asdict()
    return {k: int(v) if k in _INTEGERS else v for k, v in values.items()}


def _numbers(fields: Any) -> dict[str, float]:
    return {name: float(value) for name, value in fields._asdict().items()}


def _tunnel(part: Layerwise) -> dict[str, Any]:
    """Return the tunnel, with the name of its first layer; None if there is none."""
    start = int(part.tunnel.start)
    return {
        "start": start,
        "layer": part.names[start] if start < len(part.names) else None,
        "length": int(part.tunnel.length),
        "rank_ratio": float(part.tunnel.rank_ratio),
    }


def _sentence(split: str, part: Layerwise) -> str:
    """Return one line on the law of data separation and the tunnel."""
    law, tunnel = part.law, _tunnel(part)
    return (
        f"{split}: each layer multiplies D by {float(law.decay_ratio):.3g} "
        f"(R² = {float(law.r_squared):.3g}); the tunnel starts at {tunnel['layer']}, "
        f"{tunnel['length']} layers"
    )


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
