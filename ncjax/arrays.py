"""Turn what a caller passes as an array into a JAX array with the same values.

Every public function takes its arrays through this module. JAX arrays and tracers pass
unchanged. All other numbers are copied, because their owner may overwrite the memory while
JAX still reads it: `jax.device_put` shares aligned memory, and the copy of `jnp.array`
may end after the call has returned.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.types import Array

# XLA on CPU shares memory that starts at a multiple of this many bytes.
_ALIGNMENT = 64
# Dtypes of tensors that go to JAX on the GPU, without rounding.
_GPU = ("gpu", "cuda", "rocm")
_SHARED = ("torch.float32", "torch.bfloat16", "torch.float16")
_BATCHES = "join the batches, or stream them with ncjax.statistics.update"


def as_array(name: str, value) -> Array:
    """Return `value` as a JAX array.

    JAX arrays and tracers pass unchanged. NumPy arrays of any byte order, PyTorch tensors
    on any device, nested lists, and objects that NumPy reads (TensorFlow, pandas) are
    copied, so the caller may overwrite them after the call. Without x64 they are rounded to
    32 bits. Floats of 8 bits become float32, which holds them exactly.

    Args:
      name: name of the argument, for the message.
      value: the argument.

    Raises:
      ValueError: `value` is not an array of numbers, has masked entries, or holds an
        integer that a JAX array does not hold.
    """
    array = read_array(name, value)
    _check_numbers(name, array)
    if not isinstance(array, jax.Array):
        return _copied(name, array, _jax_dtype(array.dtype))
    return array.astype(jnp.float32) if _is_narrow_float(array.dtype) else array


def read_array(name: str, value) -> np.ndarray | Array:
    """Return `value` as a NumPy array in its own dtype, which may share its memory.

    JAX arrays and tracers pass unchanged. A float tensor of PyTorch on a GPU on which JAX
    computes becomes a JAX array there.

    Raises:
      ValueError: `value` is not an array, or has masked entries.
    """
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "__jax_array__"):  # a parameter of Flax
        return value.__jax_array__()
    if isinstance(value, np.ndarray):
        return _without_mask(name, value)
    if _is_torch(value):
        return _from_gpu(value) if _is_on_gpu_of_jax(value) else _from_torch(name, value)
    if isinstance(value, list | tuple):
        return _from_sequence(name, value)
    array = _from_object(name, value)
    if array.dtype == object and array.ndim == 0:
        raise _refusal(name, *_description(name, value))
    return array


def narrow_labels(labels: np.ndarray | Array) -> Array:
    """Return integers as an int32 array, with -1 in place of those that it cannot hold."""
    if isinstance(labels, jax.Array):
        return _narrow(labels, jnp.where)
    return _copied("labels", _narrow(labels, np.where), np.dtype(np.int32))


def _narrow(labels, where):
    narrow = labels.astype(np.int32)
    if labels.dtype.itemsize < 4 or labels.dtype == np.int32:
        return narrow
    return where(narrow.astype(labels.dtype) == labels, narrow, narrow.dtype.type(-1))


def _copied(name: str, array: np.ndarray, dtype: np.dtype) -> Array:
    """Return a JAX array on memory of its own, after one copy of `array` to `dtype`."""
    if dtype.kind in "iu" and dtype.itemsize < array.dtype.itemsize:
        _check_range(name, array, dtype)
    size = array.size * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + size].view(dtype).reshape(array.shape)
    with np.errstate(over="ignore"):  # a float64 may be infinite in float32
        np.copyto(copy, array, casting="unsafe")
    return jax.device_put(copy)


def _check_range(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    """Raise ValueError unless integers fit into `dtype`; a cast would wrap them."""
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(
            f"{name} must fit into {dtype}, got {array.min()} to {array.max()}: call "
            "jax.config.update('jax_enable_x64', True)"
        )


def _check_numbers(name: str, array: np.ndarray | Array) -> None:
    """Raise ValueError unless the entries are numbers."""
    dtype, shape = array.dtype, array.shape
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise _refusal(name, f"{dtype} {shape}", "pass numbers, not PRNG keys")
    if dtype.kind in "mM":  # NumPy counts time differences as integers
        raise _refusal(name, f"{dtype} {shape}", "convert the times to floats")
    if any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        return
    if dtype.kind in "SU":
        raise _refusal(name, f"strings {dtype} {shape}", "convert them to numbers")
    if dtype.kind == "O":
        types = sorted({type(entry).__name__ for entry in np.asarray(array).flat})[:3]
        given = f"Python objects ({', '.join(types)}) {shape}"
        raise _refusal(name, given, "cast them by .astype(float), or join them")
    raise _refusal(name, f"{dtype} {shape}", "pass one array of its fields")


def _jax_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of a JAX array that holds numbers of `dtype`."""
    if _is_narrow_float(dtype):
        return np.dtype(np.float32)
    if dtype.kind == "f" and dtype.itemsize > 8:  # JAX has no long double
        dtype = np.dtype(np.float64)
    return jax.dtypes.canonicalize_dtype(dtype.newbyteorder("="))


def _is_narrow_float(dtype: np.dtype) -> bool:
    return dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating)


def _without_mask(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ma.MaskedArray):
        return array
    if np.ma.is_masked(array):
        given = f"{np.ma.count_masked(array)} of {array.size} entries masked"
        raise _refusal(name, given, "take array[~mask] or array.filled(number)")
    return array.data


def _is_torch(value) -> bool:
    """Whether `value` is a tensor of PyTorch, which this module does not import."""
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _is_on_gpu_of_jax(tensor) -> bool:
    """Whether new arrays of JAX lie on the kind of device that holds a tensor."""
    is_dense = getattr(tensor, "is_cuda", False) and not tensor.is_sparse
    return is_dense and str(tensor.dtype) in _SHARED and _platform() in _GPU


def _platform() -> str:
    """Return the platform on which JAX puts new arrays."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _from_gpu(tensor) -> Array:
    """Return a copy of a tensor, made on its device without a way through the host.

    The copy has ended at the return, so PyTorch may overwrite or free its own memory.
    """
    with jax.ensure_compile_time_eval():
        shared = jax.dlpack.from_dlpack(tensor.detach().contiguous())
        return jax.block_until_ready(jnp.array(shared, copy=True))


def _from_torch(name: str, tensor) -> np.ndarray:
    """Return a tensor on any device, with or without a gradient, as a NumPy array."""
    dtype = str(tensor.dtype)
    try:
        tensor = tensor.detach()
        if dtype.startswith("torch.float8"):
            tensor = tensor.float()
        if dtype != "torch.bfloat16":
            return tensor.numpy(force=True)
        # NumPy reads the bits of a bfloat16 as an int16.
        int16 = tensor.new_empty(0).short().dtype
        return tensor.view(int16).numpy(force=True).view(jnp.bfloat16)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise _refusal(name, f"a tensor of {dtype}", reason) from error


def _from_sequence(name: str, value: list | tuple) -> np.ndarray | Array:
    """Return a list or tuple, of numbers, lists or arrays of one shape, as an array."""
    try:
        if any(isinstance(entry, jax.Array) for entry in value):
            return jnp.asarray([_entry(name, entry) for entry in value])
        if any(_is_torch(entry) for entry in value):
            value = [read_array(name, entry) for entry in value]
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a tracer inside an inner list
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        shapes = {_shape(entry): None for entry in value}
        given = f"a {type(value).__name__} of {len(value)} entries"
        if len(shapes) > 1:
            first, second, *_ = shapes
            given += f" of different shapes, {first} and {second}"
        raise _refusal(name, given, _joining(name)) from error


def _entry(name: str, entry):
    """Return an array in a list as a JAX array; numbers stay, because they are weak."""
    is_array = hasattr(entry, "shape") and hasattr(entry, "dtype")
    return as_array(name, entry) if is_array else entry


def _shape(entry) -> tuple[int, ...]:
    """Return the shape of an array, or the length of a list, for a message."""
    return getattr(entry, "shape", (len(entry),) if hasattr(entry, "__len__") else ())


def _from_object(name: str, value) -> np.ndarray:
    """Return what NumPy makes of an object."""
    try:
        return _without_mask(name, np.asanyarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise _refusal(name, f"a {type(value).__name__}", reason) from error


def _description(name: str, value) -> tuple[str, str]:
    """Return what a value is, and advice, if NumPy finds no array in it."""
    if value is None:
        return "None", "pass the array"
    kind = f"a {type(value).__name__}"
    if hasattr(value, "toarray"):
        return kind, "pass its .toarray(), because sparse arrays are not supported"
    if hasattr(value, "__iter__") and not hasattr(value, "items"):
        return kind, _joining(name)
    return kind, "pass a NumPy or JAX array"


def _joining(name: str) -> str:
    """Return advice on several arrays in place of one."""
    return _BATCHES if name in ("features", "labels") else "pass one array"


def _refusal(name: str, given: str, advice: str) -> ValueError:
    return ValueError(f"{name} must be an array of numbers, got {given}: {advice}")
