"""A residual network trained far past zero error: does it collapse?"""

import dataclasses
from pathlib import Path

from experiments import _cli, _training

NAME = "train_resnet"


@dataclasses.dataclass(frozen=True)
class Config(_training.Config):
    """A residual network trained far past zero error: does it collapse?

    Example: python -m experiments.train_resnet --dataset=cifar10
    """

    model: str = _cli.flag("resnet18", "resnet18, resnet34 or resnet50", _cli.MODEL)
    stem: str = _cli.flag(
        "cifar", "cifar (3x3) or imagenet (7x7, then a maximum)", _cli.MODEL
    )


def run(config: Config) -> Path:
    """Run the experiment and return its folder; see `experiments._training.run`."""
    return _training.run(config, NAME, {"stem": config.stem})


if __name__ == "__main__":
    _cli.main(Config, run, f"experiments.{NAME}")
