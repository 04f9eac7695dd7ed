"""Train a VGG network far past zero error: does it collapse?"""

import dataclasses
from pathlib import Path

from experiments import _training
from experiments._runs import cli
from ncjax.networks import models

NAME = "train_vgg"


@dataclasses.dataclass(frozen=True)
class Config(_training.Config):
    """Train a VGG network far past zero error: does it collapse?

    Example: python -m experiments.train_vgg --dataset=kmnist
    """

    model: str = cli.flag("vgg13", "vgg11, vgg13, vgg16 or vgg19", cli.MODEL)
    image_size: int = cli.flag(
        models.VGG_LEAST_SIZE,
        "pixels that images are padded to with zeros; 0 to keep them",
        cli.DATA,
    )
    head: str = cli.flag(
        "linear", "linear, or mlp: with two hidden layers of 4096 units", cli.MODEL
    )


def run(config: Config) -> Path:
    """Run the experiment and return its folder; see `experiments._training.run`."""
    return _training.run(config, NAME, {"head": config.head})


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
