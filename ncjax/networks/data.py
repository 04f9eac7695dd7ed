"""Load image classification sets as arrays: TFDS by name, or scikit-learn's digits.

Reading needs no TensorFlow. Preparing a set from its official archive, once, does. The
digits need no network.
"""

import difflib
import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ncjax.checks import check_integer, check_key
from ncjax.networks import chunks, descriptions, records
from ncjax.types import Array

DIGITS = "digits"
_DIGITS_TRAIN = 1437  # of 1797; the rest is the split "test"
_CHUNK = 1000
_BYTES_AT_ONCE = 2**30
# Google's storage, where TFDS looks first.
_PROBE = "https://storage.googleapis.com/tfds-data"
_PROBE_SECONDS = 5.0
_CROP = 4


class Part(NamedTuple):
    """Consecutive samples of a split, at least one."""

    name: str
    start: int
    stop: int


class Dataset(NamedTuple):
    """Labelled images of one size."""

    images: np.ndarray  # (N, height, width, C) uint8, C = 1 or 3
    labels: np.ndarray  # (N,) int32 in [0, K)
    num_classes: int  # K
    parts: tuple[Part, ...] = ()  # ranges of the set on disk that hold the images


def load(
    name: str, split: str, data_dir: str | None = None, *, per_class: int | None = None
) -> Dataset:
    """Load a split of a data set in the order of its files.

    Args:
      name: "digits" (1797 real handwritten digits of 8x8 that scikit-learn ships, 1437 of
        them "train" and 360 "test"), or any image classification set of TFDS, such as
        "mnist", "cifar10", "kmnist", "fashion_mnist". A set that is not prepared yet is
        downloaded and prepared.
      split: split in the syntax of TFDS: "train", "test", "train[:20%]", "train[:5000]".
      data_dir: TFDS's data directory; if None or empty, TFDS's default: TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      per_class: keep the first `per_class` samples of each class; all if None or 0.

    Raises:
      ValueError: the set or split does not exist, it has no images or labels, images have
        several sizes or another one than declared, a label lies outside [0, K), or a class
        has too few samples.
      OSError: the set is not prepared and cannot be downloaded, its files are damaged, or
        its description names code that is not of TFDS.

    Source: Wiesner et al., TensorFlow Datasets; Alpaydin, Kaynak (1998) for the digits.

    >>> from ncjax.networks import data
    >>> digits = data.load("digits", "train[:100]")
    >>> digits.images.shape, digits.num_classes
    ((100, 8, 8, 1), 10)
    """
    if per_class is not None:
        check_integer("per_class", per_class, least=0)
    read = _digits if name == DIGITS else _tfds
    dataset = read(name, split, data_dir)
    return first_of_each_class(dataset, per_class) if per_class else dataset


def first_of_each_class(dataset: Dataset, per_class: int) -> Dataset:
    """Keep the first `per_class` samples of each class, in their order.

    Raises:
      ValueError: a class has fewer samples.
    """
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    if counts.min() < per_class:
        raise ValueError(
            f"per_class is {per_class} but class {counts.argmin()} has {counts.min()} "
            "samples in this split"
        )
    by_class = [
        np.flatnonzero(dataset.labels == k)[:per_class] for k in range(dataset.num_classes)
    ]
    kept = np.sort(np.concatenate(by_class))
    return dataset._replace(images=dataset.images[kept], labels=dataset.labels[kept])


def _digits(name: str, split: str, data_dir: str | None) -> Dataset:
    """Load scikit-learn's digits with values 0 to 16 stretched to 0 to 255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    sizes = {"train": _DIGITS_TRAIN, "test": len(labels) - _DIGITS_TRAIN}
    start = {"train": 0, "test": _DIGITS_TRAIN}
    splits = {
        key: SimpleNamespace(num_examples=size, shard_lengths=[size])
        for key, size in sizes.items()
    }
    parts = _parts(name, split, splits)
    index = np.concatenate(
        [np.arange(part.start, part.stop) + start[part.name] for part in parts]
    )
    return Dataset(images[index], labels[index], 10, parts)


def _parts(name: str, split: str, splits: Any) -> tuple[Part, ...]:
    """Return the ranges of samples that a split in the syntax of TFDS selects.

    A slice that ends before it starts is empty here; TFDS reads other samples for it.

    Raises:
      ValueError: the syntax is wrong, the split does not exist or is empty.
    """
    import tensorflow_datasets as tfds

    available = ", ".join(f"{key} ({info.num_examples})" for key, info in splits.items())
    try:
        requested = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot read split {split!r} of {name}, which has {available}: {reason}"
        ) from None
    parts = []
    for part in requested:
        size = splits[part.splitname].num_examples
        start, stop, _ = slice(part.from_, part.to).indices(size)
        parts.append(Part(part.splitname, start, stop))
    parts = [part for part in parts if part.start < part.stop]
    if not parts:
        raise ValueError(f"split {split!r} of {name}, which has {available}, is empty")
    return tuple(parts)


def overlap(first: Dataset, second: Dataset) -> bool:
    """Return whether two splits of one set share samples."""
    return any(
        a.name == b.name and max(a.start, b.start) < min(a.stop, b.stop)
        for a in first.parts
        for b in second.parts
    )


def _tfds(name: str, split: str, data_dir: str | None) -> Dataset:
    """Load a set of TensorFlow Datasets; prepare it first if needed."""
    builder = _builder(name, _expanded(data_dir) if data_dir else None)
    features = _image_features(builder)
    if not builder.is_prepared():
        _prepare(builder)
    if not builder.info.splits:
        raise OSError(
            f"{builder.data_dir} is incomplete: delete it and prepare {name} again"
        )
    parts = _parts(name, split, builder.info.splits)
    for path, _ in _shards(builder):
        descriptions.check_regular(Path(path))
    source = _source(builder, name, parts)
    decoder = records.Decoder(name, builder.info.features, features, len(source))
    images, labels = [], []
    step = _records_at_once(builder, parts)
    starts = range(0, len(source), step)
    for start in tqdm(starts, desc=f"read {name}", leave=False, disable=None):
        indices = list(range(start, min(start + step, len(source))))
        places = [f"{_place(parts, index)} of {name}" for index in indices]
        try:
            decoded = decoder.decode(source.__getitems__(indices), places)
        except records.BadRecord:
            raise
        except Exception as error:
            raise _damaged(builder, error) from None
        images += decoded[0]
        labels += decoded[1]
    num_classes = builder.info.features[features.label].num_classes
    return Dataset(np.stack(images), np.asarray(labels, np.int32), num_classes, parts)


def _source(builder: Any, name: str, parts: Sequence[Part]) -> Any:
    """Return the serialised records of parts of a set, in order.

    Raises:
      OSError: the files are damaged, or TensorFlow is needed to read them.
    """
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(
            _spec(parts),
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
    except NotImplementedError:
        raise OSError(
            f"{builder.data_dir} holds {name} as {builder.info.file_format.value}, which "
            "needs TensorFlow to read: prepare it as array_record in another data_dir"
        ) from None
    except Exception as error:
        raise _damaged(builder, error) from None


def _spec(parts: Sequence[Part]) -> str:
    """Return parts in the syntax of TFDS."""
    return "+".join(f"{part.name}[{part.start}:{part.stop}]" for part in parts)


def _records_at_once(builder: Any, parts: Sequence[Part]) -> int:
    """Return the number of records to decompress at once.

    Raises:
      OSError: a record is too large, or a file is damaged.
    """
    if builder.info.file_format.value != "array_record":
        return _CHUNK
    try:
        instructions = builder.info.splits[_spec(parts)].file_instructions
        paths = {Path(instruction.filename) for instruction in instructions}
    except Exception as error:
        raise _damaged(builder, error) from None
    # Reading the records says which file is missing.
    there = sorted(path for path in paths if path.exists())
    largest = max(map(chunks.largest_record, there), default=0)
    return max(1, min(_CHUNK, _BYTES_AT_ONCE // max(largest, 1)))


def _place(parts: Sequence[Part], index: int) -> str:
    """Return number and split of the sample at an index of consecutive parts."""
    for part in parts:
        if index < part.stop - part.start:
            return f"record {part.start + index} of split {part.name!r}"
        index -= part.stop - part.start
    raise IndexError(index)


def _shards(builder: Any) -> list[tuple[str, int]]:
    """Return path and length of each shard, none if the file names are damaged."""
    try:
        return [
            shard
            for split in builder.info.splits.values()
            for shard in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
    except Exception:
        return []


def _expanded(data_dir: str) -> str:
    """Return the folder with the home directory in place of ~ or ~user.

    Raises:
      ValueError: there is no such user, or the home directory is unknown.
    """
    folder = os.path.expanduser(data_dir)
    if folder.startswith("~"):
        user = folder.partition("/")[0]
        raise ValueError(f"data_dir={data_dir}: no home directory is known for {user!r}")
    return folder


def _builder(name: str, data_dir: str | None) -> Any:
    """Return the builder of a set of TFDS."""
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:[\d.*]+)?", name):
        raise ValueError(
            f"no data set is called {name!r}: expected name[/config][:version]"
        )
    descriptions.check(data_dir, re.split("[/:]", name)[0])
    import tensorflow_datasets as tfds  # after the check that this is the package
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        return tfds.builder(name, data_dir=data_dir)
    except DatasetNotFoundError as error:
        # Read the names off the message: `tfds.list_builders` would import TensorFlow.
        known = [DIGITS, *re.findall(r"^\s*- (\w+)", str(error), flags=re.MULTILINE)]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "digits needs no network"
        folder = descriptions.data_root(data_dir) / re.split("[/:]", name)[0]
        if folder.is_dir():
            hint = f"{folder} lacks a description, features.json or dataset_info.json"
        raise ValueError(f"no data set is called {name!r}: {hint}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(
            f"cannot open data set {name!r} in {data_dir or 'the default data_dir'}: "
            f"{reason}"
        ) from None


def _image_features(builder: Any) -> records.Names:
    """Find the features that hold the image and the label.

    Raises:
      ValueError: the set has not exactly one of each.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    if "image" in images and "label" in labels:
        images, labels = ["image"], ["label"]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{builder.name} is not an image classification set: expected one image and "
            f"one label, got features {', '.join(features)}"
        )
    image = features[images[0]]
    has_channels = len(image.shape) == 3 and image.shape[-1] in (1, 3)
    if image.np_dtype != np.uint8 or not has_channels:
        raise ValueError(
            f"{builder.name} has images {image.shape} of {np.dtype(image.np_dtype)}: "
            "expected 1 or 3 channels of uint8"
        )
    num_classes = features[labels[0]].num_classes
    if not num_classes or num_classes < 1:
        raise ValueError(f"{builder.name} has {num_classes} classes: expected at least 1")
    return records.Names(images[0], labels[0])


def _damaged(builder: Any, error: Exception) -> OSError:
    """Return an error that names the damaged files; each file is opened by itself."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    suspects = []
    for path, length in _shards(builder):
        try:
            source = ArrayRecordDataSource([str(path)])
            sound = len(source.__getitems__(list(range(len(source))))) == length
        except Exception:
            sound = False
        if not sound:
            suspects.append(str(path))
    where = ", ".join(suspects) or str(builder.data_dir)
    return OSError(f"damaged or missing records in {where}: {str(error).splitlines()[0]}")


def _prepare(builder: Any) -> None:
    """Download and prepare a set, or say at once why that is impossible.

    Raises:
      OSError: TensorFlow or the network is missing, or the preparation fails.
    """
    root = Path(builder.data_dir).parents[len(Path(builder.info.full_name).parts) - 1]
    prepared = sorted(str(path) for path in _prepared(root))
    found = f"there: {', '.join(prepared)}" if prepared else "nothing is there"
    missing = f"{builder.info.full_name} is not prepared in {root} ({found})"
    choices = (
        "choose a prepared set, set --data_dir or TFDS_DATA_DIR to a folder that has it, "
        f"or use {DIGITS}, which needs no network"
    )
    if not _has_network():
        raise OSError(f"{missing} and there is no network to download it: {choices}")
    if importlib.util.find_spec("tensorflow") is None:
        raise OSError(
            f"{missing}; preparing it, once, needs TensorFlow (reading does not): pip "
            f"install tensorflow-cpu, or {choices}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise OSError(
            f"{missing} and preparing it failed: {reason.splitlines()[0]}"
        ) from error


def _prepared(root: Path) -> list[Path]:
    """List the folders of prepared sets, relative to the data directory."""
    # name/version or name/config/version. A recursive search would walk the downloads.
    patterns = ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    return [path.parent.relative_to(root) for path in paths]


def _has_network() -> bool:
    """Return whether TFDS's storage answers within a few seconds, through any proxy."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(_PROBE, timeout=_PROBE_SECONDS)
        except urllib.error.HTTPError:
            pass  # also an answer
        except Exception:
            return  # nobody catches the errors of a thread
        answered.set()

    # A thread, because the look-up of a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def pad_to(images: np.ndarray, size: int) -> np.ndarray:
    """Pad images (N, height, width, C) with zeros to `size` both ways.

    Raises:
      ValueError: the images are larger.
    """
    before = [(size - length) // 2 for length in images.shape[1:3]]
    if min(before) < 0:
        raise ValueError(
            f"image_size is {size} but the images are {images.shape[1]}x{images.shape[2]}"
        )
    after = [size - length - b for length, b in zip(images.shape[1:3], before, strict=True)]
    border = [(b, a) for b, a in zip(before, after, strict=True)]
    return np.pad(images, ((0, 0), *border, (0, 0)))


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (C,) of each channel, float32, on [0, 1].

    A constant channel gets standard deviation 1, because images are divided by it.
    """
    counts = np.stack(
        [np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, -1, 0)]
    )
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    deviation = np.sqrt(np.maximum(variance, 0))
    deviation[deviation < 1e-6] = 1.0
    return mean.astype(np.float32), deviation.astype(np.float32)


def normalise(images: Array, mean: Array, deviation: Array) -> Array:
    """Return `(images / 255 - mean) / deviation` by channel, float32, of uint8 images."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - mean[None, None, None]) / deviation[None, None, None]


def augment(key: Array, images: Array) -> Array:
    """Shift each image by up to 4 pixels, fill with zeros, and mirror it or not.

    Args:
      key: PRNG key.
      images: (B, height, width, C).

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: `key` is not one PRNG key.
    """
    check_key("key", key)
    key_shift, key_flip = jax.random.split(key)
    batch, height, width, channels = images.shape
    shift = jax.random.randint(key_shift, (batch, 2), 0, 2 * _CROP + 1, jnp.int32)
    # The first bit decides, as in `jax.random.bernoulli`, whose numbers may be float64.
    bits = jax.random.bits(key_flip, (batch,))
    flip = bits >> (8 * bits.dtype.itemsize - 1) == 0
    border = (_CROP, _CROP)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))

    def crop(image, start):
        corner = (start[0], start[1], jnp.int32(0))
        return jax.lax.dynamic_slice(image, corner, (height, width, channels))

    cropped = jax.vmap(crop)(padded, shift)
    return jnp.where(flip[:, None, None, None], cropped[:, :, ::-1], cropped)
