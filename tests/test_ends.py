"""How commands end: signals, streams, limits of the system, checkpoints of other runs."""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import sys
import threading
from contextlib import nullcontext as does_not_raise
from pathlib import Path
from types import SimpleNamespace

import damage
import jax
import matplotlib
import numpy as np
import pytest
import subprocesses
from absl import logging
from matplotlib.figure import Figure

import ncjax
from experiments import _layers_network, _start, _training, network_flow, train_vgg
from experiments._flow_loop import Loop
from experiments._runs import cli, files, folders
from experiments._runs.errors import BadUse
from experiments._runs.interruption import Interruption, interrupt_on_signals
from ncjax import plotting
from ncjax.command import output, system
from ncjax.networks.checkpoint import Checkpoints

RUN = Path(__file__).parents[1] / "results" / "peel"
UTF8 = ("utf-8", b"\xff", 0, 1, "invalid start byte")

# The user's settings of Matplotlib


# Each changed some byte of a figure, or ended the run without LaTeX.
MINE = {
    "text.usetex": True,
    "font.family": "monospace",
    "figure.facecolor": "black",
    "savefig.facecolor": "red",
    "savefig.bbox": "standard",
    "axes.prop_cycle": matplotlib.cycler(color=["lime"]),
    "axes.grid": True,
    "lines.linewidth": 9,
    "lines.marker": "x",
    "path.sketch": (3, 100, 2),
    "pdf.compression": 0,
    "xtick.direction": "in",
    "axes.unicode_minus": False,
}


def drawn(times, values):
    """Return the files of a figure."""
    values = dict.fromkeys(ncjax.CollapseMetrics._fields, values[None])
    panels = plotting.collapse_panels(values)
    return plotting.render(plotting.figure_over_log_log_t(times, panels))


def test_figures_have_the_same_bytes_whatever_the_matplotlibrc():
    times, backend = np.geomspace(2, 9, 4), matplotlib.get_backend()
    expected = drawn(times, 10 / times)
    with matplotlib.rc_context(MINE):
        before = dict(matplotlib.rcParams)
        assert drawn(times, 10 / times) == expected
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_one_function_sets_the_style_of_all_figures():
    """No other code changes the settings of Matplotlib, or draws with pyplot."""
    root = Path(plotting.__file__).parents[1]
    sources = [p for name in ("ncjax", "experiments") for p in (root / name).rglob("*.py")]
    changing = [
        path.name
        for path in sources
        if re.search(r"rc_context|rcParams|pyplot|rcdefaults", path.read_text())
    ]
    assert changing == ["plotting.py"]


def test_a_figure_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figure.png"
    output.save_plot(Figure(figsize=(1, 1)), str(path))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*figure.png: No space left"):
        output.save_plot(Figure(figsize=(2, 2)), str(path))
    assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [ValueError("nonsense"), UnicodeDecodeError(*UTF8)])
def test_a_matplotlib_that_does_not_start_is_bad_use(monkeypatch, error):
    def fail(_name):
        raise error

    monkeypatch.setattr(output.importlib, "import_module", fail)
    with pytest.raises(output.BadUse, match="--plot: Matplotlib does not start: "):
        output.check_plot("figure.png", overwrite=True)


# Checkpoints


STATE = {"W": np.arange(6.0)}


def saved(folder, *epochs):
    """Save the state as each epoch."""
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        for epoch in epochs:
            checkpoints.save(epoch, STATE, {"metrics.csv": "ab"})
    return folder


def restored(folder):
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return checkpoints.restore(STATE)


def test_a_checkpoint_that_was_renamed_to_another_epoch_is_refused(tmp_path):
    folder = saved(tmp_path, 2, 4)
    (folder / "4").rename(folder / "9")
    with pytest.raises(
        ValueError, match=r"cannot restore .*/9, .*: it was saved as 4, and"
    ):
        restored(folder)
    (folder / "9").rename(folder / "4")
    assert restored(folder)[1] == {"metrics.csv": "ab"}
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restored(folder / "4" / "empty")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 9},
        {"notes": {"metrics.csv": "ac"}},
        {"notes": {"metrics.csw": "ab"}},
        {"sha256": None},
    ],
    ids=str,
)
def test_changed_metadata_of_a_checkpoint_are_refused(tmp_path, change):
    folder = saved(tmp_path, 4)
    edit_metadata(folder / "4", change)
    if "epoch" in change:
        (folder / "4").rename(folder / "9")
    with pytest.raises(ValueError, match=r"cannot restore .* not those that were saved"):
        restored(folder)


def test_checkpoints_of_earlier_versions_are_restored(tmp_path):
    """The first had no metadata, later ones the digest of the arrays alone."""
    of_arrays = hashlib.sha256(b"['W'] float64 (6,)" + STATE["W"].tobytes()).hexdigest()
    folder = saved(tmp_path, 4)
    for metadata in ({"sha256": of_arrays, "notes": {"metrics.csv": "ab"}}, {}):
        edit_metadata(folder / "4", metadata, replace=True)
        state, notes = restored(folder)
        np.testing.assert_array_equal(state["W"], STATE["W"])
        assert notes == metadata.get("notes", {})


def test_checkpoints_without_an_inode_left_name_their_folder(tmp_path, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints")

    monkeypatch.setattr(os, "mkdir", full)
    message = "cannot write .*/checkpoints: No space left on device; free some space"
    with pytest.raises(OSError, match=message):
        Checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("notes", [{"seed": "1"}, {}], ids=str)
def test_a_checkpoint_of_another_seed_is_refused(tmp_path, notes):
    """Earlier versions stored no seed."""
    stored = SimpleNamespace(restore=lambda like: (like, notes))
    loop = SimpleNamespace(_empty_state=lambda seed: STATE, checkpoints=tmp_path)
    assert Loop._read(loop, stored, 1) == (STATE, notes)
    message = r".*/seed0 holds the checkpoint of seed 1: rename"
    refused = pytest.raises(ValueError, match=message) if notes else does_not_raise()
    with refused:
        Loop._read(loop, stored, 0)


def edit_metadata(folder, change, replace=False):
    """Change the metadata that Orbax keeps in a checkpoint."""
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    old = {} if replace else content["custom_metadata"]
    new = {k: v for k, v in {**old, **change}.items() if v is not None}
    path.write_text(json.dumps(content | {"custom_metadata": new}))


# Runs of other versions


def stored_run(folder, config, **record):
    folder.mkdir(exist_ok=True)
    (folder / _training.CHECKPOINTS).mkdir(exist_ok=True)
    files.write_sealed(folder / folders.CONFIG, {"config": config} | record)
    return folder


SETTINGS = {
    train_vgg: folders.settings(train_vgg.Config(seeds=2)),
    network_flow: folders.settings(network_flow.Config(seeds=2)),
}


@pytest.mark.parametrize(
    ("record", "maker"),
    [
        ({"versions": {"ncjax": "0.9.0"}}, "ncjax 0.9.0, which"),
        ({}, "the version of ncjax that"),
    ],
)
def test_a_setting_that_this_version_lacks_is_named_with_the_version(
    tmp_path, record, maker
):
    for number, (module, known) in enumerate(SETTINGS.items()):
        newer = known | {"smoothing": 0.1}
        folder = stored_run(tmp_path / str(number), newer, experiment=module.NAME, **record)
        message = f"does not know, --smoothing=0.1: use {maker} made the run"
        config = module.Config(workdir=str(folder), resume=True)
        with (
            pytest.raises(BadUse, match=message),
            folders.open_config(config, module.NAME, ()),
        ):
            pass
        with pytest.raises(BadUse, match=message):
            _layers_network.check_source(folder, "", 0)


@pytest.mark.parametrize("experiment", [{"experiment": "train_vgg"}, {}], ids=str)
def test_a_setting_that_a_run_lacks_has_its_default(tmp_path, experiment):
    """The default of its own experiment: VGG pads images, other networks do not."""
    known = SETTINGS[train_vgg]
    older = {k: v for k, v in known.items() if k not in ("image_size", "clock")}
    folder = stored_run(tmp_path / "run", older, **experiment)
    config, options = _training.stored_run(folder, seed=1)
    assert (config.image_size, config.clock, config.seeds) == (32, "epoch", 2)
    assert options == {"head": "linear"}
    known = SETTINGS[network_flow]
    older = {k: v for k, v in known.items() if k != "norm"}
    folder = stored_run(tmp_path / "flow", older)
    flow = _layers_network._stored_flow(folder, "", 1)
    assert vars(flow) == known | {"data_dir": ""}


def test_a_checkpoint_of_a_version_with_fewer_settings_is_read(tmp_path):
    stored_run(tmp_path, {"seed": 3})
    folders.save_checkpoint(tmp_path, {"W": np.ones(2)})
    stored_run(tmp_path, {"seed": 3, "clock": "epoch"})
    np.testing.assert_array_equal(folders.load_checkpoint(tmp_path)["W"], np.ones(2))
    stored_run(tmp_path, {"seed": 4, "clock": "epoch"})
    with pytest.raises(BadUse, match="belongs to a run of other settings"):
        folders.load_checkpoint(tmp_path)


# Signals


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(params=STOPPING, ids=lambda number: number.name)
def number(request):
    """A signal whose handler is put back."""
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_each_signal_requests_a_stop_and_a_second_one_stops(number, capfd):
    signal.signal(number, signal.SIG_DFL)
    with Interruption("epoch") as interruption:
        os.kill(os.getpid(), number)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_DFL
    assert capfd.readouterr().err.count("interrupted: saving after this epoch") == 1


def test_an_ignored_signal_stays_ignored(number):
    """As SIGHUP is by `nohup`, and SIGINT in the background of a script."""
    signal.signal(number, signal.SIG_IGN)
    interrupt_on_signals()
    with Interruption("epoch") as interruption:
        os.kill(os.getpid(), number)
        assert not interruption.requested
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_signal_outside_of_such_work_ends_as_an_interruption(number):
    signal.signal(number, signal.SIG_DFL)
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_a_signal_is_handled_where_stderr_is_closed(number, monkeypatch):
    def closed(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    signal.signal(number, signal.SIG_DFL)
    with Interruption("epoch") as interruption:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", closed)
            interruption._request(number, None)
        assert interruption.requested


# Streams, in this process: a command takes seconds to start


class Ended(Exception):
    """The process would end with this code."""


@pytest.fixture
def ended(monkeypatch):
    """Run the command of an experiment on stand-ins, and return its exit code."""
    damage.stand_in(monkeypatch)
    for name in ("set_up_jax", "interrupt_on_signals"):
        monkeypatch.setattr(cli, name, lambda *_: None)

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr(cli.sys, "exit", end)
    monkeypatch.setattr(logging, "set_verbosity", lambda _: None)

    def run(name, folder, *flags, doing=None):
        module = damage.MODULES[name]
        given = vars(damage.CONFIGS[name]) | {"workdir": str(folder)}
        given = [f"--{k}={v}" for k, v in given.items()]
        monkeypatch.setattr(sys, "argv", ["command", *given, *flags])
        with pytest.raises(Ended) as caught:
            cli.main(module.Config, doing or module.run, f"experiments.{name}")
        return caught.value.args[0]

    return run


@contextlib.contextmanager
def unread_stderr():
    """Replace stderr by a pipe that nothing reads."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield
    with contextlib.suppress(OSError):
        stream.close()


@pytest.mark.parametrize("name", ["train_small", "ulpm_flow"])
def test_a_broken_pipe_at_the_progress_bar_ends_with_141_and_resumes(
    ended, tmp_path, capsys, name
):
    folder = tmp_path / "run"
    with unread_stderr():
        assert ended(name, folder) == 141
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert not (folder / "summary.json").exists()
    assert ended(name, folder, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("a bug"), 1),
        (BadUse("no such thing"), 2),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
    ],
    ids=repr,
)
def test_an_error_keeps_its_code_where_nothing_reads(ended, tmp_path, error, code):
    def run(config):
        with folders.open_config(config, "ulpm_flow", ()):
            raise error

    with unread_stderr():
        assert ended("ulpm_flow", tmp_path, doing=run) == code


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB\nfor an array"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Unable to allocate 9 GiB"),
    ],
    ids=type,
)
def test_exhausted_memory_names_sizes_and_the_next_command(ended, tmp_path, capsys, error):
    def run(config):
        with folders.open_config(config, "ulpm_flow", ()):
            raise error

    assert ended("ulpm_flow", tmp_path, doing=run) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.match(r"error: out of memory: .*Unable to allocate 9 GiB; free some", line)
    assert "--seeds, --num_classes, --per_class, --dim" in line
    assert "then resume with: python -m" in line
    assert f"--workdir={tmp_path} --resume" in line


# Streams and limits, in processes of their own


def shell(line, **settings):
    """Run a line of the shell, where $PYTHON starts the command."""
    return subprocesses.run(
        ["sh", "-c", line], os.environ | {"PYTHON": sys.executable}, **settings
    )


def test_closed_streams_are_the_null_device():
    """No file takes their numbers, and nothing is printed elsewhere."""
    program = (
        "import os, sys; from ncjax.command import system; system.open_streams(); "
        "file = open(os.devnull); assert file.fileno() > 2; print('out'); "
        "print('err', file=sys.stderr); assert sys.stdin.read() == ''"
    )
    line = f'"$PYTHON" -c "{program}"'
    for closed, out, err in (
        ("2>&- <&-", "out\n", ""),
        (">&- </dev/null", "", "err\n"),
        ("<&- >&- 2>&-", "", ""),
    ):
        done = shell(f"{line} {closed}")
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_a_command_runs_without_a_folder_streams_or_a_terminal(tmp_path):
    """Its folder was deleted, stderr is closed, the terminal has no width."""
    line = (
        f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; unset TERM; "
        f'COLUMNS=0 LC_ALL=C "$PYTHON" -m experiments.report --runs={RUN} '
        f"--output={tmp_path}/page.html 2>&-"
    )
    done = shell(line)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/page.html"


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("-v 1000000", "the memory of this process is limited to 1024000000 bytes"),
        ("-d 500000", "the memory of this process is limited to 512000000 bytes"),
        ("-n 20", "the number of open files of this process is limited to 20 (ulimit -n)"),
    ],
)
def test_a_limit_too_low_for_jax_is_refused_before_it_is_imported(limit, message):
    for command in ("experiments.ulpm_flow --seeds=2", "ncjax flow"):
        done = shell(f'ulimit {limit}; "$PYTHON" -m {command}')
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {message}")
        assert "raise the limit" in done.stderr


def test_a_long_unknown_setting_leaves_room_for_the_version_that_knows_it(tmp_path):
    known = folders.settings(network_flow.Config())
    newer = known | {"smoothing\x1b[2J": "long" * 5000}
    versions = {"ncjax": "0.9.0"}
    folder = stored_run(tmp_path, newer, experiment=network_flow.NAME, versions=versions)
    with pytest.raises(BadUse) as raised:
        _layers_network.check_source(folder, "", 0)
    message = str(raised.value)
    assert message.endswith("…: use ncjax 0.9.0, which made the run")
    assert len(message) < 1000 + len(str(folder))
    assert "\x1b" not in message


def test_a_process_without_threads_is_refused(monkeypatch):
    start, started = threading.Thread.start, []

    def limited(self):
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert system.lacking().startswith("this process can start 5 threads, and JAX needs")
    assert not any(thread.is_alive() for thread in started)


def test_an_interruption_while_threads_are_counted_leaves_none_that_waits(monkeypatch):
    start, started = threading.Thread.start, []

    def interrupted(self):
        start(self)
        started.append(self)
        if len(started) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        system.lacking()
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()


def test_an_interruption_that_an_extension_reports_as_an_import_error_prints_nothing(
    capsys,
):
    error = ImportError("Encountered an error while initializing the extension.")
    error.__cause__ = KeyboardInterrupt()
    with pytest.raises(SystemExit) as raised:
        _start._print(ImportError, error, None)
    assert raised.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_a_matplotlibrc_that_is_not_text_ends_in_one_line(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"font.family: \xff\xfe\n")
    program = "import sys; sys.argv = ['-m']; import experiments, ncjax.plotting"
    done = shell(f'exec "$PYTHON" -c "{program}"', cwd=tmp_path)
    warning, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert warning.startswith("Cannot decode configuration file ")
    assert line.startswith("error: a matplotlibrc: 'utf-8' codec can't decode byte 0xff")
