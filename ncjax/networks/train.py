"""Training a network on a data set that lives on the device, an epoch in one call.

Stochastic gradient descent with momentum on cross entropy. Everything is a pure function
of a state, a data set and a key; `jax.vmap` over states and keys trains many seeds at
once, and a `jax.sharding.Mesh` spreads every batch over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ncjax.metrics.collapse import collapse_metrics_from_features
from ncjax.metrics.peeling import last_layer
from ncjax.networks import data
from ncjax.networks.data import Dataset
from ncjax.peeled.losses import softmax_cross_entropy
from ncjax.types import Array

AXIS = "data"  # of the mesh: batches are split along it
_CHUNK = 512  # images in one call of an evaluation


class TrainState(NamedTuple):
    """Everything that an epoch changes."""

    params: Any  # of the network, float32
    batch_stats: Any  # running means and variances; empty without batch normalisation
    opt_state: optax.OptState


class DeviceData(NamedTuple):
    """A data set on the device, and how to normalise it."""

    images: Array  # (N, height, width, C) uint8
    labels: Array  # (N,) int32
    mean: Array  # (C,) float32, of images / 255
    deviation: Array  # (C,) float32


class EpochLog(NamedTuple):
    """Means over the samples of an epoch, each before the step that used it. Scalars."""

    loss: Array
    accuracy: Array


def sgd(
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    drops: tuple[int, ...] = (),
) -> optax.GradientTransformation:
    r"""Stochastic gradient descent with momentum.

    $$v \leftarrow \mu v + \nabla L + \lambda \theta, \qquad
    \theta \leftarrow \theta - \eta v$$

    As `torch.optim.SGD`. No clipping; weight decay is off unless asked for.

    Args:
      learning_rate: $\eta$.
      momentum: $\mu$.
      weight_decay: $\lambda$, on all parameters.
      drops: steps from which on $\eta$ is a tenth of what it was before.
    """

    def schedule(step):
        passed = sum((step >= drop).astype(jnp.float32) for drop in drops)
        return learning_rate * jnp.float32(0.1) ** passed

    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    rate = schedule if drops else learning_rate
    return optax.chain(decay, optax.sgd(rate, momentum or None))


def on_device(dataset: Dataset, mean, deviation, mesh: Mesh) -> DeviceData:
    """The data set, whole, on every device of the mesh."""
    arrays = (dataset.images, dataset.labels, mean, deviation)
    return DeviceData(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))


def init_state(
    model: nn.Module,
    optimiser: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    key: Array,
) -> TrainState:
    """A freshly drawn state, for images (height, width, C)."""
    variables = model.init(key, jnp.zeros((1, *image_shape), jnp.float32))
    params = variables["params"]
    return TrainState(params, variables.get("batch_stats", {}), optimiser.init(params))


def make_epoch(
    model: nn.Module,
    optimiser: optax.GradientTransformation,
    *,
    batch_size: int,
    mesh: Mesh,
    augment: bool = False,
) -> Callable[[TrainState, DeviceData, Array], tuple[TrainState, EpochLog]]:
    """One epoch as a pure function: shuffle, then a step for every full batch.

    The N mod `batch_size` samples left over sit out, others in every epoch.

    Args:
      model: a network of `ncjax.networks.models`.
      optimiser: such as `sgd`.
      batch_size: B, a multiple of the number of devices.
      mesh: with the axis `AXIS`; every batch is split along it.
      augment: shift and mirror images, see `ncjax.networks.data.augment`.

    Returns:
      `(state, data, key) -> (state, EpochLog)`, to be jitted with the state donated.
    """
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def loss_of(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        loss = jnp.mean(softmax_cross_entropy(logits, labels))
        return loss, (updated.get("batch_stats", {}), logits)

    def step(state, batch):
        images, labels = batch
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), slope = gradient(
            state.params, state.batch_stats, images, labels
        )
        updates, opt_state = optimiser.update(slope, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        right = jax.lax.argmax(logits, 1, jnp.int32) == labels
        log = EpochLog(loss, jnp.mean(right.astype(jnp.float32)))
        return TrainState(params, batch_stats, opt_state), log

    def epoch(state, dataset, key):
        key_order, key_augment = jax.random.split(key)
        size = dataset.labels.shape[0]
        steps = size // batch_size
        order = jax.random.permutation(key_order, jnp.arange(size, dtype=jnp.int32))
        order = order[: steps * batch_size].reshape(steps, batch_size)

        def numbered_step(state, number):
            index = jax.lax.with_sharding_constraint(order[number], split)
            images = dataset.images[index]
            if augment:
                images = data.augment(jax.random.fold_in(key_augment, number), images)
            images = data.normalise(images, dataset.mean, dataset.deviation)
            return step(state, (images, dataset.labels[index]))

        state, logs = jax.lax.scan(numbered_step, state, jnp.arange(steps, dtype=jnp.int32))
        return state, jax.tree.map(lambda log: jnp.mean(log, axis=0), logs)

    return epoch


def make_forward(
    model: nn.Module, mesh: Mesh
) -> Callable[[TrainState, DeviceData, Array], Array]:
    """Features in evaluation mode, `(state, data, index (B,)) -> (B, d)`, to be jitted."""
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def forward(state, dataset, index):
        index = jax.lax.with_sharding_constraint(index, split)
        images = data.normalise(dataset.images[index], dataset.mean, dataset.deviation)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return model.apply(variables, images, train=False)[1]

    return forward


def extract_features(forward, state: TrainState, dataset: DeviceData) -> Array:
    """Features (N, d), or (S, N, d) of a vmapped `forward`, on the first local device.

    Args:
      forward: `make_forward`, jitted, with a result that all devices hold.
      state: of one network, or of S.
      dataset: N images.
    """
    size = dataset.labels.shape[0]
    devices = jax.device_count()
    chunk = min(_CHUNK, size) // devices * devices or devices
    parts = []
    for start in range(0, size, chunk):
        # The last chunk is filled up with the last image, so as to compile once.
        index = np.minimum(np.arange(start, start + chunk, dtype=np.int32), size - 1)
        parts.append(forward(state, dataset, index).addressable_data(0))
    return jnp.concatenate(parts, axis=-2)[..., :size, :]


def classifier(params) -> tuple[Array, Array | None]:
    """Weight W (K, d) and bias b (K,), None without one, of the last layer."""
    last = params["classifier"]
    return last["kernel"].T, last.get("bias")


def measure(features: Array, labels: Array, params) -> dict[str, float]:
    """Collapse metrics, loss, margins and alignment of one network on one data set.

    Args:
      features: (N, d) in evaluation mode.
      labels: (N,).
      params: of the network.

    Returns:
      The fields of `ncjax.CollapseMetrics` and of `ncjax.LastLayer` by name.
    """
    layer = classifier(jax.tree.map(first_device, params))
    labels = first_device(labels)
    metrics = collapse_metrics_from_features(features, labels, *layer)._asdict()
    metrics |= last_layer(features, labels, *layer)._asdict()
    return {name: float(value) for name, value in metrics.items()}


def first_device(array: Array) -> Array:
    """What the first local device holds of an array that all devices hold alike."""
    return array.addressable_data(0)
