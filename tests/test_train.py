"""Steps of the trainer, against the same steps in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

import ncjax
from ncjax.networks import data, models, train
from ncjax.networks.data import Dataset
from ncjax.peeled.losses import softmax_cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE, MOMENTUM = 0.1, 0.9


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train[:100]")


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:1]), (train.AXIS,))


def on_device(dataset, mesh):
    return train.on_device(dataset, *data.channel_statistics(dataset.images), mesh)


def small(name="mlp", **options):
    return models.build(name, 10, width=0.05, **options)


def started(model, optimiser, seed=0):
    return jax.jit(lambda key: train.init_state(model, optimiser, (8, 8, 1), key))(
        jax.random.key(seed)
    )


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=atol)


def test_an_epoch_agrees_with_momentum_descent_written_out(digits, mesh, key):
    model, optimiser = small(), train.sgd(RATE, momentum=MOMENTUM)
    dataset = on_device(digits, mesh)
    state = started(model, optimiser)
    epoch = jax.jit(train.make_epoch(model, optimiser, batch_size=32, mesh=mesh))
    got, log = epoch(state, dataset, key)
    # The same order of samples, three steps of plain NumPy momentum.
    order = jax.random.permutation(
        jax.random.split(key)[0], jnp.arange(100, dtype=np.int32)
    )
    mean, deviation = data.channel_statistics(digits.images)
    images = (digits.images.astype(np.float32) / 255 - mean) / deviation
    theta = state.params
    velocity = jax.tree.map(np.zeros_like, theta)
    losses, right = [], []
    for batch in np.asarray(order)[:96].reshape(3, 32):  # 4 samples sit out

        def loss(params, batch=batch):
            logits, _ = model.apply({"params": params}, images[batch])
            rows = np.arange(32, dtype=np.int32)
            picked = jax.nn.log_softmax(logits)[rows, digits.labels[batch]]
            return -jnp.mean(picked), logits

        (value, logits), slope = jax.value_and_grad(loss, has_aux=True)(theta)
        losses.append(value)
        right.append(np.mean(np.asarray(logits).argmax(axis=1) == digits.labels[batch]))
        velocity = jax.tree.map(lambda v, g: np.float32(MOMENTUM) * v + g, velocity, slope)
        theta = jax.tree.map(lambda p, v: p - np.float32(RATE) * v, theta, velocity)
    assert_close(got.params, theta)
    assert log.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert log.accuracy == pytest.approx(float(np.mean(right)), rel=1e-5)


def test_cross_entropy_in_margin_form(key):
    logits = 5 * jax.random.normal(key, (20, 7))
    labels = jnp.arange(20, dtype=jnp.int32) % 7
    expected = -jax.nn.log_softmax(logits)[np.arange(20, dtype=np.int32), labels]
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels), expected, rtol=1e-12)
    far = jnp.array([[60.0, 0.0, 0.0]], jnp.float32)
    slope = jax.grad(lambda z: softmax_cross_entropy(z, jnp.array([0], jnp.int32)).sum())(
        far
    )
    exact = np.exp(-60.0) * np.array([[-2.0, 1.0, 1.0]])
    np.testing.assert_allclose(slope, exact, rtol=1e-5)


def test_batch_statistics_move_and_evaluation_uses_them(digits, mesh, key):
    model, optimiser = small("convnet"), train.sgd(RATE)
    dataset = on_device(digits, mesh)
    state = started(model, optimiser)
    epoch = jax.jit(train.make_epoch(model, optimiser, batch_size=50, mesh=mesh))
    after, _ = epoch(state, dataset, key)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state, after)
    assert all(jax.tree.leaves((moved.params["conv1"], moved.batch_stats)))
    forward = jax.jit(train.make_forward(model, mesh))
    features = train.extract_features(forward, after, dataset)
    images = data.normalise(dataset.images, dataset.mean, dataset.deviation)
    variables = {"params": after.params, "batch_stats": after.batch_stats}
    _, expected = model.apply(variables, images, train=False)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 100])
def test_features_do_not_depend_on_the_chunk(digits, mesh, monkeypatch, size):
    model = small()
    state = started(model, train.sgd(RATE))
    dataset = on_device(Dataset(digits.images[:size], digits.labels[:size], 10), mesh)
    forward = jax.jit(train.make_forward(model, mesh))
    whole = train.extract_features(forward, state, dataset)
    monkeypatch.setattr(train, "_CHUNK", 16)
    in_chunks = train.extract_features(forward, state, dataset)
    assert in_chunks.shape == whole.shape == (size, 26)
    np.testing.assert_allclose(in_chunks, whole, rtol=1e-4, atol=1e-6)


def test_seeds_trained_together_agree_with_seeds_trained_alone(digits, mesh):
    # Without maxima and in one step, rounding cannot choose between branches.
    model, optimiser = small(), train.sgd(RATE, momentum=MOMENTUM)
    dataset = on_device(digits, mesh)
    epoch = train.make_epoch(model, optimiser, batch_size=100, mesh=mesh)
    keys = jax.random.split(jax.random.key(5), 3)
    one_by_one = [
        jax.jit(epoch)(started(model, optimiser, seed), dataset, keys[seed])
        for seed in range(3)
    ]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(started(model, optimiser, s) for s in range(3))
    )
    together, logs = jax.jit(jax.vmap(epoch, in_axes=(0, None, 0)))(stacked, dataset, keys)
    for seed, (state, log) in enumerate(one_by_one):
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (together, logs))
        assert_close(got, (state, log), rtol=1e-4, atol=1e-6)


def test_augmentation_changes_what_is_learnt_and_nothing_else(digits, mesh, key):
    model, optimiser = small(), train.sgd(RATE)
    dataset, state = on_device(digits, mesh), started(model, optimiser)

    def after(**options):
        epoch = train.make_epoch(model, optimiser, batch_size=50, mesh=mesh, **options)
        return jax.jit(epoch)(state, dataset, key)[0]

    plain, augmented = after(), after(augment=True)
    assert jnp.any(plain.params["fc1"]["kernel"] != augmented.params["fc1"]["kernel"])
    assert_close(after(augment=True), augmented, rtol=0, atol=0)


@pytest.mark.parametrize("use_bias", [True, False])
def test_measure_agrees_with_the_oracle_on_the_features(digits, mesh, use_bias):
    model = small(use_bias=use_bias)
    state = started(model, train.sgd(RATE))
    dataset = on_device(digits, mesh)
    features = train.extract_features(
        jax.jit(train.make_forward(model, mesh)), state, dataset
    )
    got = train.measure(features, dataset.labels, state.params)
    W, b = train.classifier(state.params)
    bias = np.zeros(10) if b is None else b
    stored = oracles.Data(*(np.asarray(x) for x in (features, digits.labels, W, bias)))
    exact = oracles.float64(stored)
    for field, formula in oracles.FIELDS.items():
        expected = oracles.FORMULAS[formula](exact)
        np.testing.assert_allclose(got[field], expected, rtol=1e-3, err_msg=field)
    assert got["loss"] == pytest.approx(float(oracles.cross_entropy(exact)), rel=1e-4)
    assert set(got) == {*ncjax.CollapseMetrics._fields, *ncjax.LastLayer._fields}


@settings(max_examples=settings.default.max_examples // 5)
@given(st.integers(0, 2**31), st.booleans(), st.integers(-20, 20))
def test_measure_agrees_with_the_oracle_on_any_features(seed, use_bias, exponent):
    """In shapes that the previous test compiles."""
    rng, factor = np.random.default_rng(seed), 2.0**exponent
    labels = rng.permutation(np.arange(100, dtype=np.int32) % 10)
    features = (factor * rng.normal(size=(100, 26))).astype(np.float32)
    last = {"kernel": rng.normal(size=(26, 10)).astype(np.float32)}
    b = factor * rng.normal(size=10) if use_bias else np.zeros(10)
    last |= {"bias": b.astype(np.float32)} if use_bias else {}
    params = {"classifier": jax.tree.map(jnp.asarray, last)}
    got = train.measure(jnp.asarray(features), jnp.asarray(labels), params)
    stored = oracles.Data(features, labels, last["kernel"].T, b.astype(np.float32))
    exact = oracles.float64(stored)
    for field, formula in oracles.FIELDS.items():
        expected = oracles.FORMULAS[formula](exact)
        np.testing.assert_allclose(got[field], expected, 1e-4, 1e-6, err_msg=field)
    assert got["loss"] == pytest.approx(float(oracles.cross_entropy(exact)), rel=1e-4)
    least = np.min(oracles.own_minus_best_other(oracles.logits(exact), labels))
    assert got["least_margin"] == pytest.approx(least, rel=1e-4, abs=1e-5 * factor)
