"""Train a network on a data set that lives on the device, one epoch per call.

The recipe is stochastic gradient descent with momentum on cross entropy. An epoch is a pure
function of a state, a data set and a key: `jax.vmap` over states and keys trains many seeds
at once, and a `jax.sharding.Mesh` spreads every batch over devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ncjax import sizes
from ncjax.checks import check_key
from ncjax.metrics import statistics
from ncjax.metrics.collapse import collapse_metrics_from_features
from ncjax.metrics.peeling import last_layer
from ncjax.networks import data
from ncjax.networks.data import Dataset
from ncjax.peeled.losses import softmax_cross_entropy
from ncjax.types import Array

AXIS = "data"  # of the mesh: batches are split along it
_CHUNK = 512  # images per call of an evaluation on CPU
# Bytes on each accelerator, in such a call, of images with 64 channels in float32.
_CHUNK_BYTES, _CHANNELS = 2**28, 64
# A data set that takes more of a device's memory is divided over the devices.
_SHARE_OF_MEMORY = 0.1


class TrainState(NamedTuple):
    """State that an epoch updates."""

    params: Any  # of the network, float32
    batch_stats: Any  # running means and variances; empty without batch normalisation
    opt_state: optax.OptState


class DeviceData(NamedTuple):
    """Data set on the device, with the statistics that normalise it."""

    images: Array  # (N, height, width, C) uint8
    labels: Array  # (N,) int32
    mean: Array  # (C,) float32, of images / 255
    deviation: Array  # (C,) float32


class DividedData(NamedTuple):
    """Data set whose images are divided over D devices; the rest is on each of them."""

    images: Array  # (D ceil(N / D), height, width, C) uint8, zeros at the end
    labels: Array  # (N,) int32
    mean: Array  # (C,) float32, of images / 255
    deviation: Array  # (C,) float32


class EpochLog(NamedTuple):
    """Means over the samples of an epoch, each measured before its step. Scalars."""

    loss: Array
    accuracy: Array


def sgd(
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    drops: tuple[int, ...] = (),
    factor: float = 0.1,
) -> optax.GradientTransformation:
    r"""Return stochastic gradient descent with momentum.

    $$v \leftarrow \mu v + \nabla L + \lambda \theta, \qquad
    \theta \leftarrow \theta - \eta v$$

    It equals `torch.optim.SGD`. Gradients are not clipped; weight decay is 0 by default.

    Args:
      learning_rate: $\eta$.
      momentum: $\mu$.
      weight_decay: $\lambda$, on all parameters.
      drops: numbers of the steps that multiply $\eta$ by `factor`, for themselves and all
        later steps.
      factor: of each drop.
    """

    def schedule(step):
        passed = sum((step >= drop).astype(jnp.float32) for drop in drops)
        return learning_rate * jnp.float32(factor) ** passed

    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    rate = schedule if drops else learning_rate
    return optax.chain(decay, optax.sgd(rate, momentum or None))


def on_device(
    dataset: Dataset, mean, deviation, mesh: Mesh, divided: bool | None = None
) -> DeviceData | DividedData:
    """Copy a data set to the devices of the mesh, whole or divided.

    Both give the same batches. A divided set sends the images of each batch between the
    devices.

    Args:
      dataset: N images.
      mean: (C,), of images / 255.
      deviation: (C,), of images / 255.
      mesh: device mesh with the axis `AXIS`.
      divided: whether each device gets a part of the images alone. None divides them if
        they would take more than a tenth of a device's memory, unless there are several
        processes or the devices do not report their memory, as CPUs.
    """
    if divided is None:
        divided = _is_large(dataset.images.nbytes, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    images, *rest = dataset.images, dataset.labels, mean, deviation
    rest = jax.device_put(rest, everywhere)
    if not divided:
        return DeviceData(jax.device_put(images, everywhere), *rest)
    missing = -len(images) % mesh.size
    images = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    return DividedData(
        jax.device_put(images, NamedSharding(mesh, PartitionSpec(AXIS))), *rest
    )


def _is_large(size: int, mesh: Mesh) -> bool:
    """Return whether so many bytes are too many for each device of the mesh."""
    if jax.process_count() > 1 or mesh.size == 1:
        return False
    limit = sizes.device_memory(mesh.devices.flat)
    return limit is not None and size > _SHARE_OF_MEMORY * limit


def batch(
    dataset: DeviceData | DividedData, index: Array, mesh: Mesh
) -> tuple[Array, Array]:
    """Return images (B, height, width, C) and labels (B,), split over the devices.

    Args:
      dataset: of `on_device`.
      index: (B,) int32 numbers of images, B a multiple of the number of devices.
      mesh: the mesh of `on_device`.
    """
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    index = jax.lax.with_sharding_constraint(index, split)
    if isinstance(dataset, DeviceData):
        return dataset.images[index], dataset.labels[index]

    def exchange(images, index):
        """Give each device its images of the batch, from the devices that hold them."""
        everyone = jax.lax.all_gather(index, AXIS, tiled=True)
        local = everyone - jax.lax.axis_index(AXIS) * len(images)
        held = images.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return jax.lax.psum_scatter(held, AXIS, tiled=True)

    of_each = PartitionSpec(AXIS)
    exchanged = jax.shard_map(
        exchange, mesh=mesh, in_specs=(of_each, of_each), out_specs=of_each
    )
    return exchanged(dataset.images, index), dataset.labels[index]


def init_state(
    model: nn.Module,
    optimiser: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    key: Array,
) -> TrainState:
    """Draw the first state of a network for images (height, width, C).

    Raises:
      ValueError: `key` is not one PRNG key.
    """
    check_key("key", key)
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
) -> Callable[[TrainState, DeviceData | DividedData, Array], tuple[TrainState, EpochLog]]:
    """Return one epoch as a pure function: shuffle, then one step per full batch.

    The last N mod `batch_size` samples of the shuffled order are left out of the epoch.

    Args:
      model: a network of `ncjax.networks.models`.
      optimiser: such as `sgd`.
      batch_size: B, a multiple of the number of devices.
      mesh: device mesh with the axis `AXIS`; every batch is split along it.
      augment: whether to shift and mirror images, see `ncjax.networks.data.augment`.

    Returns:
      `(state, data, key) -> (state, EpochLog)`, to be jitted with the state donated.
    """

    def loss_of(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        loss = jnp.mean(softmax_cross_entropy(logits, labels))
        return loss, (updated.get("batch_stats", {}), logits)

    def step(state, batch):
        images, labels = batch
        loss_and_gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradient = loss_and_gradient(
            state.params, state.batch_stats, images, labels
        )
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        correct = jax.lax.argmax(logits, 1, jnp.int32) == labels
        log = EpochLog(loss, jnp.mean(correct.astype(jnp.float32)))
        return TrainState(params, batch_stats, opt_state), log

    return make_pass(step, batch_size=batch_size, mesh=mesh, augment=augment)


def make_pass(
    step: Callable, *, batch_size: int, mesh: Mesh, augment: bool = False
) -> Callable[[Any, DeviceData | DividedData, Array], tuple[Any, Any]]:
    """Return a pass over a shuffled data set as a pure function, one step per full batch.

    Args:
      step: `(state, (images, labels)) -> (state, log)`, images (B, height, width, C)
        normalised, labels (B,), state and log any pytrees.
      batch_size: B, as for `make_epoch`.
      mesh: as for `make_epoch`.
      augment: as for `make_epoch`.

    Returns:
      `(state, data, key) -> (state, log)`, with the log averaged over the steps.
    """

    def epoch(state, dataset, key):
        check_key("key", key)
        key_order, key_augment = jax.random.split(key)
        size = dataset.labels.shape[0]
        steps = size // batch_size
        order = jax.random.permutation(key_order, jnp.arange(size, dtype=jnp.int32))
        order = order[: steps * batch_size].reshape(steps, batch_size)

        def numbered_step(state, number):
            images, labels = batch(dataset, order[number], mesh)
            if augment:
                images = data.augment(jax.random.fold_in(key_augment, number), images)
            images = data.normalise(images, dataset.mean, dataset.deviation)
            return step(state, (images, labels))

        state, logs = jax.lax.scan(numbered_step, state, jnp.arange(steps, dtype=jnp.int32))
        return state, jax.tree.map(lambda log: jnp.mean(log, axis=0), logs)

    return epoch


def make_forward(
    model: nn.Module, mesh: Mesh
) -> Callable[[TrainState, DeviceData | DividedData, Array], Array]:
    """Return the function `(state, data, index (B,)) -> features (B, d)`, to be jitted.

    The network runs in evaluation mode.
    """

    def forward(state, dataset, index):
        images, _ = batch(dataset, index, mesh)
        images = data.normalise(images, dataset.mean, dataset.deviation)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return model.apply(variables, images, train=False)[1]

    return forward


def evaluation_chunk(
    size: int, image_shape: Sequence[int], devices: Sequence[jax.Device]
) -> int:
    """Return the number of images in a call of an evaluation of `size` images.

    It is a multiple of the number of devices. On CPU it is at most 512 where they allow
    it. On accelerators so many images with 64 channels fill 256 MB of each device.

    Args:
      size: N.
      image_shape: (height, width, C).
      devices: the devices that share the images.
    """
    most, count = _CHUNK, len(devices)
    if devices[0].platform != "cpu":
        of_image = 4 * _CHANNELS * math.prod(image_shape[:2])
        most = max(1, _CHUNK_BYTES // of_image) * count
    return min(most, size) // count * count or count


def extract_features(
    forward, state: TrainState, dataset: DeviceData | DividedData
) -> Array:
    """Compute features (N, d), or (S, N, d) if `forward` is vmapped over S networks.

    The result lies on the first local device.

    Args:
      forward: the jitted result of `make_forward`, replicated over all devices.
      state: state of one network, or of S networks.
      dataset: N images.
    """
    size, images = dataset.labels.shape[0], dataset.images
    on_devices = isinstance(images, jax.Array)
    devices = list(images.sharding.device_set) if on_devices else jax.devices()
    chunk = evaluation_chunk(size, images.shape[1:], devices)
    parts = []
    for start in range(0, size, chunk):
        # Repeat the last image to fill the last chunk: one shape compiles once.
        index = np.minimum(np.arange(start, start + chunk, dtype=np.int32), size - 1)
        parts.append(forward(state, dataset, index).addressable_data(0))
    return jnp.concatenate(parts, axis=-2)[..., :size, :]


def classifier(params) -> tuple[Array, Array | None]:
    """Return weight W (K, d) and bias b (K,), or None, of the last layer."""
    last = params["classifier"]
    return last["kernel"].T, last.get("bias")


def measure(
    features: Array, labels: Array, params, centres: Array | None = None
) -> dict[str, float]:
    """Measure collapse metrics, loss, margins and alignment of a network on a data set.

    Args:
      features: (N, d), computed in evaluation mode.
      labels: (N,).
      params: parameters of the network.
      centres: (K, d) class centres of NC4. On a test split pass the class means of the
        training split (`class_means`). None takes the class means of the features.

    Returns:
      The fields of `ncjax.CollapseMetrics` and of `ncjax.LastLayer` by name.
    """
    layer = classifier(jax.tree.map(first_device, params))
    labels = first_device(labels)
    metrics = collapse_metrics_from_features(
        features, labels, *layer, centres=centres
    )._asdict()
    metrics |= last_layer(features, labels, *layer)._asdict()
    return {name: float(value) for name, value in metrics.items()}


def class_means(features: Array, labels: Array, params) -> Array:
    """Return the mean (K, d) of the features of each class, K from the last layer."""
    W, _ = classifier(params)
    return statistics.class_means(
        statistics.class_statistics(features, first_device(labels), W.shape[0])
    )


def first_device(array: Array) -> Array:
    """Return the copy on the first local device of an array that is replicated."""
    return array.addressable_data(0)
