"""What callers pass as arrays: right values of their own memory, or one line of advice."""

import array
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from ncjax.arrays import as_array, narrow_labels

VALUES = np.array([[0.5, -3.0, 2.0], [1.25, 0.0, 96.0]])  # exact in 8 bits too


@pytest.fixture(params=[True, False], ids=["x64", "x32"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def aligned(size, dtype=np.float32, shift=0):
    """Ones that begin `shift` bytes after a multiple of 64 bytes; JAX shares some."""
    itemsize = np.dtype(dtype).itemsize
    memory = np.zeros(size * itemsize + 128, np.uint8)
    start = -memory.ctypes.data % 64 + shift
    values = memory[start : start + size * itemsize].view(dtype)
    values[:] = 1
    return values


FLOATS = ("f2", "f4", "f8", ">f2", ">f4", ">f8", np.longdouble, jnp.bfloat16)
NARROW_FLOATS = (jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.parametrize("dtype", [*FLOATS, *NARROW_FLOATS], ids=str)
def test_floats_of_any_size_and_byte_order_keep_their_values(dtype, x64):
    given = VALUES.astype(dtype)
    got = as_array("features", given)
    np.testing.assert_array_equal(np.asarray(got, np.float64), VALUES)
    size = given.dtype.itemsize
    expected = min(max(size, 2 if dtype not in NARROW_FLOATS else 4), 8 if x64 else 4)
    assert got.dtype.itemsize == expected


INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8", ">u8", bool)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.usefixtures("x64")
def test_integers_of_any_type_keep_their_values(dtype):
    given = np.array([0, 1, 1, 0]).astype(dtype)
    np.testing.assert_array_equal(as_array("x", given), [0, 1, 1, 0])


@pytest.mark.parametrize(
    "given",
    [
        VALUES.tolist(),
        tuple(map(tuple, VALUES)),
        list(VALUES),
        [jnp.asarray(row) for row in VALUES],
        [[jnp.asarray(entry) for entry in row] for row in VALUES],
        [jnp.asarray(VALUES[0]), VALUES[1].astype(">f8")],
        [[*map(jnp.asarray, VALUES[0])], VALUES[1].tolist()],
        np.matrix(VALUES),
        np.ma.masked_array(VALUES, mask=np.zeros(VALUES.shape, bool)),
        np.repeat(VALUES, 2, axis=1)[::-1, ::2][::-1],
        np.asfortranarray(VALUES),
        memoryview(VALUES),
        scipy.sparse.csr_matrix(VALUES).todense(),
        jax.device_get(jnp.asarray(VALUES)),
    ],
)
def test_lists_and_arrays_of_any_layout_keep_their_values(given):
    np.testing.assert_array_equal(as_array("features", given), VALUES)


def test_the_buffer_of_another_library_keeps_its_values():
    np.testing.assert_array_equal(as_array("x", array.array("d", [1.5, 2.5])), [1.5, 2.5])


class Parameter:
    """An array of a neural network library, as JAX reads it."""

    def __jax_array__(self):
        return jnp.asarray(VALUES)


class Frame:
    """A table of a data library, as NumPy reads it."""

    def __array__(self, dtype=None, copy=None):
        return VALUES.astype(dtype)


@pytest.mark.parametrize("given", [Parameter(), Frame()])
def test_objects_that_jax_or_numpy_read_keep_their_values(given):
    np.testing.assert_array_equal(as_array("W", given), VALUES)


def test_jax_arrays_and_tracers_pass_unchanged():
    given = jnp.asarray(VALUES)
    assert as_array("x", given) is given
    with jax.enable_x64(False):
        assert as_array("x", given).dtype == jnp.float64

    @jax.jit
    def same(x):
        assert as_array("x", x) is x
        stacked = as_array("x", [x, x])
        nested = as_array("x", [[x[0, 0]], [x[0, 1]]])
        assert stacked.shape == (2, 2, 3)
        assert nested.shape == (2, 1)
        return x

    same(given)


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=str)
def test_jax_floats_of_eight_bits_become_float32(dtype):
    got = as_array("x", jnp.asarray(VALUES, dtype))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, VALUES)


# The memory of the caller


@pytest.mark.parametrize("shift", [0, 4, 16])
@pytest.mark.parametrize("size", [8, 10**6])
def test_memory_that_the_caller_overwrites_was_copied_before(size, shift):
    """JAX shares aligned memory, and may copy a large array after the call."""
    given = aligned(size, shift=shift)
    got = as_array("features", given)
    given[:] = 7
    np.testing.assert_array_equal(got, np.ones(size))


def test_memory_in_a_list_of_jax_arrays_was_copied_before():
    given = aligned(10**6)
    got = as_array("features", [jnp.zeros(10**6, jnp.float32), given])
    given[:] = 7
    np.testing.assert_array_equal(got[1], np.ones(10**6))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_labels_that_the_caller_overwrites_were_copied_before(dtype):
    given = aligned(10**6, dtype)
    got = narrow_labels(given)
    given[:] = 7
    np.testing.assert_array_equal(got, np.ones(10**6))


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8"])
def test_one_copy_is_made(dtype):
    given = np.ones((1000, 1000), dtype)
    with jax.enable_x64(False):
        as_array("features", given)
        tracemalloc.start()
        got = as_array("features", given)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1.05 * got.nbytes


# Integers beyond int32


LARGE = (2**31, 2**32 - 1, 2**32, 2**32 + 3, 2**63 - 1, 2**63, 2**63 + 3, 2**64 - 1)


@pytest.mark.parametrize("large", [*LARGE, -(2**31) - 1, -(2**32) + 2, -(2**63)])
def test_a_label_that_int32_cannot_hold_becomes_negative(large, x64):
    given = np.array([2, large, 0], np.uint64 if large >= 2**63 else np.int64)
    expected = [2, large, 0] if -(2**31) <= large < 2**31 else [2, -1, 0]
    np.testing.assert_array_equal(narrow_labels(given), expected)
    if x64:  # JAX holds 64 bits
        np.testing.assert_array_equal(narrow_labels(jnp.asarray(given)), expected)
        np.testing.assert_array_equal(jax.jit(narrow_labels)(given), expected)


@pytest.mark.parametrize("dtype", INTEGERS[:-1], ids=str)
@pytest.mark.usefixtures("x64")
def test_labels_that_int32_holds_keep_their_values(dtype):
    limits = np.iinfo(dtype)
    given = np.array([0, 100, max(limits.min, -(2**31)), min(limits.max, 2**31 - 1)])
    got = narrow_labels(given.astype(dtype))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, ">i8"])
def test_integers_that_jax_would_wrap_are_refused(dtype):
    given = np.array([3, 2**32 + 1]).astype(dtype)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"x must fit into u?int32"):
        as_array("x", given)
    np.testing.assert_array_equal(as_array("x", given), given)


# Advice


RECORDS = np.zeros(2, [("a", "f4"), ("b", "f4")])
MASKED = np.ma.masked_array([1.0, 2.0], mask=[False, True])
BATCHES = "join the batches, or stream them with ncjax.statistics.update"
REFUSED = [
    (None, "got None: pass the array"),
    ("W.npy", "got strings <U5 (): convert them to numbers"),
    (["a", "b"], "got strings <U1 (2,): convert them to numbers"),
    ([None, 1.0], "got Python objects (NoneType, float) (2,): cast them by .astype(float)"),
    (np.array([1.0, 2.0], object), "got Python objects (float) (2,): cast them by"),
    ([2**70], "got Python objects (int) (1,): cast them by"),
    (np.zeros(2, "M8[D]"), "got datetime64[D] (2,): convert the times to floats"),
    (np.zeros(2, "m8[s]"), "got timedelta64[s] (2,): convert the times to floats"),
    (RECORDS, "(2,): pass one array of its fields"),
    (MASKED, "got 1 of 2 entries masked: take array[~mask] or array.filled(number)"),
    (scipy.sparse.csr_matrix(np.eye(2)), "got a csr_matrix: pass its .toarray()"),
    (jax.random.key(0), "got key<fry> (): pass numbers, not PRNG keys"),
    ((batch for batch in np.ones((3, 2))), f"got a generator: {BATCHES}"),
    ({1.0, 2.0}, f"got a set: {BATCHES}"),
    ({"W": VALUES}, "got a dict: pass a NumPy or JAX array"),
    (jax.ShapeDtypeStruct((2,), np.float32), "got a ShapeDtypeStruct: pass a NumPy or JAX"),
    (
        [np.ones((4, 2)), np.ones((4, 2)), np.ones((3, 2))],
        f"got a list of 3 entries of different shapes, (4, 2) and (3, 2): {BATCHES}",
    ),
    (
        (jnp.ones((4, 2), jnp.int32), jnp.ones((3, 2), jnp.int32)),
        f"got a tuple of 2 entries of different shapes, (4, 2) and (3, 2): {BATCHES}",
    ),
    ([[1.0, 2.0], [3.0]], "got a list of 2 entries of different shapes, (2,) and (1,)"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
@pytest.mark.usefixtures("x64")
def test_other_objects_are_refused_with_advice(given, message):
    expected = f"^features must be an array of numbers, {'' if message[0] != '(' else '.*'}"
    with pytest.raises(ValueError, match=expected + re.escape(message)) as caught:
        as_array("features", given)
    assert "\n" not in str(caught.value)


def test_advice_on_batches_is_for_features_and_labels_alone():
    with pytest.raises(ValueError, match=r"W must be .* got a generator: pass one array"):
        as_array("W", (row for row in VALUES))


# PyTorch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.usefixtures("x64")
def test_tensors_with_or_without_gradient_keep_their_values(torch, dtype, gradient):
    given = (
        torch.tensor(VALUES.T.copy()).to(getattr(torch, dtype)).requires_grad_(gradient).T
    )
    assert not given.is_contiguous()
    got = as_array("features", given)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(np.asarray(got, np.float64), VALUES)
    assert got.dtype == jax.dtypes.canonicalize_dtype(dtype)


def test_bfloat16_tensors_keep_every_bit(torch):
    bits = np.random.default_rng(0).integers(0, 2**15, 1000).astype(np.int16)
    given = torch.from_numpy(bits).view(torch.bfloat16)
    got = np.asarray(as_array("features", given))
    np.testing.assert_array_equal(got.view(np.int16), bits)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_eight_bits_become_float32(torch, kind):
    given = torch.tensor(VALUES, dtype=torch.float32).to(getattr(torch, kind))
    got = as_array("features", given)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, VALUES)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "bool"])
def test_tensors_of_integers_keep_their_values(torch, dtype):
    given = torch.tensor([1, 0, 1]).to(getattr(torch, dtype))
    np.testing.assert_array_equal(as_array("labels", given), [1, 0, 1])


def test_lists_of_tensors_keep_their_values(torch):
    for dtype in (torch.float32, torch.bfloat16):
        rows = list(torch.tensor(VALUES, requires_grad=True).to(dtype))
        np.testing.assert_array_equal(as_array("features", rows), VALUES)
    mixed = [jnp.asarray(VALUES[0]), torch.tensor(VALUES[1], requires_grad=True)]
    np.testing.assert_array_equal(as_array("features", mixed), VALUES)
    labels = [torch.tensor(2), torch.tensor(0)]
    np.testing.assert_array_equal(as_array("labels", labels), [2, 0])


@pytest.mark.parametrize("size", [8, 10**6])
def test_tensors_that_the_caller_overwrites_were_copied_before(torch, size):
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.from_numpy(aligned(size)).to(dtype)
        got = as_array("features", given)
        given.fill_(7)
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.ones(size))


def test_tensors_without_numbers_to_read_are_refused_with_advice(torch):
    meta = torch.ones(2, 3, device="meta")
    for given, message in (
        (meta, "got a tensor of torch.float32: Cannot copy out of meta tensor"),
        (torch.eye(3).to_sparse(), r"got a tensor of torch.float32: .*to_dense\(\)"),
        ([torch.ones(4, 2), torch.ones(3, 2)], r"different shapes, \(4, 2\) and \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"^features must be .*{message}"):
            as_array("features", given)


class Tensor:
    """The methods of a PyTorch tensor that ncjax calls, on a device without NumPy."""

    dtype = "torch.float32"

    def __init__(self, values, gradient=True):
        self.values, self.gradient = values, gradient

    def detach(self):
        return Tensor(self.values, gradient=False)

    def cpu(self):
        raise AssertionError("numpy(force=True) moves a tensor to the host")

    def numpy(self, *, force=False):
        if self.gradient or not force:
            raise TypeError("can't convert this tensor to numpy")
        return self.values

    __array__ = numpy


def test_tensors_are_detached_and_moved_to_the_host():
    np.testing.assert_array_equal(as_array("features", Tensor(VALUES)), VALUES)
