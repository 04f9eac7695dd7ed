"""Asserts that any number of seeds on four devices has the results of one device.

It needs a process of its own, because JAX fixes the number of devices at its start.
"""

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments._seeds import Division, measurement  # noqa: E402

assert jax.device_count() == 4


def one(state, shared):
    return jax.tree.map(lambda leaf: jnp.cumsum(leaf) * shared, state)


def total(states, starts):
    return {"total": states["a"].sum(1) - starts["a"].sum(1)}


for seeds in range(1, 10):
    rng = np.random.default_rng(seeds)
    states = {"a": rng.integers(9, size=(seeds, 3)), "b": rng.integers(9, size=(seeds, 2))}
    division = Division(seeds)
    results = division.compiled(one, num_shared=1)(states, 7)
    measured = measurement(total)(results, division.place(states))
    found = division.collect(results | measured)
    ends = {name: np.cumsum(leaf, axis=1) * 7 for name, leaf in states.items()}
    ends["total"] = ends["a"].sum(1) - states["a"].sum(1)
    assert found.keys() == ends.keys()
    for name, expected in ends.items():
        np.testing.assert_array_equal(found[name], expected)
