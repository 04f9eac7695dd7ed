"""Checkpoints restore the newest of at most two states bit by bit."""

import contextlib
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncjax.networks.checkpoint import Checkpoints, newest_epoch

few = settings(max_examples=settings.default.max_examples // 5)
DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, bool)
SHAPES = ((), (1,), (3,), (2, 1, 3))


class Leaf(NamedTuple):
    dtype: type
    shape: tuple[int, ...]


# Nested and named as in Flax and optax; some nodes are empty.
NAMES = st.text("abcXYZ_019. é", min_size=1, max_size=6)
LEAVES = st.builds(Leaf, st.sampled_from(DTYPES), st.sampled_from(SHAPES))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


def filled(tree, seed):
    """Arrays of random bits, with signed zeros, infinities and all kinds of NaN."""
    rng = np.random.default_rng(seed)

    def array(leaf):
        dtype, shape = np.dtype(leaf.dtype), leaf.shape
        if dtype.kind == "b":
            return jnp.asarray(rng.integers(0, 2, shape).astype(bool))
        size = dtype.itemsize * int(np.prod(shape))
        return jnp.asarray(np.frombuffer(rng.bytes(size), dtype).reshape(shape))

    arrays = jax.tree.map(array, tree, is_leaf=lambda node: isinstance(node, Leaf))
    return {"state": arrays, "steps": jnp.int32(seed)}


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@few
@given(
    tree=TREES,
    seed=st.integers(0, 2**30),
    epochs=st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True),
    notes=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
)
def test_restore_returns_the_saved_bits(tmp_path_factory, tree, seed, epochs, notes):
    folder = tmp_path_factory.mktemp("checkpoints")
    assert newest_epoch(folder) is None
    epochs = sorted(epochs)
    states = [filled(tree, seed + i) for i in range(len(epochs))]
    like = filled(tree, seed + 7)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.newest() is None
        for epoch, state in zip(epochs, states, strict=True):
            checkpoints.save(epoch, state, notes | {"epoch": str(epoch)})
            assert checkpoints.newest() == newest_epoch(folder) == epoch
            restored, found = checkpoints.restore(like)
            assert_same_bits(restored, state)
            assert found == notes | {"epoch": str(epoch)}
    kept = sorted(int(path.name) for path in folder.iterdir())
    assert kept == epochs[-2:]
    with contextlib.closing(Checkpoints(folder, read_only=True)) as others:
        assert others.newest() == epochs[-1]
        assert_same_bits(others.restore(like)[0], states[-1])
    assert sorted(int(path.name) for path in folder.iterdir()) == kept


# Orbax leaves coroutines never awaited; collect them where that is no error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@few
@given(st.integers(0, 2**30), st.sampled_from(DTYPES), st.sampled_from(SHAPES))
def test_restore_refuses_arrays_of_another_shape(tmp_path_factory, seed, dtype, shape):
    folder = tmp_path_factory.mktemp("checkpoints")
    leaf = Leaf(dtype, shape)
    state = filled({"a": leaf}, seed)
    others = [{"a": Leaf(dtype, (*shape, 2))}, {"b": leaf}, {"a": leaf, "more": leaf}]
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(3, state)
        for other in others:
            with pytest.raises(ValueError, match=r"cannot restore .*/3, remove it"):
                checkpoints.restore(filled(other, seed))
        assert_same_bits(checkpoints.restore(state)[0], state)
    gc.collect()


@pytest.mark.parametrize("epoch", [0, 4, 5])
def test_save_refuses_an_epoch_that_is_not_new(tmp_path, epoch):
    """Orbax itself would write nothing and raise nothing."""
    state = {"W": np.arange(3.0)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(5, state)
        with pytest.raises(ValueError, match=f"an epoch above 5, .*, got {epoch}"):
            checkpoints.save(epoch, {"W": state["W"] + 1})
        checkpoints.save(6, state)
        assert checkpoints.newest() == 6


@pytest.mark.parametrize("epoch", [-1, 7.0, True])
def test_save_refuses_an_epoch_that_no_later_run_would_find(tmp_path, epoch):
    refused = pytest.raises(ValueError, match="epoch must be an integer of at least 0")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints, refused:
        checkpoints.save(epoch, {"W": np.arange(3.0)})
    assert not list(tmp_path.iterdir())


def test_a_read_only_checkpoint_refuses_to_save(tmp_path):
    state = {"W": np.arange(3.0)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(5, state)
    refused = pytest.raises(ValueError, match="was opened with read_only=True")
    reader = contextlib.closing(Checkpoints(tmp_path, read_only=True))
    with reader as checkpoints, refused:
        checkpoints.save(6, state)
