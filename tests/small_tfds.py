"""Small TFDS sets on disk in `array_record`, written without TensorFlow."""

import io
import json
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image


class Samples(NamedTuple):
    """Images and labels that are written and read back."""

    images: np.ndarray  # (N, height, width, C) uint8
    labels: np.ndarray  # (N,)


def noise(seed, number, shape, num_classes=10):
    """Random images, no two of them the same."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, *shape), np.uint8)
    return Samples(images, rng.integers(0, num_classes, number))


def png(image):
    """The PNG, which is lossless, of an image (height, width, C), as a file object."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file


def classification(shape, num_classes=10):
    """Features of an image classification set."""
    return {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }


def write(data_dir, name, version, features, splits):
    """Prepare a set in TFDS's layout and return its folder.

    `features` is the argument of `tfds.features.FeaturesDict`, `splits` maps the name of
    a split to its shards, each a list of samples.
    """
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    features.save_config(folder)
    info = {"name": name, "version": version, "fileFormat": "array_record"}
    info["splits"] = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(len(samples)) for samples in shards],
            "numBytes": "1",
        }
        for split, shards in splits.items()
    ]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, shards in splits.items():
        for index, samples in enumerate(shards):
            place = f"{index:05}-of-{len(shards):05}"
            path = folder / f"{name}-{split}.array_record-{place}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for sample in samples:
                writer.write(features.serialize_example(features.encode_example(sample)))
            writer.close()
    return folder


def write_samples(data_dir, name, version, splits, num_classes=10):
    """Prepare a classification set of images of one size, and return its folder.

    `splits` maps the name of a split to its shards, each `Samples`.
    """
    shape = next(iter(splits.values()))[0].images.shape[1:]
    encoded = {
        split: [
            [
                {"image": png(image), "label": int(label)}
                for image, label in zip(*shard, strict=True)
            ]
            for shard in shards
        ]
        for split, shards in splits.items()
    }
    return write(data_dir, name, version, classification(shape, num_classes), encoded)
