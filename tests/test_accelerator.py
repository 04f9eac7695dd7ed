"""The checks of a device: dry runs, hangs, aborts, failures, and the report of them."""

import itertools
import json
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    _accelerator_checks,
    _accelerator_images,
    _accelerator_process,
    _accelerator_step,
    _accelerator_tests,
    _accelerator_torch,
    accelerator,
)
from benchmarks._accelerator_checks import DRY, FAIL, OK, SKIP, Check, Finding, Setting
from benchmarks._accelerator_report import Report, line
from benchmarks._accelerator_sections import SECTIONS, Section
from experiments._runs.errors import BadUse, RunFailed
from ncjax.networks import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

# All sections but `tests`, which would run pytest here. Of a section that compiles a lot,
# those checks whose names begin so.
TRIED = {
    "environment": ("",),
    "numerics": ("last_layer, float64", "hessian_eig, dense", "pooling", "certificate, so"),
    "step": ("",),
    "torch": ("",),
    "train": ("",),
    "flow": (),
    "wide": ("collapse_metrics,",),
    "metrics": ("last_layer",),
    "hessian": ("spectral",),
}


def rows(checks, **settings):
    return list(_accelerator_checks.rows("a", checks, Setting(**settings)))


def finding(ok=True, value=1.5, **details):
    return Check("c", lambda: Finding(ok, value, "s", details), accelerator=False)


def raising(error, accelerator=False):
    def call():
        raise error

    return Check("raises", call, accelerator)


def test_every_section_runs_with_tiny_sizes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
    assert TRIED.keys() | {"tests"} == SECTIONS.keys()
    setting = Setting(tiny=True, folder=str(tmp_path))
    for name, tried in TRIED.items():
        checks = SECTIONS[name].checks(setting)
        chosen = [check for check in checks if check.name.startswith(tried)]
        assert chosen or not tried
        for row in _accelerator_checks.rows(name, chosen, setting):
            allowed = SKIP if name == "torch" or row.name == "driver" else DRY
            assert row.verdict in (OK, allowed), row
            json.dumps(row._asdict(), allow_nan=False)
    assert {"metrics.csv", "collapse.png", "training.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_limits_of_all_sections_are_below_nine_minutes():
    assert sum(section.seconds for section in SECTIONS.values()) < 9 * 60


def test_a_check_that_raises_is_a_row_and_the_next_one_runs():
    first, second, third = rows(
        [
            raising(ValueError("too\nlong")),
            finding(value=np.float32(2)),
            raising(_accelerator_checks.Skipped("no torch")),
        ]
    )
    assert (first.verdict, first.reason) == (FAIL, "ValueError: too")
    assert (second.verdict, second.value, second.unit) == (OK, 2.0, "s")
    assert (third.verdict, third.reason) == (SKIP, "no torch")


def test_numbers_that_json_lacks_are_kept_as_text():
    (row,) = rows([finding(False, np.nan, bound=np.inf, peak=None)])
    assert row.verdict == FAIL
    assert row.value == "nan"
    assert row.details == {"bound": "inf", "peak": None}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_checks_of_an_accelerator_are_skipped_on_a_cpu_and_dry_with_tiny_sizes(
    platform, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    check = finding()._replace(accelerator=True)
    (full,), (tiny,) = rows([check]), rows([check], tiny=True)
    expected = {"cpu": (SKIP, DRY), "gpu": (OK, OK)}[platform]
    assert (full.verdict, tiny.verdict) == expected
    if platform == "cpu":
        assert full.reason == _accelerator_checks.NO_ACCELERATOR


def test_no_check_starts_when_the_time_of_its_section_is_over():
    (row,) = rows([raising(AssertionError())], deadline=time.monotonic() + 1)
    assert (row.verdict, row.reason) == (SKIP, "the section has no time left")


# A section in a process of its own: it writes a row, then ends in some way.
PROGRAM = """
import json, os, subprocess, sys, time
print(json.dumps({"section": "s", "name": "first", "verdict": "ok"}), flush=True)
print("a last word", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("os.abort()", "ended with SIGABRT: a last word"),
        ("sys.exit(3)", "ended with exit code 3: a last word"),
        (
            "subprocess.Popen(['sleep', '60']); time.sleep(60)",
            "killed after 2 s: a last word",
        ),
        ("os.close(1); time.sleep(60)", "killed after 2 s: a last word"),
        ("", None),
    ],
)
def test_a_section_that_hangs_or_aborts_costs_itself_alone(
    tmp_path, monkeypatch, ending, reason
):
    started = subprocess_started(monkeypatch, PROGRAM + ending)
    found = list(_accelerator_process.section_rows("s", Setting(folder=str(tmp_path)), 2))
    assert [row.name for row in found] == ["first", "the section"][: 1 + bool(reason)]
    if reason:
        assert (found[1].verdict, found[1].reason) == (FAIL, reason)
    (process,) = started
    assert process.poll() is not None
    assert "a last word" in (tmp_path / "s.log").read_text()


def subprocess_started(monkeypatch, program):
    """Make sections run this program; return the list of processes that begin."""
    popen, started = _accelerator_process.subprocess.Popen, []

    def begin(_command, **settings):
        started.append(popen([sys.executable, "-c", program], **settings))
        return started[-1]

    monkeypatch.setattr(_accelerator_process.subprocess, "Popen", begin)
    return started


@pytest.fixture
def fake_sections(monkeypatch):
    """Sections whose checks run in this process."""

    def section_rows(name, setting, _seconds):
        return _accelerator_checks.rows(name, SECTIONS[name].checks(setting), setting)

    sections = {
        "good": Section(lambda _: [finding()], 1),
        "bad": Section(lambda _: [finding(False), finding(accelerated=1)], 1),
        "device": Section(lambda _: [raising(AssertionError(), accelerator=True)], 1),
    }
    monkeypatch.setattr(accelerator, "section_rows", section_rows)
    for name in [*SECTIONS]:
        monkeypatch.delitem(SECTIONS, name)
    for name, section in sections.items():
        monkeypatch.setitem(SECTIONS, name, section)


@pytest.mark.usefixtures("fake_sections")
def test_a_report_has_a_line_for_each_check_and_is_never_overwritten(tmp_path, capsys):
    config = accelerator.Config(only="good,device", workdir=str(tmp_path / "r"))
    folder = accelerator.run(config)
    text = (folder / "report.txt").read_text()
    printed = capsys.readouterr().out
    assert printed == f"{text}{folder}\n"
    assert "ok   good        c" in text
    assert "1 ok, 0 FAIL, 1 skip, 0 dry" in text
    assert "need an accelerator, skipped on this CPU: device 1" in text
    stored = [json.loads(row) for row in (folder / "report.jsonl").read_text().splitlines()]
    assert [(row["section"], row["verdict"]) for row in stored] == [
        ("good", OK),
        ("device", SKIP),
    ]
    with pytest.raises(BadUse, match=r"holds results already \(report\.txt, "):
        accelerator.run(config)
    assert (folder / "report.txt").read_text() == text
    (folder / "metrics.csv").touch()
    again = accelerator.Config(only="good", workdir=str(folder), overwrite=True)
    accelerator.run(again)
    assert "device" not in (folder / "report.txt").read_text()
    assert not (folder / "metrics.csv").exists()


@pytest.mark.usefixtures("fake_sections")
def test_a_failed_check_fails_the_run_after_the_others(tmp_path):
    with pytest.raises(RunFailed, match=r"1 of 3 checks failed, in .*report.txt: bad: c"):
        accelerator.run(accelerator.Config(only="good,bad", workdir=str(tmp_path)))
    assert (tmp_path / "report.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "flow,speed"}, r"--only must be all, or among .*got \['speed'\]"),
        ({"slowness": 0.0}, r"--slowness must lie in \[0\.1, 100\], got 0"),
        ({"data": "no.npz"}, r"--data=no\.npz: there is no such file or folder"),
        ({"workdir": "/dev/null/x"}, "cannot write to workdir '/dev/null/x'"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(settings, message):
    with pytest.raises(BadUse, match=message):
        accelerator.run(accelerator.Config(**settings))


def test_a_line_of_the_report_holds_the_number_its_unit_and_details(tmp_path):
    (row,) = rows([finding(value=0.123456, steps=7)])
    assert line(row).split() == ["ok", "a", "c", "0.1235", "s", "steps=7"]
    report = Report(tmp_path, "title")
    report.add(row._replace(verdict=FAIL))
    assert report.failures() == ["a: c"]


def test_the_operations_of_resnet18_are_the_published_ones():
    """0.56 GMAC on CIFAR-10, 1.82 GMAC on ImageNet."""
    for stem, size, expected in (("cifar", 32, 0.556e9), ("imagenet", 224, 1.814e9)):
        model = models.build("resnet18", 1000 if size == 224 else 10, stem=stem)
        flops = _accelerator_step.forward_flops(model, (size, size, 3))
        assert flops / 2 == pytest.approx(expected, rel=0.005)


def test_outcomes_of_tests_are_counted_with_and_without_workers():
    plain = (
        "tests/test_a.py::test_x[PASSED in name] PASSED [ 50%]\n"
        "tests/test_a.py::test_y FAILED [100%]\n"
        "FAILED tests/test_a.py::test_y - AssertionError\n"
        "ERROR tests/test_b.py\n"
    )
    spread = "[gw0] [ 50%] PASSED tests/test_a.py::test_x \n[gw1] [100%] ERROR tests/b::c\n"
    none = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL"), 0)
    assert _accelerator_tests.tally(plain) == none | {"PASSED": 1, "FAILED": 1}
    assert _accelerator_tests.tally(spread) == none | {"PASSED": 1, "ERROR": 1}


def test_the_named_files_of_tests_exist():
    for name in (*_accelerator_tests.FILES, *_accelerator_tests.TINY):
        assert (_accelerator_tests.ROOT / "tests" / f"test_{name}.py").exists()


def encoded(image, path):
    Image.fromarray(image).save(path, "PNG")
    return np.frombuffer(path.read_bytes(), np.uint8)


def test_images_come_from_a_file_encoded_or_not(tmp_path):
    expected, _ = _accelerator_images.read("", tiny=True)
    arrays, packed = {}, {}
    for split, dataset in expected.items():
        arrays |= {f"{split}_images": dataset.images, f"{split}_labels": dataset.labels}
        parts = [encoded(image, tmp_path / "image.png") for image in dataset.images]
        packed |= {
            f"{split}_bytes": np.concatenate(parts),
            f"{split}_ends": np.fromiter(itertools.accumulate(map(len, parts)), np.int64),
            f"{split}_labels": dataset.labels,
        }
    for content in (arrays, packed):
        np.savez(tmp_path / "images.npz", **content)
        found, source = _accelerator_images.read(str(tmp_path / "images.npz"), tiny=False)
        assert source == "file"
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_network_in_torch_has_as_many_parameters():
    pytest.importorskip("torch", reason="torch is not installed")
    count = sum(p.numel() for p in _accelerator_torch.network().parameters())
    assert count == models.count_parameters(models.build("resnet18", 10), (32, 32, 3))


def test_a_training_step_in_torch_runs():
    pytest.importorskip("torch", reason="torch is not installed")
    (check,) = _accelerator_torch.checks(Setting(tiny=True))
    assert check.call().ok
