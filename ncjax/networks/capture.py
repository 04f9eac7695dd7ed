"""Capture the features of chosen layers of a Flax network, for `ncjax.layerwise`.

Flax records the output of every submodule (`capture_intermediates`). The networks of
`ncjax.networks.models` apply ReLU between modules, so `activation=nn.relu` turns the output
of a module into the input of the next layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from ncjax.networks.models import MLP, VGG, ConvNet, ResNet
from ncjax.types import Array


def capture_layers(
    model: nn.Module,
    variables: Any,
    *arguments: Any,
    layers: Sequence[str] | Mapping[str, str] | None = None,
    activation: Callable[[Array], Array] | None = None,
    **keywords: Any,
) -> tuple[Any, dict[str, Array]]:
    """Apply a network, and return its output and the features of its layers.

    Args:
      model: a module of `flax.linen`.
      variables: its variables.
      *arguments: of the network: a batch of images, first.
      layers: paths of submodules, such as "conv1" or "layer1_0/conv1", or a dict of paths
        by the name that you want. None takes every submodule, in the order in which they
        return.
      activation: applied to the output of each module, such as `nn.relu`.
      **keywords: of the network, such as `train=False`.

    Returns:
      The output, and a dict of features (B, ...) by the name of the layer. It can be
      compiled by `jax.jit`, which sorts the dict by name.

    Raises:
      ValueError: the network has no such submodule, or it returns no single array, or the
        network calls it more than once.
    """
    returned: list[str] = []

    def keep(module: nn.Module, method: str) -> bool:
        path = "/".join(module.path)
        is_layer = bool(path) and method == "__call__"
        if is_layer:
            returned.append(path)
        return is_layer

    output, state = model.apply(
        variables,
        *arguments,
        capture_intermediates=keep,
        mutable=["intermediates"],
        **keywords,
    )
    paths = dict.fromkeys(returned)
    if layers is None:
        chosen = {path: path for path in paths}
    elif isinstance(layers, Mapping):
        chosen = dict(layers)
    else:
        chosen = {path: path for path in layers}
    features = {}
    for name, path in chosen.items():
        if path not in paths:
            raise ValueError(
                f"the network has no submodule {path!r}; it has {', '.join(paths)}"
            )
        array = _only_array(path, state["intermediates"])
        features[name] = array if activation is None else activation(array)
    return output, features


def _only_array(path: str, intermediates: Any) -> Array:
    """Return the output of the submodule at `path`.

    Raises:
      ValueError: it ran more than once, or returned no single array.
    """
    node = intermediates
    for part in path.split("/"):
        node = node[part]
    calls = node["__call__"]
    if len(calls) > 1:
        raise ValueError(f"submodule {path!r} ran {len(calls)} times: it is no one layer")
    if not hasattr(calls[0], "ndim"):
        raise ValueError(
            f"submodule {path!r} returned {type(calls[0]).__name__} instead of an array: "
            "choose a submodule inside it"
        )
    return calls[0]


def network_layers(model: nn.Module) -> dict[str, str]:
    """Return the layers of a network of `ncjax.networks.models`: path by name, in order.

    Captured with `activation=nn.relu`, they are the features after each convolution or
    fully connected layer of VGG, ConvNet and MLP, and after the stem and each block of
    ResNet. The last layer before the classifier is `features`, which the network returns.

    Raises:
      ValueError: the network is not one of this library.

    >>> from ncjax.networks import capture, models
    >>> capture.network_layers(models.build("mlp", 10, hidden=(32, 16)))
    {'fc1': 'fc1', 'fc2': 'fc2'}
    """
    match model:
        case MLP(hidden=hidden):
            return {f"fc{i + 1}": f"fc{i + 1}" for i in range(len(hidden))}
        case ConvNet(channels=channels, norm=norm):
            suffixes = [f"{i + 1}" for i in range(len(channels))]
            return _convolutions(suffixes, norm)
        case VGG(depths=depths, norm=norm, head=head):
            blocks = enumerate(depths, 1)
            suffixes = [f"{i}_{j}" for i, size in blocks for j in range(1, size + 1)]
            dense = ("fc1", "fc2") if head == "mlp" else ()
            return _convolutions(suffixes, norm) | {name: name for name in dense}
        case ResNet(depths=depths):
            sizes = enumerate(depths, 1)
            names = [f"layer{i}_{j}" for i, size in sizes for j in range(size)]
            return {"stem": "bn1"} | {name: name for name in names}
    raise ValueError(
        f"{type(model).__name__} is no network of ncjax.networks.models: give `layers` "
        "to capture_layers"
    )


def _convolutions(suffixes: Sequence[str], norm: str) -> dict[str, str]:
    """Return the module before each ReLU: batch normalisation, or the convolution."""
    prefix = "bn" if norm == "batch" else "conv"
    return {f"conv{suffix}": f"{prefix}{suffix}" for suffix in suffixes}
