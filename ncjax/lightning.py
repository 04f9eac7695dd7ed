"""Log collapse metrics from Lightning; needs the extra `lightning`."""

from collections.abc import Callable
from typing import Any

from ncjax.checks import check_installed

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    check_installed("lightning", "lightning", "torch")
    raise

from ncjax.history import History
from ncjax.torch import watch


class CollapseCallback(Callback):
    """Log the collapse metrics of every validation epoch, as `collapse/cdnv` and so on.

    Each validation loader is measured on its own; the names of several loaders begin with
    `collapse_0/`, `collapse_1/` and so on. So to measure the training set, pass it as a
    second validation loader. Each batch is read once; therefore NC4 and the accuracy are
    not logged.

    Args:
      layer: name of the last layer, as in `ncjax.torch.watch`.
      num_classes: K, as in `ncjax.torch.watch`.
      labels: function from a batch to its labels. None takes `batch["labels"]`,
        `batch["label"]` or `batch[1]`.
      min_count: classes measured, as in `CollapseMeter`; by default all that occur.
      options: further options of `ncjax.torch.watch`.

    Attributes:
      histories: `ncjax.history.History` of each validation loader, by its number.
    """

    def __init__(
        self,
        layer: str | None = None,
        num_classes: int | None = None,
        *,
        labels: Callable[[Any], Any] | None = None,
        min_count: int | None = 1,
        **options,
    ):
        self.histories: dict[int, History] = {}
        self._labels = labels or _labels_of
        self._num_classes = num_classes
        self._options = {"layer": layer, "min_count": min_count, **options}
        self._watch: Any = None  # a Watch, from the first validation to the teardown
        self._loader = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the network; once only, because a compiled one keeps its hooks."""
        if self._watch is None:
            self._watch = watch(pl_module, self._num_classes, **self._options)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule):
        """Forget the samples of before."""
        self._loader = 0
        self._watch.reset()

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        """End the loader before, at the first batch of another one."""
        if dataloader_idx != self._loader and not trainer.sanity_checking:
            self._end_loader()
        self._loader = dataloader_idx

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        """Add a batch."""
        if not trainer.sanity_checking:
            self._watch.update(self._labels(batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of every loader that are not NaN."""
        if trainer.sanity_checking:
            return
        self._end_loader()
        for loader, history in self.histories.items():
            prefix = f"collapse_{loader}" if len(self.histories) > 1 else "collapse"
            values = {name: v for name, v in history[-1].items() if name != "epoch"}
            pl_module.log_dict(
                {f"{prefix}/{name}": v for name, v in values.items() if v == v}
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook from the network."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _end_loader(self) -> None:
        self._watch.gather()
        history = self.histories.setdefault(self._loader, History())
        history.append(self._watch.compute())
        self._watch.reset()


def _labels_of(batch):
    """Return the labels of a batch of the usual form.

    Raises:
      ValueError: the batch has another form.
    """
    if hasattr(batch, "keys"):
        names = [name for name in ("labels", "label") if name in batch]
        if names:
            return batch[names[0]]
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[1]
    raise ValueError(
        f"a batch must hold its labels as batch['labels'] or batch[1], got a "
        f"{type(batch).__name__}: pass labels=lambda batch: ..."
    )
