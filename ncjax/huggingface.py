"""Log collapse metrics from the Trainer of Hugging Face; needs the extra `huggingface`."""

from collections.abc import Iterable
from typing import Any

from ncjax.checks import check_installed

try:
    import torch
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError:
    check_installed("huggingface", "torch", "transformers", "accelerate")
    raise

from ncjax.history import History
from ncjax.torch import Watch, watch


class CollapseCallback(TrainerCallback):
    """Log the collapse metrics at every evaluation, as `collapse_cdnv` and so on.

    Add it by `trainer.add_callback(CollapseCallback(trainer, loader))`. At the end of each
    evaluation the network reads the loader in evaluation mode, and `trainer.log` gets the
    metrics. The process of rank 0 does so alone, with all samples of the loader.

    Args:
      trainer: the `transformers.Trainer`.
      dataloader: batches, dicts of tensors, the same at each reading.
      layer: name of the last layer, as in `ncjax.torch.watch`. None takes the output
        embedding of a language model, or the last linear layer.
      num_classes: K, as in `ncjax.torch.watch`.
      label_name: name of the labels in a batch.
      shift: True for a language model that predicts the next token.
      second_pass: whether to read the loader twice, for NC4 and the accuracy too.
      min_count: classes measured, as in `CollapseMeter`; by default all that occur.
      options: further options of `ncjax.torch.watch`.

    Attributes:
      history: `ncjax.history.History` of the evaluations.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataloader: Iterable,
        layer: str | None = None,
        num_classes: int | None = None,
        *,
        label_name: str = "labels",
        shift: bool = False,
        second_pass: bool = False,
        min_count: int | None = 1,
        **options,
    ):
        self.history = History()
        self._trainer, self._loader, self._label_name = trainer, dataloader, label_name
        self._second_pass, self._num_classes = second_pass, num_classes
        self._options = {"layer": layer, "shift": shift, "min_count": min_count, **options}
        if trainer.model is not None:  # raise now, not after an epoch
            self._watch().close()

    def _watch(self) -> Watch:
        model: Any = self._trainer.model  # `train` makes it anew if it has a `model_init`
        return watch(model, self._num_classes, **self._options)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Measure the network and log the metrics that are not NaN."""
        if state.is_world_process_zero:
            values = self.measure().as_dict().items()
            self._trainer.log({f"collapse_{name}": v for name, v in values if v == v})

    def measure(self):
        """Return the `CollapseReport` of the network now, and append it to the history."""
        model: Any = self._trainer.model
        was_training = model.training
        model.eval()
        try:
            with self._watch() as watched:
                self._read(model, watched)
                if self._second_pass:
                    with watched.second_pass():
                        self._read(model, watched)
        finally:
            model.train(was_training)
        report = watched.compute()
        self.history.append(report)
        return report

    def _read(self, model, watched: Watch) -> None:
        device = self._trainer.args.device
        for batch in self._loader:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            with (
                torch.no_grad(),
                self._trainer.compute_loss_context_manager(),
                watched.labels(inputs[self._label_name]),
            ):
                model(**inputs)
