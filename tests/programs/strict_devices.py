"""Asserts that inputs split over four devices, or copied to them, change no result.

It needs a process of its own, because JAX fixes the number of devices at its start.
"""

import os
from functools import partial

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import interface
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

assert jax.device_count() == 4
mesh = Mesh(np.asarray(jax.devices()), ("devices",))
copied = NamedSharding(mesh, PartitionSpec())
split = NamedSharding(mesh, PartitionSpec("devices"))


def placed(array, sharding):
    """Put the rows on the devices; an array of another length goes to all of them."""
    fits = array.ndim and array.shape[0] % mesh.size == 0
    return jax.device_put(array, sharding if fits else copied)


inputs = interface.points()
for sharding in (copied, split):
    on_devices = jax.tree.map(partial(placed, sharding=sharding), inputs)
    interface.assert_as_expected(interface.compiled(on_devices))
    interface.assert_as_expected(interface.evaluate(on_devices, interface.COMPILED))
