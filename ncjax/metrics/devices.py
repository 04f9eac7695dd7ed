"""Run the passes of a `CollapseMeter` on one device, or divided over a mesh.

On a mesh each device keeps the sums over its own samples, on a leading axis of all arrays,
so that no batch needs communication. The sums meet at the end.
"""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ncjax.metrics import collapse, one_pass, statistics
from ncjax.metrics.collapse import CollapseMetrics
from ncjax.metrics.one_pass import OnePass
from ncjax.metrics.statistics import Comparison
from ncjax.metrics.tiles import FEW_CLASSES
from ncjax.numerics import at_unit_scale
from ncjax.types import Array

# A state that nobody else holds gives its memory to the new one.
_update = jax.jit(one_pass.update)
_update_in_place = jax.jit(one_pass.update, donate_argnums=0)
_merge = jax.jit(one_pass.merge)


@partial(jax.jit, donate_argnums=0)
def _compare(comparison, first, against, features, labels, mask, W, b):
    return statistics.compare(comparison, first, against, features, labels, W, b, mask)


_pairs = jax.jit(collapse.pair_metrics, static_argnums=2)
_whitening = jax.jit(one_pass.whitening_of, static_argnums=1)


@partial(jax.jit, static_argnums=2)
def _whole(state, W, min_count, pairs, whitening) -> CollapseMetrics:
    return one_pass.metrics(state, W, min_count=min_count, pairs=pairs, whitening=whitening)


def _metrics(state: OnePass, W: Array, min_count, pairs=None) -> CollapseMetrics:
    """Return the metrics of one pass; many classes take the programs one after another.

    One program for all of them would hold eleven arrays (K, d) at once, three hold five.
    """
    whitening = None
    if len(W) > FEW_CLASSES:
        pairs = _pairs(state.first, at_unit_scale(W), min_count) if pairs is None else pairs
        if state.within is not None:
            whitening = _whitening(state.first, min_count)
    return _whole(state, W, min_count, pairs, whitening)


class OneDevice:
    """All samples on one device."""

    mesh = None
    of_samples = None

    def spread(self, sums):
        """Return the sums of no sample, for each device."""
        return sums

    def update(self, state: OnePass, batch, shared: bool) -> OnePass:
        """Add a batch; `shared` keeps the old state alive."""
        return (_update if shared else _update_in_place)(state, *batch)

    def replicated(self, arrays):
        """Return arrays on every device."""
        return arrays

    def compare(self, comparison, first, against, batch, W, b) -> Comparison:
        """Add a batch to the second pass; all but sums and batch are `replicated`."""
        return _compare(comparison, first, against, *batch, W, b)

    def merge(self, one: OnePass, other: OnePass) -> OnePass:
        """Merge the sums of two meters."""
        return _merge(one, other)

    def merged(self, state: OnePass) -> OnePass:
        """Return the sums over all devices, on one of them."""
        return state

    def total(self, comparison: Comparison) -> Comparison:
        """Return the second pass over all devices, on one of them."""
        return comparison

    def metrics(self, state: OnePass, W: Array, min_count) -> CollapseMetrics:
        """Return the metrics of one pass, from merged sums."""
        return _metrics(state, W, min_count)


class Mesh:
    """Samples divided over the devices of a mesh of one axis."""

    def __init__(self, mesh: jax.sharding.Mesh):
        if len(mesh.axis_names) != 1:
            raise ValueError(
                f"expected a mesh of one axis, got {mesh.axis_names}: make it by "
                "jax.make_mesh((jax.device_count(),), ('samples',))"
            )
        self.mesh = mesh
        self._axis = mesh.axis_names[0]
        self.of_samples = NamedSharding(mesh, P(self._axis))

    def spread(self, sums):
        """Return the sums of no sample, for each device."""

        def copies():
            size = self.mesh.devices.size
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), sums)

        return jax.jit(copies, out_shardings=self.of_samples)()

    def update(self, state: OnePass, batch, shared: bool) -> OnePass:
        """Add a batch; `shared` keeps the old state alive."""
        return (self._update if shared else self._update_in_place)(state, *batch)

    def replicated(self, arrays):
        """Return arrays, which every process holds, on every device."""
        whole = NamedSharding(self.mesh, P())
        if jax.process_count() == 1:
            return jax.device_put(arrays, whole)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), arrays
        )

    def compare(self, comparison, first, against, batch, W, b) -> Comparison:
        """Add a batch to the second pass; all but sums and batch are `replicated`."""
        return self._compare(comparison, first, against, *batch, W, b)

    def merge(self, one: OnePass, other: OnePass) -> OnePass:
        """Merge the sums of two meters."""
        return self._merge(one, other)

    def merged(self, state: OnePass) -> OnePass:
        """Return the sums over all devices, on one of them."""
        return self._local(self._merged(state))

    def total(self, comparison: Comparison) -> Comparison:
        """Return the second pass over all devices, on one of them."""
        return self._local(self._total(comparison))

    def metrics(self, state: OnePass, W: Array, min_count) -> CollapseMetrics:
        """Return the metrics of one pass; all devices share the pairs of classes."""
        first, scaled = self.replicated((state.first, W))
        pairs = self._local(self._pairs(min_count)(first, scaled))
        return _metrics(state, W, min_count, pairs)

    def _over_devices(self, function, inputs, outputs, **options):
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return jax.jit(mapped, **options)

    def _of_each(self, function):
        """Return a function of one device's sums as one of sums with a leading axis."""

        def mapped(sums, *arguments):
            new = function(jax.tree.map(lambda x: x[0], sums), *arguments)
            return jax.tree.map(lambda x: x[None], new)

        return mapped

    @cached_property
    def _update(self):
        one = P(self._axis)
        return self._over_devices(self._of_each(one_pass.update), (one,) * 4, one)

    @cached_property
    def _update_in_place(self):
        one = P(self._axis)
        function = self._of_each(one_pass.update)
        return self._over_devices(function, (one,) * 4, one, donate_argnums=0)

    @cached_property
    def _compare(self):
        def compare(comparison, first, against, features, labels, mask, W, b):
            return statistics.compare(
                comparison, first, against, features, labels, W, b, mask
            )

        one, all_ = P(self._axis), P()
        inputs = (one, all_, all_, one, one, one, all_, all_)
        return self._over_devices(self._of_each(compare), inputs, one, donate_argnums=0)

    @cached_property
    def _merge(self):
        one = P(self._axis)

        def merge(sums, others):
            return one_pass.merge(sums, jax.tree.map(lambda x: x[0], others))

        return self._over_devices(self._of_each(merge), (one, one), one)

    @cached_property
    def _merged(self):
        def merged(sums):
            return one_pass.all_merge(jax.tree.map(lambda x: x[0], sums), self._axis)

        return self._over_devices(merged, P(self._axis), P())

    @cached_property
    def _total(self):
        def total(sums):
            return jax.tree.map(lambda x: jax.lax.psum(x[0], self._axis), sums)

        return self._over_devices(total, P(self._axis), P())

    def _pairs(self, min_count):
        function = partial(collapse.pair_metrics, min_count=min_count, axis_name=self._axis)
        return self._over_devices(function, P(), P())

    def _local(self, arrays):
        """Return this process's copy of arrays that all devices hold."""
        return jax.tree.map(lambda x: x.addressable_data(0), arrays)
