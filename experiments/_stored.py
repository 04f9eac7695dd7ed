"""The settings of a finished run, also of one that another version of ncjax made."""

import importlib
from pathlib import Path
from typing import Any

from experiments._runs import folders

TRAINING = ("train_resnet", "train_vgg", "train_small")
_OF_OPTION = {"stem": "train_resnet", "head": "train_vgg"}


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """Return the settings of a run of an experiment; what it lacks has its default.

    Raises:
      BadUse: the folder holds no run, or the run has settings that this version lacks.
    """
    config_class = importlib.import_module(f"experiments.{name}").Config
    return folders.known_settings(folder, folders.defaults(config_class))


def training_experiment(folder: Path) -> str:
    """Return the experiment that trained the network in `folder`.

    Earlier versions did not store it; then the options of the network tell.
    """
    name = folders.experiment(folder)
    stored = folders.stored_config(folder)
    found = [kind for option, kind in _OF_OPTION.items() if option in stored]
    return name if name in TRAINING else (*found, "train_small")[0]
