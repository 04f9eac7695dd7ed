r"""Train a network by mini-batches on the clock of its loss.

Steps of constant size on the loss reach time t after t of them. Here the steps grow as the
loss falls. With the losses $\ell_i$ of the N samples and a number F, the *frame*, the
framed loss of a batch of B samples is

$$\hat L = \frac1B \sum_i e^{\log \ell_i - F}, \qquad \theta \leftarrow \theta - \eta \nabla
\hat L,$$

with F the log of the mean loss at the start of the epoch. A step of size $\eta$ on
$\hat L$ is a step of $\eta e^{-F}$ on the mean loss, and of $\eta e^{-F} / N$ on
$\mathcal L = \sum_i \ell_i$. So much time of the flow $d\theta/dt = -\nabla \mathcal L$
passes, in the units of `ncjax.networks.flow`.

After each epoch the mean loss of the whole set is measured in evaluation mode. If it has
risen or is not finite, the epoch is refused: the network returns to the start of the epoch,
no time passes, and $\eta$ is divided by $2^{1/10}$. Otherwise F becomes its log, and $\eta$
is multiplied by $2^{1/5}$.

Only logarithms of losses and of t are stored, so that losses of any size are exact.

The networks of the source have no batch normalisation. With it the loss also depends on the
running statistics, which move even if the parameters do not; an epoch can then be refused
however small $\eta$ is.

Source: Lyu, Li (ICLR 2020), the loss-based learning rate of their experiments.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ncjax.checks import check_positive
from ncjax.networks import data, train
from ncjax.networks.train import DeviceData, DividedData, TrainState
from ncjax.peeled.kernels import log_softplus
from ncjax.peeled.logits import log_odds_of_error, margins_of_samples
from ncjax.types import Array

# Change of log η after an accepted and after a refused epoch.
_LONGER, _SHORTER = math.log(2) / 5, -math.log(2) / 10


class Clock(NamedTuple):
    """State of the clock, kept as the `opt_state` of a `TrainState`. Scalars."""

    frame: Array  # F, log of the mean loss after the last accepted epoch, float32
    log_rate: Array  # log η, float32
    log_time: Array  # log t, -inf at the start; float64 if JAX has it enabled
    refused: Array  # number of refused epochs, int32


class LossLog(NamedTuple):
    """What an epoch reports. Scalars."""

    log_loss: Array  # log of the loss, summed over samples, after the epoch
    accuracy: Array  # mean over the samples, each measured before its step
    log_time: Array  # log t after the epoch
    rate: Array  # η of the epoch
    refused: Array  # 1 if the epoch was refused, else 0


def log_losses(logits: Array, labels: Array) -> Array:
    """Return the log of the cross entropy of each sample, finite at any margin.

    Args:
      logits: (N, K).
      labels: (N,) int32.

    Returns:
      (N,).
    """
    return log_softplus(log_odds_of_error(*margins_of_samples(logits, labels)))


def make_log_loss(
    model: nn.Module, mesh: Mesh
) -> Callable[[TrainState, DeviceData | DividedData], Array]:
    """Return the function `(state, data) -> log of the mean loss`, to be jitted.

    The network runs in evaluation mode.

    Args:
      model: a network of `ncjax.networks.models`.
      mesh: as for `ncjax.networks.train.make_epoch`.
    """

    def log_loss(state, dataset):
        size = dataset.labels.shape[0]
        shape, devices = dataset.images.shape[1:], list(mesh.devices.flat)
        chunk = train.evaluation_chunk(size, shape, devices)
        # The last image fills the last chunk.
        index = jnp.arange(-(-size // chunk) * chunk, dtype=jnp.int32)
        index = jnp.minimum(index, size - 1).reshape(-1, chunk)
        variables = {"params": state.params, "batch_stats": state.batch_stats}

        def of_chunk(index):
            images, labels = train.batch(dataset, index, mesh)
            images = data.normalise(images, dataset.mean, dataset.deviation)
            logits, _ = model.apply(variables, images, train=False)
            return log_losses(logits, labels)

        logs = jax.lax.map(of_chunk, index).reshape(-1)[:size]
        return jax.nn.logsumexp(logs) - math.log(size)

    return log_loss


def begin(state: TrainState, log_loss: Array, learning_rate: float) -> TrainState:
    """Return the state of a network at t = 0, with a clock.

    Args:
      state: of `ncjax.networks.train.init_state`.
      log_loss: log of the mean loss at `state`, of `make_log_loss`.
      learning_rate: first η, of the framed loss.

    Raises:
      ValueError: the learning rate is not positive.
    """
    check_positive("learning_rate", learning_rate)
    clock = Clock(
        frame=log_loss,
        log_rate=jnp.full_like(log_loss, math.log(learning_rate)),
        log_time=jnp.asarray(-math.inf, jnp.result_type(float)),
        refused=jnp.zeros((), jnp.int32),
    )
    return state._replace(opt_state=clock)


def make_epoch(
    model: nn.Module, *, batch_size: int, mesh: Mesh
) -> Callable[[TrainState, DeviceData | DividedData, Array], tuple[TrainState, LossLog]]:
    """Return one epoch as a pure function: steps, measurement, acceptance or refusal.

    It shuffles and leaves out samples as `ncjax.networks.train.make_epoch` does.

    Args:
      model: a network of `ncjax.networks.models`.
      batch_size: B, a multiple of the number of devices.
      mesh: as for `ncjax.networks.train.make_epoch`.

    Returns:
      `(state, data, key) -> (state, LossLog)`, with the state of `begin` or of the epoch
      before; to be jitted with the state donated.
    """
    log_loss_of = make_log_loss(model, mesh)

    def framed_loss(params, state, images, labels):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (logits, _), updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        framed = jnp.exp(log_losses(logits, labels) - state.opt_state.frame)
        return jnp.mean(framed), (updated.get("batch_stats", {}), logits)

    def step(state, batch):
        images, labels = batch
        gradient_of = jax.grad(framed_loss, has_aux=True)
        gradient, (batch_stats, logits) = gradient_of(state.params, state, images, labels)
        rate = jnp.exp(state.opt_state.log_rate)
        params = jax.tree.map(
            lambda leaf, slope: leaf - rate.astype(leaf.dtype) * slope,
            state.params,
            gradient,
        )
        correct = jax.lax.argmax(logits, 1, jnp.int32) == labels
        state = state._replace(params=params, batch_stats=batch_stats)
        return state, jnp.mean(correct.astype(jnp.float32))

    steps_of_epoch = train.make_pass(step, batch_size=batch_size, mesh=mesh)

    def epoch(state, dataset, key):
        before, size = state.opt_state, dataset.labels.shape[0]
        end, accuracy = steps_of_epoch(state, dataset, key)
        log_loss = log_loss_of(end, dataset)
        accepted = jnp.isfinite(log_loss) & (log_loss <= before.frame)
        elapsed = log_elapsed(before, size // batch_size, size)
        longer = before._replace(
            frame=log_loss,
            log_rate=before.log_rate + _LONGER,
            log_time=jnp.logaddexp(before.log_time, elapsed),
        )
        shorter = before._replace(
            log_rate=before.log_rate + _SHORTER, refused=before.refused + 1
        )
        state = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old),
            end._replace(opt_state=longer),
            state._replace(opt_state=shorter),
        )
        return state, LossLog(
            log_loss=state.opt_state.frame + math.log(size),
            accuracy=accuracy,
            log_time=state.opt_state.log_time,
            rate=jnp.exp(before.log_rate),
            refused=(~accepted).astype(jnp.float32),
        )

    return epoch


def log_elapsed(clock: Clock, steps: int, samples: int) -> Array:
    r"""Return $\log (m \eta e^{-F} / N)$, the log of the time of an accepted epoch.

    Args:
      clock: at the start of the epoch.
      steps: m.
      samples: N.
    """
    dtype = clock.log_time.dtype
    rate, frame = clock.log_rate.astype(dtype), clock.frame.astype(dtype)
    return math.log(steps / samples) + rate - frame
