"""The benchmarks run on tiny problems, and their programs agree."""

import importlib.metadata
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ncjax
from benchmarks import (
    _timing,
    flow,
    flow_deep,
    flow_objectives,
    flow_reach,
    hessian,
    hessian_resnet,
    metrics,
    run,
    startup,
    training_step,
)
from ncjax.networks import convolution, models


@pytest.fixture
def no_peers(monkeypatch):
    """Report every peer as not installed."""
    monkeypatch.setattr(_timing, "missing", lambda *_: "peers left out: none wanted")
    for module in (metrics, training_step):
        monkeypatch.setattr(module, "missing", _timing.missing)


def test_programs_take_turns_and_are_compared_within_a_repeat(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: clock[0])

    def program(name, seconds, **more):
        def call(repeat):
            calls.append((name, repeat))
            clock[0] += seconds[repeat]

        return _timing.Program(name, call, lambda: call(0), **more)

    ours = program("ours", [1.0, 2.0, 30.0])
    other = program("other", [4.0, 6.0, 60.0], steps=2, note="two at once")
    _timing.warm_up([ours, other])
    _timing.interleave([ours, other], 3)
    assert calls[2:] == [(name, i) for i in range(3) for name in ("ours", "other")]
    first, second = _timing.rows("p", [ours, other], extra=1)
    assert first["over_ncjax"] == 1.0
    assert second == {
        "problem": "p",
        "program": "other",
        "note": "two at once",
        "median_seconds": 3.0,
        "over_ncjax": 1.5,  # the median of 2, 1.5 and 1
        "seconds": [2.0, 3.0, 30.0],
        "compile_seconds": 4.0,
        "extra": 1,
    }


def test_provenance_knows_the_version_of_a_clone(monkeypatch):
    installed = importlib.metadata.version

    def not_installed(package):
        if package == "ncjax":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    found = _timing.provenance()["versions"]["ncjax"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", found)


def test_stored_results_name_the_version_that_was_timed():
    sections = run.stored(Path(run.__file__).with_name("results.json"))
    assert run.SECTIONS.keys() <= sections.keys()
    for section in sections.values():
        assert re.match(r"\d+\.\d+\.\d+", section["versions"]["ncjax"])


def fake(name, note=""):
    def measure(repeats):
        program = _timing.Program(name, lambda _: None)
        _timing.interleave([program], repeats)
        return _timing.rows("nothing", [program]), [note]

    return measure


def test_a_new_section_replaces_the_old_one_and_keeps_the_others(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "results.json"
    monkeypatch.setattr(run, "SECTIONS", {"a": fake("old"), "b": fake("b")})
    both = run.run(run.Config(only="a,b", repeats=2, out=str(path)))
    assert [len(section["rows"][0]["seconds"]) for section in both.values()] == [2, 2]
    monkeypatch.setitem(run.SECTIONS, "a", fake("new", "a peer is missing"))
    capsys.readouterr()
    after = run.run(run.Config(only="a", repeats=1, out=str(path)))
    assert json.loads(path.read_text()) == after
    assert after["b"] == both["b"]
    assert after["a"]["rows"][0]["program"] == "new"
    assert {"command", "date", "versions", "device", "processor"} <= after["a"].keys()
    text = path.with_suffix(".md").read_text()
    assert "| nothing | new |" in text
    assert "| nothing | b |" in text
    printed = capsys.readouterr().out
    assert "| nothing | new |" in printed
    assert "a peer is missing" in printed
    assert "| nothing | b |" not in printed


def test_bad_settings_raise_and_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--only must be all, or among .*got \['speed'\]"):
        run.run(run.Config(only="startup,speed"))
    with pytest.raises(ValueError, match="--repeats must be at least 1, got 0"):
        run.run(run.Config(repeats=0))
    with pytest.raises(ValueError, match=r"--out must end with \.json, got 'table\.md'"):
        run.run(run.Config(out="table.md"))
    path = tmp_path / "other.json"
    for text in ("not JSON", '{"mine": 1}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"--out={path}"):
            run.run(run.Config(out=str(path)))
        assert path.read_text() == text


def test_start_up_is_timed_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(startup, "COMMANDS", {"nothing": ("-c", "")})
    (row,), notes = startup.measure(2)
    assert len(row["seconds"]) == 2
    assert notes == []
    monkeypatch.setattr(startup, "COMMANDS", {"failing": ("-c", "raise SystemExit(3)")})
    with pytest.raises(startup.subprocess.CalledProcessError):
        startup.measure(1)


SMALL = metrics.Problem(num_classes=4, dim=9, samples=60)


@pytest.mark.usefixtures("no_peers")
def test_metrics_are_timed_alone_without_peers():
    measured, notes = metrics.measure(2, {"small": SMALL})
    assert [row["program"] for row in measured] == ["ncjax", "ncjax, CollapseMeter"]
    assert notes == ["peers left out: none wanted"]


def test_torch_and_ncjax_compute_the_same_metrics():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = metrics.draw(SMALL)
    ours = ncjax.collapse_metrics_from_features(*arrays)._asdict()
    theirs = metrics.torch_metrics(*map(torch.from_numpy, arrays))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(value, ours[name], rtol=1e-4, err_msg=name)


def test_the_published_loop_and_ncjax_agree_where_they_report_the_same():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks import _published_loop

    features, labels, W, _ = metrics.draw(SMALL)
    ours = ncjax.collapse_metrics_from_features(features, labels, W)
    tensors = [torch.from_numpy(array) for array in (features, labels, W)]
    theirs = _published_loop.measures(tensors[0], tensors[1].long(), tensors[2])
    for name, value in {
        "variability": ours.within_class_variation,
        "cdnv": ours.cdnv,
        "norms": ours.mean_norm_variation,
        "weights": ours.classifier_norm_variation,
        "etf": ours.etf_gram_error,
        "duality": ours.product_etf_error,
        "agreement": 1 - ours.ncc_mismatch,
    }.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.usefixtures("no_peers")
def test_training_steps_are_timed():
    tiny = training_step.Problem("convnet", {"channels": (4,)}, (8, 8, 1))
    measured, notes = training_step.measure(1, {"tiny": tiny}, batch=8)
    assert [row["program"] for row in measured] == ["ncjax", "plain Flax"]
    assert notes == [training_step.OPEN, "peers left out: none wanted"]


def test_winograd_is_timed_with_and_without(monkeypatch):
    chosen = {True: set(), False: set()}
    choose = convolution._formula

    def spy(*arguments):
        formula = choose(*arguments)
        chosen[arguments[-1]].add(formula)
        return formula

    monkeypatch.setattr(convolution, "_formula", spy)
    tiny = training_step.Problem("convnet", {"channels": (16,)}, (16, 16, 16), steps=1)
    measured, (note,) = training_step.measure_winograd(1, {"tiny": tiny}, batch=4)
    assert [row["program"] for row in measured] == ["ncjax", "ncjax without Winograd"]
    assert note.startswith("load averages of the machine: ")
    assert convolution.convolve_winograd in chosen[True]
    assert chosen[False] == {convolution.convolve_canonical}


@pytest.mark.parametrize("problem", training_step.PROBLEMS.values())
def test_torch_and_ncjax_train_the_same_network(problem):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    network = training_step.torch_network(problem)
    model = models.build(problem.name, training_step.NUM_CLASSES, **problem.options)
    count = sum(p.numel() for p in network.parameters())
    assert count == models.count_parameters(model, problem.image_shape)


@pytest.mark.slow
def test_every_program_with_weight_decay_comes_to_the_minimum():
    measured = [
        *flow_objectives.decay(1, count=2),
        *flow_objectives.weights(1, log_t=10.0),
    ]
    assert len(measured) == 6
    for row in measured[:3]:
        assert float(row["note"].rpartition(" ")[2]) < 1e-10


@pytest.mark.slow
def test_every_program_of_deep_models_reaches_its_last_time():
    measured = [*flow_deep.starts(1, count=2, log_t=5.0), *flow_deep.late(1, (10.0,))]
    assert len(measured) == 2 + 2 * len(flow_deep.SOLVERS)
    for row in measured[2:]:
        assert float(row["note"].rpartition(" ")[2]) < 1


@pytest.mark.slow
def test_the_hessian_of_a_network_is_timed():
    options = {"stem": "imagenet", "depths": (1,), "width": 1 / 32}
    tiny = training_step.Problem("resnet18", options, (12, 12, 1))
    (row,), _ = hessian_resnet.measure(1, tiny, images=100)
    assert row["converged"]
    assert row["dim"] < 1000
    assert len(row["eigenvalues"]) == 2 * hessian_resnet.K
    assert row["peak_gigabytes"] > 0


@pytest.mark.usefixtures("no_peers")
def test_ncjax_and_arpack_agree():
    rows, notes = hessian.measure(1, ["mlp-tiny"])
    assert notes == ["peers left out: none wanted"]
    assert len(rows) == 8
    for row in rows:
        assert row["dim"] == 1584
        assert row["worst_relative_residual"] < row["tol"]
        assert row["worst_relative_error"] < row["tol"]
        assert row["num_hvps"] > 0


def test_pyhessian_and_ncjax_see_the_same_loss(tmp_path):
    reason = "PyHessian and torch are not installed: pip install torch pyhessian"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("pyhessian", reason=reason)
    for problem in (hessian.mlp((16, 12, 4), 32, 5), hessian.layer_peeled(3, 4, 5, 3.0)):
        model, criterion, (x, labels) = problem.torch_parts(problem.params, problem.batch)
        loss = criterion(model(x), labels)
        data = () if problem.batch is None else (problem.batch,)
        expected = float(problem.fn(problem.params, *data))
        np.testing.assert_allclose(float(loss.detach()), expected, rtol=1e-12)
        # Same order of parameters, so that its vectors can be measured.
        flat = torch.cat([p.ravel() for p in model.parameters()]).detach().numpy()
        np.testing.assert_array_equal(flat, ravel_pytree(problem.params)[0])
        found = hessian.pyhessian_call(problem)(0)
        product = hessian.hessian_product(problem.fn, problem.params, problem.batch)
        top = np.linalg.norm(product(jnp.asarray(found.vectors[0], float)))
        np.testing.assert_allclose(abs(found.values[0]), top, rtol=0.05)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_all_flow_solvers_reach_the_same_state(monkeypatch):
    monkeypatch.setattr(flow, "missing", lambda package: f"no {package}")
    end = np.log(30.0)
    monkeypatch.setattr(flow, "draw", lambda: ncjax.init_params(jax.random.key(0), 3, 2, 4))
    measured, notes = flow.peers(1, end)
    assert notes == ["no torchdiffeq", "no torch"]
    assert measured[0]["program"] == "ncjax, explicit"
    start = flow.draw()
    expected = ncjax.gradient_flow(start, [end], rtol=1e-10).final
    for solve in flow.SOLVERS.values():
        got = ncjax.Params(*solve(start, 30.0))
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def race(monkeypatch, seconds_of_leg, seconds, **options):
    """Return the row of a program whose legs take these seconds."""
    now = [0.0]
    monkeypatch.setattr(flow_reach.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(flow_reach, "_errors", lambda *_: "")

    def leg(state, log_t, target):
        assert target > log_t
        now[0] += seconds_of_leg(target)
        return state + 1

    return flow_reach.row(flow_reach.Racer("a", leg, **options), 0, seconds)


def test_a_race_ends_with_the_last_leg_within_the_time_limit(monkeypatch):
    row = race(monkeypatch, lambda _: 2.0, 7.0)
    assert row["log_t"] == pytest.approx(10 * 1.1**2)  # three legs fit, the fourth does not
    assert row["median_seconds"] == 6
    assert "time is over" in row["note"]
    row = race(monkeypatch, lambda _: 2.0, 7.0, by_time=True)
    assert row["log_t"] == pytest.approx(5 + 2 * np.log(1.1))
    row = race(monkeypatch, lambda _: 2.0, 1.0)
    assert row["log_t"] is None


def test_a_race_ends_when_a_program_fails(monkeypatch):
    def failing(target):
        if target > 12:
            raise RuntimeError("too far.\nand more")
        return 1.0

    row = race(monkeypatch, failing, 100.0)
    assert row["log_t"] == pytest.approx(11)
    assert "too far," in row["note"]
    row = race(monkeypatch, lambda _: 1.0, 100.0, limit=11.5)
    assert row["log_t"] == 11.5
    assert "the largest t of float64" in row["note"]


def test_racers_continue_from_their_last_state():
    start = flow.draw((3, 2, 4))
    every, _ = flow_reach.racers()
    assert len(every) >= 7
    others = [racer for racer in every if not racer.name.startswith("ncjax")]
    for racer in (every[0], *others):
        first = racer.leg(start, -np.inf, 2.0)
        second = racer.leg(first, 2.0, 3.0)
        whole = ncjax.gradient_flow(start, [3.0], solver="explicit").final
        rtol = 0.05 if racer.by_time else 1e-5  # Euler steps of 0.1
        np.testing.assert_allclose(second.W, whole.W, rtol=rtol, atol=rtol)


def test_wide_models_are_timed_in_turns_with_a_matrix_product():
    (row,) = flow.wide(2, ((3, 2, 4),), 2.0)
    assert len(row["seconds"]) == 2
    assert "% of the matrix-product rate" in row["note"]
