"""The report is one valid page, whatever the run folders hold."""

import html.parser
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import EXPERIMENTS, _training, report
from experiments._labels import LABELS
from experiments._runs import page as pages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
COMMITTED = (
    "ulpm_flow",
    "saddle_analysis",
    "neighbours",
    "deep_flow",
    "theorems",
    "train/vgg13_kmnist",
    "peel/vgg13_kmnist",
    "layers/vgg13_mnist",
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A parsed page: its tags in order and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def make(tmp_path, runs, **settings):
    output = tmp_path / "page.html"
    report.run(report.Config(runs=str(runs), output=str(output), **settings))
    return Page(output.read_text())


def copy(tmp_path, name, without=("*.png", "*.pdf", "*.csv")):
    folder = tmp_path / "runs" / name.replace("/", "_")
    shutil.copytree(RESULTS / name, folder, ignore=shutil.ignore_patterns(*without))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    runs = ",".join(str(RESULTS / name) for name in COMMITTED)
    return make(tmp_path_factory.mktemp("report"), runs)


def test_the_page_is_valid_and_self_contained(page):
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    for attributes in page.all("img"):
        assert attributes["src"].startswith("data:image/png;base64,")
        assert attributes["alt"]
        assert int(attributes["width"]) > 1000
    targets = [a["href"] for a in page.all("a")]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) == len(COMMITTED)
    assert sorted(targets) == sorted(f"#{i}" for i in ids)


def test_every_figure_of_the_runs_is_on_the_page(page):
    assert len(page.all("img")) == 1 + 1 + 0 + 2 + 1 + 1 + 3 + 1


def test_every_statement_is_on_the_page_with_its_number(page):
    statements = json.loads((RESULTS / "theorems" / "summary.json").read_text())[
        "statements"
    ]
    for entry in statements:
        assert " ".join(entry["statement"].split()) in page.text
        assert pages.number(entry["number"]) in " ".join(page.words)
    assert page.words.count("holds") == len(statements)
    assert f"{len(statements)} of {len(statements)} statements hold" in page.text


def test_medians_and_exponents_are_those_of_the_summary(page):
    summary = json.loads((RESULTS / "ulpm_flow" / "summary.json").read_text())
    fitted = list(summary["exponents"].values())[-1]
    start = page.words.index(LABELS["centred_self_duality"])
    row = [word for word in page.words[start : start + 14] if word.strip()][:7]
    final = summary["final"]["centred_self_duality"]
    expected = [final["median"], final["q25"], final["q75"]]
    assert row[1:4] == [pages.number(value) for value in expected]
    assert float(row[5]) == pytest.approx(
        fitted["centred_self_duality"]["median"], abs=1e-3
    )
    assert row[6] == "1"


def test_commands_settings_and_versions_are_on_the_page(page):
    for name in COMMITTED:
        stored = json.loads((RESULTS / name / "config.json").read_text())
        assert " ".join(stored["command"].split()) in page.text
        for setting, value in stored["config"].items():
            assert f"{setting}={value}".strip() in page.text
    assert "diffrax 0.7.2" in page.text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_page_of_what_it_writes(name):
    experiment = importlib.import_module(f"experiments.{name}")
    outputs = getattr(experiment, "OUTPUTS", _training.OUTPUTS)
    page = report.page_of(name)
    assert isinstance(page, pages.Page)
    assert page.figures.keys() == {n for n in outputs if n.endswith(".png")}


def test_networks_stand_side_by_side(tmp_path):
    for name in ("resnet18_mnist", "vgg13_kmnist"):
        copy(tmp_path, f"train/{name}")
    page = make(tmp_path, tmp_path / "runs")
    assert "Networks side by side" in page.text
    assert page.words.count("resnet18 on mnist") == 3
    summary = json.loads((RESULTS / "train/resnet18_mnist/summary.json").read_text())
    entry = summary["metrics"]["within_class_variation"]
    ends = [f"{entry[k]:.3g}" for k in ("at_zero_error", "at_the_end")]
    assert "\u00a0→ ".join(ends) in page.words


def test_the_content_of_folders_is_escaped(tmp_path):
    folder = copy(tmp_path, "theorems")
    evil = "<script>alert(1)</script><img src=x onerror='y'>"
    config = json.loads((folder / "config.json").read_text())
    config["config"][evil] = evil
    config["experiment"] = "theorems"
    del config["sha256"]  # of the file before it was edited
    (folder / "config.json").write_text(json.dumps(config))
    summary = json.loads((folder / "summary.json").read_text())
    summary["statements"][0] |= {"statement": evil, "on": evil, "source": evil}
    summary["command"] = summary["device"] = evil
    summary["versions"] = {evil: evil}
    del summary["sha256"]
    (folder / "summary.json").write_text(json.dumps(summary))
    page = make(tmp_path, folder, title=evil)
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count("alert(1)") >= 8


def test_an_unfinished_run_is_shown_with_the_files_it_has(tmp_path, capsys):
    folder = copy(tmp_path, "train/vgg13_kmnist", without=("*.pdf",))
    (folder / "summary.json").unlink()
    (folder / "training.png").unlink()
    (folder / "collapse.png").write_bytes(b"\x89PNG not a picture")
    page = make(tmp_path, folder)
    assert "There is no summary.json: the run is not finished." in page.text
    assert "There is no training.png." in page.text
    assert "collapse.png is damaged." in page.text
    assert "learning_rate=0.05" in page.text
    assert f"unfinished: {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMITTED)
@pytest.mark.parametrize("content", ["{", "null", "{}"])
def test_the_page_says_that_a_summary_is_damaged(tmp_path, name, content):
    folder = copy(tmp_path, name)
    (folder / "summary.json").write_text(content)
    page = make(tmp_path, folder)
    assert "summary.json is damaged, or not of a run of" in page.text


def test_a_failed_statement_is_marked(tmp_path):
    folder = copy(tmp_path, "theorems")
    summary = json.loads((folder / "summary.json").read_text())
    summary["statements"][3]["passed"] = False
    del summary["sha256"]  # of the file before it was edited
    (folder / "summary.json").write_text(json.dumps(summary))
    page = make(tmp_path, folder)
    assert "50 of 51 statements hold" in page.text
    assert page.words.count("FAILS") == 1


def test_the_kind_of_a_run_is_read_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"experiment": "theorems", "config": {}, "command": "python -m pytest"}'
    )
    assert report.kind_of(tmp_path) == "theorems"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "config.json is damaged"),
        (
            '{"config": {}, "experiment": "alchemy"}',
            "unknown kind, 'alchemy': expected one of",
        ),
        ('{"config": {}, "command": 3}', "unknown kind, ''"),
        ('{"config": {}, "experiment": ["peel"]}', "unknown kind"),
    ],
)
def test_a_run_of_unknown_kind_is_refused_by_name_and_skipped_within_a_folder(
    tmp_path, stored, message
):
    known, unknown = copy(tmp_path, "theorems"), tmp_path / "runs" / "other"
    unknown.mkdir()
    (unknown / "config.json").write_text(stored)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, f"{known},{unknown}")
    page = make(tmp_path, tmp_path / "runs", overwrite=True)
    assert re.search(f"Left out: .*{message}", page.text)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, unknown, overwrite=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": "nowhere"}, "--runs: there is no folder 'nowhere'"),
        ({"runs": ","}, "no run to show"),
        (
            {"runs": str(ROOT / "ncjax")},
            "is not a run folder and contains none: no config.json",
        ),
        ({"output": str(ROOT)}, "--output must be a file, got the folder"),
        ({"output": "/dev/null", "overwrite": True}, "is a named pipe or a device"),
        ({"output": "/dev/null/page.html"}, "there is no folder '/dev/null'"),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, message):
    defaults = {"runs": str(RESULTS / "theorems"), "output": str(tmp_path / "page.html")}
    with pytest.raises(ValueError, match=message):
        report.run(report.Config(**defaults | settings))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_with_overwrite(tmp_path):
    (tmp_path / "page.html").write_text("precious")
    with pytest.raises(ValueError, match="exists: give --overwrite to replace it"):
        make(tmp_path, RESULTS / "theorems")
    assert (tmp_path / "page.html").read_text() == "precious"
    assert make(tmp_path, RESULTS / "theorems", overwrite=True).all("table")


def test_a_run_given_twice_is_shown_once(tmp_path):
    page = make(tmp_path, f"{RESULTS / 'theorems'},{RESULTS / 'theorems'}/")
    assert len(page.all("section")) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        (10000.0, "10000"),
        (-3, "−3"),
        (0.5, "0.5000"),
        (-10006.9028, "−10007"),
        (2.58e-15, "2.58\u00a0×\u00a010⁻¹⁵"),
        (0.99999, "1\u00a0−\u00a01.00\u00a0×\u00a010⁻⁵"),
        (403020.5, "4.03\u00a0×\u00a010⁵"),
    ],
)
def test_numbers_are_printed_in_their_format(value, text):
    assert pages.number(value) == text


def test_the_committed_page_is_small_and_valid():
    text = (RESULTS / "report.html").read_text()
    assert len(text) < 3e6
    page = Page(text)
    assert page.open == []
    assert "statements hold" in page.text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs the chromium of Debian")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(tmp_path, width):
    """Without scripts and without a network."""
    make(tmp_path, RESULTS / "ulpm_flow")
    picture = tmp_path / "page.png"
    headless = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    command = [BROWSER, *headless, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},1400", f"--screenshot={picture}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (1400, width, 3)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).sum()
    dark = (pixels.sum(axis=-1) < 200).sum()
    assert blue > 1000  # the curves of the figure
    assert dark > 1000  # the text
