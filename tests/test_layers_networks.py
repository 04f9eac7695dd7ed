"""Features of the layers of Flax networks, and the experiment on a run."""

import contextlib
import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from experiments import (
    _layers_network,
    _training,
    layers,
    network_flow,
    train_small,
)
from experiments._flow_loop import CHECKPOINTS, Loop
from experiments._runs import files, folders
from ncjax import plotting
from ncjax.metrics.layers import LayerMetrics
from ncjax.networks import checkpoint, models
from ncjax.networks.capture import capture_layers, network_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")


# Flax


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"hidden": (5, 4)}),
        ("convnet", {}),
        ("convnet", {"norm": "none"}),
        ("resnet18", {"depths": (1, 2)}),
        ("vgg11", {"depths": (1, 2, 0, 0, 1), "head": "mlp"}),
        ("vgg11", {"depths": (1, 2, 0, 0, 1), "norm": "none"}),
    ],
)
def test_the_layers_of_every_network_exist_in_the_order_of_their_computation(name, options):
    model = models.build(name, 10, width=0.02, **options)
    images = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    variables = models.abstract_variables(model, (32, 32, 1))
    order = []

    def apply(variables, images):
        (_, features), found = capture_layers(model, variables, images)
        order[:] = found
        return features, found

    features, found = jax.eval_shape(apply, variables, images)
    paths = list(network_layers(model).values())
    assert [path for path in order if path in paths] == paths
    assert found[paths[-1]].shape[-1] == features.shape[-1]


def test_a_layer_is_what_the_next_one_is_given():
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    model = models.build("mlp", 3, hidden=(5, 4))

    @jax.jit
    def both(images):
        variables = model.init(jax.random.key(0), images)
        chosen = network_layers(model)
        output, found = capture_layers(
            model, variables, images, layers=chosen, activation=nn.relu
        )
        return variables["params"], output, found

    params, (logits, features), found = jax.device_get(both(images))
    rows = images.reshape(3, -1)
    for name in ("fc1", "fc2"):
        rows = np.maximum(rows @ params[name]["kernel"] + params[name]["bias"], 0)
        np.testing.assert_allclose(found[name], rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["fc2"], features)
    assert logits.shape == (3, 3)


class Nested(nn.Module):
    """A network with a submodule inside another, one that runs twice, and a pair."""

    @nn.compact
    def __call__(self, x):
        x = models.MLP(4, hidden=(3,), dtype=jnp.float64, name="inner")(x)[0]
        shared = nn.Dense(4, name="shared", param_dtype=jnp.float64)
        return shared(shared(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["outer"], "no submodule 'outer'; it has inner/fc1, inner/classifier, inner"),
        (["shared"], "'shared' ran 2 times: it is no one layer"),
        (["inner"], "'inner' returned tuple instead of an array"),
    ],
)
def test_a_submodule_that_is_no_layer_is_named(layers, message):
    images = jnp.ones((2, 1, 5, 1))
    model = Nested()
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def capture(variables, layers):
        return capture_layers(model, variables, images, layers=layers)[1]

    found = jax.eval_shape(lambda v: capture(v, {"deep": "inner/fc1"}), variables)
    assert found["deep"].shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: capture(v, layers), variables)


def test_an_unknown_network_has_no_list_of_layers():
    with pytest.raises(ValueError, match="Nested is no network of ncjax"):
        network_layers(Nested())


# The experiment


TRAINING = train_small.Config(
    train_split="train[:200]", test_split="test[:100]", width=0.02, seeds=2, batch_size=40
)


@pytest.fixture(scope="module")
def training_run(tmp_path_factory):
    """The folder of a training run of two networks that were never trained."""
    folder = tmp_path_factory.mktemp("layers") / "source"
    config = dataclasses.replace(TRAINING, workdir=str(folder))
    opening = folders.open_config(config, "train_small", _training.OUTPUTS)
    with (
        opening,
        contextlib.closing(
            checkpoint.Checkpoints(folder / _training.CHECKPOINTS)
        ) as checkpoints,
    ):
        loop = _training._Loop(config, _training.set_up(config, {}), folder)
        checkpoints.save(3, loop.start(), {})
    return folder


@pytest.fixture(scope="module")
def finished(training_run):
    folder = training_run.parent / "run"
    return layers.run(config(training_run, folder))


def config(source, folder, **changes):
    settings = {"run": str(source), "workdir": str(folder), "per_class": 5, "index": 1}
    return layers.Config(**settings | changes)


def read(folder):
    return files.read_rows(folder / "layers.csv", {"split": str, "layer": str})


def test_the_experiment_measures_each_layer_of_both_splits(training_run, finished):
    rows, summary = read(finished), files.read_json(finished / "summary.json")
    names = ["input", "fc1", "features"]
    assert [(row["split"], row["layer"]) for row in rows] == [
        (split, name) for split in ("train", "test") for name in names
    ]
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "summary.json"),
        *layers.OUTPUTS,
    }
    network = _layers_network.load(training_run, "", 1)
    sets = _layers_network.splits(network, 5)
    of_network = _layers_network.Layers(network)
    W = network.variables["params"]["classifier"]
    given = {"features": (W["kernel"].T, W["bias"])}
    found = {"train": None}
    for split, dataset in sets.items():
        assert len(dataset.labels) == 50
        report = ncjax.layerwise(
            of_network.features(dataset),
            dataset.labels,
            classifiers=given,
            centres=found["train"] and found["train"].class_means,
        )
        found[split] = report
        for i, row in enumerate(row for row in rows if row["split"] == split):
            right = {k: float(v[i]) for k, v in report.metrics._asdict().items()}
            assert {k: row[k] for k in right} == pytest.approx(right, rel=1e-5, nan_ok=True)
        law = {k: float(v) for k, v in report.law._asdict().items()}
        assert summary["law"][split] == pytest.approx(law, rel=1e-4)
        assert summary["tunnel"][split]["start"] == int(report.tunnel.start)
    logits, _ = network.setup.model.apply(
        network.variables,
        (sets["test"].images / np.float32(255) - network.setup.mean)
        / network.setup.deviation,
    )
    accuracy = np.mean(np.asarray(logits).argmax(axis=1) == sets["test"].labels)
    assert rows[-1]["accuracy"] == pytest.approx(accuracy)
    assert np.isnan(rows[0]["accuracy"])
    assert summary["network"] == "mlp on digits, epoch 3"
    assert summary["training"]["config"]["seeds"] == 2


def test_an_interrupted_run_resumes_to_the_same_files(
    training_run, finished, tmp_path, monkeypatch
):
    save = layers._save_rows

    def stop(folder, rows):
        save(folder, rows)
        if len(rows["test"]) == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as once:
        once.setattr(layers, "_save_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            layers.run(config(training_run, folder))
    measured = []
    measure = layers._measure_layer

    def count(*arguments):
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(layers, "_measure_layer", count)
    layers.run(config(training_run, folder, resume=True))
    assert len(measured) == 1
    assert (folder / "layers.csv").read_bytes() == (finished / "layers.csv").read_bytes()
    assert not (folder / "checkpoint.npz").exists()
    monkeypatch.setattr(_layers_network, "load", None)
    layers.run(config(training_run, folder, resume=True))  # nothing is left to do


@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        ("mlp", ["fc1"]),
        pytest.param("convnet", ["conv1", "conv2", "conv3"], marks=pytest.mark.slow),
    ],
)
def test_a_network_flow_is_read_in_evaluation_mode(tmp_path, model, hidden):
    """The convolutions have batch normalisation, whose means the flow does not store."""
    source = tmp_path / "flow"
    settings = network_flow.Config(
        model=model,
        width=0.05,
        per_class=2,
        test_split="test[:100]",
        workdir=str(source),
    )
    setup = network_flow.set_up(settings)
    loop = Loop(settings, setup, source, source / CHECKPOINTS)
    with folders.open_config(settings, "network_flow", network_flow.OUTPUTS):
        checkpoints = checkpoint.Checkpoints(source / CHECKPOINTS / "seed0")
        with contextlib.closing(checkpoints):
            params = loop._draw(0)["params"]
            checkpoints.save(1, loop._empty_state(0)._replace(params=params), {})
    network = _layers_network.load(source, "", 0)
    of_network = _layers_network.Layers(network)
    assert of_network.names == ("input", *hidden, "features")
    sets = _layers_network.splits(network, 0)
    found = of_network.features(sets["train"])["features"]
    right, _ = loop.programs.features(params)  # of training mode, in another order
    found, right = (x[np.argsort(np.sum(x, axis=1))] for x in (found, right))
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)
    assert len(sets["test"].labels) == 100
    assert network.title == f"{model} on digits, log t = 0"


BAD = (
    ({"run": ""}, "--run=DIR is needed"),
    ({"workdir": "{source}/."}, "--workdir must differ from --run"),
    ({"per_class": -1}, "--per_class must not be negative"),
    ({"pooling": "max"}, "--pooling must be one of flatten, mean, got 'max'"),
    ({"index": 2}, r"expected a seed in \[0, 2\), got 2"),
    ({"per_class": 50}, "per_class is 50 but class"),
    ({"run": "{source}/checkpoints"}, "holds no run"),
)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings_are_named(training_run, tmp_path, changes, message):
    changes = {
        k: v.format(source=training_run) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        layers.run(config(training_run, tmp_path / "run", **changes))


def test_the_figure_has_a_name_for_each_layer_and_a_line_for_each_split():
    def report(size, factor):
        columns = {name: factor * 0.5 ** np.arange(size) for name in LayerMetrics._fields}
        measured = [
            LayerMetrics(**{name: jnp.asarray(v[i]) for name, v in columns.items()})
            for i in range(size)
        ]
        return ncjax.layers.over_depth([f"layer{i}" for i in range(size)], measured)

    figure = plotting.layers_figure({"train": report(4, 1.0), "test": report(4, 2.0)})
    fuzziness = figure.axes[0]
    lines = [np.asarray(line.get_ydata(), float) for line in fuzziness.get_lines()]
    for points, line in zip(lines[::2], lines[1::2], strict=True):
        np.testing.assert_allclose(points, line)
    assert len(lines) == 4
    labels = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert labels == ["layer0", "layer1", "layer2", "layer3"]
    assert "0.50" in fuzziness.get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match="expected reports of the same layers"):
        plotting.layers_figure({"train": report(4, 1.0), "test": report(3, 1.0)})


def test_the_committed_run_holds_what_its_page_shows():
    folder = Path(__file__).parents[1] / "results" / "layers" / "vgg13_mnist"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["layers"][0] == "input"
    assert len(read(folder)) == 2 * len(summary["layers"])
    assert summary["law"]["train"]["r_squared"] > 0.9
