"""Decode the records of a data set on disk, after a look at their sizes and labels."""

import io
import struct
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ncjax import sizes

_PNG = b"\x89PNG\r\n\x1a\n"
# Pillow reads dozens of formats; for one of them it starts another program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
_OTHER_FORMATS = (b"RIFF", b"II*\0", b"MM\0*")  # beginnings of WebP and TIFF
_MOST_BYTES = 256 * 2**20  # of a record
_MOST_PIXELS = 2**26


class Names(NamedTuple):
    """Names of the features that hold the image and the label."""

    image: str
    label: str


class BadRecord(ValueError):
    """A record holds what its description does not allow."""


class Decoder:
    """Decode records to images and labels, and nothing else that they hold."""

    def __init__(self, name: str, features: Any, names: Names, size: int):
        """Prepare to decode.

        Args:
          name: name of the set.
          features: the features of a set of TFDS.
          names: names of the image and of the label.
          size: number of records, for the check of the memory.
        """
        import tensorflow_datasets as tfds

        self._image, self._label = features[names.image], features[names.label]
        self._name, self._names, self._size = name, names, size
        self._features = tfds.features.FeaturesDict(
            {names.image: self._image, names.label: self._label}
        )
        self._decoders = {names.image: tfds.decode.SkipDecoding()}
        self._extent: tuple[int, int] | None = None  # of the images so far

    def decode(
        self, records: Sequence[Any], places: Iterable[str]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Return images and labels.

        Args:
          records: a serialised `tf.train.Example` each.
          places: name of each record, for errors.

        Raises:
          BadRecord: an image has another size than declared or than the others, the images
            do not fit into memory, or a label lies outside [0, K).
          Exception: a record is damaged; TFDS, Pillow and protobuf have many kinds.
        """
        images, labels = [], []
        for record, place in zip(records, places, strict=True):
            if len(record) > _MOST_BYTES:
                raise BadRecord(
                    f"{place} has {len(record):,} bytes: expected at most {_MOST_BYTES:,}"
                )
            example = self._features.deserialize_example_np(
                bytes(record), decoders=self._decoders
            )
            self._check_label(example[self._names.label], place)
            encoded = example[self._names.image]
            self._check_extent(_extent(encoded, place), place)
            image = self._image.decode_example_np(encoded)
            self._check_shape(image.shape, place)
            images.append(image)
            labels.append(example[self._names.label])
        return images, labels

    def _check_label(self, label: Any, place: str) -> None:
        """Raise BadRecord if a label lies outside [0, K)."""
        num_classes = self._label.num_classes
        if not 0 <= label < num_classes:
            advice = "; -1 marks a sample without label" if label == -1 else ""
            raise BadRecord(
                f"{place} has label {label}: expected 0 to {num_classes - 1}{advice}"
            )

    def _check_extent(self, extent: tuple[int, int], place: str) -> None:
        """Raise BadRecord if an image, still encoded, has the wrong height and width."""
        declared = self._image.shape[:2]
        if any(d not in (None, e) for d, e in zip(declared, extent, strict=True)):
            raise BadRecord(
                f"{place} holds an image of {_times(extent)} pixels: its description "
                f"declares {_times(declared)}"
            )
        if self._extent is None:
            self._check_memory(extent, place)
            self._extent = extent
        if extent != self._extent:
            raise BadRecord(
                f"{self._name} has images of several sizes, {_times(self._extent)} and, in "
                f"{place}, {_times(extent)}; one size is needed"
            )

    def _check_memory(self, extent: tuple[int, int], place: str) -> None:
        """Raise BadRecord if images of this size cannot be held."""
        pixels = extent[0] * extent[1]
        if pixels > _MOST_PIXELS:
            raise BadRecord(
                f"{place} holds an image of {_times(extent)} pixels: expected at most "
                f"{_MOST_PIXELS:,} pixels"
            )
        needed = pixels * self._image.shape[-1] * self._size
        total = sizes.host_memory()
        if needed > total:
            raise BadRecord(
                f"{self._size:,} images of {_times(extent)} pixels need {needed / 1e9:.3g} "
                f"GB of memory, and the machine has {total / 1e9:.3g} GB: take a smaller "
                "split"
            )

    def _check_shape(self, shape: tuple[int, ...], place: str) -> None:
        """Raise BadRecord if a decoded image has another shape than its header promised."""
        expected = (*(self._extent or ()), self._image.shape[-1])
        if shape != expected:
            raise BadRecord(
                f"{place} holds an image of shape {_times(shape)}: expected "
                f"{_times(expected)}"
            )


def _extent(encoded: bytes, place: str) -> tuple[int, int]:
    """Return height and width of an encoded image by its header; decode nothing.

    Raises:
      BadRecord: the image is larger than Pillow allows.
      Exception: this is no image that TFDS stores.
    """
    # Reading the header by hand takes a hundredth of Pillow's time.
    if encoded[:8] == _PNG and encoded.count(b"IHDR") == 1 and encoded[12:16] == b"IHDR":
        width, height = struct.unpack(">II", encoded[16:24])
        return height, width
    if encoded.startswith(_OTHER_FORMATS):
        raise BadRecord(
            f"{place} holds an image that is not {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}: convert the images of the set"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                return image.height, image.width
    except Image.DecompressionBombError as error:
        raise BadRecord(f"{place} holds too large an image: {error}") from None


def _times(lengths: Sequence[int | None]) -> str:
    """Return lengths as text, 28x28x1."""
    return "x".join("any" if length is None else str(length) for length in lengths)
