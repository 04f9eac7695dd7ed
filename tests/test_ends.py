"""How commands end: signals, streams, limits of the system, checkpoints of other runs."""

import contextlib
import hashlib
import json
from contextlib import nullcontext as does_not_raise
from types import SimpleNamespace

import numpy as np
import pytest

from experiments._flow_loop import Loop
from ncjax.networks.checkpoint import Checkpoints

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
