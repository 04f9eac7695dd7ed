r"""Define networks that return their logits and the features of the last layer.

Every network maps images (B, height, width, C) to `(logits, features)`, logits (B, K) and
features (B, d) with `logits = features @ W.T + b`: W.T and b are the kernel and bias of
the parameters under "classifier". Parameters, normalisation, features and the last layer
are float32, or float64 if `dtype` is; the rest is computed in `dtype`. On GPU and TPU,
float32 products run at JAX's default precision. Batch normalisation averages over the whole
batch, across all devices.

Layouts follow the papers. Weights are drawn as in torchvision, biases start at zero.
Parameter counts equal torchvision's (`stem="imagenet"`, `head="mlp"`) or match the usual
variants for small images (`stem="cifar"`, `head="linear"`).

`norm="none"` makes VGG and ConvNet homogeneous: their logits f satisfy $f(c \theta) = c^p
f(\theta)$ for c > 0, where p is the number of weight layers (`degree`). Such a network has
neither batch normalisation nor biases, except a bias in the first layer. Its weights are
drawn from a normal distribution with variance 2 / fan-in, which keeps the mean square of
the activations (He et al., ICCV 2015).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_choice, check_integer, check_positive
from ncjax.networks.convolution import convolve, max_pool
from ncjax.numerics import einsum, wide_dtype
from ncjax.types import Array

STEMS = ("cifar", "imagenet")
HEADS = ("linear", "mlp")
NORMS = ("batch", "none")
# VGG halves its images five times.
VGG_LEAST_SIZE = 32
# Share of the old value that an update of the averages of batch normalisation keeps.
MOMENTUM = 0.9

_VGG_CHANNELS = (64, 128, 256, 512, 512)
_VGG_UNITS = 4096
_VGG_GRID = 7

_kaiming_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_normal_hundredth = nn.initializers.normal(0.01)


class Conv(nn.Module):
    """Convolve with a square kernel (size, size, C, channels) and zero padding."""

    channels: int
    size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = _kaiming_fan_out

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, height, width, C) to (B, height', width', channels)."""
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", self.kernel_init, shape, wide_dtype(self.dtype))
        y = convolve(
            x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding
        )
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, shape[-1:], wide_dtype(self.dtype))
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


def _norm(train: bool, dtype, name: str) -> Callable[[Array], Array]:
    """Return batch normalisation, at least in float32, with PyTorch's constants."""
    wide = wide_dtype(dtype)
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=MOMENTUM,
        epsilon=1e-5,
        dtype=wide,
        param_dtype=wide,
        name=name,
    )
    return lambda x: norm(x.astype(wide)).astype(dtype)


def _conv_relu(
    x: Array, channels: int, norm: str, use_bias: bool, train: bool, dtype, suffix: str
) -> Array:
    """Convolve 3x3, normalise unless `norm` is "none", and apply ReLU."""
    plain = norm == "none"
    init = _kaiming_fan_in if plain else _kaiming_fan_out
    conv = Conv(channels, 3, 1, 1, use_bias, dtype, init, name=f"conv{suffix}")
    x = conv(x) if plain else _norm(train, dtype, f"bn{suffix}")(conv(x))
    return nn.relu(x)


def _dense(units: int, dtype, name: str, use_bias: bool = True, init=_torch_linear):
    """Return a fully connected layer with parameters at least in float32."""
    return nn.Dense(
        units,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=wide_dtype(dtype),
        kernel_init=init,
        precision="highest" if dtype == jnp.float32 else None,
        name=name,
    )


def _classify(features: Array, num_classes: int, use_bias: bool, dtype, init=_torch_linear):
    """Apply the last layer; return `(logits, features)`, at least in float32."""
    wide = wide_dtype(dtype)
    features = features.astype(wide)
    last = _dense(num_classes, wide, "classifier", use_bias, init)
    return last(features), features


def _mean_over_positions(x: Array) -> Array:
    """Average (B, height, width, C) to (B, C), at least in float32."""
    return jnp.mean(x.astype(wide_dtype(x.dtype)), axis=(1, 2))


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class BasicBlock(nn.Module):
    """Apply two 3x3 convolutions and a shortcut; He et al. (2016), Figure 5 left."""

    channels: int
    stride: int
    dtype: Any

    expansion = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map (B, height, width, C) to (B, height', width', channels)."""
        y = Conv(self.channels, 3, self.stride, 1, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(_norm(train, self.dtype, "bn1")(y))
        y = Conv(self.channels, 3, 1, 1, dtype=self.dtype, name="conv2")(y)
        y = _norm(train, self.dtype, "bn2")(y)
        return nn.relu(y + _shortcut(x, y.shape[-1], self.stride, train, self.dtype))


class Bottleneck(nn.Module):
    """Apply 1x1, strided 3x3 and 1x1 convolutions and a shortcut, as in torchvision."""

    channels: int
    stride: int
    dtype: Any

    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map (B, height, width, C) to (B, height', width', 4 channels)."""
        y = Conv(self.channels, 1, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(_norm(train, self.dtype, "bn1")(y))
        y = Conv(self.channels, 3, self.stride, 1, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(_norm(train, self.dtype, "bn2")(y))
        y = Conv(self.channels * self.expansion, 1, dtype=self.dtype, name="conv3")(y)
        y = _norm(train, self.dtype, "bn3")(y)
        return nn.relu(y + _shortcut(x, y.shape[-1], self.stride, train, self.dtype))


def _shortcut(x: Array, channels: int, stride: int, train: bool, dtype) -> Array:
    """Return the input of a block, projected if its shape changes."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = Conv(channels, 1, stride, dtype=dtype, name="shortcut")(x)
    return _norm(train, dtype, "shortcut_bn")(x)


class ResNet(nn.Module):
    """Residual network of He, Zhang, Ren and Sun (CVPR 2016)."""

    num_classes: int
    block: type[BasicBlock] | type[Bottleneck]
    depths: Sequence[int]
    stem: str = "cifar"  # 3x3; "imagenet" is 7x7 with stride 2, then a 3x3 maximum
    width: float = 1.0  # multiplies all channels
    use_bias: bool = True  # of the classifier
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """Map images (B, height, width, C) to `(logits (B, K), features (B, d))`."""
        check_choice("stem", self.stem, STEMS)
        channels = _scaled(64, self.width)
        if self.stem == "imagenet":
            x = Conv(channels, 7, 2, 3, dtype=self.dtype, name="conv1")(x)
        else:
            x = Conv(channels, 3, 1, 1, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(_norm(train, self.dtype, "bn1")(x))
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                channels = _scaled(64 * 2**i, self.width)
                name = f"layer{i + 1}_{j}"
                x = self.block(channels, stride, self.dtype, name=name)(x, train)
        features = _mean_over_positions(x)
        return _classify(features, self.num_classes, self.use_bias, self.dtype)


class VGG(nn.Module):
    """VGG of Simonyan and Zisserman (ICLR 2015), with batch normalisation, no dropout."""

    num_classes: int
    depths: Sequence[int]
    head: str = "linear"  # on the mean over positions; "mlp" adds two layers of 4096
    norm: str = "batch"  # "none" makes it homogeneous
    width: float = 1.0  # multiplies all channels and units
    use_bias: bool = True  # of the classifier; False with norm="none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """Map images (B, height, width, C) to `(logits (B, K), features (B, d))`.

        Raises:
          ValueError: the images are smaller than 32x32, or an option does not fit.
        """
        check_choice("head", self.head, HEADS)
        _check_norm(self.norm, self.use_bias)
        if min(x.shape[1:3]) < VGG_LEAST_SIZE:
            raise ValueError(
                f"VGG needs images of {VGG_LEAST_SIZE}x{VGG_LEAST_SIZE} or larger, got "
                f"{x.shape[1]}x{x.shape[2]}: pad them"
            )
        plain = self.norm == "none"
        for i, (depth, channels) in enumerate(zip(self.depths, _VGG_CHANNELS, strict=True)):
            for j in range(depth):
                x = _conv_relu(
                    x,
                    _scaled(channels, self.width),
                    self.norm,
                    use_bias=not plain or i == j == 0,
                    train=train,
                    dtype=self.dtype,
                    suffix=f"{i + 1}_{j + 1}",
                )
            x = max_pool(x, 2, 2)
        if self.head == "linear":
            init = _kaiming_fan_in if plain else _torch_linear
            x = _mean_over_positions(x)
            return _classify(x, self.num_classes, self.use_bias, self.dtype, init)
        init = _kaiming_fan_in if plain else _normal_hundredth
        x = adaptive_mean(x, _VGG_GRID).reshape(x.shape[0], -1)
        for i in (1, 2):
            units = _scaled(_VGG_UNITS, self.width)
            x = nn.relu(_dense(units, self.dtype, f"fc{i}", not plain, init)(x))
        return _classify(x, self.num_classes, self.use_bias, self.dtype, init)


class MLP(nn.Module):
    """Fully connected ReLU network on the pixels."""

    num_classes: int
    hidden: Sequence[int] = (512, 512)
    hidden_bias: bool = True  # of the hidden layers after the first
    width: float = 1.0  # multiplies the units
    use_bias: bool = True  # of the classifier
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """Map images (B, height, width, C) to `(logits (B, K), features (B, d))`."""
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, units in enumerate(self.hidden):
            use_bias = self.hidden_bias or i == 0
            layer = _dense(_scaled(units, self.width), self.dtype, f"fc{i + 1}", use_bias)
            x = nn.relu(layer(x))
        return _classify(x, self.num_classes, self.use_bias, self.dtype)


class ConvNet(nn.Module):
    """3x3 convolutions with batch normalisation, each followed by a 2x2 maximum."""

    num_classes: int
    channels: Sequence[int] = (32, 64, 128)
    norm: str = "batch"  # "none" makes it homogeneous
    width: float = 1.0  # multiplies the channels
    use_bias: bool = True  # of the classifier; False with norm="none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """Map images (B, height, width, C) to `(logits (B, K), features (B, d))`.

        Raises:
          ValueError: an option does not fit.
        """
        _check_norm(self.norm, self.use_bias)
        plain = self.norm == "none"
        for i, channels in enumerate(self.channels):
            x = _conv_relu(
                x,
                _scaled(channels, self.width),
                self.norm,
                use_bias=plain and i == 0,
                train=train,
                dtype=self.dtype,
                suffix=f"{i + 1}",
            )
            x = max_pool(x, 2, 2)
        init = _kaiming_fan_in if plain else _torch_linear
        features = _mean_over_positions(x)
        return _classify(features, self.num_classes, self.use_bias, self.dtype, init)


def _check_norm(norm: str, use_bias: bool) -> None:
    """Raise ValueError if `norm` is unknown or does not allow the classifier's bias."""
    check_choice("norm", norm, NORMS)
    if norm == "none" and use_bias:
        raise ValueError(
            "norm='none' makes a homogeneous network, which has no bias in the classifier: "
            "pass use_bias=False"
        )


def adaptive_mean(x: Array, grid: int) -> Array:
    """Average over a `grid` x `grid` of windows, as `torch.nn.AdaptiveAvgPool2d` does.

    Args:
      x: (B, height, width, C).
      grid: windows each way; they overlap if it does not divide the image size.

    Returns:
      (B, grid, grid, C).
    """
    rows, columns = (jnp.asarray(_window_means(n, grid), x.dtype) for n in x.shape[1:3])
    return einsum("ph,bhwc,qw->bpqc", rows, x, columns)


def _window_means(size: int, grid: int) -> np.ndarray:
    """Return the matrix (grid, size) that averages over the windows of one axis."""
    matrix = np.zeros((grid, size))
    for i in range(grid):
        start, stop = i * size // grid, -(-(i + 1) * size // grid)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3)),
    "vgg11": partial(VGG, depths=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, depths=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, depths=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, depths=(2, 2, 4, 4, 4)),
    "mlp": MLP,
    "convnet": ConvNet,
}
MODELS = tuple(_MODELS)
_OPTIONS = {
    "resnet": ("stem", "depths"),
    "vgg": ("head", "norm", "depths"),
    "mlp": ("hidden", "hidden_bias"),
    "convnet": ("channels", "norm"),
}


def build(name: str, num_classes: int, **options) -> nn.Module:
    """Return a network by name, one of `MODELS`.

    Args:
      name: such as "resnet18" or "vgg13".
      num_classes: K.
      **options: fields of the network. All have `width`, `use_bias` and `dtype`; ResNet has
        `stem` and `depths`, VGG `head`, `norm` and `depths`, MLP `hidden` and
        `hidden_bias`, ConvNet `channels` and `norm`. `use_bias` is True by default, and
        False with norm="none".

    Returns:
      A Flax module. `module.init(key, images)` returns its variables: the collection
      "params" and, with batch normalisation, "batch_stats".

    Raises:
      ValueError: the name or an option is unknown, or an option is out of range.

    >>> from ncjax.networks import models
    >>> models.count_parameters(models.build("resnet18", 10), (32, 32, 3))
    11173962
    """
    check_choice("model", name, MODELS)
    check_integer("num_classes", num_classes, least=2)
    network = _MODELS[name]
    known = {"width", "use_bias", "dtype", *_OPTIONS[name.rstrip("0123456789")]}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    check_positive("width", options.get("width", 1.0))
    for option, choices in (("stem", STEMS), ("head", HEADS)):
        check_choice(option, options.get(option, choices[0]), choices)
    if "norm" in options:
        options.setdefault("use_bias", options["norm"] != "none")
        _check_norm(options["norm"], options["use_bias"])
    return network(num_classes=num_classes, **options)


def weight_layers(model: nn.Module) -> tuple[str, ...]:
    r"""Return the names of a homogeneous network's p weight layers, from the first one on.

    They are the keys of its parameters. Logits are homogeneous of degree 1 in the
    parameters of each layer, hence $f(c \theta) = c^p f(\theta)$ for c > 0.

    Raises:
      ValueError: the network is not homogeneous, or not one of this module.
    """
    match model:
        case VGG(norm="none", use_bias=False, head=head, depths=depths):
            blocks = enumerate(depths, 1)
            names = [f"conv{i}_{j}" for i, depth in blocks for j in range(1, depth + 1)]
            names += ["fc1", "fc2"] if head == "mlp" else []
        case ConvNet(norm="none", use_bias=False, channels=channels):
            names = [f"conv{i + 1}" for i in range(len(channels))]
        case MLP(hidden=hidden, hidden_bias=hidden_bias, use_bias=False) if (
            len(hidden) < 2 or not hidden_bias
        ):
            names = [f"fc{i + 1}" for i in range(len(hidden))]
        case _:
            raise ValueError(
                f"{type(model).__name__} is not homogeneous: build a VGG or ConvNet with "
                "norm='none', or an MLP with hidden_bias=False and use_bias=False"
            )
    return (*names, "classifier")


def degree(model: nn.Module) -> int:
    r"""Return p of a homogeneous network, $f(c \theta) = c^p f(\theta)$ for c > 0.

    p is the number of weight layers: 11 for VGG13, and 13 with `head="mlp"`.

    Raises:
      ValueError: the network is not homogeneous, or not one of this module.

    >>> from ncjax.networks import models
    >>> models.degree(models.build("vgg13", 10, norm="none"))
    11
    """
    return len(weight_layers(model))


def abstract_variables(model: nn.Module, image_shape: Sequence[int]):
    """Return shapes and dtypes of the variables for images (height, width, C).

    Nothing is computed.

    Raises:
      ValueError: the images are too small for the network.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def count_parameters(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Count the trained parameters for images (height, width, C)."""
    shapes = jax.tree.leaves(abstract_variables(model, image_shape)["params"])
    return sum(leaf.size for leaf in shapes)
