"""Compiled programs stay on disk, in a safe and bounded folder."""

import json
import os
import stat
import warnings

import jax
import pytest
import subprocesses

from experiments._runs import compilation


@pytest.fixture
def environment(tmp_path):
    """Environment of a process with an empty cache folder, as a user has it."""
    names = [name for name in os.environ if name.startswith(("JAX_COMP", "JAX_PERSIST"))]
    rest = {name: value for name, value in os.environ.items() if name not in names}
    return rest | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}


def kept(environment, *damages):
    command = subprocesses.command("kept_programs", *damages)
    done = subprocesses.run(command, environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


def test_a_program_is_kept_and_a_damaged_one_is_replaced(environment):
    found, lines = kept(environment, "cut", "flipped")
    assert found["sums"] == [3.0] * 4
    assert found["files"] == [1] * 4
    assert found["changed"] == [False, True, True]
    start = "warning: a damaged file of a compiled program is replaced: jit_"
    assert [line.startswith(start) for line in lines] == [True, True]


@pytest.mark.parametrize(
    "setting", [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"XDG_CACHE_HOME": "/dev/null"}]
)
def test_no_program_is_kept_if_the_user_says_so_or_there_is_no_room(environment, setting):
    environment |= {"XDG_CACHE_HOME": environment["XDG_CACHE_HOME"]} | setting
    found, lines = kept(environment)
    assert (found["sums"], found["files"], lines) == ([3.0] * 2, [0] * 2, [])


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The folder of the cache, which is empty, in a process of its own kind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compilation._folder()


def test_the_folder_is_private_and_of_this_machine(folders, tmp_path):
    assert folders.parent == tmp_path / "ncjax" / "compiled"
    assert stat.S_IMODE(folders.stat().st_mode) & 0o077 == 0
    assert list(folders.iterdir()) == []


def test_a_folder_that_others_may_write_is_not_used(folders):
    folders.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        compilation._folder()


def test_a_relative_folder_is_ignored_as_the_standard_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation._folder().is_relative_to(tmp_path / ".cache")


def test_a_processor_with_other_instructions_has_another_folder(monkeypatch):
    here = compilation._machine()
    monkeypatch.setattr(compilation.platform, "machine", lambda: "another")
    assert compilation._machine() != here


def test_the_folder_stays_below_its_bound_and_keeps_what_was_used_last(
    folders, monkeypatch
):
    monkeypatch.setattr(compilation, "_LARGEST", 250)
    for age in range(5):
        path = folders / f"jit_{age}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    (folders / "jit_empty-cache").write_bytes(b"")
    (folders / "other").write_bytes(b"x" * 1000)
    compilation._remove_oldest(folders)
    left = sorted(path.name for path in folders.iterdir())
    assert left == ["jit_0-cache", "jit_1-cache", "other"]


def test_the_users_own_folder_is_left_alone(monkeypatch, tmp_path):
    """The tests have one of their own, or none at all without pytest's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = (jax.config.jax_compilation_cache_dir, warnings.showwarning)
    compilation.keep_programs()
    assert (jax.config.jax_compilation_cache_dir, warnings.showwarning) == before
    assert list(tmp_path.iterdir()) == []
