"""Prints the bytes of a data set on each device, whole and divided, as JSON.

Both must give the same bits in training and evaluation, of two networks at once.

It needs a process of its own, because JAX fixes the number of devices at its start.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ncjax.networks import data, loss_clock, models, train

MESH = Mesh(np.asarray(jax.devices()), (train.AXIS,))
DIGITS = data.load("digits", "train[:61]")  # not a multiple of the devices
SHAPE = DIGITS.images.shape[1:]
MODEL = models.build("mlp", 10, width=0.05)
OPTIMISER = train.sgd(0.1)


def trained(divided):
    """Bytes of images on a device; states, logs, features and losses of two networks."""
    statistics = data.channel_statistics(DIGITS.images)
    dataset = train.on_device(DIGITS, *statistics, MESH, divided=divided)
    options = {"batch_size": 20, "mesh": MESH, "augment": True}
    epoch = train.make_epoch(MODEL, OPTIMISER, **options)
    keys = jax.random.split(jax.random.key(1), 2)
    states = [train.init_state(MODEL, OPTIMISER, SHAPE, key) for key in keys]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    states, logs = jax.jit(jax.vmap(epoch, in_axes=(0, None, 0)))(together, dataset, keys)
    forward = jax.jit(jax.vmap(train.make_forward(MODEL, MESH), in_axes=(0, None, None)))
    features = forward(states, dataset, np.arange(44, 64, dtype=np.int32) % 61)
    losses = jax.vmap(loss_clock.make_log_loss(MODEL, MESH), in_axes=(0, None))
    log_losses = jax.jit(losses)(states, dataset)
    held = max(shard.data.nbytes for shard in dataset.images.addressable_shards)
    return held, jax.device_get((states, logs, features, log_losses))


def main():
    whole, divided = trained(False), trained(True)
    jax.tree.map(np.testing.assert_array_equal, whole[1], divided[1])
    print(json.dumps({"whole": whole[0], "divided": divided[0]}))


main()
