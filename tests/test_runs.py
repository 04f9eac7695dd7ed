"""Run folders with two runs at once, full and read-only disks, pickles and kills."""

import ast
import contextlib
import errno
import importlib.metadata
import io
import json
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pytest
import subprocesses

import ncjax
from experiments import report
from experiments._runs import events, files, folders, lock, processes, provenance
from ncjax.networks import checkpoint

ROOT = Path(__file__).parents[1]
CODE = sorted(
    p for d in ("ncjax", "experiments", "benchmarks") for p in (ROOT / d).rglob("*.py")
)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def quick(monkeypatch):
    """Stand-ins for the numerics."""
    damage.stand_in(monkeypatch)
    return monkeypatch


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Two runs in one folder


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the lock of a folder."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        subprocesses.command("hold_lock", str(tmp_path / "run")),
        env=os.environ | subprocesses.PATH,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("name", "flags"),
    [("ulpm_flow", {}), ("theorems", {"overwrite": True}), ("train_small", {})],
)
def test_a_folder_in_use_is_refused(quick, tmp_path, holder, name, flags):
    with pytest.raises(ValueError, match="is in use by another run") as raised:
        damage.run(name, tmp_path / "run", **flags)
    message = str(raised.value)
    assert str(tmp_path / "run") in message
    assert f"process {holder.pid} on {socket.gethostname()}: " in message
    assert message.endswith("give another --workdir")
    assert "\n" not in message
    assert names(tmp_path / "run") == {".lock"}


def test_a_lock_ends_with_its_process(quick, tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    folder = damage.run("ulpm_flow", tmp_path / "run")
    assert not (folder / ".lock").exists()


def test_a_run_holds_its_folder_to_its_end_and_no_longer(quick, tmp_path):
    refusals = []

    def again(*_):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on") as raised:
            damage.run("theorems", tmp_path, overwrite=True)
        refusals.append(raised)

    with quick.context() as patch:
        patch.setattr(damage.theorems, "_run", again)
        damage.run("theorems", tmp_path)
    assert len(refusals) == 1
    damage.run("theorems", tmp_path, overwrite=True)


def test_only_the_first_process_locks(quick, tmp_path, holder):
    answer = json.dumps({"folder": str(tmp_path / "run"), "finished": False}).encode()
    quick.setattr(processes, "is_first", lambda: False)
    quick.setattr(processes, "exchange", lambda _: [answer, b"{}"])
    config = damage.train_small.Config(workdir=str(tmp_path / "run"))
    with processes.open_config(config, "train_small", ()) as opened:
        assert opened == (tmp_path / "run", False)


def test_a_lock_file_removed_while_waiting_is_made_again(tmp_path, monkeypatch):
    unchanged = lock._lock
    tried = []

    def remove_first(descriptor, path):
        unchanged(descriptor, path)
        if not tried:
            path.unlink()  # as its holder does at the end
        tried.append(descriptor)

    monkeypatch.setattr(lock, "_lock", remove_first)
    with lock.held(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert len(tried) == 2


def test_a_disk_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="on a disk without locks"), lock.held(tmp_path):
        pass


def test_a_lock_file_that_cannot_be_made_is_an_error(quick, tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot lock .*\.lock: Is a directory"):
        damage.run("theorems", tmp_path)


def test_a_clone_that_is_not_installed_has_its_version(monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", absent)
    versions = provenance.provenance("flax")["versions"]
    assert f"version = {versions['ncjax']}\n" in (ROOT / "setup.cfg").read_text()
    assert versions["flax"] == "not installed"


# Full and read-only disks


def cut_off(patch, target, error):
    """Let writes to files whose names start with `target` fail with this error."""
    replace = Path.replace

    def refuse(path, goal):
        if Path(goal).name.startswith(target):
            raise error
        return replace(path, goal)

    patch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("ulpm_flow", f) for f in ("config", "checkpoint", "metrics", "figure2.pdf")),
        *(("ulpm_flow", "summary"), ("theorems", "theorems.md"), ("peel", "peel.csv")),
        *(("train_small", f) for f in ("metrics", "collapse.csv", "training.png")),
    ],
)
def test_a_full_disk_error_names_the_file_and_the_next_command(
    quick, tmp_path, name, target
):
    damage.run("train_small", tmp_path / "source")
    expected = damage.run(name, tmp_path / "expected")
    folder = tmp_path / "run"
    with quick.context() as patch:
        cut_off(patch, target, FULL)
        with pytest.raises(OSError, match="No space left on device; free some") as raised:
            damage.run(name, folder)
    message = str(raised.value)
    assert f"cannot write {folder}/{target}" in message
    afresh = name == "theorems" or target == "config"
    how, flag = ("start again", "overwrite") if afresh else ("resume", "resume")
    assert f"; then {how} with: python -m" in message
    assert f"--workdir={folder} --{flag}" in message
    assert "\n" not in message
    assert not [n for n in names(folder) if n.startswith(".")]
    damage.run(name, folder, **{flag: True})
    for path in expected.glob("*.csv"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_other_disk_errors_name_the_file(quick, tmp_path, code):
    cut_off(quick, "metrics", OSError(code, os.strerror(code)))
    with pytest.raises(OSError, match=f"metrics.csv: {os.strerror(code)}"):
        damage.run("ulpm_flow", tmp_path)


def test_a_checkpoint_that_does_not_fit_keeps_the_previous_one(quick, tmp_path):
    expected = damage.run("train_small", tmp_path / "expected")
    folder = tmp_path / "run"
    save = checkpoint.ocp.CheckpointManager.save

    def too_large(self, epoch, **rest):
        if epoch == 4:
            (folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
            raise ValueError(
                'RESOURCE_EXHAUSTED: Error writing "W": Failed to write 1 bytes to file 9: '
                "No space left on device [os_error_code='28']"
            )
        return save(self, epoch, **rest)

    with quick.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", too_large)
        with pytest.raises(
            OSError, match=r"checkpoints/4: No space left on device; free some space; then"
        ):
            damage.run("train_small", folder)
    assert not list(folder.glob("checkpoints/*tmp*"))
    assert checkpoint.newest_epoch(folder / "checkpoints") == 2
    damage.run("train_small", folder, resume=True)
    assert (folder / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()


def test_a_file_size_limit_of_the_kernel_is_an_error_and_the_run_resumes(quick, tmp_path):
    """The kernel itself refuses; each limit hits another file."""
    expected = damage.run("train_small", tmp_path / "expected")
    limits = ("400", "1500", "6000")
    command = subprocesses.command("limited_files", str(tmp_path), *limits)
    lines = subprocesses.output(command).splitlines()
    errors = [line for line in lines if line.startswith("refused: ")]
    assert all("File too large" in line for line in errors), errors
    files = {line.split(": ")[1].replace(str(tmp_path), "") for line in errors}
    assert len(files) >= 2, errors
    for limit in limits:
        assert not [n for n in names(tmp_path / limit) if n.endswith(".part")]
        same = (tmp_path / limit / "metrics.csv").read_bytes()
        assert same == (expected / "metrics.csv").read_bytes()


def test_events_that_cannot_be_written_end_the_run(quick, tmp_path):
    def refuse(self):
        raise FULL

    quick.setattr(events.RecordWriter, "flush", refuse)
    with pytest.raises(OSError, match=r"cannot write .*tensorboard/events.*No space left"):
        damage.run("train_small", tmp_path)


def test_events_are_on_the_disk_at_once(tmp_path):
    written = events.Events(tmp_path / "tensorboard", purge_epoch=3)
    written.add(3, {"loss": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    written.close()
    assert path.read_bytes() == content
    assert b"loss" in content
    assert np.float32(0.5).tobytes() in content


def test_a_report_that_cannot_be_written_is_an_error(quick, tmp_path):
    damage.run("theorems", tmp_path / "run")
    (tmp_path / "page.html").write_text("before")
    cut_off(quick, "page", FULL)
    config = report.Config(
        runs=str(tmp_path / "run"), output=str(tmp_path / "page.html"), overwrite=True
    )
    with pytest.raises(OSError, match=r"cannot write .*page.html: No space left"):
        report.run(config)
    assert (tmp_path / "page.html").read_text() == "before"


def test_a_read_only_folder_is_refused_before_any_work(quick, tmp_path):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    quick.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ValueError, match=r"cannot write to workdir .*: Read-only file"):
        damage.run("theorems", tmp_path)
    assert names(tmp_path) == set()


def test_resume_removes_the_partial_files_of_a_killed_run(quick, tmp_path):
    folder = damage.interrupted(quick, "ulpm_flow", tmp_path / "run")
    left = folder / ".metrics.csv.abcdefgh.part"
    left.write_text("half")
    other = folder / ".notes.part"
    other.write_text("mine")
    damage.run("ulpm_flow", folder, resume=True)
    assert not left.exists()
    assert other.read_text() == "mine"


def test_resuming_makes_no_folder(quick, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        damage.run("ulpm_flow", tmp_path / "nowhere", resume=True)
    assert names(tmp_path) == set()


# Reading a folder


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_resume_refuses_a_changed_number_in_a_json_file(quick, tmp_path, name):
    folder = damage.run("ulpm_flow", tmp_path / "run")
    path = folder / name
    text = path.read_text()
    assert '"seeds": 2' in text
    path.write_text(text.replace('"seeds": 2', '"seeds": 3', 1))
    with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 does not fit"):
        damage.run("ulpm_flow", folder, resume=True)


def test_files_without_a_digest_from_earlier_versions_are_read():
    for path in (ROOT / "results").rglob("summary.json"):
        assert folders.is_finished(path.parent)


def test_resume_of_a_finished_run_names_the_changed_file(quick, tmp_path):
    folder = damage.run("ulpm_flow", tmp_path / "run")
    path = folder / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(ValueError, match=r"missing or damaged: .*metrics.csv; remove its"):
        damage.run("ulpm_flow", folder, resume=True)


def test_resume_refuses_changed_metrics(quick, tmp_path):
    folder = damage.interrupted(quick, "train_small", tmp_path / "run")
    path = folder / "metrics.csv"
    text = path.read_text()
    digit = text.rindex(".") + 1
    path.write_text(f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}")
    with pytest.raises(ValueError, match=r"metrics.csv is missing or damaged: give --over"):
        damage.run("train_small", folder, resume=True)


def test_restore_refuses_changed_arrays(tmp_path, monkeypatch):
    """Orbax itself would return them."""
    state = {"W": np.arange(6.0), "H": np.ones(3)}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {"note": "text"})
        restored, notes = checkpoints.restore(state)
        assert notes == {"note": "text"}
        np.testing.assert_array_equal(restored["W"], state["W"])
        restore = checkpoint.ocp.CheckpointManager.restore

        def flip(self, *args, **kwargs):
            got = restore(self, *args, **kwargs)
            return got | {"W": got["W"] + np.eye(6)[2] * 1e-9}

        monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", flip)
        with pytest.raises(ValueError, match=r"cannot restore .*/1, remove .* not those"):
            checkpoints.restore(state)


# No pickle


def loads_pickle(tree):
    """Names in a module that can load a pickle."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from {node.module} if node.module.split(".")[0] in modules else ()
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("np.load", "numpy.load", "jnp.load"):
                yield from {called} if keywords.get("allow_pickle") != "False" else ()
            elif called in ("torch.load", "pd.read_pickle", "np.loads"):
                yield called


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_no_code_loads_a_pickle(path):
    assert list(loads_pickle(ast.parse(path.read_text()))) == []


def test_the_search_for_pickles_finds_them():
    code = "import pickle\nfrom joblib import load\nnp.load(f)\ntorch.load(f)"
    assert len(list(loads_pickle(ast.parse(code)))) == 4
    assert list(loads_pickle(ast.parse("np.load(f, allow_pickle=False)"))) == []


class Bomb:
    """An object whose pickle, loaded, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["ulpm_flow", "peel"])
def test_a_pickle_in_a_folder_is_not_loaded(quick, tmp_path, name):
    damage.run("train_small", tmp_path / "source")
    folder = damage.interrupted(quick, name, tmp_path / "run")
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    with np.load(folder / "checkpoint.npz") as stored:
        arrays = dict(stored)
    np.savez(folder / "checkpoint.npz", **arrays | {"W": bomb})
    with pytest.raises(ValueError, match=r"checkpoint.npz is damaged: give --overwrite"):
        damage.run(name, folder, resume=True)
    (folder / "checkpoint.npz").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"checkpoint.npz is damaged: give --overwrite"):
        damage.run(name, folder, resume=True)
    assert not (tmp_path / "exploded").exists()
    with np.load(io.BytesIO(np_bytes(bomb)), allow_pickle=True) as stored:
        stored["W"]
    assert (tmp_path / "exploded").exists()  # the pickle does make a file if it is loaded


def np_bytes(array):
    buffer = io.BytesIO()
    np.savez(buffer, W=array)
    return buffer.getvalue()


_WATCHED: list[set[str]] = []
sys.addaudithook(
    lambda event, args: (
        _WATCHED[-1].add(f"{args[0]}.{args[1]}")
        if event == "pickle.find_class" and _WATCHED
        else None
    )
)


def test_nothing_is_unpickled_while_a_run_goes_on(quick, tmp_path):
    """The interpreter itself reports each class that an unpickler looks up."""
    found = set()
    _WATCHED.append(found)
    try:
        pickle.loads(pickle.dumps(ncjax.Params(1, 2)))
        assert found  # the hook works
        found.clear()
        damage.run("train_small", tmp_path / "source")
        for name in ("ulpm_flow", "train_small", "peel"):
            folder = damage.interrupted(quick, name, tmp_path / name)
            damage.run(name, folder, resume=True)
        report.run(report.Config(runs=str(tmp_path), output=str(tmp_path / "page.html")))
    finally:
        _WATCHED.pop()
    assert found == set()


def test_a_table_has_a_dash_where_there_is_no_number(tmp_path):
    files.write_table(
        tmp_path / "table", [{"metric": "a", "at_zero": math.nan, "end": 0.5}]
    )
    assert (tmp_path / "table.md").read_text().splitlines()[-1] == "| a | - | 0.5 |"


def test_settings_that_differ_are_quoted_for_a_shell(tmp_path):
    config = {"train_split": "train[:9]", "width": 1.0}
    files.write_json(tmp_path / folders.CONFIG, {"config": config})
    with pytest.raises(
        ValueError, match=r"it with '--train_split=train\[:9\]' --width=1\.0"
    ):
        folders._reopen(tmp_path, {"train_split": "train", "width": 2.0}, {}, {})
