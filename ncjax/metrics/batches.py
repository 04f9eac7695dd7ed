"""Bring batches of any kind and size into the few shapes that compiled programs take."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, read_array
from ncjax.metrics.inputs import check_batch, read_batch
from ncjax.types import Array

# A longer batch is split: entries of features that one program takes at most.
_MOST_ELEMENTS = 2**24


class Batches:
    """Check, flatten, split and pad batches of features and labels.

    Args:
      num_classes: K.
      dim: d.
      ignore_index: label of samples to leave out; None for no such label.
      sharding: sharding of the samples over devices; None for one device. With several
        processes each passes its own samples.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        ignore_index: int | None = None,
        sharding: jax.sharding.NamedSharding | None = None,
    ):
        self._num_classes, self._dim, self._ignored = num_classes, dim, ignore_index
        self._sharding = sharding
        self._parts = 1
        if sharding is not None:
            self._parts = len(sharding.addressable_devices)
        self._sizes: list[int] = []  # batch sizes that have a program

    def __call__(self, features, labels, mask=None) -> Iterator[tuple[Array, Array, Array]]:
        """Yield features (B, d), labels (B,) and mask (B,), of few different sizes B.

        Raises:
          ValueError: a shape, dtype or known label does not fit.
        """
        features, labels, mask = self._flat(features, labels, mask)
        if not len(labels):
            return
        most = max(self._num_classes, _MOST_ELEMENTS // self._dim)
        size = self._size(min(len(labels), most))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            yield self._padded(features[rows], labels[rows], mask[rows], size)

    def _flat(self, features, labels, mask):
        """Return features (N, d), labels (N,) and mask (N,), on the host or a device."""
        features, labels = read_array("features", features), read_array("labels", labels)
        if any(isinstance(array, jax.core.Tracer) for array in (features, labels)):
            raise ValueError(
                "a meter must see arrays, got tracers: call update outside jax.jit, or use "
                "the pure functions of ncjax.statistics inside"
            )
        if features.ndim > 2 and features.shape[:-1] == labels.shape:
            mask = None if mask is None else _flat(read_array("mask", mask), labels.shape)
            features, labels = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
        features, labels, mask = read_batch(features, labels, mask, self._dim)
        as_array("features", features[:1])  # raises unless the entries are numbers
        kept = np.ones(len(labels), bool) if mask is None else mask
        if self._ignored is not None:
            kept = kept & (labels != self._ignored)
        self._check_known(labels, kept)
        return features, labels, kept

    def _check_known(self, labels, kept) -> None:
        """Raise ValueError if a label on the host lies outside [0, K)."""
        if isinstance(labels, jax.Array) or isinstance(kept, jax.Array):
            return
        outside = kept & ((labels < 0) | (labels >= self._num_classes))
        if outside.any():
            advice = "" if self._ignored is None else f", or {self._ignored} for no class"
            raise ValueError(
                f"labels must lie in [0, {self._num_classes}){advice}, got "
                f"{np.unique(labels[outside])[:5].tolist()}"
            )

    def _size(self, samples: int) -> int:
        """Return the size of the program for a batch: an old one if that is near."""
        fitting = [size for size in self._sizes if samples <= size <= 8 * samples]
        if fitting:
            return min(fitting)
        if self._sizes:  # sizes vary: powers of two bound the number of programs
            samples = 1 << max(samples - 1, 0).bit_length()
        size = -(-max(samples, 1) // self._parts) * self._parts
        self._sizes.append(size)
        return size

    def _padded(self, features, labels, mask, size: int) -> tuple[Array, Array, Array]:
        missing = size - len(labels)
        if missing:
            features, labels, mask = (
                _pad(array, missing) for array in (features, labels, mask)
            )
        features, labels, mask = check_batch(features, labels, mask, self._dim)
        if self._sharding is None:
            return features, labels, mask
        return tuple(
            jax.make_array_from_process_local_data(self._sharding, np.asarray(array))
            for array in (features, labels, mask)
        )


def _flat(array, shape: tuple[int, ...]):
    """Return an array of this shape with one axis, any other as it is."""
    return array.reshape(-1) if array.shape == shape else array


def _pad(array, missing: int):
    """Return an array with `missing` rows of zeros at the end, where the array lies."""
    widths = ((0, missing), *((0, 0),) * (array.ndim - 1))
    library = jnp if isinstance(array, jax.Array) else np
    return library.pad(array, widths)
