"""The Trainer's callback logs the metrics of the features at every evaluation."""

import numpy as np
import pytest

import ncjax

torch = pytest.importorskip("torch", reason="needs requirements-hooks.txt")
transformers = pytest.importorskip("transformers", reason="needs requirements-hooks.txt")
pytest.importorskip("accelerate", reason="needs requirements-hooks.txt")

from ncjax.huggingface import CollapseCallback  # noqa: E402

VOCABULARY, D, LENGTH, N = 7, 4, 9, 24

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("default"),  # of the packages
]


def language_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=D, n_layer=1, n_head=1
    )
    return transformers.GPT2LMHeadModel(config)


def sentences():
    """Dicts of tokens; the labels of the first two positions are ignored."""
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(0, VOCABULARY, (N, LENGTH)))
    labels = tokens.clone()
    labels[:, :2] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


class Expected(transformers.TrainerCallback):
    """Metrics of the same features by the function for arrays, at the same times."""

    def __init__(self, dataset):
        self.dataset, self.values = dataset, []

    def on_evaluate(self, args, state, control, model, **kwargs):
        tokens = torch.stack([row["input_ids"] for row in self.dataset])
        labels = torch.stack([row["labels"] for row in self.dataset])[:, 1:].reshape(-1)
        model.eval()
        with torch.no_grad():
            features = model.transformer(tokens).last_hidden_state[:, :-1].reshape(-1, D)
        kept = labels != -100
        self.values.append(
            ncjax.collapse_metrics_from_features(
                features[kept], labels[kept], model.lm_head.weight, min_count=1
            )
        )


def train(tmp_path, second_pass):
    dataset = sentences()
    trainer = transformers.Trainer(
        model=language_model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset[:4],
    )
    loader = trainer.get_eval_dataloader(dataset)
    callback = CollapseCallback(trainer, loader, shift=True, second_pass=second_pass)
    expected = Expected(dataset)
    trainer.add_callback(callback)
    trainer.add_callback(expected)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "collapse_cdnv" in row]
    return logged, expected.values, callback


@pytest.mark.parametrize("second_pass", [False, True])
def test_the_metrics_of_a_language_model_are_logged(tmp_path, second_pass):
    logged, expected, callback = train(tmp_path, second_pass)
    assert len(logged) == len(expected) == len(callback.history) == 2
    for row, metrics in zip(logged, expected, strict=True):
        assert row["collapse_samples"] == N * (LENGTH - 2)
        for name in ncjax.CollapseMetrics._fields:
            if name in ("ncc_mismatch", "accuracy") and not second_pass:
                assert f"collapse_{name}" not in row
                continue
            got = row[f"collapse_{name}"]
            np.testing.assert_allclose(
                got, getattr(metrics, name), rtol=1e-5, atol=1e-7, err_msg=name
            )


def test_an_unclear_layer_is_refused_before_training(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = transformers.Trainer(model=language_model(), args=args)
    with pytest.raises(ValueError, match="num_classes is 9 but the last layer has 7"):
        CollapseCallback(trainer, [], "lm_head", num_classes=9)


def test_the_mode_of_the_network_stays(tmp_path):
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none"
    )
    trainer = transformers.Trainer(model=language_model().train(), args=args)
    loader = torch.utils.data.DataLoader(sentences(), 8)
    CollapseCallback(trainer, loader, shift=True).measure()
    assert trainer.model.training
    assert not trainer.model.lm_head._forward_pre_hooks
