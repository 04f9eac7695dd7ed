"""CIFAR-10 for the section `train`: from TFDS, from one file, or noise in its place."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ncjax.networks import data

SPLITS = ("train", "test")
_CLASSES = 10


def read(source: str, tiny: bool) -> tuple[dict[str, data.Dataset], str]:
    """Return the training and the test set, and a word on where they come from.

    Args:
      source: a `.npz` file, a data folder of TFDS with CIFAR-10, or empty for noise. The
        file has for each split `train_labels` (N,), and either `train_images`
        (N, 32, 32, 3) uint8, or encoded images: `train_bytes` uint8, one after the other,
        and `train_ends` (N,), where each one ends.
      tiny: whether a few images suffice.
    """
    most = 64 if tiny else None
    if not source:
        return {split: _noise(split, most or 20_000) for split in SPLITS}, "noise"
    if source.endswith(".npz"):
        with np.load(source, allow_pickle=False) as stored:
            return {split: _stored(stored, split, most) for split in SPLITS}, "file"
    part = "" if most is None else f"[:{most}]"
    found = {split: data.load("cifar10", f"{split}{part}", source) for split in SPLITS}
    return found, "CIFAR-10 of TFDS"


def _noise(split: str, count: int) -> data.Dataset:
    """Return images that a network can only learn by heart."""
    rng = np.random.default_rng(SPLITS.index(split))
    size = (count // (1 + 3 * SPLITS.index(split)), 32, 32, 3)
    labels = (np.arange(size[0]) % _CLASSES).astype(np.int32)
    return data.Dataset(rng.integers(0, 256, size, dtype=np.uint8), labels, _CLASSES)


def _stored(stored, split: str, most: int | None) -> data.Dataset:
    labels = stored[f"{split}_labels"][:most].astype(np.int32)
    if f"{split}_images" in stored:
        return data.Dataset(stored[f"{split}_images"][:most], labels, _CLASSES)
    ends = stored[f"{split}_ends"][:most]
    content = stored[f"{split}_bytes"].tobytes()
    starts = np.concatenate([[0], ends[:-1]])
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda a, b: _decoded(content[a:b]), starts, ends))
    return data.Dataset(np.stack(images), labels, _CLASSES)


def _decoded(content: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def exists(source: str) -> bool:
    """Return whether the source is noise, or a file or folder that is there."""
    return not source or Path(source).exists()
