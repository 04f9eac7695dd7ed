"""Train small networks, many seeds side by side, far past zero error."""

import dataclasses
from pathlib import Path

from experiments import _training
from experiments._runs import cli

NAME = "train_small"


@dataclasses.dataclass(frozen=True)
class Config(_training.Config):
    """Train small networks, many seeds side by side, far past zero error.

    Example: python -m experiments.train_small --model=convnet --seeds=8
    """

    model: str = cli.flag(
        "mlp", "mlp or convnet; any network of ncjax.networks.models works", cli.MODEL
    )


def run(config: Config) -> Path:
    """Run the experiment and return its folder; see `experiments._training.run`."""
    return _training.run(config, NAME, {})


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
