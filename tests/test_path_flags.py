"""Flags that name folders and files: ~ and ~user begin the home directory in each."""

import dataclasses
import json
import re

import pytest
from commands import MODULES

from benchmarks import accelerator
from benchmarks import run as benchmarks_run
from experiments import _legs, peel, report, train_small, ulpm_flow
from experiments._runs import cli
from experiments._runs.errors import BadUse

PATH_FLAGS = [
    pytest.param(module.Config, field.name, id=f"{module.NAME}-{field.name}")
    for module in (*MODULES, benchmarks_run, accelerator)
    for field in dataclasses.fields(module.Config)
    if field.type is str and re.search(r"folder|\bfile\b", field.metadata["help"], re.I)
]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home directory, which is not the working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_path_flags_are_those_that_experiments_have():
    names = {param.values[1] for param in PATH_FLAGS}
    assert names == {"workdir", "data", "data_dir", "run", "runs", "output", "out"}


@pytest.mark.parametrize(("config", "name"), PATH_FLAGS)
def test_a_tilde_is_the_home_directory(home, config, name):
    for given, expected in {
        "~": home,
        "~/my runs/x": home / "my runs" / "x",
        "a/~/b": "a/~/b",
        "./~": "./~",
        "": "",
    }.items():
        parsed = cli.parse(config, ["", f"--{name}={given}"])
        assert getattr(parsed, name) == str(expected)
        assert parsed == config(**{name: given})
    assert getattr(cli.parse(config, ["", f"--{name}=~root/x"]), name)[0] == "/"


@pytest.mark.parametrize(("config", "name"), PATH_FLAGS)
def test_an_unknown_user_is_refused_by_name(config, name):
    with pytest.raises(BadUse, match=rf"--{name}=~nobody-here/x: .* '~nobody-here'"):
        cli.parse(config, ["", f"--{name}=~nobody-here/x"])


def test_each_of_several_paths_may_begin_with_a_tilde(home):
    config = cli.parse(report.Config, ["", "--runs=~/a, b ,~/c"])
    assert config.runs == f"{home}/a,b,{home}/c"


def test_a_run_is_written_printed_and_resumed_in_the_home_directory(
    home, tmp_path, monkeypatch, capsys
):
    def stop(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(_legs, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        ulpm_flow.run(ulpm_flow.Config(seeds=2, workdir="~/x"))
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(home / "x")
    assert f"--workdir={home / 'x'}" in err
    assert (home / "x" / "config.json").is_file()
    assert list((tmp_path / "here").iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        ulpm_flow.run(ulpm_flow.Config(seeds=2, workdir=str(home / "x"), resume=True))


def test_a_peel_stores_the_run_that_it_read_in_full(home):
    assert peel.Config(run="~/a") == peel.Config(run=str(home / "a"))
    with pytest.raises(BadUse, match="--workdir must differ from --run"):
        peel.run(peel.Config(run="~/a", workdir=str(home / "a")))


def test_the_report_reads_and_writes_in_the_home_directory(home):
    run = home / "runs" / "one"
    run.mkdir(parents=True)
    stored = {"experiment": "ulpm_flow", "config": {"seeds": 2}}
    (run / "config.json").write_text(json.dumps(stored))
    path = report.run(report.Config(runs="~/runs", output="~/page.html"))
    assert path == home / "page.html"
    assert path.is_file()


def test_training_looks_for_the_run_to_resume_in_the_home_directory(home):
    config = train_small.Config(workdir="~/x", resume=True)
    with pytest.raises(BadUse, match=f"{home / 'x'}.* holds no run to resume"):
        train_small.run(config)
