"""Divide the seeds of a run over the devices of all its processes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments._runs import processes


class Division:
    """S seeds over D devices: ceil(S / D) seeds in order on each device.

    If D does not divide S, the last seed is repeated to fill its device, and `collect`
    drops the repetitions. Devices that would hold nothing else are left out, except that
    every process keeps one.

    The programs have no communication: each process runs its own devices at its own pace,
    and `collect` brings the results together.
    """

    def __init__(self, seeds: int):
        """Divide `seeds` over the devices that JAX has now."""
        self.seeds = seeds
        of_device = -(-seeds // jax.device_count())
        process, devices = jax.process_index(), jax.local_devices()
        before = sum(device.process_index < process for device in jax.devices())
        first = before * of_device
        used = min(max(1, -(-(seeds - first) // of_device)), len(devices))
        indices = first + np.arange(used * of_device)
        self._indices = np.minimum(indices, seeds - 1)  # the seeds of this process
        self._mesh = Mesh(np.asarray(devices[:used]), ("seeds",))

    def place(self, states: Any) -> Any:
        """Return the states of the seeds of this process, from all (S, ...)."""
        split = NamedSharding(self._mesh, PartitionSpec("seeds"))
        own = jax.tree.map(lambda leaf: np.asarray(leaf)[self._indices], states)
        return jax.device_put(own, split)

    def compiled(self, one: Callable, num_shared: int = 0) -> Callable:
        """Compile a function of one seed for the seeds of this process.

        Args:
          one: function of a state and of `num_shared` arrays that all seeds share.
          num_shared: number of the arrays.

        Returns:
          A function of all states (S, ...) and the shared arrays.
        """
        spread, shared = PartitionSpec("seeds"), PartitionSpec()
        # Each device solves its own seeds, at its own pace and without communication.
        program = jax.jit(
            jax.shard_map(
                jax.vmap(one, in_axes=(0, *[None] * num_shared)),
                mesh=self._mesh,
                in_specs=(spread, *[shared] * num_shared),
                out_specs=spread,
                check_vma=False,
            )
        )
        # Every call needs the same placement, or the second one compiles again.
        return lambda states, *arrays: program(self.place(states), *arrays)

    def collect(self, results: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Join the named results of every process; return them for all seeds, (S, ...)."""
        own = {name: np.asarray(array) for name, array in results.items()}
        parts = processes.exchange_arrays(own)
        return {
            name: np.concatenate([part[name] for part in parts])[: self.seeds]
            for name in own
        }


def measurement(of_seeds: Callable) -> Callable:
    """Compile a function of states (s, ...) for placed states, device by device.

    The first device computes all, because XLA's batched LAPACK calls can deadlock on
    several. Each call has the seeds of one device, so that the results do not depend on
    the number of processes that own the devices.
    """
    program = jax.jit(of_seeds)

    def of_placed(*trees):
        leaves, shape = jax.tree.flatten(trees)
        columns = zip(*map(_shards, leaves), strict=True)
        first = jax.local_devices()[0]
        found = [
            program(*jax.tree.unflatten(shape, jax.device_put(parts, first)))
            for parts in columns
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    return of_placed


def _shards(array: jax.Array) -> list[jax.Array]:
    """Return the parts of an array on each device, in the order of the seeds."""
    parts = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [part.data for part in parts]
