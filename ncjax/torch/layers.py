"""Find the last layer of a PyTorch network, and read its weight and bias."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Layers that an error message lists.
_MOST_LISTED = 8


class LastLayer(NamedTuple):
    """A layer whose inputs are the features."""

    name: str  # its name in the network, "" if it is the network
    module: nn.Module

    @property
    def num_classes(self) -> int | None:
        """K, the number of outputs; None for a layer without weight."""
        weight = getattr(self.module, "weight", None)
        if weight is None or is_lazy(weight):
            return getattr(self.module, "out_features", None)
        return weight.shape[0] if _is_matrix(weight) else None

    @property
    def has_channels_first(self) -> bool:
        """Whether the features are (B, d, ...) and not (..., d)."""
        return getattr(self.module, "kernel_size", None) is not None

    def classifier(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the weight (K, d) and bias (K,) without gradient; None where missing."""
        if self.num_classes is None:
            return None, None
        layer: Any = self.module
        weight, bias = layer.weight, getattr(layer, "bias", None)
        return weight.detach().flatten(1), None if bias is None else bias.detach()


def find_layer(
    network: nn.Module, layer: str | None = None, num_classes: int | None = None
) -> LastLayer:
    """Return the last layer of a network.

    A module with a weight (K, d) is the layer itself, and so is a module without
    submodules if `num_classes` is given. Inside any other module it is the output embedding
    that a network of Hugging Face names, or the last `torch.nn.Linear`.

    Args:
      network: a module, also wrapped by DistributedDataParallel or `torch.compile`.
      layer: name of the module to search, as in `network.named_modules()`; the end of the
        name is enough if it is unique.
      num_classes: K; only a layer with K outputs is taken.

    Raises:
      ValueError: there is no such layer, or more than one may be the last.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"network must be a torch.nn.Module, got {type(network).__name__}: pass the "
            "network or its last layer"
        )
    name, module = ("", network) if layer is None else _named(network, layer)
    found = LastLayer(name, module)
    if found.num_classes is not None:
        return _with_outputs(found, num_classes)
    is_leaf = not any(True for _ in module.children())
    if is_leaf and num_classes is not None:
        return found
    inner = _output_embedding(module, num_classes) or _last_linear(module, num_classes)
    return inner._replace(name=".".join(filter(None, (name, inner.name))))


def _with_outputs(layer: LastLayer, num_classes: int | None) -> LastLayer:
    if num_classes not in (None, layer.num_classes):
        raise ValueError(
            f"num_classes is {num_classes} but the last layer has {layer.num_classes} "
            "outputs: leave num_classes out"
        )
    return layer


def _is_matrix(weight: Tensor) -> bool:
    """Whether the weight is (K, d), or of a 1x1 convolution."""
    return weight.ndim >= 2 and weight.shape[2:].numel() == 1


def _named(network: nn.Module, layer: str) -> tuple[str, nn.Module]:
    """Return the module with this name, or with the only name that ends so."""
    modules = dict(network.named_modules())
    if layer in modules:
        return layer, modules[layer]
    names = [name for name in modules if name.endswith(f".{layer}")]
    if len(names) == 1:
        return names[0], modules[names[0]]
    linears = [name for name, _ in _linears(network)]
    raise ValueError(
        f"layer must name one module of the network, got {layer!r}, which names "
        f"{_listed(names)}: choose one of the linear layers {_listed(linears)}"
    )


def _linears(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    modules = network.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, nn.Linear)]


def _output_embedding(network: nn.Module, num_classes: int | None) -> LastLayer | None:
    """Return the layer that a network of Hugging Face, or one inside, names as its last."""
    for module in network.modules():
        getter = getattr(module, "get_output_embeddings", None)
        embedding = getter() if callable(getter) else None
        for name, candidate in network.named_modules():
            layer = LastLayer(name, candidate)
            if candidate is embedding and num_classes in (None, layer.num_classes):
                return layer
    return None


def _last_linear(network: nn.Module, num_classes: int | None) -> LastLayer:
    """Return the Linear that was registered last, if no other may be the last as well."""
    linears = _linears(network)
    fitting = [
        (name, linear)
        for name, linear in linears
        if num_classes in (None, linear.out_features)
    ]
    if not fitting:
        outputs = "" if num_classes is None else f" with {num_classes} outputs"
        raise ValueError(
            f"network must have a torch.nn.Linear{outputs}, got {type(network).__name__} "
            f"with {_listed(map(_described, linears))}: pass the last layer itself"
        )
    *others, (name, last) = fitting
    rivals = [
        (rival, linear)
        for rival, linear in others
        if linear.out_features == last.out_features
        or (linear is others[-1][1] and _is_beside(linear, last))
    ]
    if rivals:
        raise ValueError(
            "the last layer must be unique, got "
            f"{_listed(map(_described, [*rivals, (name, last)]))}: name it, for example "
            f"layer={name!r}"
        )
    return LastLayer(name, last)


def _is_beside(other: nn.Linear, last: nn.Linear) -> bool:
    """Whether both read as many inputs and `other` cannot feed `last`: two heads."""
    return other.in_features == last.in_features != other.out_features


def _described(entry: tuple[str, nn.Linear]) -> str:
    name, linear = entry
    return f"{name} ({linear.in_features} to {linear.out_features})"


def _listed(names) -> str:
    """Return names joined by commas, the last ones if they are many."""
    names = list(names)
    hidden = len(names) - _MOST_LISTED
    first = [f"{hidden} more"] if hidden > 0 else []
    return ", ".join([*first, *names[-_MOST_LISTED:]]) or "none"
