"""The clocks of the training experiments: steps of constant size, or sized by the loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments._runs.errors import RunFailed
from ncjax.networks import loss_clock, train
from ncjax.networks.train import TrainState


class Clock(NamedTuple):
    """What the training loop needs to know of its clock."""

    epoch: Callable  # (state, data, key) -> (state, log), of one network
    start: Callable  # (key, data) -> state, of one network
    # Of a log in NumPy, its fields () or (S,) for S seeds:
    progress: Callable[[Any], Mapping[str, str]]  # what the progress bar shows
    check: Callable[[Any, int], None]  # (log, epoch); RunFailed if training diverged
    # Of a state, further columns of metrics.csv by name, () or (S,):
    columns: Callable[[TrainState], Mapping[str, jax.Array]]


def of_epochs(
    model: Any,
    image_shape: tuple[int, ...],
    learning_rate: float,
    *,
    optimiser: Any,
    **settings: Any,
) -> Clock:
    """Return the clock that counts epochs: every step has the size that the flags set.

    Args:
      model: the network.
      image_shape: (height, width, C).
      learning_rate: named if training diverges.
      optimiser: see `ncjax.networks.train.sgd`.
      settings: of `ncjax.networks.train.make_epoch`.
    """

    def start(key, dataset):
        return train.init_state(model, optimiser, image_shape, key)

    def progress(log):
        return {
            "loss": f"{log.loss.mean():.3g}",
            "accuracy": f"{log.accuracy.mean():.4f}",
        }

    def check(log, epoch):
        if not np.isfinite(log.loss).any():
            raise RunFailed(
                f"training diverged in epoch {epoch}: the loss is {log.loss}; try a lower "
                f"--learning_rate than {learning_rate}"
            )

    epoch = train.make_epoch(model, optimiser, **settings)
    return Clock(epoch, start, progress, check, lambda state: {})


def of_loss(
    model: Any,
    image_shape: tuple[int, ...],
    learning_rate: float,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Clock:
    """Return the clock of the loss: steps grow as it falls.

    Args:
      model: the network.
      image_shape: (height, width, C).
      learning_rate: the first one.
      batch_size: see `ncjax.networks.loss_clock.make_epoch`.
      mesh: see `ncjax.networks.loss_clock.make_epoch`.
    """
    log_loss = loss_clock.make_log_loss(model, mesh)

    def start(key, dataset):
        state = train.init_state(
            model, train.sgd(learning_rate, momentum=0.0), image_shape, key
        )
        return loss_clock.begin(state, log_loss(state, dataset), learning_rate)

    def progress(log):
        return {
            "log_t": f"{log.log_time.mean():.4g}",
            "log_L": f"{log.log_loss.mean():.4g}",
            "accuracy": f"{log.accuracy.mean():.4f}",
        }

    def check(log, epoch):
        # A refused epoch returns to a finite loss, unless there never was one.
        if not np.isfinite(log.log_loss).any():
            raise RunFailed(
                "the loss is not finite before the first step: the network or the data "
                "hold NaN or infinite numbers"
            )

    def columns(state):
        return {"log_t": state.opt_state.log_time}

    epoch = loss_clock.make_epoch(model, batch_size=batch_size, mesh=mesh)
    return Clock(epoch, start, progress, check, columns)
