"""Train a residual network far past zero error: does it collapse?"""

import dataclasses
from pathlib import Path

from experiments import _training
from experiments._runs import cli

NAME = "train_resnet"


@dataclasses.dataclass(frozen=True)
class Config(_training.Config):
    """Train a residual network far past zero error: does it collapse?

    Example: python -m experiments.train_resnet --dataset=cifar10
    """

    model: str = cli.flag("resnet18", "resnet18, resnet34 or resnet50", cli.MODEL)
    stem: str = cli.flag(
        "cifar", "cifar (3x3) or imagenet (7x7, then max pooling)", cli.MODEL
    )


def run(config: Config) -> Path:
    """Run the experiment and return its folder; see `experiments._training.run`."""
    return _training.run(config, NAME, {"stem": config.stem})


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
