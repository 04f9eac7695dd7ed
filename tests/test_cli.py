"""The command line: grouped help, one-line errors, exit codes, the run folder last."""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import subprocesses
from absl import logging
from commands import MODULES

import ncjax
from benchmarks import accelerator
from benchmarks import run as benchmarks_run
from experiments import (
    __main__,
    _deep_flows,
    _layers_network,
    _legs,
    _neighbours_parts,
    _training,
    deep_flow,
    layers,
    neighbours,
    peel,
    report,
    saddle_analysis,
    theorems,
    train_small,
    ulpm_flow,
)
from experiments._runs import cli, folders
from experiments._runs.errors import BadUse

COMMANDS = {f"experiments.{module.NAME}": module for module in MODULES} | {
    "benchmarks.run": benchmarks_run,
    "benchmarks.accelerator": accelerator,
}
BENCHMARKS = {"benchmarks.run", "benchmarks.accelerator"}
# Their defaults are so long that the help stands on the next line.
TWO_LINES = {"title", "out"}


@pytest.fixture
def run_here(monkeypatch):
    """Run the command of an experiment in this process and return its exit code."""
    monkeypatch.setattr(cli, "set_up_jax", lambda *_: None)
    monkeypatch.setattr(logging, "set_verbosity", lambda _: None)

    def call(*flags, run=ulpm_flow.run, config=ulpm_flow.Config):
        return cli._main(config, run, "experiments.some", ["some", *flags])

    return call


def only_line(text):
    assert text.count("\n") == 1, text
    return text.removesuffix("\n")


def pages():
    return [
        pytest.param(module.Config, cli.usage(module.Config, name), id=name)
        for name, module in COMMANDS.items()
    ]


def shown_flags(page):
    """The left column of the help: --name=default or --[no]name."""
    return re.findall(r"^  (--(?:'[^']*'|\S)+)", page, re.MULTILINE)


def test_the_list_of_experiments_describes_each():
    lines = __main__.listing().splitlines()
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert {f"experiments.{name}" for name in listed} | BENCHMARKS == {*COMMANDS}
    assert all(len(line.split()) > 3 for line in listed.values())
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(("config", "page"), pages())
def test_the_help_shows_every_flag_in_its_group(config, page):
    parts = dict(part.split("\n", 1) for part in page.split("\n\n") if "\n" in part)
    groups = [line for line in page.splitlines() if line in cli.GROUPS]
    assert groups == [group for group in cli.GROUPS if group in groups]
    for field in dataclasses.fields(config):
        text, group = field.metadata["help"], field.metadata["group"]
        assert len(text) > 5
        left = re.escape("[no]" if isinstance(field.default, bool) else "")
        gap = r"\n +" if field.name in TWO_LINES else r" +"
        line = rf"^  --{left}{field.name}(=.*)?{gap}{re.escape(text)}"
        assert re.search(line, parts[group], re.MULTILINE), line


@pytest.mark.parametrize(("config", "page"), pages())
def test_the_help_fits_in_100_columns_and_explains_common_flags_and_exit_codes(
    config, page
):
    assert max(map(len, page.splitlines())) <= 100
    for words in (
        "--traceback",
        "Exit codes: 0 done, 1 failed, 2 bad use, 130",
        "--noflag",
    ):
        assert words in page


@pytest.mark.parametrize(("config", "page"), pages())
def test_the_help_shows_the_true_defaults(config, page):
    shown = [flag for flag in shown_flags(page) if "=" in flag]
    assert shown
    assert cli.parse(config, ["", *shlex.split(" ".join(shown))]) == config()


@pytest.mark.parametrize(("config", "page"), pages())
def test_the_example_in_the_help_parses(config, page):
    (example,) = re.findall(r"^Example: python -m (\S+)(.*)$", page, re.MULTILINE)
    assert COMMANDS[example[0]].Config is config
    cli.parse(config, ["", *shlex.split(example[1])])


@pytest.mark.parametrize(("config", "page"), pages())
def test_the_help_keeps_its_text_without_docstrings(monkeypatch, config, page):
    """As under `python -OO`, where a dataclass shows its signature instead."""
    monkeypatch.setattr(config, "__doc__", "Config(seeds: int = 8)")
    name = next(name for name, module in COMMANDS.items() if module.Config is config)
    assert cli.usage(config, name) == page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ulpm_flow", "train_small", "report"])
def test_optimised_python_shows_the_same_help(name):
    program = [sys.executable, "-OO", "-m", f"experiments.{name}", "--help"]
    done = subprocess.run(program, text=True, capture_output=True)
    assert (
        done.stdout
        == cli.usage(COMMANDS[f"experiments.{name}"].Config, f"experiments.{name}") + "\n"
    )


def test_flags_are_parsed_by_type():
    flags = ["", "--seeds=3", "--init_scale=1", "--overwrite"]
    config = cli.parse(ulpm_flow.Config, flags)
    assert (config.seeds, config.init_scale, config.overwrite) == (3, 1.0, True)
    assert not cli.parse(ulpm_flow.Config, [*flags, "--nooverwrite"]).overwrite


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sedes=3", "Unknown command line flag 'sedes'. Did you mean: seeds ?"),
        ("--seds=3", "Unknown command line flag 'seds'. Did you mean: seeds ?"),
        ("--tracback", "Unknown command line flag 'tracback'. Did you mean: traceback ?"),
        ("--quux", "Unknown command line flag 'quux'; --help lists the flags"),
        ("--seeds=many", "--seeds must be an integer, got 'many'"),
        ("--log_t_max=1:2", "--log_t_max must be a number, got '1:2'"),
        ("--overwrite=perhaps", "--overwrite must be true or false, got 'perhaps'"),
        ("--traceback=2", "--traceback must be true or false, got '2'"),
        ("--flagfile=/dev/null/x", "Unable to open flagfile"),
        ("seeds", "expected flags such as --seed=1, got 'seeds'"),
        ("--dim=0", "--dim must be at least 1, got 0"),
        ("--workdir=/dev/null/x", "cannot write to workdir '/dev/null/x'"),
        ("--resume", "--resume needs --workdir"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(run_here, capsys, flag, message):
    assert run_here(flag) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err).startswith("error: ")
    assert message in err
    assert "(--traceback shows where)" not in err


def test_a_start_that_its_dtype_cannot_hold_is_a_usage_error(run_here, capsys, tmp_path):
    folder = tmp_path / "run"
    flags = ("--init_scale=1e39", "--dtype=float32", f"--workdir={folder}")
    assert run_here(*flags) == 2
    message = "--init_scale must be positive and at most 3.4e+38 with --dtype=float32"
    assert only_line(capsys.readouterr().err) == f"error: {message}, got 1e+39"
    assert not folder.exists()


def test_a_network_whose_last_layer_is_zero_is_a_usage_error(run_here, capsys):
    network = ncjax.Params(W=jnp.zeros((3, 4)), H=jnp.ones((3, 2, 4)))
    assert run_here(run=lambda _: peel._balance(network)) == 2
    assert only_line(capsys.readouterr().err).endswith("not zero, got W = 0")


def raising(error):
    def run(_config):
        raise error

    return run


def out_of_memory(_config):
    jnp.zeros((10**7, 10**7)).block_until_ready()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (raising(KeyError("mean")), "KeyError: 'mean'"),
        (raising(AssertionError()), "AssertionError"),
        (raising(MemoryError("Unable to\nallocate")), "MemoryError: Unable to"),
        (raising(NotImplementedError("one\ntwo")), "NotImplementedError: one"),
        (lambda _: json.loads("{"), "JSONDecodeError: Expecting property name"),
        (lambda _: jnp.zeros(2).reshape(3), "TypeError: cannot reshape array"),
        (out_of_memory, "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
        (raising(ValueError("of a library")), "ValueError: of a library"),
    ],
)
def test_an_unexpected_error_is_one_line_with_its_type(run_here, capsys, run, message):
    assert run_here(run=run) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"error: {message}")
    assert line.endswith(" (--traceback shows where)")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (raising(OSError(28, "No space left on device", "x.csv")), "[Errno 28] No space"),
        (lambda config: _failed(config), "all 32 seeds failed at once"),
    ],
)
def test_an_expected_error_is_one_line_without_its_type(run_here, capsys, run, message):
    assert run_here(run=run) == 1
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"error: {message}")
    assert "--traceback" not in line


def _failed(config):
    ulpm_flow._solver_stats(config, jnp.ones((1, config.seeds, 3)))


@pytest.mark.parametrize(
    ("flags", "run", "code"),
    [
        (("--dim=0",), ulpm_flow.run, 2),
        (("--sedes=3",), ulpm_flow.run, 2),
        ((), raising(KeyError("mean")), 1),
    ],
)
def test_the_traceback_flag_adds_a_traceback_and_changes_nothing_else(
    run_here, capsys, flags, run, code
):
    assert run_here(*flags, run=run) == code
    line = only_line(capsys.readouterr().err)
    assert run_here(*flags, "--traceback", run=run) == code
    trace, _, last = capsys.readouterr().err.removesuffix("\n").rpartition("\n")
    assert last == line
    assert trace.startswith("Traceback (most recent call last):")
    config = cli.parse(ulpm_flow.Config, ["", "--traceback"])
    assert config == ulpm_flow.Config()


STOPPED = {
    ulpm_flow: (_legs, "solve"),
    saddle_analysis: (saddle_analysis, "family_row"),
    theorems: (theorems, "_flows"),
    neighbours: (_neighbours_parts, "parts"),
    deep_flow: (_deep_flows, "flow_of"),
    peel: (_training, "load_trained"),
    layers: (_layers_network, "load"),
    train_small: (_training._Loop, "run"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyError("a bug")], ids=type)
@pytest.mark.parametrize("module", STOPPED, ids=lambda module: module.NAME)
def test_a_stopped_run_prints_its_folder_last(
    run_here, capsys, monkeypatch, tmp_path, module, error
):
    def stop(*_args, **_settings):
        raise error

    monkeypatch.setattr(*STOPPED[module], stop)
    monkeypatch.setattr(_training, "stored_run", lambda *_: None)
    monkeypatch.setattr(_layers_network, "check_source", lambda *_: None)
    folder = tmp_path / "my run"
    flags = (
        f"--workdir={folder}",
        *(["--run=somewhere"] if module in (peel, layers) else []),
    )
    code = run_here(*flags, run=module.run, config=module.Config)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(folder)
    if not isinstance(error, KeyboardInterrupt):
        assert code == 1
        return
    assert code == 130
    then, command = err.splitlines()[-1].split(" with: ")
    assert then in ("interrupted; resume", "interrupted; start again")
    again = [flag for flag in shlex.split(command) if flag.startswith("--")]
    config = cli.parse(module.Config, ["", *again])
    assert config.workdir == str(folder)
    assert getattr(config, "resume", config.overwrite)


def test_only_the_first_of_several_processes_prints(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with (
        pytest.raises(KeyboardInterrupt),
        folders._final_output(train_small.Config(), tmp_path),
    ):
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("installed", ["none", "experiments"])
def test_the_experiments_name_the_extra_that_they_miss(tmp_path, installed):
    """With the extra `experiments` alone, the report still shows networks."""
    program = subprocesses.command("light_experiments", installed, str(tmp_path))
    subprocesses.output(program)
    assert (tmp_path / "page.html").exists() == (installed == "experiments")


def command(*flags, module="report", env=None, **streams):
    arguments = [sys.executable, "-m", f"experiments.{module}", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    env = os.environ | (env or {})
    return subprocess.run(arguments, text=True, env=env, **streams)


def test_the_command_runs_and_prints_its_folder_last(run_here, capsys, tmp_path):
    folder = tmp_path / "run"
    flags = ("--seeds=3", "--num_classes=3", "--dim=2", "--log_t_max=5", "--num_times=20")
    flags += (f"--workdir={folder}", "--traceback")
    done = command(*flags, module="ulpm_flow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    assert "flow: 100%" in done.stderr
    settings = json.loads((folder / "config.json").read_text())["config"]
    assert settings == folders.settings(cli.parse(ulpm_flow.Config, ["", *flags]))
    assert "traceback" not in settings
    assert run_here(*flags, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)


def test_an_interrupt_does_not_wait_for_running_computations():
    """An ordinary exit would wait for ever here, or crash."""
    done = subprocesses.run(subprocesses.command("endless", "--cpu_devices=2"), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "at work\n", "")


def test_a_closed_pipe_ends_the_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = command("--help", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_output_device_is_one_error_line():
    with open("/dev/full", "w") as full:
        done = command("--help", stdout=full)
    assert done.returncode == 1
    assert only_line(done.stderr) == "error: [Errno 28] No space left on device"


def test_letters_that_a_terminal_lacks_do_not_stop_a_command(tmp_path):
    folder = tmp_path / "Θ" / "page.html"
    folder.parent.mkdir()
    runs = Path(report.__file__).parents[1] / "results" / "animation"
    done = command(
        f"--runs={runs}", f"--output={folder}", env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder).replace("Θ", r"\u0398")
    assert folder.is_file()


# What libraries read while they are imported, and JAX when it starts.
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("JAX_PLATFORMS", "JAX finds no such device here, only "),
        ("JAX_ENABLE_X64", "invalid truth value"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "Invalid value"),
        ("MPLBACKEND", "not a valid value for backend"),
    ],
)
def test_an_impossible_environment_variable_is_one_line(tmp_path, name, message):
    folder = tmp_path / "run"
    done = command(f"--workdir={folder}", module="ulpm_flow", env={name: "nonsense"})
    assert (done.returncode, done.stdout) == (2, "")
    line = only_line(done.stderr)
    assert line.startswith(f"error: {name}=nonsense: ")
    assert message in line
    assert not folder.exists()


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("no libtpu.so")], ids=type
)
def test_a_platform_without_a_device_is_a_usage_error(monkeypatch, error):
    """However JAX says it: JAX_PLATFORMS=cuda without CUDA is an AssertionError."""
    requested = jax.config.jax_platforms

    def devices():
        if jax.config.jax_platforms is not None:
            raise error
        return [argparse.Namespace(platform="cpu")]

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    jax.config.update("jax_platforms", "cuda")
    try:
        with pytest.raises(BadUse, match=r"JAX_PLATFORMS=cuda: .* only cpu; unset"):
            cli._check_platforms()
    finally:
        jax.config.update("jax_platforms", requested)


def test_the_report_needs_no_device(tmp_path):
    done = command("--runs=nowhere", env={"JAX_PLATFORMS": "nonsense"})
    assert only_line(done.stderr) == "error: --runs: there is no folder 'nowhere'"
