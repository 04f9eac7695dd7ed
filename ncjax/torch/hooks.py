"""Feed a `CollapseMeter` with the inputs of a PyTorch layer, by a forward pre-hook."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Size, distributed, nn

from ncjax.arrays import read_array
from ncjax.history import History
from ncjax.metrics.meter import CollapseMeter
from ncjax.torch.layers import LastLayer, find_layer


def watch(
    module: nn.Module,
    num_classes: int | None = None,
    *,
    layer: str | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    min_count: int | None = None,
    dtype=None,
    within_scatter: bool | None = None,
) -> "Watch":
    """Watch the inputs of the last layer of a network.

    Args:
      module: a network, or its last layer: any module with a weight (K, d) or (K, d, 1, 1).
        Of a network the last `torch.nn.Linear` is watched, or the output embedding that a
        network of Hugging Face names. `DistributedDataParallel` and `torch.compile` may
        wrap it; watch a network before the first call of its compiled form.
      num_classes: K. None takes the number of outputs of the layer. For a layer without
        weight K must be given; then the metrics of the classifier are NaN.
      layer: name of the last layer, or of the part that holds it, where the network has
        several linear layers that may be the last.
      ignore_index: label of samples that are left out.
      shift: True for a language model that predicts the next token: the features
        (B, T, d) at position t go with the label at t + 1.
      min_count: classes measured, as in `CollapseMeter`.
      dtype: dtype of the statistics, as in `CollapseMeter`.
      within_scatter: as in `CollapseMeter`.

    Returns:
      A `Watch`, which also works as a context manager that removes its hook at the end.

    Raises:
      ValueError: the network has no such layer or several, or `num_classes` does not fit.
    """
    found = find_layer(module, layer, num_classes)
    options = {
        "ignore_index": ignore_index,
        "min_count": min_count,
        "dtype": dtype,
        "within_scatter": within_scatter,
    }
    classes = num_classes or found.num_classes
    assert classes is not None  # `find_layer` has refused such a layer
    return Watch(found, classes, shift=shift, options=options)


class Watch:
    """The meter of one layer; made by `watch`.

    Name the labels around the forward passes that have them:

        with watched.labels(labels):
            network(images)

    or after one forward pass:

        network(images)
        watched.update(labels)

    Only one batch of features is held at a time, on its device and without gradient.
    Backward passes, accumulated gradients and the order of the samples do not matter. The
    features are those of the mode that the network is in: for the metrics of the
    literature call `network.eval()` and pass the whole training set once.

    Attributes:
      history: `ncjax.history.History` of the finished epochs.
    """

    def __init__(self, layer: LastLayer, num_classes: int, *, shift: bool, options: dict):
        self.history = History()
        self._layer, self._num_classes = layer, num_classes
        self._shift, self._options = shift, options
        self._meter: CollapseMeter | None = None
        self._second: Any = None
        self._compares = False
        self._collects = False
        self._seen: list = []
        self._handle = layer.module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Kept this small for torch.compile, which traces it into the network.
        if not self._collects:
            self._seen.clear()
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._seen.append(inputs.detach())

    @contextmanager
    def labels(self, labels, mask=None) -> Iterator[None]:
        """Give these labels to every forward pass of the block, as `update` does.

        Raises:
          ValueError: the block has no forward pass, or as in `update`.
        """
        self._seen.clear()
        self._collects = True
        try:
            yield
            seen = self._seen[:]
        finally:
            self._collects = False
            self._seen.clear()
        self._take(seen, labels, mask)

    def update(self, labels, mask=None) -> None:
        """Add the last forward pass to the meter.

        Args:
          labels: integers of the shape of the features (..., d) without the last axis,
            or flat: PyTorch on any device, NumPy or JAX.
          mask: booleans of the shape of the labels; samples at False are left out.

        Raises:
          ValueError: no forward pass since the last update, or shapes do not fit.
        """
        seen = self._seen[:]
        self._seen.clear()
        self._take(seen, labels, mask)

    def _take(self, seen: list, labels, mask) -> None:
        if not seen:
            raise ValueError(
                f"layer {self._layer.name!r} must see a forward pass for these labels, got "
                "none: call the watched network first, and watch a compiled one before its "
                "first call"
            )
        for features in seen:
            self._feed(*self._rows(features, labels, mask))

    def _rows(self, features, labels, mask) -> tuple:
        """Return features (N, d), labels (N,) and mask (N,) or None of one forward pass."""
        if self._layer.has_channels_first:
            features = features.movedim(1, -1)
        arrays = [read_array("labels", labels)]
        arrays += [] if mask is None else [read_array("mask", mask)]
        for name, array in zip(("labels", "mask"), arrays, strict=False):
            _check_shape(name, array.shape, features.shape, self._shift)
        if self._shift:
            features, arrays = features[:, :-1], [array[:, 1:] for array in arrays]
        flat = [array.reshape(-1) for array in arrays]
        rows = features.reshape(-1, features.shape[-1])
        return rows, flat[0], flat[1] if mask is not None else None

    def _feed(self, features, labels, mask) -> None:
        if self._meter is None:
            dim = features.shape[1]
            self._meter = CollapseMeter(self._num_classes, dim, **self._options)
        if self._compares:
            self._second.update(features, labels, mask)
            return
        self._second = None
        self._meter.update(features, labels, mask)

    @property
    def meter(self) -> CollapseMeter:
        """The `CollapseMeter` of the samples since the last reset.

        Raises:
          ValueError: there was no sample.
        """
        if self._meter is None:
            raise ValueError(
                "a watch must see a sample first, got none: call the network inside "
                "`with watched.labels(labels):`"
            )
        return self._meter

    @contextmanager
    def second_pass(self, centres=None) -> Iterator[None]:
        """Compare the samples of the block, the same as before, with the class means.

        After it `compute` returns NC4 and the accuracy too. The weight and bias are read at
        the start of the block.

        If the block fails, the watch has the first pass alone, as before.

        Args:
          centres: (K, d) class centres of NC4, for a test split `meter.class_means` of the
            training split. None takes the class means of the first pass.

        Raises:
          ValueError: the layer has no weight, or as in `CollapseMeter.second_pass`.
        """
        W, b = self._layer.classifier()
        if W is None:
            raise ValueError(
                f"a second pass needs the weight of layer {self._layer.name!r}, which has "
                "none: watch the last linear layer"
            )
        self._second = self.meter.second_pass(W, b, centres=centres)
        self._compares = True
        try:
            yield
        except BaseException:
            self._second = None
            raise
        finally:
            self._compares = False

    def compute(self):
        """Return the `CollapseReport` of the samples since the last reset.

        The weight and bias of the layer are read now, or were at the second pass. Without a
        second pass NC4 and the accuracy are NaN.

        Raises:
          ValueError: there was no sample, or as in `CollapseMeter.compute`.
        """
        if self._second is not None:
            return self._second.compute()
        return self.meter.compute(*self._layer.classifier())

    def gather(self) -> None:
        """Give every process of `torch.distributed` the samples of all processes.

        Each process must call it once, after its own share of the samples and before
        `compute`. A second pass after it must read the samples of all processes. Without
        `torch.distributed` it does nothing.

        Raises:
          ValueError: no process saw a sample.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        meters: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(meters, self._meter)
        self._meter = None
        for meter in filter(None, meters):
            self._meter = meter if self._meter is None else self._meter.merge(meter)
        self._second = None

    def end_epoch(self, epoch: int | None = None):
        """Append the report to `history`, reset, and return the report.

        Args:
          epoch: number of the epoch; None counts from 1.

        Raises:
          ValueError: as in `compute`.
        """
        report = self.compute()
        self.history.append(report, epoch)
        self.reset()
        return report

    def reset(self) -> None:
        """Forget all samples; `history` stays."""
        self._seen.clear()
        self._second = None
        if self._meter is not None:
            self._meter.reset()

    def close(self) -> None:
        """Remove the hook from the network; what was measured stays."""
        self._handle.remove()
        self._seen.clear()

    def __enter__(self) -> "Watch":
        """Return the watch itself."""
        return self

    def __exit__(self, *_) -> None:
        """Remove the hook."""
        self.close()

    def __repr__(self) -> str:
        """Return the name of the layer and K."""
        return f"Watch(layer={self._layer.name!r}, num_classes={self._num_classes})"


def _check_shape(name: str, given: tuple, features: Size, shift: bool) -> None:
    """Raise ValueError unless labels or a mask fit to features (..., d)."""
    expected = tuple(features[:-1])
    if shift and len(features) != 3:
        raise ValueError(
            f"shift needs features (B, T, d) of sequences, got {tuple(features)}: leave "
            "shift out"
        )
    is_flat = len(given) == 1 and not shift and given[0] == features[:-1].numel()
    if tuple(given) == expected or is_flat:
        return
    advice = "give one for each row that the last layer reads"
    if tuple(given[:-1]) == expected:
        advice = f"take {name}.argmax(-1)" if given[-1] > 1 else f"take {name}[..., 0]"
    elif len(expected) > 1 and len(given) == 1:
        advice += ", or pool before that layer"
    raise ValueError(
        f"expected {name} {expected} for features {tuple(features)}, got {tuple(given)}: "
        f"{advice}"
    )
