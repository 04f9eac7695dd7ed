"""Prints the bytes of a data set on each device, whole and divided, as JSON.

Both must give the same batches, and networks equal to rounding. It needs a process of its
own, because JAX fixes the number of devices at its start.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ncjax.networks import data, models, train

MESH = Mesh(np.asarray(jax.devices()), (train.AXIS,))
RNG = np.random.default_rng(0)
SHAPE = (4, 4, 1)
IMAGES = RNG.integers(1, 256, (61, *SHAPE)).astype(np.uint8)  # not even over the devices
DATA = data.Dataset(IMAGES, np.arange(61, dtype=np.int32) % 3, 3)
BATCHES = RNG.integers(0, 61, (2, 20)).astype(np.int32)
MODEL, OPTIMISER = models.build("mlp", 3, width=0.05), train.sgd(0.1)


def used(divided):
    """Bytes of images on a device, two batches at once, and two networks trained."""
    statistics = data.channel_statistics(IMAGES)
    dataset = train.on_device(DATA, *statistics, MESH, divided=divided)
    batch = jax.vmap(partial(train.batch, mesh=MESH), in_axes=(None, 0))
    batches = jax.jit(batch)(dataset, BATCHES)
    epoch = train.make_epoch(MODEL, OPTIMISER, batch_size=20, mesh=MESH)
    keys = jax.random.split(jax.random.key(1), 2)
    states = [train.init_state(MODEL, OPTIMISER, SHAPE, key) for key in keys]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    trained = jax.jit(jax.vmap(epoch, in_axes=(0, None, 0)))(states, dataset, keys)
    held = max(shard.data.nbytes for shard in dataset.images.addressable_shards)
    return held, jax.device_get(batches), jax.device_get(trained)


def main():
    (whole, *expected), (divided, *got) = used(False), used(True)
    for images, labels in (expected[0], got[0]):
        np.testing.assert_array_equal(images, IMAGES[BATCHES])
        np.testing.assert_array_equal(labels, DATA.labels[BATCHES])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, got[1], expected[1])
    print(json.dumps({"whole": whole, "divided": divided}))


main()
