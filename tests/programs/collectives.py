"""Prints the bytes that compiled programs send between devices, as JSON.

It needs a process of its own, because JAX fixes the number of devices at its start.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ncjax
from experiments import _legs, _seeds
from ncjax import statistics
from ncjax.networks import data, models, train

DEVICES = (2, 4, 8)
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-[a-z]+"
IMAGE = (8, 8, 1)


def sent(lowered, devices):
    """Bytes of the results of each kind of collective; shapes such as f32[3,4]."""
    text = lowered.compile().as_text()
    assert f"num_partitions={devices}" in text
    found: dict[str, int] = {}
    for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        for bits, shape in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", shapes):
            size = int(np.prod([int(axis) for axis in shape.split(",") if axis]))
            found[kind] = found.get(kind, 0) + size * int(bits) // 8
    return found


def mesh_of(devices, name):
    return Mesh(np.asarray(jax.devices()[:devices]), (name,))


def placed(tree, mesh, *names):
    """Shapes and dtypes of the leaves, split along the axes named."""
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def setting(devices):
    """Mesh, data set and replicated sharding of a run."""
    mesh = mesh_of(devices, train.AXIS)
    digits = data.load("digits", "train[:64]")
    dataset = train.on_device(digits, *data.channel_statistics(digits.images), mesh)
    return mesh, dataset, NamedSharding(mesh, PartitionSpec())


def step(model, devices, seeds=1):
    """Bytes of an epoch, whose loop holds one step, of one or several networks."""
    mesh, dataset, everywhere = setting(devices)
    optimiser = train.sgd(0.1)
    epoch = train.make_epoch(model, optimiser, batch_size=16, mesh=mesh)

    def start(key):
        return train.init_state(model, optimiser, IMAGE, key)

    key = jax.random.key(0)
    if seeds > 1:
        epoch, start = jax.vmap(epoch, in_axes=(0, None, 0)), jax.vmap(start)
        key = jax.random.split(key, seeds)
    state = placed(jax.eval_shape(start, key), mesh)
    jitted = jax.jit(epoch, out_shardings=everywhere)
    return sent(jitted.lower(state, dataset, key), devices)


def evaluation(model, devices):
    """Bytes of the features of 32 images."""
    mesh, dataset, everywhere = setting(devices)
    state = jax.eval_shape(
        lambda key: train.init_state(model, train.sgd(0.1), IMAGE, key), jax.random.key(0)
    )
    index = jax.ShapeDtypeStruct((32,), jnp.int32)
    forward = jax.jit(train.make_forward(model, mesh), out_shardings=everywhere)
    return sent(forward.lower(placed(state, mesh), dataset, index), devices)


def merge(devices, K=5, d=7):
    """Bytes of both passes of the collapse metrics."""
    mesh = mesh_of(devices, "devices")
    split = PartitionSpec("devices")

    def both(first, second):
        total = jax.lax.psum(second, "devices")
        return statistics.all_merge(first, "devices"), total

    parts = statistics.init(devices * K, d), statistics.init_comparison(devices * K)
    fn = jax.shard_map(both, mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    return sent(jax.jit(fn).lower(*placed(parts, mesh, "devices")), devices)


def flow(devices):
    """Bytes of one leg of the flow of as many seeds as devices."""
    keys = jax.random.split(jax.random.key(0), devices)
    starts = jax.vmap(lambda key: ncjax.init_params(key, 3, 2, 4))(keys)
    _seeds.Division.place = lambda self, states: states  # shapes are placed below
    leg, _ = _legs._compile(starts, _legs.measure_collapse, "explicit", 100)
    starts = placed(starts, mesh_of(devices, "seeds"), "seeds")
    times, before = jnp.array([1.0, 2.0]), jnp.array(-jnp.inf)
    return sent(jax.jit(leg).lower(starts, times, before), devices)


def main():
    mlp = models.build("mlp", 10, width=0.1)
    convnet = models.build("convnet", 10, channels=(3, 6))
    found = {
        "mlp": step(mlp, 4),
        "convnet": [step(convnet, devices) for devices in DEVICES],
        "three mlps": step(mlp, 4, seeds=3),
        "features": [evaluation(mlp, devices) for devices in DEVICES],
        "merge": [merge(devices) for devices in DEVICES],
        "flow": flow(DEVICES[-1]),
        "parameters": {
            "mlp": models.count_parameters(mlp, IMAGE),
            "convnet": models.count_parameters(convnet, IMAGE),
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])
    main()
