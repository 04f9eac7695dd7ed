"""The training experiments: folders, resuming, interruption, devices, processes, errors."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import oracles
import pytest

import ncjax
from experiments import (
    _legs,
    _record,
    _training,
    peel,
    train_resnet,
    train_small,
    train_vgg,
)
from experiments._runs import cli, files, folders
from experiments._runs.interruption import Interruption
from ncjax.metrics.peeling import LastLayer
from ncjax.networks import checkpoint, data, train

SMALL = train_small.Config(
    train_split="train[:200]",
    test_split="test[:100]",
    width=0.05,
    epochs=6,
    batch_size=40,
    measurements=3,
    checkpoint_every=2,
)

# Variations at another moment or size, half a minute each.
SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("blank_figures")


def small(folder, **changes):
    return dataclasses.replace(SMALL, workdir=str(folder), **changes)


def command(folder, *flags, module="train_small", **changes):
    """Return the command of `SMALL` with changes, for another process."""
    settings = folders.settings(dataclasses.replace(SMALL, **changes))
    default = train_small.Config()
    given = [f"--{k}={v}" for k, v in settings.items() if v != getattr(default, k)]
    start = (sys.executable, "-m", f"experiments.{module}", f"--workdir={folder}")
    return [*start, *given, *flags]


def state_of(folder):
    """The newest checkpoint of a run, and its epoch."""
    settings = folders.stored_config(folder)
    config = train_small.Config(**settings, workdir=str(folder), resume=True)
    loop = _training._Loop(config, _training.set_up(config, {}), folder)
    checkpoints = checkpoint.Checkpoints(folder / _training.CHECKPOINTS, read_only=True)
    with contextlib.closing(checkpoints):
        return loop.restore(checkpoints)


read_json = files.read_json


def measured(folder):
    return sorted({row["epoch"] for row in _record.read_rows(folder)})


def assert_same_run(folder, other, exact=True):
    """Compare parameters, optimiser state, metrics and summary of two runs."""
    (got, got_epoch), (expected, epoch) = state_of(folder), state_of(other)
    assert got_epoch == epoch
    if exact:
        chex.assert_trees_all_equal(got, expected)
    else:
        chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-5)
    if exact:
        files = (folder / "metrics.csv", other / "metrics.csv")
        assert files[0].read_bytes() == files[1].read_bytes()
        summaries = [
            json.loads((run / "summary.json").read_text())["metrics"]
            for run in (folder, other)
        ]
        assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "run"
    return train_small.run(small(folder))


@pytest.fixture
def interrupted(monkeypatch):
    """Run a config that is interrupted by SIGINT in an epoch."""
    finite = _training._Loop._check_finite

    def run(config, epoch):
        def interrupt(self, log, number):
            finite(self, log, number)
            if number == epoch:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(_training._Loop, "_check_finite", interrupt)
            return train_small.run(config)

    return run


def test_a_run_writes_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "summary.json", *_training.OUTPUTS}
    config = read_json(finished / "config.json")["config"]
    assert config["model"] == "mlp"
    assert "data_dir" not in config
    summary = read_json(finished / "summary.json")
    assert summary["training_images"] == 200
    assert summary["parameters"] == 64 * 26 + 26 + 26 * 26 + 26 + 26 * 10 + 10
    assert list((finished / "tensorboard").glob("events.*"))


def test_metrics_have_a_row_for_each_epoch_and_split(finished):
    rows = _record.read_rows(finished)
    keys = [(row["epoch"], row["split"], row["seed"]) for row in rows]
    assert keys == [(e, s, 0) for e in (1, 2, 6) for s in ("train", "test")]
    fields = {*ncjax.CollapseMetrics._fields, *LastLayer._fields}
    assert set(rows[0]) == {"epoch", "split", "seed", *fields}


def test_metrics_are_the_oracle_on_the_stored_network(finished):
    trained = _training.load_trained(finished)
    assert trained.epoch == 6
    digits = data.load("digits", "train[:200]")
    np.testing.assert_array_equal(trained.labels, digits.labels)
    # Compute the features in NumPy from the parameters.
    leaves = state_of(finished)[0].params
    mean, deviation = data.channel_statistics(digits.images)
    hidden = ((digits.images / 255 - mean) / deviation).reshape(200, -1)
    for layer in ("fc1", "fc2"):
        kernel, bias = (np.asarray(leaves[layer][k], float) for k in ("kernel", "bias"))
        hidden = np.maximum(hidden @ kernel + bias, 0)
    np.testing.assert_allclose(trained.features, hidden, rtol=1e-4, atol=1e-5)
    exact = oracles.Data(
        hidden, digits.labels, np.asarray(trained.weight, float), np.asarray(trained.bias)
    )
    last = _record.read_rows(finished)[-2]
    for field, formula in oracles.FIELDS.items():
        expected = oracles.FORMULAS[formula](exact)
        assert last[field] == pytest.approx(expected, rel=1e-3), field
    assert last["loss"] == pytest.approx(oracles.cross_entropy(exact), rel=1e-4)


def test_a_folder_that_holds_a_run_is_replaced_only_with_overwrite(finished, tmp_path):
    folder = train_small.run(small(tmp_path / "run", epochs=2))
    with pytest.raises(ValueError, match="holds a run already"):
        train_small.run(small(folder))
    train_small.run(small(folder, overwrite=True))
    assert_same_run(folder, finished)


@pytest.mark.parametrize("epoch", [1, *(pytest.param(e, marks=SLOW) for e in (3, 6))])
def test_an_interrupted_run_saves_and_resumes_bit_for_bit(
    finished, interrupted, tmp_path, epoch, capsys
):
    folder, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    if epoch < 6:
        with pytest.raises(KeyboardInterrupt):
            interrupted(small(folder), epoch)
        assert "interrupted; resume with: python -m" in capsys.readouterr().err
    else:
        interrupted(small(folder), epoch)
    assert signal.getsignal(signal.SIGINT) is handler
    train_small.run(small(folder, resume=True))
    assert_same_run(folder, finished)


# Two seeds on the clock of the loss; some of their epochs are refused.
ON_LOSS = {
    "clock": "loss",
    "momentum": 0.0,
    "learning_rate": 3.0,
    "seeds": 2,
    "test_split": "",
    "epochs": 5,
}


@pytest.fixture(scope="module")
def on_loss_clock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss_clock") / "run"
    return train_small.run(small(folder, **ON_LOSS))


def test_the_clock_of_the_loss_adds_log_t_to_the_metrics(on_loss_clock, finished):
    rows = _record.read_rows(on_loss_clock)
    assert list(rows[0])[:4] == ["epoch", "split", "seed", "log_t"]
    assert "log_t" not in _record.read_rows(finished)[0]
    state, epoch = state_of(on_loss_clock)
    clock = state.opt_state
    assert epoch == 5
    assert (clock.refused > 0).any()
    assert (clock.refused < 5).all()
    for seed, row in enumerate(rows[-2:]):
        assert row["log_t"] == pytest.approx(float(clock.log_time[seed]), rel=1e-8)
        # The frame is the log of the mean over 200 images.
        total = float(clock.frame[seed]) + np.log(200)
        assert row["log_loss"] == pytest.approx(total, rel=1e-5)
    summary = read_json(on_loss_clock / "summary.json")
    assert summary["metrics"]["log_t"]["fell"] == ""
    assert _training.load_trained(on_loss_clock, seed=1).features.shape == (200, 26)


def test_a_run_on_the_clock_of_the_loss_resumes_bit_for_bit(
    on_loss_clock, interrupted, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        interrupted(small(folder, **ON_LOSS), 3)
    train_small.run(small(folder, resume=True, **ON_LOSS))
    assert_same_run(folder, on_loss_clock)


def test_a_run_of_a_version_without_the_flag_resumes(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    stored = read_json(folder / "config.json")
    del stored["config"]["clock"]
    files.write_sealed(folder / "config.json", stored)
    (folder / "summary.json").unlink()
    train_small.run(small(folder, resume=True))
    assert_same_run(folder, finished)
    with pytest.raises(ValueError, match=r"other settings: resume it with --clock=epoch "):
        train_small.run(small(folder, resume=True, clock="loss", momentum=0.0))


def test_a_second_interrupt_stops_within_the_epoch():
    class Busy:
        """The result of an endless epoch, which sends a signal whenever it is polled."""

        def is_ready(self):
            os.kill(os.getpid(), signal.SIGINT)
            return False

    with Interruption("epoch") as interruption:
        with pytest.raises(KeyboardInterrupt):
            _training._to_host(Busy())
        assert interruption.requested


def test_the_resume_command_repeats_all_settings(tmp_path):
    data_dir = str(tmp_path / "my data")
    config = small(tmp_path / "run", data_dir=data_dir, cpu_devices=2)
    line = folders.resume_command(config, tmp_path / "run")
    assert f"'--data_dir={data_dir}'" in line
    assert "--cpu_devices=2" in line
    assert "'--train_split=train[:200]'" in line
    flags = ["", *(flag for flag in shlex.split(line) if flag.startswith("--"))]
    assert cli.parse(train_small.Config, flags) == dataclasses.replace(config, resume=True)


def test_overwrite_refuses_folders_that_hold_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").write_text("weights")
    with pytest.raises(ValueError, match="holds checkpoints but no run that --overwrite"):
        train_small.run(small(tmp_path, overwrite=True))
    assert (tmp_path / "checkpoints" / "precious").read_text() == "weights"
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'


def test_overwrite_removes_a_link_but_not_its_target(tmp_path):
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    run.mkdir()
    (scratch / "old").write_text("kept")
    (run / "config.json").write_text('{"config": {}}')
    (run / "checkpoints").symlink_to(scratch)
    train_small.run(small(run, overwrite=True, epochs=1))
    assert (scratch / "old").read_text() == "kept"
    assert not (run / "checkpoints").is_symlink()


def test_a_run_without_its_metrics_is_not_resumed(tmp_path):
    folder = train_small.run(small(tmp_path / "run", epochs=1))
    (folder / "summary.json").unlink()
    (folder / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"metrics.csv is missing or damaged"):
        train_small.run(small(folder, epochs=1, resume=True))


def test_loading_a_trained_network_leaves_its_folder_unchanged(finished):
    saving = finished / "checkpoints" / "9.orbax-checkpoint-tmp"
    saving.mkdir()
    _training.load_trained(finished)
    assert saving.exists()
    saving.rmdir()


def test_the_summary_is_empty_for_comparisons_not_made(finished):
    summary = read_json(finished / "summary.json")
    assert summary["zero_training_error_from_epoch"] is None
    assert {row["fell"] for row in summary["metrics"].values()} == {""}
    assert summary["metrics"]["cdnv"]["at_zero_error"] is None


@pytest.mark.parametrize(
    "delay", [0.05, *(pytest.param(d, marks=SLOW) for d in (0.0, 0.3))]
)
def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path, delay):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Wait until the first checkpoint is begun.
    while process.poll() is None and not list((folder / "checkpoints").glob("*")):
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    train_small.run(small(folder, resume=True))
    assert_same_run(folder, finished)


def test_a_kill_within_a_save_keeps_the_previous_checkpoint(
    finished, tmp_path, monkeypatch
):
    """As kill -9 would: the save stops between its files, nothing is cleaned up."""
    folder = tmp_path / "run"
    save = _training.checkpoint.Checkpoints.save

    class Killed(BaseException):
        pass

    def die(self, epoch, state, notes):
        if epoch < 4:
            return save(self, epoch, state, notes)
        partial = folder / "checkpoints" / f"{epoch}.orbax-checkpoint-tmp"
        partial.mkdir()
        (partial / "half").write_bytes(b"a part")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(_training.checkpoint.Checkpoints, "save", die)
        with pytest.raises(Killed):
            train_small.run(small(folder))
    train_small.run(small(folder, resume=True))
    assert_same_run(folder, finished)
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    folder = train_small.run(small(tmp_path / "run", epochs=2))
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot restore .*checkpoints/2, remove it"):
        train_small.run(small(folder, epochs=2, resume=True))


def test_a_finished_run_is_not_run_again(finished, capsys):
    assert train_small.run(small(finished, resume=True)) == finished
    assert "the run is finished" in capsys.readouterr().out


@SLOW  # tests/test_network_flow_runs.py extends a quicker run
def test_an_extended_run_is_the_longer_one_bit_for_bit(tmp_path, capsys):
    longer = train_small.run(small(tmp_path / "longer", epochs=5))
    folder = train_small.run(small(tmp_path / "run", epochs=3))
    short = read_json(folder / "config.json")
    summary = read_json(folder / "summary.json")
    before = (folder / "metrics.csv").read_text()
    train_small.run(small(folder, epochs=5, resume=True))
    assert "resumes with --epochs=5 (was 3)" in capsys.readouterr().out
    (got, done), (expected, epochs) = state_of(folder), state_of(longer)
    assert done == epochs == 5
    chex.assert_trees_all_equal(got, expected)
    # The old rows stay. Rows that both runs measured are the same.
    after = (folder / "metrics.csv").read_text()
    assert after.startswith(before)
    assert measured(folder) == [1, 2, 3, 5]
    assert set((longer / "metrics.csv").read_text().splitlines()) <= {*after.splitlines()}
    # The record of the shorter run is kept.
    stored = read_json(folder / "config.json")
    assert stored["experiment"] == short.pop("experiment")
    assert stored["config"] == short.pop("config") | {"epochs": 5}
    assert stored["earlier"] == [
        {"changed": {"epochs": 3}, "summary.json": summary} | short
    ]
    assert stored.keys() == {*short, "experiment", "config", "earlier"}
    # The end is the new one.
    assert read_json(folder / "summary.json")["metrics"] != summary["metrics"]
    train_small.run(small(folder, epochs=5, resume=True))
    assert "the run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "step"), [(files, "write_json"), (folders, "_drop_earlier_summary")]
)
def test_a_kill_within_an_extension_loses_nothing(
    finished, tmp_path, monkeypatch, module, step
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, step, die)
        with pytest.raises(Killed):
            train_small.run(small(folder, epochs=8, resume=True))
    kept = read_json(finished / "summary.json")
    assert read_json(folder / "summary.json") == kept
    train_small.run(small(folder, epochs=8, resume=True))
    assert measured(folder) == [1, 2, 6, 8]
    stored = read_json(folder / "config.json")
    assert [entry["summary.json"] for entry in stored["earlier"]] == [kept]
    assert stored["config"]["epochs"] == 8


def test_an_interrupted_run_may_be_shortened_to_its_last_epoch(
    interrupted, finished, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        interrupted(small(folder), 4)
    assert measured(folder) == [1, 2]
    for epochs in (3, 1):
        with pytest.raises(
            ValueError, match=rf"trained 4 epochs: .* at least 4, got {epochs}$"
        ):
            train_small.run(small(folder, epochs=epochs, resume=True))
    assert read_json(folder / "config.json")["config"]["epochs"] == 6
    train_small.run(small(folder, epochs=4, resume=True))
    assert measured(folder) == [1, 2, 4]
    assert state_of(folder)[1] == 4
    # The shortened run is extended again.
    train_small.run(small(folder, epochs=6, resume=True))
    assert measured(folder) == [1, 2, 4, 6]
    chex.assert_trees_all_equal(state_of(folder)[0], state_of(finished)[0])
    earlier = read_json(folder / "config.json")["earlier"]
    assert [entry["changed"] for entry in earlier] == [{"epochs": 6}, {"epochs": 4}]


def test_a_run_that_is_too_short_names_the_command_to_train_longer(tmp_path):
    message = _training._ending(small(tmp_path), tmp_path, None)
    assert message.startswith(
        "training error is not zero after 6 epochs; train on with: python"
    )
    assert "--resume" in message
    assert "--epochs=12" in message
    assert "'--train_split=train[:200]'" in message  # quoted for a shell
    stepped = _training._ending(small(tmp_path, schedule="step"), tmp_path, None)
    assert stepped == "training error is not zero after 6 epochs"


@pytest.mark.parametrize(
    ("schedule", "epochs", "factors"),
    [
        ("constant", 4, [1, 1, 1, 1]),
        ("step", 7, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]),
        ("step5", 10, [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008, 0.0016, 0.0016]),
    ],
)
def test_a_schedule_multiplies_the_learning_rate_of_each_epoch(schedule, epochs, factors):
    config = small("", schedule=schedule, epochs=epochs, learning_rate=0.5, momentum=0.0)
    optimiser, gradient = _training._optimiser(config, samples=80), np.float64(1)
    state, rates = optimiser.init(gradient), []
    for _ in range(2 * epochs):  # two steps an epoch
        update, state = optimiser.update(gradient, state)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, 0.5 * np.repeat(factors, 2), rtol=1e-6)


@pytest.mark.parametrize(("schedule", "parts"), [("step", "thirds"), ("step5", "fifths")])
def test_a_run_with_drops_is_not_extended(tmp_path, schedule, parts):
    stepped = folders.settings(small("", schedule=schedule, compute_dtype="float32"))
    (tmp_path / "config.json").write_text(json.dumps({"config": stepped}))
    message = rf"^--schedule={schedule} drops .* at {parts} of --epochs=6: .* to 9 epochs"
    with pytest.raises(ValueError, match=message) as error:
        train_small.run(small(tmp_path, schedule=schedule, epochs=9, resume=True))
    assert "\n" not in str(error.value)


def test_extending_a_run_that_cannot_be_extended_is_refused(finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match="trained 6 epochs: give --epochs of at least 6, got 5"
    ):
        train_small.run(small(finished, epochs=5, resume=True))
    with pytest.raises(ValueError, match=r"resume it with --seed=0$"):
        train_small.run(small(finished, epochs=7, seed=1, resume=True))
    assert (finished / "config.json").read_bytes() == before


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"diverged in epoch .* lower --learning_rate"):
        train_small.run(small(tmp_path / "run", learning_rate=1e12))


def test_seeds_train_together(tmp_path):
    folder = train_small.run(small(tmp_path / "run", seeds=3, test_split="", epochs=3))
    rows = _record.read_rows(folder)
    assert [row["seed"] for row in rows] == [0, 1, 2] * 3
    assert len({row["loss"] for row in rows if row["epoch"] == 3}) == 3
    networks = [_training.load_trained(folder, seed=seed) for seed in range(3)]
    for row, network in zip(rows[-3:], networks, strict=True):
        layer = ncjax.last_layer(
            network.features, network.labels, network.weight, network.bias
        )
        assert row["loss"] == pytest.approx(float(layer.loss), rel=1e-5)
    with pytest.raises(ValueError, match=r"expected a seed in \[0, 3\), got 3"):
        _training.load_trained(folder, seed=3)


def test_one_diverged_seed_does_not_stop_the_others(tmp_path, monkeypatch):
    init = train.init_state

    def broken(model, optimiser, shape, key):
        state = init(model, optimiser, shape, key)
        spoilt = jax.random.uniform(key) < 0.5
        return state._replace(
            params=jax.tree.map(
                lambda leaf: jax.numpy.where(spoilt, np.float32(np.nan), leaf),
                state.params,
            )
        )

    monkeypatch.setattr(train, "init_state", broken)
    folder = train_small.run(small(tmp_path / "run", seeds=8, test_split="", epochs=2))
    losses = [row["loss"] for row in _record.read_rows(folder) if row["epoch"] == 2]
    assert 0 < np.isfinite(losses).sum() < 8


def test_measured_epochs_are_even_in_log_log():
    assert _training.measured_epochs(5, 30) == [1, 2, 3, 4, 5]
    epochs = _training.measured_epochs(350, 30)
    assert epochs[0] == 1
    assert epochs[-1] == 350
    late = np.log(np.log([e for e in epochs if e > 20]))
    np.testing.assert_allclose(np.diff(late), np.diff(late).mean(), rtol=0.2)


def test_zero_error_counts_from_the_epoch_after_which_it_stays():
    measured = {
        "epoch": np.array([[1.0, 2, 4, 8]] * 2),
        "accuracy": np.array([[0.5, 1, 1, 1], [0.9, 1, 0.99, 1]]),
    }
    assert _record.zero_error_epoch(measured) == 8
    measured["accuracy"][0, -1] = 0.99
    assert _record.zero_error_epoch(measured) is None
    assert _record.zero_error_epoch(measured | {"accuracy": np.ones((2, 4))}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnst"}, "no data set is called 'mnst'"),
        ({"train_split": "valid"}, "cannot read split 'valid' of digits"),
        ({"test_split": "test[:3]"}, r"every class needs an image, but 'test\[:3\]'"),
        ({"model": "resnet19"}, "model must be one of resnet18, .*, got 'resnet19'"),
        ({"width": 0.0}, "width must be positive"),
        ({"batch_size": 201}, "--batch_size is 201 but .* has 200 images"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning_rate must be positive"),
        ({"momentum": 1.0}, r"--momentum must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "--weight_decay must be finite and not negative"),
        ({"schedule": "step", "epochs": 2}, "--schedule=step needs --epochs of at least 3"),
        ({"schedule": "step5", "epochs": 4}, "--schedule=step5 needs .* of at least 5"),
        ({"test_split": "train[150:]"}, r"--test_split=train\[150:\] has images of"),
        ({"schedule": "cosine"}, "--schedule must be one of constant, step, step5, got"),
        ({"clock": "time"}, "--clock must be one of epoch, loss, got 'time'"),
        (
            {"clock": "loss"},
            "--clock=loss .*: give --momentum=0, not --momentum=0.9$",
        ),
        (
            {"clock": "loss", "schedule": "step", "augment": True, "weight_decay": 5e-4},
            "give --momentum=0 --weight_decay=0 --schedule=constant --noaugment, not "
            "--momentum=0.9 --weight_decay=0.0005 --schedule=step --augment$",
        ),
        ({"compute_dtype": "int8"}, "--compute_dtype must be one of auto"),
        ({"per_class": 100}, "per_class is 100 but class"),
        ({"image_size": 4}, "image_size is 4 but the images are 8x8"),
        ({"model": "vgg11"}, "VGG needs images of 32x32 or larger, got 8x8"),
        ({"workdir": "/dev/null/run"}, "cannot write to workdir"),
        ({"num_processes": 2, "workdir": ""}, "several processes need one --workdir"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_small.run(dataclasses.replace(small(tmp_path / "run"), **changes))
    assert not (tmp_path / "run" / "metrics.csv").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_training_and_test_images_must_have_the_same_channels(tmp_path, monkeypatch):
    load = data.load

    def coloured(name, split, *rest, **options):
        dataset = load(name, split, *rest, **options)
        if split.startswith("test"):
            return dataset._replace(images=np.repeat(dataset.images, 3, axis=-1))
        return dataset

    monkeypatch.setattr(data, "load", coloured)
    with pytest.raises(ValueError, match=r"training images are \(8, 8, 1\) but test"):
        train_small.run(small(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size=7", "--cpu_devices=2"), "must be a multiple of the 2 devices"),
        (("--process_id=1",), "--process_id must lie in [0, 1)"),
        (("--coordinator=localhost:1",), "--coordinator=HOST:PORT and --num_processes go"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path, flags, message):
    done = subprocess.run(
        [*command(tmp_path / "run"), *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("devices", [8, pytest.param(2, marks=SLOW)])
def test_several_devices_agree_with_one(finished, tmp_path, devices):
    flags = (f"--cpu_devices={devices}",)
    subprocess.run([*command(tmp_path / "run"), *flags], check=True, capture_output=True)
    assert_same_run(tmp_path / "run", finished, exact=False)


def test_two_processes_agree_with_one(finished, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    processes = [
        subprocess.Popen(
            [*command(tmp_path / "run"), *flags, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert str(tmp_path / "run") in outputs[0]
    assert_same_run(tmp_path / "run", finished, exact=False)


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        pytest.param(train_resnet, {"width": 0.05}, marks=pytest.mark.slow),
        pytest.param(train_vgg, {"width": 0.05}, marks=pytest.mark.slow),
        pytest.param(
            train_small, {"model": "convnet", "width": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_network_memorises_a_hundred_real_images(tmp_path, module, settings):
    config = module.Config(
        train_split="train[:100]",
        test_split="",
        epochs=60,
        batch_size=50,
        learning_rate=0.05,
        measurements=2,
        checkpoint_every=100,
        workdir=str(tmp_path / "run"),
        **settings,
    )
    folder = module.run(config)
    last = _record.read_rows(folder)[-1]
    assert last["accuracy"] == 1
    assert last["least_margin"] > 0


@pytest.mark.slow
def test_peel_describes_the_network_and_where_the_flow_takes_it(finished, tmp_path):
    config = peel.Config(
        run=str(finished),
        per_class=2,
        log_t_max=30.0,
        num_times=20,
        workdir=str(tmp_path / "peel"),
    )
    folder = peel.run(config)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "summary.json",
        *peel.OUTPUTS,
    }
    summary = read_json(folder / "summary.json")
    network, balanced, end = summary["points"].values()
    trained = _training.load_trained(finished)
    params = peel._peel(trained, 2)
    assert network["margin_ratio"] == pytest.approx(float(ncjax.margin_ratio(params)))
    assert network["verdict"] == "not separated: a sample is misclassified"
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, sphere=True)
    assert network["smallest_riemannian_eigenvalue"] == pytest.approx(
        float(eig.eigenvalues[0]), rel=1e-4
    )
    start = ncjax.balance_norms(params)
    assert balanced["margin_ratio"] == pytest.approx(float(ncjax.margin_ratio(start)))
    flow = ncjax.gradient_flow(start, [30.0]).final
    assert end["log_loss"] == pytest.approx(float(ncjax.log_cross_entropy(flow)), rel=1e-6)
    assert end["margin_ratio"] > network["margin_ratio"]
    certificate = ncjax.certificate(flow)
    assert end["sigma_max"] == pytest.approx(float(certificate.sigma_max), rel=1e-3)
    assert end["verdict"] == ncjax.VERDICTS[int(certificate.verdict)]


def test_peel_reports_a_failed_flow(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(_legs, "step_limit", lambda log_t_max: 2)
    with pytest.raises(RuntimeError, match="the flow failed in leg"):
        peel.run(
            peel.Config(run=str(finished), per_class=2, workdir=str(tmp_path / "peel"))
        )


def test_peel_names_the_run_it_needs(tmp_path):
    with pytest.raises(ValueError, match="--run=DIR is needed"):
        peel.run(peel.Config())
    with pytest.raises(ValueError, match="holds no run"):
        peel.run(peel.Config(run=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"config": {"seed": 0}}')
    with pytest.raises(ValueError, match="holds no training run"):
        peel.run(peel.Config(run=str(tmp_path)))
    with pytest.raises(ValueError, match="--workdir must differ from --run"):
        peel.run(peel.Config(run=str(tmp_path), workdir=f"{tmp_path}/."))
    config = json.dumps({"config": folders.settings(SMALL)})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        peel.run(peel.Config(run=str(tmp_path)))
