"""Asserts that eight devices, merged, give the metrics of one pass over all samples.

One device sees nothing and each other one or two classes.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from ncjax import statistics
from ncjax.metrics.collapse import metrics_from_statistics

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

rng = np.random.default_rng(0)
K, d, N = 5, 7, 64
features = jnp.asarray(rng.normal(size=(N, d)) + 1e4)
labels = jnp.asarray(np.sort(rng.integers(0, K, N)))
mask = jnp.asarray(np.arange(N) // 8 != 2)
W, b = jnp.asarray(rng.normal(size=(K, d))), jnp.asarray(rng.normal(size=K))


def both_passes(features, labels, mask, merge, total):
    first = merge(statistics.update(statistics.init(K, d, W.dtype), features, labels, mask))
    empty, against = statistics.init_comparison(K, W.dtype), statistics.reference(first)
    second = statistics.compare(empty, first, against, features, labels, W, b, mask)
    return first, total(second)


def on_one_of_eight(features, labels, mask):
    return both_passes(
        features,
        labels,
        mask,
        lambda first: statistics.all_merge(first, "devices"),
        lambda second: jax.lax.psum(second, "devices"),
    )


@jax.jit
def alone(features, labels, mask):
    return both_passes(features, labels, mask, lambda first: first, lambda second: second)


mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
assert mesh.size == 8
split = PartitionSpec("devices")
sharded = jax.jit(
    jax.shard_map(on_one_of_eight, mesh=mesh, in_specs=split, out_specs=PartitionSpec())
)
got, expected = sharded(features, labels, mask), alone(features, labels, mask)
np.testing.assert_array_equal(got[0].counts, expected[0].counts)
np.testing.assert_allclose(got[0].scatter, expected[0].scatter, rtol=1e-11)
chex.assert_trees_all_close(
    metrics_from_statistics(*got, W),
    metrics_from_statistics(*expected, W),
    rtol=1e-10,
)
