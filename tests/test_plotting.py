"""Figures hold the medians, quartiles and ticks of their data."""

import importlib
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from strategies import WIDE, seeds

import ncjax
from ncjax import plotting

few = settings(max_examples=settings.default.max_examples // 5)
COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 12))
# All values of one kind, or a mixture.
HOLES = st.sampled_from(["none", "nan", "infinite", "zero", "negative", "all"])
VALUES = {"nan": np.nan, "infinite": np.inf, "zero": 0.0, "negative": -1.0}
FIELDS = (*ncjax.CollapseMetrics._fields, *ncjax.LastLayer._fields)
FIELDS += ncjax.DualityParts._fields
FIELDS += ("margin", "log_smoothed_margin", "theta_kkt_angle", "norm_growth", "loss_growth")


def table(seed, shape, holes):
    """Draw values (S, T) by name, some of them replaced."""
    rng = np.random.default_rng(seed)
    share = {"none": 0.0, "all": 1.0}.get(holes, 0.3)
    kinds = [holes] if holes in VALUES else [*VALUES]
    found = {}
    for name in FIELDS:
        values = 10 ** rng.uniform(-12, 3, shape)
        hole = rng.uniform(size=shape) < share
        chosen = rng.choice([VALUES[kind] for kind in kinds], shape)
        found[name] = np.where(hole, chosen, values)
    return found


def medians(values, logarithmic):
    """Medians of the finite values at each time; None if none can be drawn."""
    found = []
    for column in values.T:
        finite = [float(value) for value in column if np.isfinite(value)]
        median = statistics.median(finite) if finite else None
        drawn = median is not None and (median > 0 or not logarithmic)
        found.append(median if drawn else None)
    return found


def assert_curves(axis, x, panel):
    """The solid lines of the axis are the curves of the panel, and no others."""
    lines = [line for line in axis.get_lines() if line.get_linestyle() != ":"]
    expected = []
    for curve in panel.curves:
        points = zip(x, medians(curve.values, panel.scale == "log"), strict=True)
        points = [(a, m) for a, m in points if m is not None]
        expected += [(curve, points)] if points else []
    assert len(lines) == len(expected)
    for line, (curve, points) in zip(lines, expected, strict=True):
        drawn = np.transpose(line.get_data())
        drawn = drawn[np.isfinite(drawn).all(axis=1)]
        np.testing.assert_allclose(drawn, points, rtol=1e-12)
        assert line.get_label() == curve.label
        assert to_hex(line.get_color()) == curve.colour
        assert len(x) > 1 or line.get_marker() == "o"  # a line of one point shows nothing


def assert_ticks(axis, places, x):
    """The ticks are the `places` that lie within the axis."""
    ticks = axis.get_xticks()
    assert set(np.round(ticks, 12)) <= {round(float(place), 12) for place in places}
    if x[0] < x[-1]:
        assert axis.get_xlim() == (x[0], x[-1])
        assert ((ticks >= x[0]) & (ticks <= x[-1])).all()


def assert_guide(axis, values, exponent):
    """The dotted line falls as (log t)^-p, below the medians at its times."""
    for line in axis.get_lines():
        if line.get_linestyle() == ":":
            at, guide = line.get_data()
            np.testing.assert_allclose(guide / guide[-1], np.exp(exponent * (at[-1] - at)))
            late = [m for m in medians(values, False) if m is not None][-len(at) :]
            shares = [line / m for line, m in zip(guide, late, strict=True) if m > 0]
            assert max(shares) == pytest.approx(0.4, rel=1e-9)
            assert np.exp(at[-1]) >= 300


@few
@given(seeds, COUNTS, HOLES, st.floats(0.2, 9), st.none() | st.floats(1.5, 1e4))
def test_figures_over_time_hold_medians(seed, shape, holes, decades, reach):
    rng = np.random.default_rng(seed)
    log_times = np.sort(10 ** rng.uniform(-1, decades, shape[1]))
    panels = plotting.collapse_panels(table(seed, shape, holes))
    if log_times[-1] <= 1:
        with pytest.raises(ValueError, match="expected a log time above 1, got"):
            plotting.figure_over_log_log_t(log_times, panels)
        return
    figure = plotting.figure_over_log_log_t(log_times, panels, reach=reach)
    shown = log_times > 1
    x = np.log(log_times[shown])
    assert len(figure.axes) == 4
    for axis, panel in zip(figure.axes, panels, strict=True):
        curves = [c._replace(values=c.values[:, shown]) for c in panel.curves]
        assert_curves(axis, x, panel._replace(curves=curves))
        assert_ticks(axis, np.log(np.log(10) * np.array(plotting._EXPONENTS)), x)
        assert_guide(axis, curves[0].values, panel.guide)
        assert axis.get_yscale() == panel.scale
        if reach is not None:
            (shade,) = axis.patches
            end = shade.get_x() + shade.get_width()
            assert end == pytest.approx(min(np.log(reach), x[-1]))


@few
@given(seeds, COUNTS, HOLES, st.booleans(), st.none() | st.integers(1, 300))
def test_figures_over_epochs_hold_medians(seed, shape, holes, with_test, until):
    rng = np.random.default_rng(seed)
    epochs = np.sort(rng.choice(np.arange(1, 400), shape[1], replace=False))
    train = table(seed, shape, holes)
    test = table(seed + 1, shape, holes) if with_test else {}
    for panels in (plotting.collapse_panels(train), plotting.training_panels(train, test)):
        if epochs[-1] < 2:
            with pytest.raises(ValueError, match="expected an epoch from 2 on, got"):
                plotting.figure_over_log_log_epochs(epochs, panels, until=until)
            continue
        figure = plotting.figure_over_log_log_epochs(epochs, panels, until=until)
        shown = epochs >= 2
        x = np.log(np.log(epochs[shown]))
        for axis, panel in zip(figure.axes, panels, strict=True):
            curves = [c._replace(values=c.values[:, shown]) for c in panel.curves]
            assert_curves(axis, x, panel._replace(curves=curves))
            assert_ticks(axis, np.log(np.log(plotting._EPOCHS)), x)
            assert len(axis.patches) == (until is not None and until >= 2)


@pytest.mark.parametrize("name", ["margin_panels", "duality_panels", "homogeneity_panels"])
def test_panels_of_network_flows_hold_medians(name):
    log_times = np.geomspace(2, 1000, 12)
    panels = getattr(plotting, name)(table(0, (3, 12), "nan"))
    figure = plotting.figure_over_log_log_t(log_times, panels)
    for axis, panel in zip(figure.axes, panels, strict=True):
        assert_curves(axis, np.log(log_times), panel)


@pytest.mark.parametrize(
    ("figure", "times", "message"),
    [
        (plotting.figure_over_log_log_t, [0.5, 1.0], "expected a log time above 1"),
        (plotting.figure_over_log_log_epochs, [1], "expected an epoch from 2 on"),
    ],
)
def test_figures_without_data_are_refused(figure, times, message):
    panels = plotting.collapse_panels(table(0, (2, len(times)), "none"))
    with pytest.raises(ValueError, match=message):
        figure(np.array(times), panels)


@pytest.mark.parametrize(
    ("values", "panels", "message"),
    [
        (np.ones(3), 4, r"'seeds' must be \(S, T\) at the T = 3 times, got shape \(3,\)"),
        (np.ones((2, 2)), 4, r"got shape \(2, 2\)"),
        (np.ones((2, 3)), 3, r"expected four panels .*, got \[1, 1, 1\]"),
        (None, 4, r"expected four panels .*, got \[0, 0, 0, 0\]"),
    ],
)
def test_curves_of_another_shape_are_refused_by_name(values, panels, message):
    curves = [] if values is None else [plotting.Curve(values, "seeds", "C0")]
    drawn = [plotting.Panel("", curves)] * panels
    for figure in (plotting.figure_over_log_log_t, plotting.figure_over_log_log_epochs):
        with pytest.raises(ValueError, match=message):
            figure(np.array([2, 3, 4]), drawn)


def test_a_loss_that_underflows_is_drawn_to_the_edge():
    epochs = np.arange(3, 60)
    train = table(0, (1, epochs.size), "none") | {"loss": np.exp(-15.0 * epochs)[None]}
    assert train["loss"].min() == 0
    panels = plotting.training_panels(train, {})
    figure = plotting.figure_over_log_log_epochs(epochs, panels)
    low, high = figure.axes[1].get_ylim()
    assert 0 < low < 1e-300
    assert high > train["loss"].max()


@given(seeds, COUNTS, HOLES)
def test_shares_and_losses_are_drawn_as_they_are(seed, shape, holes):
    """The error is one minus the accuracy; an error of zero is not drawn."""
    train = table(seed, shape, holes)
    accuracy = np.random.default_rng(seed).integers(0, 3, shape) / 2
    train["accuracy"] = accuracy
    wrong, loss, margin, mismatch = plotting.training_panels(train, {})
    expected = np.where(accuracy < 1, 1 - accuracy, np.nan)
    np.testing.assert_array_equal(wrong.curves[0].values, expected)
    for panel, name in ((loss, "loss"), (margin, "balanced_margin_ratio")):
        np.testing.assert_array_equal(panel.curves[0].values, train[name])
    disagree = train["ncc_mismatch"]
    expected = np.where(disagree > 0, disagree, np.nan)
    np.testing.assert_array_equal(mismatch.curves[0].values, expected)
    assert [len(panel.curves) for panel in (wrong, loss, margin, mismatch)] == [1] * 4


@few
@given(seeds, COUNTS, st.integers(0, 3), st.sampled_from(["none", "nan", "zero"]))
def test_figures_of_saddles_hold_the_given_values(seed, shape, count, holes):
    rng = np.random.default_rng(seed)
    values = table(seed, shape, holes)
    times = np.sort(10 ** rng.uniform(0, 4, shape[1]))
    angles = np.linspace(0, 1, 5)
    escapes = [
        (f"escape {i}", times, 10 ** rng.uniform(-8, 0, shape), 0.5) for i in range(count)
    ]
    descents = [(f"descent {i}", *rng.normal(size=(2, 5))) for i in range(count)]
    residual, excess = values["kkt_angle"], values["margin_ratio"]
    figure = plotting.saddle_figure(
        log_times=times,
        stationarity=residual,
        excess=excess,
        escapes=escapes,
        angles=angles,
        descents=descents,
    )
    flow, escape, descent = figure.axes
    curves = [plotting.Curve(residual, "KKT residual", plotting._MEANS)]
    label = r"$|\sigma_{\max} - 1|$"
    curves.append(plotting.Curve(excess, label, plotting._CLASSIFIER))
    assert_curves(flow, times, plotting.Panel("", curves))
    for i, (label, _, unstable, exponent) in enumerate(escapes):
        line, guide = escape.get_lines()[2 * i : 2 * i + 2]
        assert line.get_label() == label
        np.testing.assert_allclose(line.get_ydata(), medians(unstable, True))
        at, power = guide.get_data()
        assert power[-1] == pytest.approx(statistics.median(unstable[:, -1]))
        np.testing.assert_allclose(power / power[-1], (at / at[-1]) ** exponent)
    for i, (label, *pair) in enumerate(descents):
        lines = descent.get_lines()[2 * i : 2 * i + 2]
        assert lines[0].get_label() == label
        for line, expected in zip(lines, pair, strict=True):
            np.testing.assert_array_equal(line.get_data(), (angles, expected))


@settings(max_examples=settings.default.max_examples // 25)
@given(seeds, COUNTS, HOLES)
def test_files_are_images_and_the_same_every_time(seed, shape, holes):
    times = np.linspace(0.9, 1.5, 1 + shape[1])[1:] ** 20
    panels = plotting.collapse_panels(table(seed, shape, holes))
    files = plotting.render(plotting.figure_over_log_log_t(times, panels))
    assert files[".png"].startswith(b"\x89PNG\r\n")
    assert files[".pdf"].startswith(b"%PDF-")
    assert b"CreationDate" not in files[".pdf"]
    if WIDE:
        again = plotting.figure_over_log_log_t(times, panels)
        assert plotting.render(again) == files


def test_without_matplotlib_the_import_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "ncjax.plotting")
    message = r"matplotlib not found: pip install 'ncjax\[experiments\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module("ncjax.plotting")
