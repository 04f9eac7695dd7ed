"""Data and network of a network flow, from its settings."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import _training
from experiments._runs.errors import BadUse
from ncjax.networks import models


def training_config(config: Any) -> _training.Config:
    """Return the flags of a training run with the same network and data."""
    shared = {field.name for field in dataclasses.fields(_training.Config)}
    values = {k: v for k, v in vars(config).items() if k in shared}
    if not config.warm_epochs:
        values |= {"batch_size": jax.device_count()}  # not used, but checked
    if config.norm == "none":
        values |= {"use_bias": False}
    if config.model.startswith("vgg") and not config.image_size:
        values |= {"image_size": models.VGG_LEAST_SIZE}
    return _training.Config(**values | {"compute_dtype": "float32"})


def set_up(config: Any) -> _training.Setup:
    """Load the data and build the network.

    Raises:
      BadUse: they do not fit together.
      OSError: the data cannot be read.
    """
    options: dict[str, Any] = {}
    if config.model.startswith("resnet"):
        options["stem"] = config.stem
    elif config.norm == "none" and config.model == "mlp":
        options["hidden_bias"] = False
    elif config.norm == "none":
        options["norm"] = config.norm
    setup = _training.set_up(training_config(config), options)
    size = len(setup.train_set.labels)
    if size % config.num_groups:
        raise BadUse(
            f"--num_groups must divide the {size} training images, got {config.num_groups}"
        )
    if config.random_labels:
        order = np.random.default_rng(config.seed).permutation(size)
        shuffled = setup.train_set._replace(labels=setup.train_set.labels[order])
        setup = setup._replace(train_set=shuffled)
    return setup
