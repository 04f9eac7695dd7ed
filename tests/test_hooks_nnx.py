"""The metric of Flax NNX: the numbers of the arrays, alone and compiled with others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ncjax
from ncjax.nnx import Collapse

K, D, N = 3, 5, 60
FIELDS = [
    name
    for name in ncjax.CollapseMetrics._fields
    if name not in ("ncc_mismatch", "accuracy")
]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(N, dtype=np.int32) % K)
    features = np.eye(K, D)[labels] + 0.3 * rng.normal(size=(N, D))
    return jnp.asarray(features), jnp.asarray(labels), jnp.asarray(rng.normal(size=(D, K)))


def assert_same(got, features, labels, kernel, names=FIELDS):
    expected = ncjax.collapse_metrics_from_features(features, labels, kernel.T)
    for name in names:
        np.testing.assert_allclose(
            got[name], getattr(expected, name), rtol=1e-10, err_msg=name
        )
    assert int(got["samples"]) == len(labels)


def test_batches_give_the_metrics_of_all_samples(data):
    features, labels, kernel = data
    metric = Collapse(K, D, dtype=jnp.float64)
    for rows in (slice(0, 30), slice(30, N)):
        metric.update(features=features[rows], labels=labels[rows], kernel=kernel)
    got = metric.compute()
    assert_same(got, *data)
    assert np.isnan(got["ncc_mismatch"])
    assert np.isnan(got["accuracy"])


def test_it_works_compiled_beside_other_metrics(data):
    features, labels, kernel = data
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), collapse=Collapse(K, D, dtype=jnp.float64)
    )

    @nnx.jit
    def step(metrics, layer, features, labels):
        metrics.update(
            loss=jnp.ones(2, jnp.float32),
            features=features,
            labels=labels,
            kernel=layer.kernel,
        )

    layer = nnx.Linear(D, K, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel.astype(jnp.float32)
    for rows in (slice(0, 30), slice(30, N)):  # of one size, so compiled once
        step(metrics, layer, features[rows], labels[rows])
    with jax.numpy_dtype_promotion("standard"):  # of Flax's own metric
        got = metrics.compute()
        inside = nnx.jit(lambda metrics: metrics.compute())(metrics)
    assert got["loss"] == 1
    assert_same(got["collapse"], features, labels, layer.kernel[...].astype(jnp.float64))
    np.testing.assert_allclose(inside["collapse"]["cdnv"], got["collapse"]["cdnv"])


def test_without_a_kernel_only_the_classifier_is_undefined(data):
    features, labels, _ = data
    metric = Collapse(K, D, dtype=jnp.float64)
    metric.update(features=features, labels=labels)
    got = metric.compute()
    assert np.isnan(got["self_duality"])
    assert_same(got, *data, names=["cdnv", "etf_gram_error", "mean_cosine_deviation"])


def test_features_whose_squares_underflow_leave_nc1_undefined(data):
    features, labels, kernel = data
    metric = Collapse(K, D)
    metric.update(features=1e-17 * features, labels=labels, kernel=kernel)
    values = metric.compute()
    for name in ("within_class_variation", "within_class_quotient", "cdnv"):
        assert np.isnan(values[name])
    assert np.isfinite(values["mean_cosine_deviation"])


def test_without_the_scatter_only_nc1_is_undefined(data):
    features, labels, kernel = data
    metric = Collapse(K, D, within_scatter=False, dtype=jnp.float64)
    metric.update(features=features, labels=labels, kernel=kernel)
    got = metric.compute()
    assert np.isnan(got["within_class_variation"])
    assert_same(got, *data, names=[name for name in FIELDS if name != FIELDS[0]])


def test_sequences_masks_and_ignored_labels(data):
    features, labels, kernel = data
    metric = Collapse(K, D, dtype=jnp.float64)
    kept = np.arange(N) % 5 != 0
    marked = jnp.where(kept, labels, -100).reshape(6, 10)
    metric.update(features=features.reshape(6, 10, D), labels=marked, kernel=kernel)
    assert_same(metric.compute(), features[kept], labels[kept], kernel)
    metric.reset()
    metric.update(
        features=features.reshape(6, 10, D),
        labels=labels.reshape(6, 10),
        kernel=kernel,
        mask=kept.reshape(6, 10),
    )
    assert_same(metric.compute(), features[kept], labels[kept], kernel)


def test_reset_forgets_all_samples(data):
    features, labels, kernel = data
    metric = Collapse(K, D, dtype=jnp.float64)
    metric.update(features=features + 1, labels=labels, kernel=-kernel)
    metric.reset()
    metric.update(features=features, labels=labels, kernel=kernel)
    assert_same(metric.compute(), *data)


def test_bad_input_is_refused_with_advice(data):
    features, labels, kernel = data
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 2"):
        Collapse(1, D)
    metric = Collapse(K, D, dtype=jnp.float64)
    with pytest.raises(ValueError, match=r"expected kernel \(5, 3\), got \(3, 5\)"):
        metric.update(features=features, labels=labels, kernel=kernel.T)
    with pytest.raises(ValueError, match="expected features"):
        metric.update(features=features[:, :2], labels=labels)
    metric.update(features=features, labels=0 * labels)
    with pytest.raises(ValueError, match="every class needs a sample"):
        metric.compute()
