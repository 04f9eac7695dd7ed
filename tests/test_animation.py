"""The animation: what its frames show, and the file that they make."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

import ncjax
from experiments import _scene, animation
from experiments._runs import files, folders

SMALL = animation.Config(per_class=3, seed=5, log_t_max=30.0, frames=6, width=200)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("animation") / "run"
    return animation.run(dataclasses.replace(SMALL, workdir=str(workdir)))


@pytest.fixture(scope="module")
def states():
    """States of the small run at its frames."""
    _, log_times = animation.frame_times(SMALL.log_t_max, SMALL.frames)
    return animation._flow(SMALL, log_times)[0]


def frames(folder):
    with Image.open(folder / "collapse.gif") as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def test_the_gif_has_the_frames_and_the_size_of_the_flags(folder):
    pictures = frames(folder)
    assert len(pictures) == 6
    assert {picture.size for picture in pictures} == {(200, 120)}


def test_the_gif_loops_for_ever_and_holds_its_last_frame(folder):
    with Image.open(folder / "collapse.gif") as image:
        assert image.info["loop"] == 0
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert times == [50] * 5 + [2000]


def test_frames_differ_and_share_one_palette_on_white(folder):
    pictures = [np.asarray(picture) for picture in frames(folder)]
    colours = np.unique(np.concatenate([p.reshape(-1, 3) for p in pictures]), axis=0)
    assert len(colours) <= 63
    for picture, following in itertools.pairwise(pictures):
        assert (picture != following).any()
    for picture in pictures:
        assert (picture == 255).all(axis=-1).mean() > 0.5


def test_every_class_has_its_colour_in_every_frame(folder):
    for picture in frames(folder):
        pixels = np.asarray(picture).reshape(-1, 3).astype(int)
        for colour in np.rint(255 * _scene.COLOURS).astype(int):
            assert np.abs(pixels - colour).sum(axis=1).min() <= 6


def test_the_still_is_the_last_frame(folder):
    with Image.open(folder / "collapse.png") as still:
        np.testing.assert_array_equal(still.convert("RGB"), frames(folder)[-1])


def test_the_flow_starts_at_the_start_of_its_seed(states):
    start = ncjax.init_params(jax.random.key(5), 4, 3, 3)
    jax.tree.map(
        lambda leaf, first: np.testing.assert_allclose(leaf[0], first, rtol=1e-12),
        states,
        start,
    )


def test_the_summary_has_the_metrics_of_the_first_and_the_last_frame(folder, states):
    summary = files.read_json(folder / folders.SUMMARY)
    assert summary["first_frame"].pop("log_t") is None  # t = 0
    assert summary["last_frame"].pop("log_t") == 30
    for frame, name in ((0, "first_frame"), (-1, "last_frame")):
        state = jax.tree.map(lambda leaf, frame=frame: leaf[frame], states)
        expected = ncjax.collapse_metrics(state)._asdict()
        assert summary[name].keys() == expected.keys()
        for metric, value in expected.items():
            assert summary[name][metric] == pytest.approx(float(value), rel=1e-6, abs=1e-9)
    assert summary["frames"] == 6
    assert summary["bytes"] == (folder / "collapse.gif").stat().st_size


def test_what_is_shown_has_mean_zero_and_mean_square_length_one(states):
    features, classifier, _ = animation.arrange(states)
    for rows in (features.reshape(6, 12, 3), classifier):
        np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose((rows**2).sum(axis=2).mean(axis=1), 1, rtol=1e-12)


def test_turning_keeps_every_angle(states):
    _, classifier, _ = animation.arrange(states)
    for shown, W in zip(classifier, states.W, strict=True):
        centred = ncjax.measures.centre_rows(W)
        np.testing.assert_allclose(
            ncjax.measures.pair_cosines(shown), ncjax.measures.pair_cosines(centred)
        )


def test_a_collapsed_state_lies_on_the_corners_of_the_simplex():
    etf = ncjax.simplex_etf(4, 3, jax.random.key(3))
    H = np.repeat(7 * np.asarray(etf)[:, None], 2, axis=1)
    features, classifier, simplex = animation.arrange(ncjax.Params(2 * etf[None], H[None]))
    np.testing.assert_allclose(simplex[0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(simplex @ simplex.T, 4 / 3 * np.eye(4) - 1 / 3, atol=1e-12)
    np.testing.assert_allclose(classifier[0], simplex, atol=1e-12)
    np.testing.assert_allclose(features[0, :, 0], simplex, atol=1e-12)


def test_frames_run_from_the_start_to_the_last_time_on_the_clock():
    clock, log_times = animation.frame_times(1000.0, 50)
    assert log_times[0] == -np.inf
    assert log_times[-1] == 1000
    assert (np.diff(clock) > 0).all()
    assert (np.diff(np.diff(clock)) > 0).all()  # more frames at the start
    np.testing.assert_allclose(clock, np.log1p(np.logaddexp(0, log_times)), atol=1e-12)


def test_nearer_points_are_drawn_larger_and_move_more():
    near, nearness = _scene._project(np.array([[0, 0, 1], [0, -1, 0], [0, 1, 0.0]]), 0.0)
    assert nearness[1] > nearness[0] > nearness[2]
    left, _ = _scene._project(np.array([[1, -1, 0], [1, 1, 0.0]]), 0.0)
    assert left[0, 0] > 1 > left[1, 0]
    assert near.shape == (3, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_class": 1},
        {"seed": -1},
        {"log_t_max": float("inf")},
        {"log_t_max": 1.0},
        {"frames": 1},
        {"width": 100},
        {"width": 5000},
        {"frames": 10**9},
    ],
    ids=str,
)
def test_flags_out_of_range_are_refused_before_any_work(tmp_path, settings):
    workdir = tmp_path / "run"
    (flag,) = settings
    with pytest.raises(ValueError, match=f"--{flag}"):
        animation.run(animation.Config(**settings, workdir=str(workdir)))
    assert not workdir.exists()


def test_the_committed_animation_is_below_two_megabytes():
    results = Path(__file__).parents[1] / "results" / "animation"
    summary = files.read_json(results / folders.SUMMARY)
    assert (results / "collapse.gif").stat().st_size == summary["bytes"] < 2e6
    assert folders.changed_files(results, summary) == []
    last = summary["last_frame"]
    assert max(last["within_class_quotient"], last["mean_cosine_deviation"]) < 1e-4
    assert last["centred_self_duality"] < 1e-3
