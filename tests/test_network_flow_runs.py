"""The experiment `network_flow`: rows, endings, resuming, refused settings."""

import dataclasses
import json
import os
import shlex
import signal

import jax
import numpy as np
import pytest

import ncjax
from experiments import (
    _flow_loop,
    _flow_page,
    _flow_record,
    _record,
    _training,
    network_flow,
    report,
)
from experiments._runs import cli, files, folders
from experiments._runs.errors import BadUse, RunFailed
from experiments._runs.interruption import Interruption
from ncjax.networks import flow

SMALL = network_flow.Config(
    model="mlp", width=0.05, per_class=4, log_t_max=12.0, test_split="test[:40]"
)

pytestmark = pytest.mark.usefixtures("quick_compilation", "blank_figures")


@pytest.fixture(autouse=True)
def short_description(monkeypatch):
    """Leave out the description of the last layer, which `finished` has."""
    monkeypatch.setattr(_flow_loop, "describe", lambda point: {"verdict": "not computed"})


def small(folder, **changes):
    return dataclasses.replace(SMALL, workdir=str(folder), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return network_flow.run(small(tmp_path_factory.mktemp("network_flow") / "run", seeds=2))


@pytest.fixture
def interrupted(monkeypatch):
    """Run a config that is interrupted after so many rows."""

    def run(config, number):
        write = _record.write_rows

        def write_and_interrupt(folder, rows):
            write(folder, rows)
            if len(rows) == number:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(_record, "write_rows", write_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                network_flow.run(config)

    return run


def rows_of(folder, split="train", seed=0):
    rows = _flow_record.read_rows(folder)
    return [row for row in rows if (row["split"], row["seed"]) == (split, seed)]


def assert_same_run(folder, other):
    """Compare rows, endings and what follows from them."""
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    one, two = (files.read_json(run / "summary.json") for run in (folder, other))
    for name in ("endings", "metrics", "evaluation_mode", "exponents"):
        assert one[name] == two[name]


def test_a_run_comes_to_the_end_and_measures_on_the_way(finished):
    summary = files.read_json(finished / "summary.json")
    for seed, ending in enumerate(summary["endings"]):
        rows = rows_of(finished, seed=seed)
        assert ending["result"] == _flow_loop.REACHED
        assert ending["log_t"] >= SMALL.log_t_max
        assert rows[-1]["log_t"] == pytest.approx(ending["log_t"], rel=1e-8)
        assert rows[-1]["log_loss"] == pytest.approx(ending["log_loss"], abs=1e-2)
        times = [row["log_t"] for row in rows]
        assert times == sorted(set(times))
        assert times[0] < 2
        assert len(rows) > 5
        assert len(rows_of(finished, "test", seed)) == len(rows)
    assert {name for name in network_flow.OUTPUTS if (finished / name).exists()} == {
        *network_flow.OUTPUTS
    } - {"homogeneity.png", "homogeneity.pdf"}


def test_rows_are_on_the_smooth_path_of_the_flow(finished):
    """There log t + log L is -log |∇ log L|², up to the excess."""
    for row in rows_of(finished):
        if row["log_t"] > 5:
            assert row["excess"] < 4
            assert -10 < row["log_t"] + row["log_loss"] < 3


def test_the_last_layer_is_described_with_its_certificate(finished):
    point = files.read_json(finished / "summary.json")["last_layer"]
    assert point["verdict"] in ncjax.VERDICTS
    assert 0 < point["margin_ratio"] <= 1
    assert (finished / "peel.md").read_text().startswith("| quantity | at equal norms |")


def test_evaluation_mode_agrees_without_normalisation(finished):
    summary = files.read_json(finished / "summary.json")
    last = rows_of(finished)[-1]
    for name in ("within_class_quotient", "centred_self_duality", "accuracy"):
        assert summary["evaluation_mode"][name] == pytest.approx(last[name], rel=1e-3)


def test_a_resumed_run_is_bit_for_bit_the_same(finished, interrupted, tmp_path):
    config = small(tmp_path / "run", seeds=2)
    total = len(_flow_record.read_rows(finished))
    interrupted(config, 6)
    interrupted(dataclasses.replace(config, resume=True), total - 4)
    network_flow.run(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(finished, tmp_path):
    config = small(tmp_path / "run", seeds=2, log_t_max=6.0)
    network_flow.run(config)
    network_flow.run(dataclasses.replace(config, log_t_max=12.0, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_run_is_resumed_before_the_first_row_and_at_the_end(tmp_path, monkeypatch):
    """A checkpoint may lack the row of the end, and a run goes on without that row."""
    show = _flow_loop._show

    def run(config, stop):
        def show_and_interrupt(bar, state):
            show(bar, state)
            if stop(state):
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(_flow_loop, "_show", show_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                network_flow.run(config)

    settings = {"measurements": 2, "test_split": ""}
    short = small(tmp_path / "run", log_t_max=6.0, **settings)
    run(short, lambda state: state.log_time >= 6)
    network_flow.run(dataclasses.replace(short, resume=True))
    *_, end = rows_of(tmp_path / "run")
    assert 6 < end["log_t"] < 10  # off the grid
    long = dataclasses.replace(short, log_t_max=12.0, resume=True)
    run(long, lambda state: int(state.gradients) > end["gradients"])
    network_flow.run(long)
    direct = network_flow.run(small(tmp_path / "direct", **settings))
    assert_same_run(tmp_path / "run", direct)


def test_a_stuck_seed_stays_where_it_is_when_resumed(tmp_path, monkeypatch):
    def is_stalled(state):
        return state.gradients >= 10

    monkeypatch.setattr(flow, "is_stalled", is_stalled)
    config = small(tmp_path / "run", test_split="")
    longer = dataclasses.replace(config, log_t_max=13.0, resume=True)
    for each in (config, longer):
        with pytest.raises(RunFailed, match="no step is short enough"):
            network_flow.run(each)
        (ending,) = files.read_json(tmp_path / "run" / "summary.json")["endings"]
        assert ending["gradients"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_t_max": 6.0}, "with --log_t_max=12.0: give at least 12, got 6.0"),
        ({"max_gradients": 9}, "with --max_gradients=10000: give at least .*, got 9"),
    ],
)
def test_a_run_is_not_made_shorter_than_it_is(finished, changes, message):
    with pytest.raises(BadUse, match=message):
        network_flow.run(small(finished, seeds=2, resume=True, **changes))
    assert folders.is_finished(finished)


def test_spent_gradients_leave_what_was_reached(tmp_path, capsys):
    config = small(tmp_path / "run", max_gradients=60, log_t_max=1e4)
    with pytest.raises(RunFailed, match="--max_gradients is spent"):
        network_flow.run(config)
    (ending,) = files.read_json(tmp_path / "run" / "summary.json")["endings"]
    assert ending["result"] == _flow_loop.SPENT
    assert rows_of(tmp_path / "run")[-1]["gradients"] == ending["gradients"] >= 60
    assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "run"))
    longer = dataclasses.replace(config, max_gradients=90, resume=True)
    with pytest.raises(RunFailed):
        network_flow.run(longer)
    assert rows_of(tmp_path / "run")[-1]["gradients"] >= 90


def test_data_that_cannot_be_separated_end_in_one_line(tmp_path, monkeypatch):
    set_up = network_flow.set_up

    def equal_images(config):
        setup = set_up(config)
        images = np.zeros_like(setup.train_set.images)
        return setup._replace(train_set=setup.train_set._replace(images=images))

    monkeypatch.setattr(network_flow, "set_up", equal_images)
    config = small(tmp_path / "run", max_gradients=40, test_split="")
    with pytest.raises(RunFailed, match="no seed came to --log_t_max"):
        network_flow.run(config)
    assert rows_of(tmp_path / "run")[-1]["log_loss"] > 0


def test_a_start_that_is_not_finite_ends_at_once(tmp_path):
    config = small(tmp_path / "run", init_scale=1e30, test_split="")
    with pytest.raises(RunFailed, match="the loss of the start is NaN or infinite"):
        network_flow.run(config)
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_homogeneous_network_has_its_columns(tmp_path):
    config = small(tmp_path / "run", norm="none", log_t_max=8.0, test_split="test[:40]")
    rows = rows_of(network_flow.run(config))
    smoothed = np.array([row["log_smoothed_margin"] for row in rows])
    assert smoothed[-1] > smoothed[0] + 0.5  # tests/test_homogeneous.py has short steps
    assert rows[-1]["theta_kkt_angle"] < 1
    start, end = (row["norm_difference"] for row in (rows[0], rows[-1]))
    assert end == pytest.approx(start, rel=0.05)
    assert (tmp_path / "run" / "homogeneity.png").exists()


@pytest.mark.slow
def test_warm_epochs_and_groups_run_and_are_resumed(interrupted, tmp_path):
    config = small(
        tmp_path / "run",
        warm_epochs=2,
        batch_size=10,
        num_groups=2,
        log_t_max=2.0,
        test_split="",
    )
    interrupted(config, 1)
    first = rows_of(tmp_path / "run")
    rows = rows_of(network_flow.run(dataclasses.replace(config, resume=True)))
    assert rows[-1]["log_t"] >= 2
    assert rows[: len(first)] == first


def test_an_interruption_ends_the_warm_epochs(tmp_path):
    config = small(tmp_path / "run", warm_epochs=2**30, batch_size=10, test_split="")
    setup = network_flow.set_up(config)
    loop = _flow_loop.Loop(config, setup, tmp_path, tmp_path / "checkpoints")
    interruption = Interruption("step")
    interruption.requested = True
    with pytest.raises(KeyboardInterrupt):
        loop.run(interruption)


def test_no_warm_epoch_needs_no_batch_size_of_many_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 7)
    network_flow.check(SMALL)
    with pytest.raises(BadUse, match="--batch_size must be a multiple of the 7 devices"):
        network_flow.check(dataclasses.replace(SMALL, warm_epochs=1))


def test_random_labels_are_a_permutation():
    plain, shuffled = (
        network_flow.set_up(small("", random_labels=value, test_split="")).train_set
        for value in (False, True)
    )
    assert (np.sort(plain.labels) == np.sort(shuffled.labels)).all()
    assert (plain.labels != shuffled.labels).mean() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adam"}, "--method must be one of stabilised, descent, got 'adam'"),
        ({"log_t_max": 1.0}, "--log_t_max must be above 1 and finite, got 1.0"),
        ({"log_t_max": float("inf")}, "--log_t_max must be above 1"),
        ({"max_stages": 1}, "--max_stages must be at least 2"),
        (
            {"max_stages": 10**6},
            "--max_stages must be at least 2, and at most 1000, got 1000000",
        ),
        ({"seeds": 10**400}, "--seeds must be at least 1, and below"),
        ({"measurements": 10**400}, "--measurements must be at least 1, and below"),
        ({"max_gradients": 0}, "--max_gradients must be at least 1"),
        ({"num_groups": 3}, "--num_groups must divide the 40 training images, got 3"),
        ({"num_groups": 0}, "--num_groups must be at least 1"),
        ({"warm_epochs": -1}, "--warm_epochs must be at least 0"),
        ({"measurements": 0}, "--measurements must be at least 1"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"init_scale": 0.0}, "--init_scale must be positive and finite, got 0.0"),
        ({"stem": "imagenet"}, "--stem=imagenet is for a ResNet, got --model=mlp"),
        ({"norm": "layer"}, "--norm must be one of batch, none, got 'layer'"),
        ({"norm": "none", "model": "resnet18"}, "--norm=none is not for --model=resnet18"),
        ({"random_labels": True}, "--random_labels leaves nothing to test"),
        ({"model": "lenet"}, "lenet"),
        ({"learning_rate": 0.0, "warm_epochs": 1}, "--learning_rate must be positive"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(BadUse, match=message):
        network_flow.run(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_other_settings_are_not_resumed(finished):
    with pytest.raises(BadUse, match="other settings"):
        network_flow.run(small(finished, seeds=2, width=0.1, resume=True))


def test_changed_rows_are_found_when_a_run_is_resumed(interrupted, tmp_path):
    config = small(tmp_path / "run", test_split="")
    interrupted(config, 3)
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text().replace("train,0,1.", "train,0,1.5", 1))
    with pytest.raises(BadUse, match="missing or damaged"):
        network_flow.run(dataclasses.replace(config, resume=True))


def test_a_network_flow_is_no_training_run_to_peel(finished):
    with pytest.raises(BadUse, match="holds no training run"):
        _training.stored_run(finished)


def test_the_report_shows_a_run_whose_first_seed_has_no_last_layer(finished):
    summary = files.read_json(finished / "summary.json")
    del summary["last_layer"]
    summary["endings"][0] |= {"result": _flow_loop.NOT_FINITE}
    findings = _flow_page.PAGE.show(summary)
    assert findings.verdict.count("1 of 2 seeds")


def test_the_report_shows_the_run(finished, tmp_path):
    output = tmp_path / "report.html"
    report.run(report.Config(runs=str(finished), output=str(output)))
    text = output.read_text()
    assert "Gradient flow of mlp on digits" in text
    assert "steps refused" in text
    assert "There is no" not in text


def test_the_grid_of_times():
    assert _flow_record.next_time(0.0, 20) == 1
    assert _flow_record.next_time(1.0, 1) == 10
    assert _flow_record.next_time(9.99, 1) == pytest.approx(10)
    assert _flow_record.next_time(10.0, 1) == pytest.approx(100)


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([], 0),
        ([(1, -np.inf)], 0),
        ([(1, 0.9)], 0),
        ([(1, 1.1)], 1),
        ([(1, 1.1), (2, 1.5)], 1),
        ([(1, 1.1), (2, 3.5)], 2),
        ([(1, 1.1), (2, 3.5), (9, 3.5)], 2),  # steps refused since
    ],
)
def test_the_row_of_the_end_is_left_out_unless_the_grid_has_it(points, kept):
    rows = [{"gradients": count, "log_t": log_t} for count, log_t in points]
    assert _flow_record.on_grid(rows, 2) == rows[:kept]


def test_seeds_are_interpolated_at_common_times():
    parts = [
        {"log_t": np.array([1.5, 4.0, 8.0]), "value": np.log([1.5, 4.0, 8.0])},
        {"log_t": np.array([2.0, 5.0, 6.0]), "value": np.log([2.0, 5.0, 6.0])},
    ]
    log_times, columns = _flow_record.interpolate(parts)
    assert log_times[[0, -1]] == pytest.approx([2, 6])
    expected = np.stack([np.log(log_times)] * 2)
    np.testing.assert_allclose(columns["value"], expected)


def test_seeds_that_ended_early_are_left_out():
    parts = [{"log_t": np.array(times)} for times in ([1.2, 12.0], [1.05], [2.0, 11.0])]
    assert [part["log_t"][-1] for part in _flow_record.far(parts)] == [12, 11]
    assert _flow_record.far([]) == []


def test_the_resume_command_of_the_run(tmp_path):
    config = small(tmp_path / "run", max_gradients=70)
    line = folders.resume_command(config, tmp_path / "run")
    assert "--max_gradients=70" in line
    flags = ["", *shlex.split(line)[3:]]
    assert cli.parse(network_flow.Config, flags) == dataclasses.replace(config, resume=True)


def test_stages_default_to_the_library():
    assert SMALL.max_stages == flow.MAX_STAGES
    assert json.loads(json.dumps(folders.settings(SMALL)))["method"] == "stabilised"
