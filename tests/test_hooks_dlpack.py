"""Tensors on a GPU reach JAX through DLPack: same bits, memory of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import arrays
from ncjax.arrays import as_array

torch = pytest.importorskip("torch", reason="needs requirements-hooks.txt")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Take the way of a GPU with tensors on the CPU, which DLPack shares too."""
    monkeypatch.setattr(
        arrays, "_is_on_gpu_of_jax", lambda tensor: tensor.is_floating_point()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_keep_every_bit(dtype):
    given = torch.randn(4, 6).to(getattr(torch, dtype))
    got = as_array("features", given)
    assert str(got.dtype) == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), given.double().numpy())


def test_tensors_with_a_gradient_or_strides_keep_their_values():
    given = torch.randn(5, 3, requires_grad=True)
    got = as_array("features", given.T[:, ::2])
    np.testing.assert_array_equal(got, given.T[:, ::2].numpy(force=True))


@pytest.mark.parametrize("size", [8, 10**6])
def test_tensors_that_the_caller_overwrites_were_copied_before(size):
    given = torch.ones(size)
    got = as_array("features", given)
    given.fill_(7)
    np.testing.assert_array_equal(got, np.ones(size))


def test_a_tensor_inside_a_compiled_function_is_a_constant():
    given = torch.ones(3)
    got = jax.jit(lambda x: x + as_array("features", given))(jnp.ones(3, jnp.float32))
    np.testing.assert_array_equal(got, 2 * np.ones(3))


class OnGpu:
    """What the choice of the way reads of a tensor."""

    def __init__(self, dtype, is_cuda=True, is_sparse=False):
        self.dtype, self.is_cuda, self.is_sparse = dtype, is_cuda, is_sparse


def test_only_dense_floats_on_a_gpu_of_jax_go_through_dlpack(monkeypatch):
    monkeypatch.undo()
    tensors = {
        "float": OnGpu(torch.float32),
        "labels": OnGpu(torch.int64),  # JAX without x64 would wrap them
        "double": OnGpu(torch.float64),  # DLPack does not round
        "sparse": OnGpu(torch.float32, is_sparse=True),
        "on the host": OnGpu(torch.float32, is_cuda=False),
    }
    for platform, taken in {"gpu": {"float"}, "cpu": set()}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        found = {name for name, t in tensors.items() if arrays._is_on_gpu_of_jax(t)}
        assert found == taken
