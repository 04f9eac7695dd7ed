"""Work that never ends on two devices, interrupted while they compute."""

import jax
import numpy as np

from experiments import train_small
from experiments._runs import cli


def run(_config):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("a",))
    split = jax.sharding.PartitionSpec("a")

    def endless(x):
        return jax.lax.while_loop(lambda y: (y >= 0).all(), lambda y: x @ y, x)

    shard = jax.shard_map(
        endless, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    jax.jit(shard)(np.zeros((2, 300, 300)))
    print("at work", flush=True)
    raise KeyboardInterrupt


cli.main(train_small.Config, run, "endless")
