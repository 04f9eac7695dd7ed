"""Networks of `ncjax.networks` for comparison with torchvision's; needs no torch.

Their variables, drawn from names and shapes so that none need storing, and the same
variables under torchvision's names and layouts.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ncjax.networks import models

# Of the means that torchvision's VGG gives to its fully connected layers.
GRID = 7


class Case(NamedTuple):
    name: str
    options: dict[str, Any]
    size: tuple[int, int]
    num_classes: int = 10
    num_images: int = 2

    def build(self):
        return models.build(self.name, self.num_classes, **self.options)

    def variables(self):
        return filled(self.build(), (*self.size, 3))

    def images(self):
        """(num_images, height, width, 3), each with its own contrast."""
        images = 2 * uniforms("images", (self.num_images, *self.size, 3)) - np.float32(1)
        contrast = np.arange(1, self.num_images + 1, dtype=np.float32)
        return contrast[:, None, None, None] * images


# The sides are odd and unequal, so that swapped axes are noticed.
CASES = {
    "resnet18-cifar": Case("resnet18", {"stem": "cifar"}, (32, 24)),
    "resnet18-imagenet": Case("resnet18", {"stem": "imagenet"}, (65, 47)),
    "resnet34-imagenet": Case("resnet34", {"stem": "imagenet"}, (64, 48)),
    "resnet50-imagenet": Case("resnet50", {"stem": "imagenet"}, (64, 48)),
    "resnet50-cifar": Case("resnet50", {"stem": "cifar"}, (16, 16)),
    "vgg13-linear": Case("vgg13", {"head": "linear"}, (65, 50)),
    "vgg11-mlp-narrow": Case("vgg11", {"head": "mlp", "width": 1 / 8}, (96, 64)),
    "vgg16-linear-narrow": Case("vgg16", {"head": "linear", "width": 1 / 8}, (32, 32)),
    "vgg19-mlp-narrow": Case("vgg19", {"head": "mlp", "width": 1 / 8}, (64, 96)),
    "vgg11-mlp": Case("vgg11", {"head": "mlp"}, (224, 224), num_images=1),
}
TRAINED = {
    "resnet18-cifar": Case("resnet18", {"stem": "cifar"}, (32, 32), num_images=4),
    "bottlenecks-imagenet": Case(
        "resnet50", {"stem": "imagenet", "depths": (1, 1, 1, 1)}, (95, 64), num_images=4
    ),
    "vgg13-linear-narrow": Case("vgg13", {"width": 1 / 8}, (64, 32), num_images=4),
}
# Their outputs are in tests/data/torchvision_logits.json: all logits, these features.
STORED = (
    "resnet18-cifar",
    "resnet18-imagenet",
    "resnet50-cifar",
    "vgg13-linear",
    "vgg11-mlp-narrow",
)
STORED_FEATURES = 128


def filled(model, image_shape):
    """Variables with every entry uniform.

    Kernels have mean 0 and variance 2 / fan_in, in residual blocks 1.2 / fan_in, so that
    activations stay of order 1; scales and running variances lie in [0.5, 1.5), biases
    and running means in [-0.1, 0.1).
    """

    def fill(path, leaf):
        name = _name(path)
        draws = uniforms(name, leaf.shape)
        kind = name.split("/")[-1]
        if kind == "kernel":
            variance = (1.2 if "layer" in name else 2) / math.prod(leaf.shape[:-1])
            return np.float32(math.sqrt(3 * variance)) * (2 * draws - 1)
        return draws + np.float32(0.5) if kind in ("scale", "var") else 0.2 * draws - 0.1

    shapes = models.abstract_variables(model, image_shape)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def uniforms(name, shape):
    """Float32 multiples of 2^-24 in [0, 1), given by `name`.

    From the raw bits, which NumPy promises to keep, and not from a `Generator`.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    draws = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return draws.reshape(shape)


def state_dict(variables):
    """NumPy arrays by torchvision's names, of variables or only some collections of them.

    ResNet's, with either stem; those of VGG with `head="mlp"`; and with `head="linear"`
    those of torchvision's VGG with a single linear layer as its `classifier`.
    """
    leaves = {
        _name(path[1:]): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    modules = _modules({name.rsplit("/", 1)[0] for name in leaves})
    state = {}
    for name, leaf in leaves.items():
        module, kind = name.rsplit("/", 1)
        state[f"{modules[module]}.{_KINDS[kind]}"] = _layout(module, leaf)
        if kind == "mean":
            state[f"{modules[module]}.num_batches_tracked"] = np.array(0)
    return state


_KINDS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layout(module, leaf):
    """Kernels (h, w, in, out) as (out, in, h, w), and (in, out) as (out, in)."""
    if leaf.ndim == 2 and module == "fc1":  # ours is flattened (h, w, C), theirs (C, h, w)
        channels = leaf.shape[0] // GRID**2
        leaf = leaf.reshape(GRID, GRID, channels, -1).transpose(2, 0, 1, 3)
        leaf = leaf.reshape(GRID**2 * channels, -1)
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    return np.ascontiguousarray(leaf.transpose(axes))


def _modules(names):
    """Torchvision's name of each of our modules."""
    if any(name.startswith("layer") for name in names):
        return {name: _resnet_module(name) for name in names}
    places = {name: _place(name) for name in names if "_" in name}
    order = sorted(set(places.values()))
    theirs = {"fc1": "classifier.0", "fc2": "classifier.3"}
    theirs["classifier"] = "classifier.6" if "fc1" in names else "classifier"
    for name, place in places.items():
        # Convolution, normalisation and ReLU, and a maximum after each group.
        index = 3 * order.index(place) + place[0] - 1 + name.startswith("bn")
        theirs[name] = f"features.{index}"
    return theirs


def _resnet_module(name):
    renamed = {
        "classifier": "fc",
        "shortcut": "downsample.0",
        "shortcut_bn": "downsample.1",
    }
    block, _, last = name.rpartition("/")
    last = renamed.get(last, last)
    return f"{block.replace('_', '.')}.{last}" if block else last


def _place(name):
    """(2, 1) of "conv2_1" or "bn2_1"."""
    group, position = name.removeprefix("conv").removeprefix("bn").split("_")
    return int(group), int(position)
