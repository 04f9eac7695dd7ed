"""The Lightning callback logs the metrics of the features, for every loader and epoch."""

import numpy as np
import pytest

import ncjax

torch = pytest.importorskip("torch", reason="needs requirements-hooks.txt")
lightning = pytest.importorskip("lightning", reason="needs requirements-hooks.txt")

from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from ncjax.lightning import CollapseCallback, _labels_of  # noqa: E402

K, D, N = 3, 5, 48

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("default"),  # Lightning's own
]


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, D), torch.nn.Tanh())
        self.dropout = torch.nn.Dropout(0.5)  # off in validation
        self.classifier = torch.nn.Linear(D, K)
        self.other = torch.nn.Linear(D, K)
        self.expected = []

    def forward(self, images):
        return self.classifier(self.dropout(self.body(images)))

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, _, dataloader_idx=0):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Logged(Logger):
    """Everything logged, by name, in order."""

    name, version = "logged", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)


class Expected(lightning.Callback):
    """Metrics of the same features by the function for arrays, at the same times."""

    def __init__(self, *splits):
        self.splits, self.values = splits, [[] for _ in splits]

    def on_validation_epoch_end(self, trainer, network):
        if trainer.sanity_checking:
            return
        layer = network.classifier
        for (images, labels), values in zip(self.splits, self.values, strict=True):
            values.append(
                ncjax.collapse_metrics_from_features(
                    network.body(images), labels, layer.weight, layer.bias
                )
            )


def split(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(N) % K)
    images = np.eye(K, 4)[labels] + 0.3 * rng.normal(size=(N, 4))
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)


def loader(images, labels, shuffle=False):
    data = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(data, 20, shuffle)


def fit(tmp_path, callback, *splits):
    torch.manual_seed(0)
    logger, expected = Logged(), Expected(*splits)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback, expected],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = Network()
    trainer.fit(network, loader(*splits[0], shuffle=True), [loader(*s) for s in splits])
    assert not network.classifier._forward_pre_hooks
    return logger.values, expected.values


def assert_logged(logged, expected, prefix="collapse"):
    for name in ncjax.CollapseMetrics._fields:
        if name in ("ncc_mismatch", "accuracy"):
            assert f"{prefix}/{name}" not in logged
            continue
        values = [getattr(metrics, name) for metrics in expected]
        got = logged[f"{prefix}/{name}"]
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_metrics_of_each_epoch_are_logged(tmp_path):
    callback = CollapseCallback(layer="classifier")
    logged, (expected,) = fit(tmp_path, callback, split(0))
    assert len(expected) == 2
    assert_logged(logged, expected)
    assert logged["collapse/samples"] == [N, N]
    np.testing.assert_allclose(
        callback.histories[0].columns()["cdnv"], logged["collapse/cdnv"], rtol=1e-6
    )


def test_every_validation_loader_is_measured_on_its_own(tmp_path):
    callback = CollapseCallback("classifier", labels=lambda batch: batch[1])
    logged, expected = fit(tmp_path, callback, split(0), split(1))
    for number, metrics in enumerate(expected):
        assert_logged(logged, metrics, f"collapse_{number}")


@pytest.mark.parametrize("batch", [{"labels": 1, "x": 0}, {"label": 1}, (0, 1), [0, 1, 2]])
def test_labels_are_found_in_batches_of_the_usual_forms(batch):
    assert _labels_of(batch) == 1


@pytest.mark.parametrize("batch", [{"target": 1}, torch.ones(3), [torch.ones(3)]])
def test_a_batch_without_labels_is_refused_with_advice(batch):
    with pytest.raises(ValueError, match=r"got a (dict|Tensor|list): pass labels=lambda"):
        _labels_of(batch)
