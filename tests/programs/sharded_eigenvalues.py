"""Prints extreme eigenvalues of a loss whose samples lie on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ncjax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


x = np.random.default_rng(0).normal(size=(3, 16, 40))
params = {"w": jnp.full((40, 30), 0.01), "b": jnp.zeros(30)}
for devices, kind in ((1, AxisType.Auto), (8, AxisType.Auto), (8, AxisType.Explicit)):
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices]
    )
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    copied = NamedSharding(mesh, PartitionSpec())
    eig = ncjax.hessian_eig(
        loss,
        jax.device_put(params, copied),
        batches=jax.device_put(x, split),
        k=2,
        which="both",
        sphere=True,
    )
    assert eig.method == "lanczos"
    assert bool(eig.converged.all())
    assert len(eig.eigenvalues.sharding.device_set) == devices
    print(*map(float.hex, map(float, eig.eigenvalues)))
