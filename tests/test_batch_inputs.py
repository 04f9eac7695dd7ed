"""Batches as people pass them to the streaming statistics: right values, or advice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import statistics

K, D, N = 3, 4, 12
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = np.arange(N) % K
W = RNG.normal(size=(K, D)).astype(np.float32)
FIRST = statistics.class_statistics(FEATURES, LABELS, K)
AGAINST = statistics.reference(FIRST)


def update(features, labels, mask=None):
    return statistics.update(statistics.init(K, D), features, labels, mask)


def compare(features, labels, mask=None, weight=W, b=None):
    empty = statistics.init_comparison(K)
    return statistics.compare(empty, FIRST, AGAINST, features, labels, weight, b, mask)


def counted(labels):
    """Number of samples of each class in [0, K), in Python integers."""
    return [sum(int(label) == k for label in labels) for k in range(K)]


def assert_means(got, features, labels):
    """Compare counts, means and scatters with NumPy in float64."""
    np.testing.assert_array_equal(got.counts, counted(labels))
    for k in range(K):
        members = np.asarray(features, np.float64)[[int(y) == k for y in labels]]
        mean = members.mean(axis=0)
        np.testing.assert_allclose(statistics.class_means(got)[k], mean, rtol=1e-5)
        scatter = np.sum((members - mean) ** 2)
        np.testing.assert_allclose(got.scatter[k], scatter, rtol=1e-5)


@pytest.fixture(params=[True, False], ids=["x64", "x32"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.usefixtures("x64")
def test_labels_of_every_integer_type_count_alike(dtype):
    labels = LABELS.astype(dtype)
    assert_means(update(FEATURES, labels), FEATURES, LABELS)
    np.testing.assert_array_equal(compare(FEATURES, labels).counts, counted(LABELS))


WRAPPED = [2**32, 2**32 + 1, 2**40 + 2, -(2**32), 2**31, -1, K]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, ">i8", list])
def test_labels_beyond_int32_are_left_out(dtype, x64):
    """Without x64, JAX turns 2^32 + k into k."""
    large = [2**63, 2**63 + 1, 2**64 - 1] if dtype == np.uint64 else WRAPPED
    whole = [int(y) for y in LABELS]
    whole[: len(large)] = large
    labels = whole if dtype is list else np.array(whole, dtype)
    assert_means(update(FEATURES, labels), FEATURES, whole)
    seen = statistics.class_statistics(FEATURES, labels, K)
    assert_means(seen, FEATURES, whole)
    np.testing.assert_array_equal(compare(FEATURES, labels).counts, counted(whole))
    if x64 and dtype != ">i8":  # JAX holds the labels, also under jit
        given = jnp.asarray(labels)
        assert_means(update(FEATURES, given), FEATURES, whole)
        assert_means(jax.jit(update)(FEATURES, given), FEATURES, whole)


def test_labels_may_be_a_list_of_any_integers():
    for labels in (LABELS.tolist(), list(LABELS), tuple(map(np.uint8, LABELS))):
        assert_means(update(FEATURES, labels), FEATURES, LABELS)
        np.testing.assert_array_equal(compare(FEATURES, labels).counts, counted(LABELS))


@pytest.mark.parametrize("labels", [[], (), np.zeros(0, int), jnp.zeros(0, jnp.int32)])
@pytest.mark.parametrize("mask", [None, np.zeros(0, bool)])
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_a_batch_of_no_sample_changes_nothing(labels, mask, transform):
    if transform is jax.jit:
        labels = np.asarray(labels, np.int32)
    none = np.zeros((0, D), np.float32)
    got = transform(statistics.update)(FIRST, none, labels, mask)
    chex.assert_trees_all_equal(got, FIRST)
    second = compare(FEATURES, LABELS)
    got = transform(statistics.compare)(second, FIRST, AGAINST, none, labels, W, None, mask)
    chex.assert_trees_all_equal(got, second)
    chex.assert_trees_all_equal(
        statistics.class_statistics(none, labels, K), statistics.init(K, D)
    )


def test_one_buffer_may_hold_every_batch():
    """The usual loop refills its buffers while JAX still computes."""
    rng = np.random.default_rng(1)
    size, dim, batches = 4096, 64, 8
    drawn = rng.normal(size=(batches, size, dim)).astype(np.float32)
    classes = rng.integers(0, K, size=(batches, size))
    features, labels = np.empty((size, dim), np.float32), np.empty(size, np.int64)
    first = statistics.init(K, dim)
    for batch in range(batches):
        features[:], labels[:] = drawn[batch], classes[batch]
        first = statistics.update(first, features, labels)
        features[:], labels[:] = np.nan, -1
    for k in range(K):
        members = drawn[classes == k].astype(np.float64)
        assert int(first.counts[k]) == len(members)
        np.testing.assert_allclose(
            statistics.class_means(first)[k], members.mean(axis=0), atol=1e-6
        )


def test_a_data_set_may_be_overwritten_after_the_call():
    features, labels = np.tile(FEATURES, (5000, 1)), np.tile(LABELS, 5000)
    expected = statistics.class_statistics(features.copy(), labels.copy(), K)
    jax.block_until_ready(expected)
    got = statistics.class_statistics(features, labels, K)
    features[:], labels[:] = np.nan, -1
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", ">f4", ">f8", jnp.bfloat16, jnp.float8_e4m3fn, "i4", bool]
)
@pytest.mark.usefixtures("x64")
def test_features_of_real_numbers_are_cast_to_the_dtype_of_the_statistics(dtype):
    given = np.round(FEATURES).astype(dtype)
    assert_means(update(given, LABELS), given.astype(np.float64), LABELS)
    got = compare(given, LABELS)
    assert got.whitened_scatter.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_pytorch_in_both_passes(dtype):
    torch = pytest.importorskip("torch")
    given = torch.tensor(FEATURES, requires_grad=True).to(getattr(torch, dtype))
    exact = given.detach().double().numpy()
    for kind in (torch.int64, torch.int32, torch.uint8):
        labels = torch.tensor(LABELS).to(kind)
        assert_means(update(given, labels), exact, LABELS)
        weight = torch.tensor(W, requires_grad=True)
        got = compare(given, labels, mask=torch.ones(N, dtype=torch.bool), weight=weight)
        np.testing.assert_array_equal(got.counts, counted(LABELS))


BATCHES = [FEATURES[:8], FEATURES[8:]]
REFUSED = [
    ({"features": BATCHES}, r"features must be .* a list of 2 entries .* join the batches"),
    ({"features": (x for x in BATCHES)}, "features must be .* a generator: join the batch"),
    (
        {"features": FEATURES[None]},
        r"expected features \(B, 4\), got \(1, 12, 4\): reshape",
    ),
    ({"features": FEATURES[:, :3]}, r"expected features \(B, 4\), got \(12, 3\)$"),
    ({"features": FEATURES * 1j}, "features must be real, got complex"),
    ({"features": None}, "features must be an array of numbers, got None"),
    ({"labels": None}, "labels must be an array of numbers, got None"),
    ({"labels": LABELS * 1.0}, r"expected labels of integers \(12,\), got float64.*cast"),
    ({"labels": LABELS + 0.5}, r"got float64 \(12,\): they are not whole numbers"),
    ({"labels": LABELS * 1j}, r"expected labels of integers \(12,\), got complex128"),
    ({"labels": LABELS > 0}, r"got bool \(12,\): cast them"),
    ({"labels": LABELS[:, None]}, r"got int64 \(12, 1\): take labels\[:, 0\]"),
    ({"labels": np.eye(K)[LABELS]}, r"got float64 \(12, 3\): take labels.argmax\(1\)"),
    ({"labels": LABELS.astype(str)}, r"got <U21 \(12,\): number the classes by np.unique"),
    ({"labels": LABELS.astype(object)}, r"got object \(12,\): number the classes by"),
    (
        {"labels": LABELS[:5]},
        r"integers \(12,\), got int64 \(5,\): pass one label for each row",
    ),
    ({"labels": jax.random.key(0)}, r"expected labels of integers \(12,\), got key<fry>"),
    ({"mask": np.ones(N)}, r"expected mask of booleans \(12,\), got float64 \(12,\)"),
    ({"mask": [None] * N}, r"expected mask of booleans \(12,\), got object \(12,\)"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_other_batches_are_refused_with_advice(changed, message):
    given = {"features": FEATURES, "labels": LABELS} | changed
    for function in (update, compare):
        with pytest.raises(ValueError, match=message) as caught:
            function(**given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES, LABELS, 1), "num_classes must be an integer of at least 2, got 1"),
        ((FEATURES, LABELS, 3.0), "num_classes must be an integer of at least 2, got 3.0"),
        ((FEATURES[0], LABELS, 3), r"expected features \(B, d\), got \(4,\)"),
        ((FEATURES[:, :0], LABELS, 3), "dim must be an integer of at least 1, got 0"),
        ((FEATURES, LABELS * 1.0, 3), r"got float64 \(12,\): cast them"),
        (
            (FEATURES, LABELS[:5], 3),
            r"expected labels of integers \(12,\), got int64 \(5,\)",
        ),
    ],
)
def test_data_sets_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        statistics.class_statistics(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 4), "num_classes must be an integer of at least 2, got 1"),
        ((3, 0), "dim must be an integer of at least 1, got 0"),
        ((3, 4.0), "dim must be an integer of at least 1, got 4.0"),
        ((3, 4, int), "dtype must be floating, got int64"),
    ],
)
def test_statistics_of_a_size_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        statistics.init(*arguments)


def test_statistics_in_float64_need_x64():
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64 needs"):
        statistics.init(3, 4, jnp.float64)


def test_no_value_of_a_device_array_is_read(monkeypatch):
    """Reading one would wait for the device at every batch."""
    features, labels = jnp.asarray(FEATURES), jnp.asarray(LABELS)
    mask, weight = jnp.ones(N, bool), jnp.asarray(W)
    read = np.asarray

    def guarded(value, *args, **kwargs):
        assert not isinstance(value, jax.Array)
        return read(value, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", guarded)
    monkeypatch.setattr(np, "array", guarded)
    update(features, labels, mask)
    compare(features, labels, mask, weight, jnp.zeros(K, jnp.float32))
