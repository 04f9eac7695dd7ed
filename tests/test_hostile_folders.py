"""Folders that somebody else made: pipes, links, devices, and content of any shape."""

import errno
import html.parser
import json
import os
import random
import re
import shutil
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import damage
import numpy as np
import pytest

from experiments import report
from experiments._runs import files, folders, lock, page, reading

RESULTS = Path(__file__).parents[1] / "results"
SOUND = ("train/vgg13_kmnist", "network_flow/vgg13_mnist")
KINDS = (
    *("ulpm_flow", "saddle_analysis", "theorems", "neighbours", "deep_flow", "animation"),
    *("train/vgg13_mnist", "peel/vgg13_kmnist", "layers/vgg13_mnist"),
    "network_flow/convnet_digits",
)

pytestmark = pytest.mark.usefixtures("quick_compilation", "quickly")


@pytest.fixture
def quickly():
    """Fail where a reader waits for a named pipe."""
    with damage.within(60):
        yield


@pytest.fixture
def quick(monkeypatch):
    """Stand-ins for the numerics."""
    damage.stand_in(monkeypatch)
    return monkeypatch


# Opening files


def to_pipe(path):
    os.mkfifo(path)
    return "is a named pipe"


def to_socket(path):
    path.touch()
    damage.DAMAGES["a socket instead"](path, 0)
    return "is a socket"


def to_link(path):
    path.symlink_to("/dev/zero")
    return "is a link"


def to_dangling_link(path):
    path.symlink_to("nowhere")
    return "is a link"


def to_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")
    return "is a device"


SPECIAL = (to_pipe, to_socket, to_link, to_dangling_link, to_device)


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT])
def test_only_regular_files_are_opened(tmp_path, make, flags):
    message = make(tmp_path / "file")
    with pytest.raises(ValueError, match=rf"{tmp_path}/file {message}: expected a reg"):
        reading.open_regular(tmp_path / "file", flags)


def test_a_file_that_turns_into_a_pipe_after_the_look_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "file")
    (tmp_path / "regular").touch()
    regular = os.lstat(tmp_path / "regular")
    monkeypatch.setattr(os, "lstat", lambda path: regular)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="file is a named pipe"):
        reading.open_regular(tmp_path / "file")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_folder_and_a_missing_file_give_the_errors_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        reading.open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        reading.open_regular(tmp_path / "missing")


def test_a_regular_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert reading.read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="file has 5 bytes: expected at most 4"):
        reading.read_bytes(path, 4)
    os.truncate(path, 2**40)  # a hole
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes: expected at most"):
        reading.read_bytes(path)
    assert files.file_digest(path) is None


def test_a_file_of_a_system_without_sizes_is_read_up_to_its_limit():
    path = Path("/proc/self/smaps")
    with pytest.raises(ValueError, match="is too large: expected at most 10 bytes"):
        reading.read_bytes(path, 10)


@pytest.mark.parametrize("make", SPECIAL)
def test_a_tree_holds_regular_files_only(tmp_path, make):
    reading.check_tree(tmp_path / "missing")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    reading.check_tree(tmp_path)
    message = make(tmp_path / "a" / "b" / "c")
    with pytest.raises(ValueError, match=f"b/c {message}"):
        reading.check_tree(tmp_path)


def test_a_tree_is_walked_without_following_links(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a/loop is a link"):
        reading.check_tree(tmp_path)
    with pytest.raises(ValueError, match="loop is a link"):
        reading.check_tree(tmp_path / "a" / "loop")


# The lock


@pytest.mark.parametrize("make", SPECIAL)
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path, make):
    message = make(tmp_path / ".lock")
    with pytest.raises(ValueError, match=f"lock {message}"), lock.held(tmp_path):
        pass
    assert os.path.lexists(tmp_path / ".lock")


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_the_file_that_a_lock_names_is_not_overwritten(tmp_path, link):
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    getattr(tmp_path / "run" / ".lock", link)(precious)
    with pytest.raises(ValueError, match=r"\.lock"), lock.held(tmp_path / "run"):
        pass
    assert precious.read_text() == "precious"


# Files and folders of a run


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "summary.json", "checkpoint.npz"])
def test_resume_refuses_a_file_that_is_not_regular_by_name(quick, tmp_path, make, name):
    folder = damage.interrupted(quick, "deep_flow", tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    message = make(folder / name)
    # A dangling link is no file: the run has no config, or no summary yet.
    expected = f"{name} {message}|holds no run"
    with pytest.raises((ValueError, OSError), match=expected):
        damage.run("deep_flow", folder, resume=True)


def test_a_pipe_among_orbax_files_is_refused_by_resume_and_by_peel(quick, tmp_path):
    folder = damage.interrupted(quick, "train_small", tmp_path / "source")
    path = next(p for p in (folder / "checkpoints").rglob("*") if p.is_file())
    path.unlink()
    to_pipe(path)
    message = f"{path} is a named pipe"
    with pytest.raises(ValueError, match=message):
        damage.run("train_small", folder, resume=True)
    with pytest.raises(ValueError, match=message):
        damage.run("peel", tmp_path / "peel")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_of_a_run_that_is_a_link_is_left_alone(quick, tmp_path, name):
    """Orbax would remove older checkpoints from the folder that the link names."""
    folder = damage.interrupted(quick, "train_small", tmp_path / "run")
    other = tmp_path / "other"
    shutil.move(folder / name, other)
    (folder / name).symlink_to(other)
    kept = sorted(other.rglob("*"))
    with pytest.raises(ValueError, match=f"{name} is a link"):
        damage.run("train_small", folder, resume=True)
    assert sorted(other.rglob("*")) == kept
    damage.run("train_small", folder, overwrite=True)
    assert sorted(other.rglob("*")) == kept
    assert not (folder / name).is_symlink()


def test_the_run_folder_itself_may_be_a_link(quick, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    damage.interrupted(quick, "deep_flow", tmp_path / "latest")
    damage.run("deep_flow", tmp_path / "latest", resume=True)
    assert (tmp_path / "run" / "summary.json").exists()


def test_overwrite_replaces_links_and_not_what_they_name(quick, tmp_path):
    folder = tmp_path / "run"
    damage.run("theorems", folder)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("config.json", "summary.json", "theorems.csv"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    damage.run("theorems", folder, overwrite=True)
    assert precious.read_text() == "precious"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_partial_file_that_is_a_folder_or_a_link_is_no_obstacle(quick, tmp_path):
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / "run"
    (folder / ".config.json.x.part").mkdir(parents=True)
    (folder / ".summary.json.x.part").symlink_to(tmp_path / "precious")
    damage.run("theorems", folder)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not os.path.lexists(folder / ".summary.json.x.part")


def test_a_compressed_checkpoint_is_refused_before_its_arrays_are_made(quick, tmp_path):
    """64 MB of zeros take 64 kB; they could be terabytes."""
    folder = damage.interrupted(quick, "deep_flow", tmp_path / "run")
    stored = dict(np.load(folder / "checkpoint.npz"))
    stored["zeros"] = np.zeros(2**23)
    np.savez_compressed(folder / "checkpoint.npz", **stored)
    with pytest.raises(ValueError, match=r"checkpoint.npz is damaged: give --overwrite"):
        damage.run("deep_flow", folder, resume=True)


def test_an_archive_that_names_a_huge_array_is_refused(quick, tmp_path):
    folder = damage.interrupted(quick, "deep_flow", tmp_path / "run")
    head = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head.encode() + b"\n"
    with zipfile.ZipFile(folder / "checkpoint.npz", "a") as archive:
        archive.writestr("huge.npy", entry)
    with pytest.raises(ValueError, match=r"checkpoint.npz is damaged"):
        damage.run("deep_flow", folder, resume=True)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "1" * 5000, '"\\ud800"'])
def test_json_of_any_shape_is_damaged(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is damaged$"):
        folders.stored_config(tmp_path)


@pytest.mark.parametrize("value", [1, "x", {"a": 1}, [1], [[]], [None]])
def test_earlier_settings_of_another_type_are_damage(quick, tmp_path, value):
    folder = damage.interrupted(quick, "train_small", tmp_path / "run")
    change(folder, "config.json", earlier=value)
    with pytest.raises(ValueError, match=r"config.json is damaged: 'earlier' must be a li"):
        damage.run("train_small", folder, resume=True)
    with pytest.raises(ValueError, match=r"config.json is damaged: 'earlier' must be a li"):
        damage.run("train_small", folder, resume=True, epochs=6)


def test_what_is_shown_commands_no_terminal():
    assert reading.shown("a\x1b[31m\x9b\x00\ud800\nb") == "a?[31m???\nb"
    assert reading.shown("x" * 600) == "x" * 500 + "…"


# The report


class Parsed(html.parser.HTMLParser):
    """The tags that are open at the end, the scripts and the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts, self.sections = [], 0, [""]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "section":
            self.sections.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.sections[-1] += f"{data} "


def copy(name, folder):
    """Copy configuration and summary of a committed run."""
    folder.mkdir(parents=True)
    for path in ("config.json", "summary.json"):
        shutil.copyfile(RESULTS / name / path, folder / path)
    return folder


@pytest.fixture
def runs(tmp_path):
    """A folder of two sound runs, to which a test adds another."""
    for i, name in enumerate(SOUND):
        copy(name, tmp_path / "runs" / f"sound{i}")
    return tmp_path / "runs"


def make(runs):
    """Return the sections of the report on all runs, the head first."""
    output = runs.parent / "page.html"
    report.run(report.Config(runs=str(runs), output=str(output), overwrite=True))
    parsed = Parsed(output.read_bytes().decode())
    assert parsed.open == []
    assert not parsed.scripts
    return [" ".join(section.split()) for section in parsed.sections]


def assert_sound(runs, sections):
    """The sections of the sound runs have their verdicts and their settings."""
    for i, verdict in enumerate(("no training error from epoch", "1 of 1 seeds")):
        section = next(s for s in sections[1:] if str(runs / f"sound{i}") in s)
        assert verdict in section
        assert "learning_rate=" in section or "log_t_max=" in section
        assert "versions python" in section


def section_of(folder, sections):
    return next(s for s in sections[1:] if str(folder) in s)


def change(folder, name, **entries):
    """Set entries of a JSON file, or with None remove them."""
    content = json.loads((folder / name).read_text()) | entries
    content.pop("sha256", None)
    kept = {k: v for k, v in content.items() if v is not None}
    (folder / name).write_text(json.dumps(kept))


@pytest.mark.parametrize("make_special", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "summary.json", "collapse.png"])
def test_a_special_file_is_a_line_of_its_run(runs, make_special, name):
    folder = copy("train/vgg13_mnist", runs / "odd")
    (folder / name).unlink(missing_ok=True)
    message = make_special(folder / name)
    sections = make(runs)
    assert_sound(runs, sections)
    part = sections[0] if name == "config.json" else section_of(folder, sections)
    assert (
        f"{name} {message}" in part or f"{name} cannot be read" in part or message in part
    )


@pytest.mark.parametrize("value", [[], "x", 3, [["a", "b"]]])
def test_files_of_another_type_are_a_line_of_their_run(runs, value):
    folder = copy("theorems", runs / "odd")
    change(folder, "summary.json", files=value)
    sections = make(runs)
    assert_sound(runs, sections)
    section = section_of(folder, sections)
    assert "'files' must be a table of digests" in section
    assert "statements hold" in section


@pytest.mark.parametrize(
    "name", ["a" * 5000, "nul\0byte", "../../secret", "/dev/zero", "\ud800", "", ".", ".."]
)
def test_outputs_of_odd_names_are_missing_or_damaged(runs, name):
    folder = copy("theorems", runs / "odd")
    change(folder, "summary.json", files={name: "0" * 64})
    sections = make(runs)
    assert_sound(runs, sections)
    assert "is missing or damaged: not as the run wrote it" in section_of(folder, sections)


def test_very_many_outputs_are_one_line(runs):
    folder = copy("theorems", runs / "odd")
    change(folder, "summary.json", files={str(i): "" for i in range(1500)})
    assert "1,500 files are missing or damaged" in section_of(folder, make(runs))


def test_a_network_without_a_metric_is_compared_without_it(runs):
    folder = copy("train/vgg13_mnist", runs / "odd")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["metrics"]["within_class_variation"]
    change(folder, "summary.json", metrics=summary["metrics"])
    sections = make(runs)
    assert_sound(runs, sections)
    assert "Networks side by side" in sections[0]
    assert "– → –" in sections[0]


def test_a_network_that_cannot_be_compared_is_left_out_of_the_table(runs):
    folder = copy("train/vgg13_mnist", runs / "odd")
    copy("train/vgg13_cifar10", runs / "third")
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"]["within_class_variation"]["at_the_end"] = 1e999
    change(folder, "summary.json", metrics=summary["metrics"], training_images=10**400)
    sections = make(runs)
    assert_sound(runs, sections)
    assert "Networks side by side" in sections[0]
    assert "It is not compared with other runs" in section_of(folder, sections)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["config.json", "summary.json", "collapse.png"])
def test_an_unreadable_file_is_a_line_of_its_run(runs, monkeypatch, code, name):
    """Root reads everything, so the refusal of the system is simulated."""
    folder = copy("train/vgg13_mnist", runs / "odd")
    (folder / "collapse.png").touch()
    unchanged = os.open

    def refuse(path, *arguments, **named):
        if str(path) == str(folder / name):
            raise OSError(code, os.strerror(code), str(path))
        return unchanged(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    sections = make(runs)
    assert_sound(runs, sections)
    part = sections[0] if name == "config.json" else section_of(folder, sections)
    assert os.strerror(code) in part


@pytest.mark.parametrize("when", ["before", "while it is read"])
def test_a_folder_that_vanishes_is_a_line(runs, monkeypatch, when):
    folder = copy("theorems", runs / "odd")
    unchanged = page._read_summary if when == "while it is read" else page._section

    def vanish(path, *arguments):
        if path == folder:
            shutil.rmtree(folder)
        return unchanged(path, *arguments)

    monkeypatch.setattr(page, unchanged.__name__, vanish)
    sections = make(runs)
    assert_sound(runs, sections)
    section = section_of(folder, sections)
    assert "No such file or directory" in section or "There is no summary.json" in section


@pytest.mark.parametrize("error", [RecursionError, MemoryError, KeyError, OSError])
def test_an_error_of_any_kind_is_a_line_of_its_run(runs, monkeypatch, error):
    folder = copy("theorems", runs / "odd")
    unchanged = folders.changed_files

    def fail(path, summary):
        if path == folder:
            raise error("of any\nkind")
        return unchanged(path, summary)

    monkeypatch.setattr(folders, "changed_files", fail)
    sections = make(runs)
    assert_sound(runs, sections)
    assert "of any" in section_of(folder, sections)


def test_a_folder_whose_name_is_no_text_is_shown(runs, capsys):
    folder = copy("theorems", Path(os.fsdecode(os.fsencode(runs) + b"/\xff\xfe<b>")))
    (folder / "summary.json").unlink()
    sections = make(runs)
    assert_sound(runs, sections)
    assert str(runs / "??<b>") in " ".join(sections[1:])
    assert f"unfinished: {runs / '??<b>'}" in capsys.readouterr().out


def test_loops_of_links_are_not_followed(runs):
    (runs / "loop").symlink_to(runs)
    (runs / "self").symlink_to("self")
    sections = make(runs)
    assert_sound(runs, sections)
    assert len(sections) == 3


@pytest.mark.parametrize("size", [(9000, 9000), (60000, 60000)])
def test_a_picture_of_too_many_pixels_is_a_line_of_its_run(runs, size):
    """Nothing is decoded, and no warning is given."""
    folder = copy("train/vgg13_mnist", runs / "odd")
    chunk = b"IHDR" + struct.pack(">II", *size) + bytes([8, 0, 0, 0, 0])
    length, checksum = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(chunk))
    content = b"\x89PNG\r\n\x1a\n" + length + chunk + checksum
    (folder / "collapse.png").write_bytes(content)
    sections = make(runs)
    assert_sound(runs, sections)
    assert "collapse.png is damaged" in section_of(folder, sections)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = (
    *(None, True, False, -1, 0, 10**400, -(10**400), 10**4000, 2**63, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "x" * 5000, "\ud800", "9" * 4299),
    *([], {}, [[]], [1, "a", None], {"a": {}}, "<script>alert(1)</script>", nested(300)),
)
# Put into the text of a file, because no writer of JSON writes them.
TEXTS = ("1e999", "9" * 5000, "[" * 5000 + "]" * 5000, '"\\ud800"', "NaN", "{", "")


def places(content):
    """Yield each container with a key or an index of it, at any depth."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places(content[key])


def mutate(rng, path):
    """Change a JSON file in some places; return what was done."""
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    done = []
    for _ in range(rng.randint(1, 3)):
        found = list(places(content))
        if not found:
            break
        # A place near the root is as likely as all places in long tables together.
        near = [(c, k) for c, k in found if c is content]
        container, key = rng.choice(near if near and rng.random() < 0.4 else found)
        if rng.random() < 0.3:
            del container[key]
            done.append(f"without {key!r}")
        else:
            container[key] = json.loads(json.dumps(rng.choice(VALUES)))  # a copy
            done.append(f"{key!r}: {type(container[key])!s}")
    text = json.dumps(content)
    if rng.random() < 0.2:
        start = rng.randrange(len(text))
        text = text[:start] + rng.choice(TEXTS) + text[start + rng.randint(0, 20) :]
        done.append(f"text at {start}")
    path.write_text(text)
    return done


def text_of(runs):
    """Return the report as text, and the HTML of its sections."""
    output = runs.parent / "page.html"
    report.run(report.Config(runs=str(runs), output=str(output), overwrite=True))
    text = output.read_bytes().decode()
    return text, re.findall(r"<section .*?</section>", text, flags=re.DOTALL)


def test_no_content_of_a_run_changes_what_is_shown_of_others(runs):
    """150 trials: random changes of config.json and summary.json of every experiment."""
    rng = random.Random(0)
    _, sound = text_of(runs)
    assert_sound(runs, make(runs))
    shown = 0
    for trial in range(150):
        name = KINDS[trial % len(KINDS)]
        shutil.rmtree(runs / "odd", ignore_errors=True)
        folder = copy(name, runs / "odd")
        chosen = rng.choice(["config.json", "summary.json", "summary.json"])
        done = mutate(rng, folder / chosen)
        try:
            text, sections = text_of(runs)
        except Exception as error:
            raise AssertionError((name, chosen, done)) from error
        assert set(sound) <= set(sections), (name, chosen, done)
        assert len(sections) == 3 or "Left out: " in text, (name, chosen, done)
        shown += len(sections) == 3
        if trial % 15 == 0:
            parsed = Parsed(text)
            assert parsed.open == []
            assert not parsed.scripts
    assert shown > 100


def test_a_signal_still_ends_the_report(runs, monkeypatch):
    """The guard around a run catches errors, not the user's Ctrl-C."""
    unchanged = page._section

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return unchanged(*arguments)

    monkeypatch.setattr(page, "_section", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(runs)
