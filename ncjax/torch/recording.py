"""Record the features of chosen layers of a PyTorch model, for `ncjax.layerwise`.

Only hooks are used: the model stays as it is.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ncjax.arrays import read_array
from ncjax.checks import check_choice
from ncjax.metrics.layers import POOLINGS, pool

SIDES = ("output", "input")


class RecordedLayers:
    """Features that hooks have recorded, batch by batch, as NumPy arrays on the host."""

    def __init__(self, names: Sequence[str], pooling: str):
        """Begin without a batch; `names` is the order of the layers."""
        self._batches: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._pooling = pooling

    def features(self) -> dict[str, np.ndarray]:
        """Return the features (N, d) of all batches so far, by the name of the layer.

        Raises:
          ValueError: a layer has recorded nothing, or another number of samples than the
            first layer because the model called it more than once, or not every time.
        """
        joined = {}
        for name, batches in self._batches.items():
            if not batches:
                raise ValueError(
                    f"layer {name!r} has recorded nothing: call the model inside the with "
                    "block, on a path that runs this module"
                )
            joined[name] = np.concatenate(batches)
        sizes = {name: len(rows) for name, rows in joined.items()}
        first = next(iter(sizes))
        for name, size in sizes.items():
            if size != sizes[first]:
                raise ValueError(
                    f"layer {name!r} has recorded {size} samples, but {first!r} "
                    f"{sizes[first]}: a module that the model calls several times, such as "
                    "a shared ReLU, cannot be one layer"
                )
        return joined

    def clear(self) -> None:
        """Forget all batches, for example before the test split."""
        for batches in self._batches.values():
            batches.clear()

    def add(self, name: str, value: Any) -> None:
        """Append a batch of a layer; called by the hooks."""
        tensor = _first_tensor(value)
        if tensor is None:
            raise ValueError(
                f"layer {name!r} gave {type(value).__name__} instead of a tensor: choose a "
                "module inside it"
            )
        # A copy: the memory belongs to the model, which may write to it (in-place ReLU).
        rows = pool(read_array(f"layer {name!r}", tensor), self._pooling)
        self._batches[name].append(np.array(rows))


@contextlib.contextmanager
def record_layers(
    model: Any,
    layers: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    side: str = "output",
    pooling: str = "flatten",
) -> Iterator[RecordedLayers]:
    """Record the features of chosen layers while the model runs in this context.

    Put the model in evaluation mode, and run it under `torch.no_grad()`. The hooks are
    removed at the end, also after an error.

    Args:
      model: a `torch.nn.Module`.
      layers: names as in `model.named_modules()`, or modules of the model, or both, from
        the input to the last layer; or a dict of these by the name that you want. None
        takes every module without a child, in the order of `named_modules()`.
      side: "output" for the result of a layer, "input" for its argument. The inputs of the
        last linear layer are the features of neural collapse. A tuple counts as its first
        tensor.
      pooling: as in `ncjax.layerwise`. Averages need far less memory than "flatten".

    Yields:
      `RecordedLayers`; its `features()` gives a dict for `ncjax.layerwise`.

    Raises:
      ValueError: the model has no such layer, or a name is unknown.
    """
    check_choice("side", side, SIDES)
    check_choice("pooling", pooling, POOLINGS)
    chosen = _chosen(model, layers)
    recorded = RecordedLayers(tuple(chosen), pooling)
    with contextlib.ExitStack() as stack:
        for name, module in chosen.items():
            handle = _hook(module, name, side, recorded)
            stack.callback(handle.remove)
        yield recorded


def _hook(module: Any, name: str, side: str, recorded: RecordedLayers) -> Any:
    """Register the hook of one layer, which returns None and so changes nothing."""
    if side == "output":
        return module.register_forward_hook(
            lambda _module, _inputs, output: recorded.add(name, output)
        )
    return module.register_forward_pre_hook(
        lambda _module, inputs, named: recorded.add(name, (*inputs, *named.values())),
        with_kwargs=True,
    )


def _chosen(model: Any, layers) -> dict[str, Any]:
    """Return modules by the name of the layer.

    Raises:
      ValueError: there is none, the model lacks one, or two have one name.
    """
    known = dict(model.named_modules())
    if layers is None:
        return {k: module for k, module in known.items() if not list(module.children())}
    if isinstance(layers, str) or not isinstance(layers, Sequence | Mapping):
        raise ValueError(
            f"layers must be a list of names or modules, or a dict, got {layers!r}"
        )
    names = {id(module): name for name, module in known.items()}
    chosen = {}
    for layer in layers:
        given = layers[layer] if isinstance(layers, Mapping) else layer
        module = known.get(given) if isinstance(given, str) else given
        if id(module) not in names:
            raise ValueError(
                f"the model has no layer {given!r}: model.named_modules() lists them, such "
                f"as {', '.join(list(filter(None, known))[:5])}"
            )
        name = layer if isinstance(layer, str) else names[id(module)]
        if name in chosen:
            raise ValueError(f"layers has {name!r} twice")
        chosen[name] = module
    if not chosen:
        raise ValueError("layers is empty: expected at least one name or module")
    return chosen


def _first_tensor(value: Any) -> Any:
    """Return `value`, or the first tensor in a tuple, list or dict; None without one."""
    if hasattr(value, "detach"):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        found = (_first_tensor(part) for part in value)
        return next((tensor for tensor in found if tensor is not None), None)
    return None
