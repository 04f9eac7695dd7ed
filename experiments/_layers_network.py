"""Load the network of a run, and compute the features of its layers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _stored, _training
from experiments._flow_loop import CHECKPOINTS, Loop
from experiments._flow_setup import set_up
from experiments._runs import files, folders, memory
from experiments._runs.errors import BadUse, checks
from ncjax.networks import data
from ncjax.networks.capture import capture_layers, network_layers

_BATCH = 100
_FLOW = "network_flow"
INPUT, FEATURES = "input", "features"  # the first layer, and the last one


class Network(NamedTuple):
    """A trained network with the images that it is measured on."""

    setup: _training.Setup
    variables: Any
    title: str
    training: dict[str, Any]  # from config.json of its run: command, settings, versions


def check_source(folder: Path, data_dir: str, seed: int) -> None:
    """Raise BadUse unless `folder` holds a network that `load` can read."""
    if _is_flow(folder):
        _stored_flow(folder, data_dir, seed)
    else:
        _training.stored_run(folder, data_dir, seed)


def load(folder: Path, data_dir: str, seed: int) -> Network:
    """Load a network from the newest checkpoint of its run, and its data.

    Args:
      folder: folder of a training run or of a network flow; it is only read.
      data_dir: folder of TFDS.
      seed: number of the network, of a run of several.

    Raises:
      BadUse: the folder holds no such run, or no checkpoint.
      OSError: the data cannot be read.
    """
    if _is_flow(folder):
        stored = _stored.settings_of(folder, _FLOW)
        config = _stored_flow(folder, data_dir, seed)
        setup = set_up(config)
        loop = Loop(config, setup, folder, folder / CHECKPOINTS)
        variables, log_t = loop.load_variables(seed)
        when = f"log t = {log_t:.4g}"
    else:
        stored = _stored.settings_of(folder, _stored.training_experiment(folder))
        training, options = _training.stored_run(folder, data_dir, seed)
        training = dataclasses.replace(training, test_split=stored["test_split"])
        setup = _training.set_up(training, options)
        variables, epoch = _training.load_variables(training, setup, folder, seed)
        when = f"epoch {epoch}"
    title = f"{stored['model']} on {stored['dataset']}, {when}"
    record = files.read_json(folder / folders.CONFIG)
    kept = ("command", "date", "versions", "device", "platform", "config")
    return Network(setup, variables, title, {k: record[k] for k in kept if k in record})


def _is_flow(folder: Path) -> bool:
    """Return whether the run in `folder` is a network flow."""
    return "max_gradients" in folders.stored_config(folder)


def _stored_flow(folder: Path, data_dir: str, seed: int) -> Any:
    """Return the settings of a network flow as attributes.

    Raises:
      BadUse: it has no such seed, or no checkpoint.
    """
    config = SimpleNamespace(**_stored.settings_of(folder, _FLOW), data_dir=data_dir)
    if not 0 <= seed < config.seeds:
        raise BadUse(f"expected a seed in [0, {config.seeds}), got {seed}")
    if not (folder / CHECKPOINTS).is_dir():
        raise BadUse(f"{str(folder)!r} holds no checkpoint")
    return config


@checks()
def splits(network: Network, per_class: int) -> dict[str, data.Dataset]:
    """Return the first images of each class of the training and of the test set.

    Raises:
      BadUse: a class has fewer images.
    """
    sets = {"train": network.setup.train_set, "test": network.setup.test_set}
    return {
        name: data.first_of_each_class(dataset, per_class) if per_class else dataset
        for name, dataset in sets.items()
        if dataset is not None
    }


class Layers:
    """The layers of a network: their names, and their features of a data set."""

    def __init__(self, network: Network):
        """Prepare; nothing is compiled yet."""
        self._network = network
        model = network.setup.model
        self._paths = network_layers(model)
        self._compute = jax.jit(self._features)
        images = network.setup.train_set.images[:1]
        shapes = jax.eval_shape(self._features, network.variables, images)
        self.sizes = {name: shapes[name].size for name in self._ordered(shapes)}
        self.names = tuple(self.sizes)

    def _ordered(self, found: Any) -> list[str]:
        """Return the names in order; the last hidden layer may be the features."""
        hidden = list(self._paths)
        if found[hidden[-1]].ndim == 2:
            del hidden[-1]
        return [INPUT, *hidden, FEATURES]

    def _features(self, variables, images) -> dict[str, jax.Array]:
        setup = self._network.setup
        images = data.normalise(images, *map(jnp.asarray, (setup.mean, setup.deviation)))
        (_, features), found = capture_layers(
            setup.model,
            variables,
            images,
            layers=self._paths,
            activation=jax.nn.relu,
            train=False,
        )
        return {INPUT: images, FEATURES: features} | found

    def check_memory(self, sets: Sequence[data.Dataset]) -> None:
        """Raise BadUse unless the features of all layers fit into memory."""
        images = sum(len(dataset.labels) for dataset in sets)
        memory.check(4.0 * images * sum(self.sizes.values()), "--per_class")

    def features(self, dataset: data.Dataset) -> dict[str, np.ndarray]:
        """Return the features (N, ...) of each layer in evaluation mode, on the host."""
        size = len(dataset.labels)
        each = min(size, _BATCH)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        for start in range(0, size, each):
            # Repeat the last image to fill the last batch: one shape compiles once.
            index = np.minimum(np.arange(start, start + each), size - 1)
            found = self._compute(self._network.variables, dataset.images[index])
            for name, batches in parts.items():
                batches.append(np.asarray(found[name])[: size - start])
        return {name: np.concatenate(batches) for name, batches in parts.items()}
