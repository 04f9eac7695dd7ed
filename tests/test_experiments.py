import csv
import dataclasses
import gc
import json

import jax
import numpy as np
import pytest

import ncjax
from experiments import _fits, _legs, _saddles, saddle_analysis, theorems, ulpm_flow
from experiments._runs import files, folders

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ulpm_flow.Config(
    seeds=2, num_classes=3, per_class=2, dim=4, log_t_max=20.0, num_times=20
)


def small(folder, **changes):
    return dataclasses.replace(SMALL, workdir=str(folder), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ulpm_flow.run(small(tmp_path_factory.mktemp("flow") / "run"))


def read_csv(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_the_flow_writes_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "metrics.csv",
        "summary.json",
        "figure2.png",
        "figure2.pdf",
    }
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["seeds"] == 2
    assert {"jax", "diffrax", "python"} <= set(config["versions"])


def test_flow_measures_every_seed_at_every_time(finished):
    rows = read_csv(finished)
    assert len(rows) == 2 * 20
    assert set(ncjax.CollapseMetrics._fields) < set(rows[0])
    assert {row["seed"] for row in rows} == {0, 1}


def test_flow_measures_what_the_library_computes(finished):
    last = read_csv(finished)[-1]
    start = ulpm_flow._starts(SMALL)
    start = ncjax.Params(start.W[1], start.H[1])
    final = ncjax.gradient_flow(start, [20.0]).final
    metrics = ncjax.collapse_metrics(final)._asdict()
    for name, value in metrics.items():
        assert last[name] == pytest.approx(float(value), rel=1e-5, abs=1e-8), name
    assert last["log_loss"] == pytest.approx(float(ncjax.log_cross_entropy(final)))
    assert last["margin_deficit"] == pytest.approx(1 - float(ncjax.margin_ratio(final)))


def test_the_printed_table_has_the_limits_of_the_theory(finished):
    summary = json.loads((finished / "summary.json").read_text())
    printed = ulpm_flow._table(SMALL, summary)
    for name in ulpm_flow._PRINTED_METRICS:
        (line,) = (x for x in printed.splitlines() if x.startswith(f"{name} "))
        assert line.endswith(f"tends to {_fits.PREDICTED[name]}")
    assert "--log_t_max=10000" in printed.splitlines()[-1]


def test_no_limit_is_shown_if_no_simplex_etf_fits(finished):
    rows = read_csv(finished)
    columns = {k: np.reshape([row[k] for row in rows], (2, 20)) for k in rows[0]}
    log_times, stats = columns.pop("log_t")[0], {"failed_seeds": []}
    stats |= {"steps_per_seed": 1, "seconds": 1.0}
    for dim, limits in ((2, True), (1, False)):
        config = dataclasses.replace(SMALL, dim=dim)
        summary = ulpm_flow._summarise(config, log_times, columns, stats)
        assert ("tends to" in ulpm_flow._table(config, summary)) == limits
        _, _, (metrics, constants) = ulpm_flow.PAGE.show(summary)
        assert ({row[-1] for row in metrics.rows} != {"–"}) == limits
        assert (constants.rows[0][-1] != "–") == limits


def test_the_summary_holds_the_results(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["solver"]["failed_seeds"] == []
    assert summary["sharp_constants"]["|Z|^2 / log t"]["predicted"] == 4 * 2**0.5
    assert summary["final"]["accuracy"]["median"] == 1
    assert "log t in [2, 12]" in summary["exponents"]


def test_a_folder_that_holds_a_run_is_replaced_only_with_overwrite(finished):
    before = (finished / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already .*: give --overwrite"):
        ulpm_flow.run(small(finished))
    assert (finished / "metrics.csv").read_bytes() == before
    ulpm_flow.run(small(finished, overwrite=True))
    assert (finished / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(("resume", "named"), [(False, True), (None, False)])
def test_the_error_names_resume_only_if_the_experiment_has_it(tmp_path, resume, named):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="give --overwrite") as caught:
        folders.open_run(tmp_path, {}, (), overwrite=False, resume=resume)
    assert ("--resume" in str(caught.value)) == named


def test_an_interrupted_run_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch):
    save, legs = _legs._save, []

    def interrupt(folder, progress):
        save(folder, progress)
        legs.append(progress.legs_done)
        if len(legs) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(_legs, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ulpm_flow.run(small(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.csv").exists()
    ulpm_flow.run(small(tmp_path / "run", resume=True))
    assert legs == list(range(1, _legs.LEGS + 1))
    resumed = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert resumed == (finished / "metrics.csv").read_bytes()


def test_a_finished_run_is_not_run_again(finished, capsys):
    before = (finished / "summary.json").stat().st_mtime_ns
    assert ulpm_flow.run(small(finished, resume=True)) == finished
    assert "the run is finished" in capsys.readouterr().out
    assert (finished / "summary.json").stat().st_mtime_ns == before


def test_resume_refuses_other_settings(finished):
    with pytest.raises(ValueError, match="other settings: resume it with --seed=0"):
        ulpm_flow.run(small(finished, resume=True, seed=1))


def test_resume_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        ulpm_flow.run(small(tmp_path, resume=True))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        folders.open_run(tmp_path, {}, (), overwrite=False, resume=True)
    for settings in ("null", "[1]"):
        (tmp_path / "config.json").write_text(f'{{"config": {settings}}}')
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            folders.open_run(tmp_path, {}, (), overwrite=False, resume=True)
    (tmp_path / folders.CHECKPOINT).write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"checkpoint.npz is damaged"):
        folders.load_checkpoint(tmp_path)
    gc.collect()  # a file left open would give a warning, which is an error here


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, r"--seed must lie in \[0, 2\*\*63\)"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"num_classes": 1}, "--num_classes must be at least 2, got 1"),
        ({"log_t_max": float("nan")}, "--log_t_max must be above 1"),
        ({"init_scale": -1.0}, "--init_scale must be positive"),
        ({"dtype": "int8"}, "--dtype must be float64 or float32, got 'int8'"),
        (
            {"solver": "euler"},
            "--solver must be one of auto, explicit, stabilised, implicit, got 'euler'",
        ),
        ({"overwrite": True, "resume": True}, "exclude each other"),
        ({"folder": "/dev/null/run"}, "cannot write to workdir '/dev/null/run'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ulpm_flow.run(small(**{"folder": tmp_path / "run"} | changes))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_folder_that_holds_a_file_of_an_output_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("precious")
    with pytest.raises(ValueError, match=r"holds a run already \(metrics.csv\)"):
        ulpm_flow.run(small(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == "precious"


@pytest.mark.usefixtures("blank_figures")
def test_overwrite_removes_all_files_of_the_old_run(tmp_path):
    (tmp_path / "metrics.csv").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    folders.open_run(
        tmp_path, {"seeds": 1}, ulpm_flow.OUTPUTS, overwrite=True, resume=False
    )
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}


@pytest.mark.usefixtures("blank_figures")
def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"seed": 0}}')
    folders.save_checkpoint(tmp_path, {"W": np.zeros(2)})
    (tmp_path / "config.json").write_text('{"config": {"seed": 1}}')
    with pytest.raises(ValueError, match="belongs to a run of other settings"):
        folders.load_checkpoint(tmp_path)


def test_the_resume_command_repeats_the_settings_that_differ_from_defaults():
    config = ulpm_flow.Config(seeds=3, dtype="float32", workdir="here")
    command = folders.resume_command(config, "here")
    assert command.endswith("--workdir=here --resume --seeds=3 --dtype=float32")


@pytest.mark.usefixtures("blank_figures")
def test_results_of_failed_seeds_are_kept_up_to_the_failure(tmp_path, monkeypatch, capsys):
    extend, flow = _legs._extend, []

    def fail_from_the_tenth_leg_on(progress, solution, new):
        if progress.legs_done >= 10:
            lost = jax.tree.map(lambda leaf: leaf * np.nan, (solution.params, new))
            solution = solution._replace(result=solution.result + 2, params=lost[0])
            new = lost[1]
        flow.append(progress.legs_done)
        return extend(progress, solution, new)

    monkeypatch.setattr(_legs, "_extend", fail_from_the_tenth_leg_on)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="all 2 seeds failed before log t = "):
        ulpm_flow.run(small(folder))
    assert flow == list(range(11))
    rows = read_csv(folder)
    assert len(rows) == 40
    assert sum(np.isfinite(row["log_loss"]) for row in rows) == 20
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["solver"]["failed_seeds"] == [0, 1]
    assert summary["final"]["log_loss"]["median"] is None
    reached = max(row["log_t"] for row in rows if np.isfinite(row["log_loss"]))
    assert summary["solver"]["failed_after_log_t"] == pytest.approx(reached)
    printed = capsys.readouterr().out
    assert (
        f"failed seeds: 0, 1 (2 of 2), the first of them after log t = {reached:.4g}"
        in printed
    )
    assert "try a lower --log_t_max" in printed
    with pytest.raises(RuntimeError, match="all 2 seeds failed before log t = "):
        ulpm_flow.run(small(folder, resume=True))
    assert flow == list(range(11))


def test_all_seeds_failing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="all 2 seeds failed at once"):
        ulpm_flow.run(small(tmp_path / "run", init_scale=1e200))


def test_fitted_exponents_of_power_laws_are_exact():
    log_times = np.linspace(10, 1000, 200)
    values = np.stack([3 * log_times**-1.5, log_times**-0.5])
    fitted = _fits.exponents(log_times, values, (100, 1000))
    np.testing.assert_allclose(fitted, [1.5, 0.5])
    assert np.isnan(_fits.exponents(log_times, values, (990, 1000))).all()


def test_times_are_even_on_the_clock():
    times = _legs.log_times(1000.0, 30)
    assert len(times) == 40
    assert times[-1] == 1000.0
    clock = np.log1p(np.logaddexp(0, times))
    np.testing.assert_allclose(np.diff(clock), np.diff(clock)[0], rtol=1e-9)


def test_closed_form_eigenvalues_of_the_block_family():
    assert _saddles.Block(2, 2, 1, 4).eigenvalue() == -1 / 4
    assert _saddles.Block(2, 2, 1, 4).eigenvalue(2**0.5) == pytest.approx(-0.178810508)
    assert _saddles.Block(3, 2, 1, 6).eigenvalue(30.0) == pytest.approx(-1 / 12)
    assert _saddles.Block(2, 3, 2, 8).multiplicity == 4


def test_a_row_of_the_family_table_is_right():
    row = saddle_analysis.family_row(_saddles.Block(2, 2, 3, 4), 30.0)
    assert row["computed_eigenvalue"] == pytest.approx(-0.144337567, abs=1e-9)
    assert row["computed_multiplicity"] == row["predicted_multiplicity"] == 2
    assert row["computed_sigma_max"] == pytest.approx(2, abs=1e-10)
    assert row["plain_eigenvalue"] < row["computed_eigenvalue"]
    assert row["verdict"] == "strict saddle direction"


def test_escape_from_a_saddle_has_the_predicted_exponent(key):
    block = _saddles.Block(2, 2, 1, 4)
    log_times = np.geomspace(1e3, 1e4, 8)
    flows = _saddles.escape(block, log_times, distance=1e-6, seeds=2, key=key)
    fitted = -_fits.exponents(log_times, flows.unstable, (1e3, 1e4))
    np.testing.assert_allclose(fitted, 0.5, atol=0.02)


@pytest.mark.slow
def test_saddle_analysis_writes_its_files(tmp_path):
    config = saddle_analysis.Config(max_classes=4, seeds=4, workdir=str(tmp_path / "run"))
    folder = saddle_analysis.run(config)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "summary.json",
        *saddle_analysis.OUTPUTS,
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["family"]["wrong_multiplicity_or_verdict"] == []
    assert summary["family"]["largest_eigenvalue_error"] < 1e-10
    assert summary["directions"]["globally_optimal"] == 4
    for row in summary["descent"]:
        assert row["curvature"] == pytest.approx(row["predicted"], rel=0.01)


@pytest.mark.slow
def test_every_theorem_holds(tmp_path, capsys):
    folder = theorems.run(theorems.Config(seeds=4, workdir=str(tmp_path / "run")))
    assert "FAIL" not in capsys.readouterr().out
    rows = json.loads((folder / "summary.json").read_text())["statements"]
    assert len(rows) == len(theorems.CHECKS)


def test_a_theorem_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(theorems, "CHECKS", (theorems._definition_2_1, _false_statement))
    monkeypatch.setattr(theorems, "_flows", lambda config: None)
    with pytest.raises(RuntimeError, match="1 statements failed: pigs fly"):
        theorems.run(theorems.Config(workdir=str(tmp_path / "run")))
    table = (tmp_path / "run" / "theorems.md").read_text()
    assert "pigs fly" in table


def _false_statement(_flow):
    return theorems.Statement("nobody", "pigs fly", "nothing", 1.0, 0.0, False)
