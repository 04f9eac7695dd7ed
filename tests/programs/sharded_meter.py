"""Asserts that a meter over four devices gives the numbers of a meter on one."""

import jax
import numpy as np

import ncjax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
mesh = jax.make_mesh((4,), ("samples",))
K, d, N = 1100, 6, 1401  # two tiles of classes, and a batch that four does not divide
labels = np.arange(N) % K
W, b = rng.normal(size=(K, d)), rng.normal(size=K)
features = W[labels] + 0.5 * rng.normal(size=(N, d)) + 100
settings = {"min_count": 1, "centres": W + 100, "classifier": (W, b)}
meter, other = (ncjax.CollapseMeter(K, d, mesh=mesh, **settings) for _ in range(2))
meter.update(features[:700], labels[:700])
other.update(features[700:], labels[700:])
meter.merge(other)
second = meter.second_pass(W, b, centres=W + 100).update(features, labels)
expected = ncjax.collapse_metrics_from_features(
    features, labels, W, b, centres=W + 100, min_count=1
)
for report in (meter.compute(), second.compute()):
    assert report.samples == N
    for name, value in report.metrics._asdict().items():
        right = getattr(expected, name)
        np.testing.assert_allclose(value, right, rtol=1e-10, err_msg=name)
