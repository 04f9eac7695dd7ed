"""How commands end: signals, streams, limits of the system, checkpoints of other runs."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from contextlib import nullcontext as does_not_raise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import ncjax
from experiments import _layers_network, _training, network_flow, train_vgg
from experiments._flow_loop import Loop
from experiments._runs import files, folders
from experiments._runs.errors import BadUse
from ncjax import plotting
from ncjax.command import output
from ncjax.networks.checkpoint import Checkpoints

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
    """Return the files of a figure, and what a user saves."""
    values = dict.fromkeys(ncjax.CollapseMetrics._fields, values[None])
    figure = plotting.figure_over_log_log_t(times, plotting.collapse_panels(values))
    files = plotting.render(figure)
    with plotting.style(), io.BytesIO() as file:
        figure.savefig(file, format="png")
        return files | {"user": file.getvalue()}


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
