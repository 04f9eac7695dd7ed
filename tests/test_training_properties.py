"""Networks, data and training at random shapes and numbers, against NumPy."""

import math
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from scipy.stats import kstest
from strategies import seeds

import ncjax
from ncjax.networks import data, models, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

few = settings(max_examples=settings.default.max_examples * 2 // 5)


# Data


@given(seeds, st.sampled_from([(2, 3, 4, 1), (1, 2, 2, 3)]))
def test_normalised_images_equal_numpy(seed, shape):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape, np.uint8)
    mean, deviation = rng.uniform(0, 1, shape[-1]), 10 ** rng.uniform(-3, 0, shape[-1])
    single = [jnp.asarray(x, jnp.float32) for x in (mean, deviation)]
    got = data.normalise(jnp.asarray(images), *single)
    assert got.dtype == jnp.float32
    expected = (images / 255 - mean) / deviation
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(got, expected, rtol=4 * eps, atol=4 * eps / deviation.min())


PARTS = st.lists(
    st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 9), st.integers(1, 4)),
    max_size=3,
)


@given(PARTS, PARTS)
def test_splits_overlap_where_they_share_a_sample(first, second):
    sets = []
    for drawn in (first, second):
        parts = tuple(data.Part(name, start, start + size) for name, start, size in drawn)
        sets.append(data.Dataset(np.zeros((0, 1, 1, 1)), np.zeros(0), 2, parts))
    samples = [
        {(name, i) for name, start, size in drawn for i in range(start, start + size)}
        for drawn in (first, second)
    ]
    assert data.overlap(*sets) == bool(samples[0] & samples[1])
    assert data.overlap(*sets[::-1]) == data.overlap(*sets)


# Networks

WIDTHS = st.floats(0.01, 0.5)


def units(number, width):
    return max(1, round(number * width))


@few
@given(
    hidden=st.lists(st.integers(1, 300), max_size=3),
    width=WIDTHS,
    num_classes=st.integers(2, 20),
    use_bias=st.booleans(),
    image=st.sampled_from([(1, 1, 1), (3, 2, 3), (8, 8, 1)]),
)
def test_parameter_counts_of_fully_connected_networks(
    hidden, width, num_classes, use_bias, image
):
    options = {"hidden": tuple(hidden), "width": width, "use_bias": use_bias}
    network = models.build("mlp", num_classes, **options)
    sizes = [math.prod(image), *(units(h, width) for h in hidden)]
    expected = sum((a + 1) * b for a, b in pairwise(sizes))
    expected += (sizes[-1] + use_bias) * num_classes
    assert models.count_parameters(network, image) == expected


@few
@given(
    channels=st.lists(st.integers(1, 200), min_size=1, max_size=2),
    width=WIDTHS,
    num_classes=st.integers(2, 20),
    use_bias=st.booleans(),
)
def test_parameter_counts_of_convolutional_networks(channels, width, num_classes, use_bias):
    options = {"channels": tuple(channels), "width": width, "use_bias": use_bias}
    network = models.build("convnet", num_classes, **options)
    sizes = [3, *(units(c, width) for c in channels)]
    # Kernels of 3x3, scales and offsets; no bias before a normalisation.
    expected = sum((9 * a + 2) * b for a, b in pairwise(sizes))
    expected += (sizes[-1] + use_bias) * num_classes
    assert models.count_parameters(network, (8, 8, 3)) == expected


def drawn_layers(rng, sizes, use_bias):
    """Parameters of a fully connected network as NumPy arrays."""
    names = [*(f"fc{i + 1}" for i in range(len(sizes) - 2)), "classifier"]
    params = {}
    for name, (a, b) in zip(names, pairwise(sizes), strict=True):
        params[name] = {"kernel": (rng.normal(size=(a, b)) / a**0.5).astype(np.float32)}
        if use_bias or name != "classifier":
            params[name]["bias"] = rng.normal(size=b).astype(np.float32)
    return params


@few
@given(seeds, st.sampled_from([(), (3,), (4, 2)]), st.booleans())
def test_fully_connected_networks_agree_with_their_formula(seed, hidden, use_bias):
    rng = np.random.default_rng(seed)
    network = models.build("mlp", 3, hidden=hidden, width=1.0, use_bias=use_bias)
    params = drawn_layers(rng, [6, *hidden, 3], use_bias)
    images = rng.normal(size=(5, 2, 3, 1)).astype(np.float32)
    logits, features = network.apply({"params": params}, images)
    rows = images.reshape(5, -1).astype(float)
    for i in range(len(hidden)):
        layer = params[f"fc{i + 1}"]
        rows = np.maximum(0, rows @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(features, rows, rtol=1e-4, atol=1e-5)
    W, b = train.classifier(jax.tree.map(jnp.asarray, params))
    assert (b is None) == (not use_bias)
    expected = rows @ np.asarray(W, float).T + (np.asarray(b) if use_bias else 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# Training


@few
@given(
    seed=seeds,
    rate=st.floats(1e-4, 1),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    decay=st.sampled_from([0.0, 1e-3, 0.1]),
    drops=st.lists(st.integers(0, 5), max_size=3),
    factor=st.sampled_from([0.1, 0.2]),
)
def test_sgd_agrees_with_its_formula(seed, rate, momentum, decay, drops, factor):
    rng = np.random.default_rng(seed)
    optimiser = train.sgd(
        rate,
        momentum=momentum,
        weight_decay=decay,
        drops=tuple(sorted(drops)),
        factor=factor,
    )
    theta, velocity = rng.normal(size=4), np.zeros(4)
    params = jnp.asarray(theta)
    state = optimiser.init(params)
    # The rate is float32 where it drops.
    for step in range(5):
        slope = rng.normal(size=4)
        updates, state = optimiser.update(jnp.asarray(slope), state, params)
        params = params + updates
        velocity = momentum * velocity + slope + decay * theta
        theta = theta - rate * factor ** sum(step >= drop for drop in drops) * velocity
        np.testing.assert_allclose(params, theta, rtol=1e-5, atol=1e-5 * rate)


N, BATCH, K, IMAGE = 11, 4, 3, (2, 2, 1)
SOFTMAX = models.build("mlp", K, hidden=())
RATE, MOMENTUM = 0.25, 0.75
OPTIMISER = train.sgd(RATE, momentum=MOMENTUM)
MESH = Mesh(np.asarray(jax.devices()[:1]), (train.AXIS,))
FORWARD = jax.jit(train.make_forward(SOFTMAX, MESH))
EPOCH = jax.jit(train.make_epoch(SOFTMAX, OPTIMISER, batch_size=BATCH, mesh=MESH))


def drawn_data(rng):
    images = rng.integers(0, 256, (N, *IMAGE), np.uint8)
    labels = rng.integers(0, K, N, np.int32)
    return data.Dataset(images, labels, K), *data.channel_statistics(images)


@given(seeds, seeds, st.floats(0, 20))
def test_epochs_of_softmax_regression_agree_with_numpy(seed, key, size):
    """Two epochs, with the gradient in closed form: (p - e_y) xᵀ."""
    rng = np.random.default_rng(seed)
    dataset, mean, deviation = drawn_data(rng)
    params = drawn_layers(rng, [4, K], True)
    params = jax.tree.map(lambda leaf: np.float32(size) * leaf, params)
    state = train.TrainState(params, {}, OPTIMISER.init(params))
    on_device = train.on_device(dataset, mean, deviation, MESH)
    rows = ((dataset.images / 255 - mean) / deviation).reshape(N, -1)
    features = train.extract_features(FORWARD, state, on_device)
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)
    rows = np.append(rows, np.ones((N, 1)), axis=1)
    last = params["classifier"]
    W = np.vstack([last["kernel"], last["bias"]]).astype(float)
    velocity = np.zeros_like(W)
    for part in jax.random.split(jax.random.key(key), 2):
        state, log = EPOCH(state, on_device, part)
        order = jax.random.permutation(
            jax.random.split(part)[0], np.arange(N, dtype=np.int32)
        )
        losses, least, most = [], [], []  # a near tie may go either way
        atol = 1e-5 * (1 + size)
        for batch in np.asarray(order)[: N // BATCH * BATCH].reshape(-1, BATCH):
            x, y = rows[batch], dataset.labels[batch]
            logits = x @ W
            excess = logits - logits[np.arange(BATCH), y, None]
            losses.append(np.logaddexp.reduce(excess, axis=1))
            worst = np.delete(excess.ravel(), np.arange(BATCH) * K + y)
            worst = worst.reshape(BATCH, K - 1).max(axis=1)
            least.append(worst < -2 * atol)
            most.append(worst <= 2 * atol)
            p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
            velocity = MOMENTUM * velocity + x.T @ (p - np.eye(K)[y]) / BATCH
            W = W - RATE * velocity
        got = state.params["classifier"]
        np.testing.assert_allclose(got["kernel"], W[:-1], rtol=1e-4, atol=atol)
        np.testing.assert_allclose(got["bias"], W[-1], rtol=1e-4, atol=atol)
        assert float(log.loss) == pytest.approx(np.mean(losses), rel=1e-4, abs=atol)
        assert np.mean(least) - 1e-6 <= float(log.accuracy) <= np.mean(most) + 1e-6


@given(st.integers(1, 70), st.sampled_from([1, 7, 16]), seeds)
def test_features_come_in_order_and_in_chunks_of_one_size(size, chunk, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size, 3)).astype(np.float32)
    lengths = []

    def forward(state, dataset, index):
        lengths.append(len(index))
        return jnp.asarray(features[index] + state)

    labels = np.zeros(size, np.int32)
    dataset = train.DeviceData(np.zeros((size, *IMAGE), np.uint8), labels, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_CHUNK", chunk)
        got = train.extract_features(forward, np.float32(2), dataset)
    np.testing.assert_array_equal(got, features + np.float32(2))
    assert set(lengths) == {min(chunk, size)}
    assert len(lengths) == -(-size // min(chunk, size))


# The start of the flow


@given(
    seeds, st.just(0) | st.floats(1e-30, 1e30), st.sampled_from([np.float32, np.float64])
)
def test_starts_are_independent_normal_numbers(seed, scale, dtype):
    key = jax.random.key(seed)
    start = ncjax.init_params(key, 6, 9, 7, scale, dtype)
    unit = ncjax.init_params(key, 6, 9, 7, 1.0, dtype)
    scaled = jax.tree.map(lambda leaf: dtype(scale) * np.asarray(leaf), unit)
    chex.assert_trees_all_equal(start, scaled)
    chex.assert_type(list(start), dtype)
    numbers = np.concatenate([np.ravel(leaf) for leaf in unit]).astype(float)
    # A sample of 420 numbers fails by chance once in a hundred million examples.
    assert kstest(numbers, "norm").pvalue > 1e-8
    W, H = (np.asarray(leaf, float) for leaf in unit)
    # No two rows of W and H are equal.
    rows = np.concatenate([W, H.reshape(-1, 7)])
    assert len({tuple(row) for row in rows}) == len(rows)
