"""Streaming statistics in any grouping, with any mask, on any number of devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import subprocesses
from hypothesis import given
from hypothesis import strategies as st

from ncjax import statistics
from ncjax.metrics import collapse

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, D, N = 4, 3, 24


@st.composite
def samples(draw):
    """Draw features (N, D) of any scale and offset, labels, and batch numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    offset = scale * draw(st.sampled_from([0.0, 1.0, 1e4]))
    labels = rng.integers(0, draw(st.integers(1, K)), size=N)
    features = scale * rng.normal(size=(N, D)) * rng.exponential(size=D) + offset
    return jnp.asarray(features), jnp.asarray(labels), jnp.asarray(rng.integers(0, 3, N))


def take(features, labels, mask):
    empty = statistics.init(K, D, features.dtype)
    return statistics.update(empty, features, labels, mask)


def assert_same(first, second, features, rtol=1e-11):
    """Compare counts, means and scatters; the anchors may differ."""
    scale = float(jnp.max(jnp.abs(features)))
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_allclose(
        statistics.class_means(first), statistics.class_means(second), atol=1e-14 * scale
    )
    np.testing.assert_allclose(first.scatter, second.scatter, rtol=rtol)


@given(samples())
def test_update_matches_the_definition(drawn):
    features, labels, _ = drawn
    got = jax.jit(take)(features, labels, jnp.ones(N, bool))
    for k in range(K):
        members = np.asarray(features)[np.asarray(labels) == k]
        assert int(got.counts[k]) == len(members)
        if len(members):
            mean = members.mean(axis=0)
            # A mean near zero rounds at the size of its samples.
            rounding = 1e-14 * np.abs(members).max()
            np.testing.assert_allclose(
                statistics.class_means(got)[k], mean, rtol=1e-12, atol=rounding
            )
            # The plain mean rounds at the offset, 1e4 times the deviations.
            np.testing.assert_allclose(
                got.scatter[k], np.sum((members - mean) ** 2), rtol=1e-8, atol=1e-40
            )


@pytest.mark.usefixtures("platform")
def test_class_sums_of_each_platform_agree_with_loops():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(N, D)), rng.integers(0, K, N)
    mask = rng.uniform(size=N) < 0.7
    got = take(jnp.asarray(features), jnp.asarray(labels), jnp.asarray(mask))
    for k in range(K):
        members = features[mask & (labels == k)]
        mean = members.mean(axis=0)
        np.testing.assert_allclose(statistics.class_means(got)[k], mean, rtol=1e-12)
        scatter = np.sum((members - mean) ** 2)
        np.testing.assert_allclose(got.scatter[k], scatter, rtol=1e-12)


@jax.jit
def _merges(features, labels, batch):
    one, two, three = (take(features, labels, batch == j) for j in range(3))
    empty = statistics.init(K, D, features.dtype)
    merge = statistics.merge
    streamed = empty
    for j in range(3):
        streamed = statistics.update(streamed, features, labels, batch == j)
    whole = take(features, labels, jnp.ones(N, bool))
    same = {
        "associative": (merge(merge(one, two), three), merge(one, merge(two, three))),
        "commutative": (merge(one, two), merge(two, one)),
        "whole": (merge(merge(one, two), three), whole),
        "streamed": (streamed, whole),
    }
    identical = {
        "left neutral": (merge(empty, one), one),
        "right neutral": (merge(one, empty), one),
    }
    return same, identical


@given(samples())
def test_merge_is_associative_and_commutative_with_init_as_neutral_element(drawn):
    same, identical = _merges(*drawn)
    for first, second in same.values():
        assert_same(first, second, drawn[0])
    for first, second in identical.values():
        chex.assert_trees_all_equal(first, second)


@jax.jit
def _of_all_devices(features, labels, batch):
    """Statistics of all samples on each of three devices, and by one pass."""

    def one(number):
        return statistics.all_merge(take(features, labels, batch == number), "devices")

    parts = jnp.arange(3, dtype=batch.dtype)
    together = jax.vmap(one, axis_name="devices")(parts)
    return together, take(features, labels, jnp.ones(N, bool))


@given(samples())
def test_devices_merge_to_one_pass_and_agree(drawn):
    together, whole = _of_all_devices(*drawn)
    for device in range(3):
        seen = jax.tree.map(lambda leaf, device=device: leaf[device], together)
        assert_same(seen, whole, drawn[0])
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in (0, -1))
    chex.assert_trees_all_equal(first, last)


@jax.jit
def _both_passes(features, labels, mask, W):
    first_pass = take(features, labels, mask)
    second_pass = statistics.compare(
        statistics.init_comparison(K, features.dtype),
        first_pass,
        statistics.reference(first_pass),
        features,
        labels,
        W,
        mask=mask,
    )
    return first_pass, second_pass


def test_a_mask_of_integers_is_a_mask_of_booleans():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(6, D)), np.arange(6) % K
    chosen = np.array([1, 0, 1, 1, 0, 1])
    chex.assert_trees_all_equal(
        take(features, labels, chosen), take(features, labels, chosen.astype(bool))
    )


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("label", [0, -1, 255])
def test_masked_rows_are_ignored_whatever_they_hold(padding, label):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(N, D)), np.arange(N) % K
    W = jnp.asarray(rng.normal(size=(K, D)))
    plain = _both_passes(features[:17], labels[:17], np.ones(17, bool), W)
    features[17:], labels[17:] = padding, label
    padded = _both_passes(features, labels, np.arange(N) < 17, W)
    chex.assert_trees_all_close(padded, plain, rtol=1e-13)
    assert int(jnp.sum(padded[1].counts)) == 17


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64])
def test_labels_of_any_integer_type_with_more_classes_than_it_holds(dtype):
    """300 classes wrap in 8 bits: label 0 must not count for class 256 too."""
    labels = np.arange(100, dtype=dtype)
    seen = statistics.class_statistics(jnp.ones((100, 2)), jnp.asarray(labels), 300)
    np.testing.assert_array_equal(seen.counts, np.arange(300) < 100)


def test_labels_out_of_range_are_left_out():
    features, labels = jnp.ones((4, 2)), jnp.array([0, 5, -1, 1])
    np.testing.assert_array_equal(
        statistics.class_statistics(features, labels, 2).counts, [1, 1]
    )


def test_variation_of_a_few_roundings_of_the_means_keeps_its_digits():
    """Float32 features 1 + j ulp: the means lie between floats, the scatter is exact."""
    rng = np.random.default_rng(1)
    steps, labels = rng.integers(-3, 4, size=(60, 5)), np.arange(60) % 3
    features = (1 + labels[:, None] + steps * 2.0**-22).astype(np.float32)
    seen = statistics.init(3, 5)
    for batch in np.split(np.arange(60), 6):
        seen = statistics.update(seen, features[batch], labels[batch])
    for k in range(3):
        members = steps[labels == k]
        exact = np.sum((members - members.mean(axis=0)) ** 2) * 2.0**-44
        np.testing.assert_allclose(seen.scatter[k], exact, rtol=1e-6)
    deviation = statistics.deviations(seen, jnp.asarray(features), jnp.asarray(labels))
    means = np.array([steps[labels == k].mean(axis=0) for k in range(3)])
    np.testing.assert_allclose(
        deviation, (steps - means[labels]) * 2.0**-22, rtol=1e-5, atol=1e-13
    )


@pytest.mark.parametrize("centring", statistics.CENTRINGS)
@pytest.mark.parametrize("offset", [0, 3000])
def test_whitening_in_float32_of_spreads_that_differ_by_500(centring, offset):
    r"""$T M x$ has the norm that $\Sigma_B^+$ gives; a squared condition would lose it."""
    rng = np.random.default_rng(2)
    spread = np.geomspace(1, 1 / 500, 8)
    features = (100 * rng.normal(size=(9, 8)) * spread + offset).astype(np.float32)
    labels = np.repeat(np.arange(9), np.arange(1, 10))
    first_pass = statistics.class_statistics(
        jnp.asarray(features[labels]), jnp.asarray(labels), 9
    )
    against = statistics.reference(first_pass, centring)
    x = rng.normal(size=8).astype(np.float32) * spread.astype(np.float32)
    whitened = against.whitening @ x
    exact = features.astype(np.float64)[labels]
    inverse = oracles.pseudo_inverse(oracles.between_covariance(exact, labels, centring))
    np.testing.assert_allclose(
        jnp.sum(whitened**2), x.astype(float) @ inverse @ x.astype(float) / 9, rtol=1e-4
    )


@pytest.mark.parametrize("centring", statistics.CENTRINGS)
@pytest.mark.parametrize("size", [2, 5])
def test_whitening_drops_the_dimension_that_centring_takes(centring, size):
    """In either centring the means of K classes span K - 1 dimensions, in float32 too."""

    @jax.jit
    def rank(features, labels):
        first_pass = statistics.class_statistics(features, labels, size)
        against = statistics.reference(first_pass, centring)
        assert against.whitening.shape == (size - 1, 50)
        return jnp.sum((against.whitening @ against.centred.T) ** 2)

    for seed in range(20):
        rng = np.random.default_rng(seed)
        features = (rng.normal(size=(size, 50)) + 100).astype(np.float32)
        labels = np.r_[np.arange(size), rng.integers(0, size, 30) ** 2 % size]
        got = rank(jnp.asarray(features[labels]), jnp.asarray(labels))
        np.testing.assert_allclose(got, size - 1, rtol=1e-5)


def test_global_mean_skips_classes_without_a_sample():
    features, labels = jnp.array([[1.0], [3.0], [10.0]]), jnp.array([1, 1, 4])
    seen = statistics.class_statistics(features, labels, 6)
    np.testing.assert_allclose(statistics.global_mean(seen), [6.0])
    np.testing.assert_allclose(statistics.global_mean(seen, "sample_mean"), [14 / 3])


def test_squared_distances_agree_when_taken_one_row_at_a_time():
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(200, 110)))
    assert rows.shape[0] * rows.size > 2**22
    few = statistics.squared_distances(rows[:10])
    np.testing.assert_allclose(statistics.squared_distances(rows)[:10, :10], few)
    brute = np.sum((np.asarray(rows)[:10, None] - np.asarray(rows)[None, :10]) ** 2, axis=2)
    np.testing.assert_allclose(few, brute, rtol=1e-13)


def test_unknown_centring_is_refused():
    seen = statistics.class_statistics(jnp.eye(3), jnp.arange(3), 3)
    for function in (
        statistics.centred_means,
        statistics.global_mean,
        statistics.reference,
    ):
        with pytest.raises(ValueError, match="centring must be one of"):
            function(seen, "median")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": np.ones((3, 5))}, r"expected features \(B, 4\), got \(3, 5\)"),
        ({"features": np.ones(4)}, r"expected features \(B, 4\), got \(4,\)"),
        ({"labels": np.zeros(3)}, r"got float\d+ \(3,\): cast them"),
        ({"labels": np.zeros((3, 1), int)}, r"got int\d+ \(3, 1\): take labels\[:, 0\]"),
        ({"mask": np.ones(2, bool)}, r"expected mask of booleans \(3,\), got bool \(2,\)"),
        ({"mask": np.ones(3)}, r"expected mask of booleans \(3,\), got float\d+ \(3,\)"),
    ],
)
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_batches_that_do_not_fit_are_refused(changed, message, transform):
    """In both passes: a wrong shape would broadcast to a wrong number."""
    good = {"features": np.ones((3, 4)), "labels": np.zeros(3, int), "mask": None}
    features, labels, mask = (good | changed).values()
    first = statistics.init(2, 4, jnp.float64)
    with pytest.raises(ValueError, match=message):
        transform(statistics.update)(first, features, labels, mask)
    seen = statistics.class_statistics(jnp.eye(2, 4, dtype=float), jnp.arange(2), 2)
    against = statistics.reference(seen)
    second, W = statistics.init_comparison(2, jnp.float64), jnp.ones((2, 4))
    with pytest.raises(ValueError, match=message):
        transform(statistics.compare)(
            second, first, against, features, labels, W, None, mask
        )


def test_a_classifier_that_does_not_fit_is_refused():
    first = statistics.class_statistics(jnp.eye(3, 4), jnp.arange(3), 3)
    against = statistics.reference(first)
    second = statistics.init_comparison(3, first.anchor.dtype)
    batch = jnp.eye(3, 4), jnp.arange(3)
    for W, b, message in (
        (jnp.ones((4, 3)), None, r"expected W \(3, 4\), got \(4, 3\): transpose W"),
        (jnp.ones((1, 4)), None, r"expected W \(3, 4\), got \(1, 4\)$"),
        (jnp.ones((3, 4)), jnp.ones(1), r"expected b \(3,\), got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.compare(second, first, against, *batch, W, b)
    with pytest.raises(ValueError, match=r"expected W \(3, 4\), got \(4, 3\)"):
        collapse.metrics_from_statistics(first, second, jnp.ones((4, 3)))


def test_all_merge_over_eight_devices_equals_one_pass():
    """Some devices lack a class and one sees nothing."""
    subprocesses.output(subprocesses.command("sharded_statistics", strict=True))
