"""Training on the clock of the loss, against descent written out in NumPy."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ncjax.networks import data, loss_clock, models, train

N, BATCH, K, IMAGE = 11, 4, 3, (2, 2, 1)
STEPS = N // BATCH
MESH = Mesh(np.asarray(jax.devices()[:1]), (train.AXIS,))
SOFTMAX = models.build("mlp", K, hidden=())


class Normalised(nn.Module):
    """A linear classifier after batch normalisation."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(K, name="classifier")(x), x


def separable(spread=40):
    """Images of K classes: pixel k of class k is the brightest."""
    rng = np.random.default_rng(0)
    labels = np.arange(N, dtype=np.int32) % K
    images = rng.integers(0, spread, (N, 4), np.uint8)
    images[np.arange(N), labels] = 250
    images = images.reshape(N, *IMAGE)
    return data.Dataset(images, labels, K), *data.channel_statistics(images)


DATA, MEAN, DEVIATION = separable()
ON_DEVICE = train.on_device(DATA, MEAN, DEVIATION, MESH)
# Two labels are wrong: the loss has a minimum, and long steps raise it.
MIXED = ON_DEVICE._replace(labels=ON_DEVICE.labels.at[:3].set(np.int32(0)))
ROWS = ((DATA.images / 255 - MEAN.astype(float)) / DEVIATION).reshape(N, -1)
ROWS = np.append(ROWS, np.ones((N, 1)), axis=1)  # the last coordinate is the bias


def weights(params):
    """W (5, K) in float64, with the bias as its last row."""
    last = params["classifier"]
    return np.vstack([last["kernel"], last["bias"]]).astype(float)


def log_odds(W, rows, labels):
    """`log(e^-ownmargin sums)` (B,) and the shares (B, K) of the wrong classes."""
    logits = rows @ W
    wrong = np.arange(K) != labels[:, None]
    own = logits[~wrong]
    gaps = np.where(wrong, logits - own[:, None], -np.inf)
    highest = gaps.max(axis=1)
    sums = np.exp(gaps - highest[:, None]).sum(axis=1)
    shares = np.exp(gaps - highest[:, None]) / sums[:, None]
    return highest + np.log(sums), shares


def log_loss_and_slope(W, frame, rows=ROWS, labels=DATA.labels):
    """`log mean ℓ_i` and the gradient of `mean e^(log ℓ_i - F)`, without underflow."""
    a, shares = log_odds(W, rows, labels)
    log_l = np.where(a < -30, a, np.log(np.logaddexp(0, np.maximum(a, -30))))
    # dℓ/dz_j = σ(a) share_j for wrong classes, minus σ(a) for the own one.
    slopes = np.exp(a - np.logaddexp(0, a) - frame)[:, None]
    slopes = slopes * (shares - np.eye(K)[labels])
    mean = np.logaddexp.reduce(log_l) - math.log(len(labels))
    return mean, rows.T @ slopes / len(labels)


def started(model=SOFTMAX, scale=1.0, rate=0.5, seed=0):
    """The state at t = 0, with the weights of a classifier of the K brightest pixels."""
    optimiser = train.sgd(rate, momentum=0.0)
    state = train.init_state(model, optimiser, IMAGE, jax.random.key(seed))
    kernel = state.params["classifier"]["kernel"]
    kernel = np.float32(0.3) * kernel + jnp.eye(4, K, dtype=np.float32)
    state.params["classifier"]["kernel"] = np.float32(scale) * kernel
    log_loss = loss_clock.make_log_loss(model, MESH)(state, ON_DEVICE)
    return loss_clock.begin(state, log_loss, rate)


def batches(key):
    """The indices of each step's samples in the epoch of `key`."""
    order = jax.random.permutation(jax.random.split(key)[0], jnp.arange(N, dtype=np.int32))
    return np.asarray(order)[: STEPS * BATCH].reshape(STEPS, BATCH)


def epoch_of(model=SOFTMAX, batch_size=BATCH):
    return jax.jit(loss_clock.make_epoch(model, batch_size=batch_size, mesh=MESH))


EPOCH = epoch_of()


@pytest.mark.parametrize("scale", [0.1, 1.0, 2000.0])
def test_an_epoch_agrees_with_framed_descent_at_any_loss(key, scale):
    state = started(scale=scale)
    W, frame = weights(state.params), float(state.opt_state.frame)
    measured, _ = log_loss_and_slope(W, 0)
    assert frame == pytest.approx(measured, rel=1e-5)
    if scale > 1000:
        assert frame < -400 * math.log(10)
    for batch in batches(key):
        _, slope = log_loss_and_slope(W, frame, ROWS[batch], DATA.labels[batch])
        W = W - 0.5 * slope
    after, log = EPOCH(state, ON_DEVICE, key)
    # A logit of 2000 is rounded by 1e-4, and a slope relative to its size by as much.
    moved = weights(after.params) - weights(state.params)
    expected = W - weights(state.params)
    spacing = np.spacing(np.float32(scale))
    np.testing.assert_allclose(moved, expected, rtol=3e-3, atol=1e-5 + 4 * spacing)
    assert np.isfinite(float(log.log_loss))
    measured, _ = log_loss_and_slope(weights(after.params), 0)
    assert float(after.opt_state.frame) == pytest.approx(measured, rel=1e-5)
    assert float(log.log_loss) == pytest.approx(measured + math.log(N), rel=1e-5)


def test_a_step_is_descent_on_the_mean_loss_with_step_eta_over_its_value(key):
    """One batch of all samples; the loss by log softmax, in float64."""
    state = started(rate=0.25)
    W = weights(state.params)

    def loss(W):
        logits = jnp.asarray(ROWS) @ W
        picked = jax.nn.log_softmax(logits)[np.arange(N), DATA.labels]
        return -jnp.mean(picked)

    value, slope = jax.value_and_grad(loss)(jnp.asarray(W))
    after, log = epoch_of(batch_size=N)(state, ON_DEVICE, key)
    expected = W - 0.25 * np.exp(-np.log(value)) * slope
    np.testing.assert_allclose(weights(after.params), expected, rtol=1e-4, atol=1e-6)
    # On the sum over samples, the loss of the flow, this is a step of η over the sum.
    assert float(log.log_time) == pytest.approx(math.log(0.25 / (N * value)), abs=1e-5)


def test_the_time_is_the_sum_of_all_accepted_steps(key):
    state, time, refused = started(scale=0.1, rate=0.3), 0.0, 0
    for number in range(12):
        before = state.opt_state
        # The shares of η and F in the time, in float64.
        steps = STEPS / N * math.exp(float(before.log_rate) - float(before.frame))
        state, log = EPOCH(state, MIXED, jax.random.fold_in(key, number))
        refused += int(log.refused)
        time += 0 if log.refused else steps
        change = float(state.opt_state.log_rate - before.log_rate)
        assert change == pytest.approx(
            math.log(2) * (-0.1 if log.refused else 0.2), rel=1e-4
        )
        assert log.rate == pytest.approx(math.exp(float(before.log_rate)), rel=1e-6)
    assert state.opt_state.log_time.dtype == np.float64
    assert float(log.log_time) == pytest.approx(math.log(time), rel=1e-12)
    assert 0 < refused < 12
    assert int(state.opt_state.refused) == refused


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_an_epoch_that_raises_the_loss_is_undone(key, rate):
    """With a rate of 1e30 the loss is not finite at the end of the epoch."""
    # The classifier starts near a minimum of the normalised pixels.
    state = started(Normalised(), scale=4.0, rate=rate)
    after, log = epoch_of(Normalised())(state, ON_DEVICE, key)
    assert log.refused == 1
    chex.assert_trees_all_equal(after.params, state.params)
    chex.assert_trees_all_equal(after.batch_stats, state.batch_stats)
    before, clock = state.opt_state, after.opt_state
    assert clock.frame == before.frame
    assert clock.log_time == before.log_time == -math.inf
    assert float(clock.log_rate) == pytest.approx(math.log(rate / 2**0.1), rel=1e-6)
    assert int(clock.refused) == 1


def test_an_accepted_epoch_moves_the_batch_statistics(key):
    state = started(Normalised(), rate=0.01)
    after, log = epoch_of(Normalised())(state, ON_DEVICE, key)
    assert log.refused == 0
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, state)
    assert all(jax.tree.leaves((moved.params["classifier"], moved.batch_stats)))


def test_seeds_accept_or_refuse_on_their_own(key):
    rates = (0.1, 1e30, 0.2)
    states = [started(scale=0.1, rate=rate, seed=seed) for seed, rate in enumerate(rates)]
    keys = jax.random.split(key, 3)
    alone = [EPOCH(*each) for each in zip(states, [MIXED] * 3, keys, strict=True)]
    epoch = loss_clock.make_epoch(SOFTMAX, batch_size=BATCH, mesh=MESH)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, logs = jax.jit(jax.vmap(epoch, in_axes=(0, None, 0)))(stacked, MIXED, keys)
    np.testing.assert_array_equal(logs.refused, [0, 1, 0])
    for seed, expected in enumerate(alone):
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (together, logs))
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 11])
def test_the_measured_loss_does_not_depend_on_the_chunk(monkeypatch, size):
    part = data.Dataset(DATA.images[:size], DATA.labels[:size], K)
    dataset = train.on_device(part, MEAN, DEVIATION, MESH)
    state = started()
    whole = loss_clock.make_log_loss(SOFTMAX, MESH)(state, dataset)
    monkeypatch.setattr(train, "_CHUNK", 4)
    in_chunks = loss_clock.make_log_loss(SOFTMAX, MESH)(state, dataset)
    np.testing.assert_allclose(in_chunks, whole, rtol=1e-5)


def test_the_first_rate_must_be_positive():
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        started(rate=0.0)
