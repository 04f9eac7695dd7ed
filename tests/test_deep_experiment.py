"""The deep experiment: cells, codes at the end, shares, files, resuming."""

import math

import jax
import numpy as np
import pytest

import ncjax
from experiments import (
    _deep_cells,
    _deep_checks,
    _deep_ends,
    _deep_figures,
    _deep_flows,
    _deep_results,
    deep_flow,
)
from experiments._deep_cells import Cell
from experiments._deep_ends import BETWEEN
from experiments._runs import files, folders

SMALL = Cell(num_classes=3, factors=3, scale=0.5, per_class=2, width=3)
CELL = Cell(num_classes=4, factors=3, scale=0.3, per_class=2, width=4)
SEEDS, LOG_T = 2, 12.0

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def followed():
    return _deep_flows.flow_of(SMALL, SEEDS, 0, LOG_T)


def stand_in(cell, seeds, _seed=0, log_t_max=100.0):
    """Return the arrays of a flow whose starts are at the codes of the cell, in turn."""
    codes = [*_deep_ends.codes_of(cell).values()]
    p, log_times = cell.factors, np.linspace(1.0, log_t_max, 5)
    margin = log_times / 1.0
    shape = (seeds, len(log_times))
    sigma = np.zeros((*shape, cell.num_classes))
    norm, loss = np.zeros(shape), np.zeros(shape)
    logits = np.zeros((seeds, cell.num_classes, cell.num_classes))
    for start in range(seeds):
        code = codes[start % len(codes)]
        sigma[start, :, : code.rank] = margin[:, None] * code.singular_values
        logits[start] = margin[-1] * code.matrix
        norm[start] = 2 * code.value * log_times ** (2 / p)
        constant = math.log(2 * code.value / p**2)
        loss[start] = constant - log_times - (2 - 2 / p) * np.log(log_times)
    return {
        "log_times": log_times,
        "singular_values": sigma,
        "least_margin": np.tile(margin, (seeds, 1)),
        "squared_norm": norm,
        "log_loss": loss,
        "within_class_quotient": np.full((*shape, p - 1), 0.1) / log_times[:, None],
        "logits": logits,
        "kkt_angle": np.full(seeds, 0.01),
        "result": np.zeros(seeds, np.int32),
    }


def test_a_flow_has_the_arrays_of_its_stand_in(followed):
    expected = stand_in(SMALL, SEEDS)
    assert followed.keys() == expected.keys()
    for name, values in followed.items():
        assert values.shape[2:] == expected[name].shape[2:], name
        assert np.isfinite(values).all(), name
    assert not followed["result"].any()
    assert followed["log_times"][-1] == LOG_T


def test_the_end_of_a_flow_is_its_last_time(followed):
    singular = np.linalg.svd(followed["logits"], compute_uv=False)
    np.testing.assert_allclose(singular, followed["singular_values"][:, -1], rtol=1e-9)
    own = np.diagonal(followed["logits"], axis1=1, axis2=2)
    gaps = own[:, None] - followed["logits"] + np.where(np.eye(3), np.inf, 0)
    mean_margin = gaps.min(axis=(1, 2))
    np.testing.assert_allclose(followed["least_margin"][:, -1], mean_margin, rtol=0.2)


def test_the_logits_are_of_the_class_means(key):
    state = ncjax.init_deep_params(key, 3, 2, (4, 5), 0.7)
    (first, second), H = jax.device_get(state)
    expected = np.zeros((3, 3))
    for k in range(3):
        for i in range(2):
            expected[:, k] += second @ (first @ H[k, i]) / 2
    np.testing.assert_allclose(_deep_flows.class_logits(state), expected, rtol=1e-12)


def test_the_scale_is_the_deviation_of_an_entry_times_the_root_of_the_width():
    cell = CELL._replace(width=100, scale=3.0)
    (W, _), H = _deep_flows._starts(cell, jax.random.split(jax.random.key(1), 4))
    for leaf in (W, H):
        assert float(leaf.std()) == pytest.approx(0.3, rel=0.05)


def test_the_starts_of_two_scales_are_multiples():
    keys = jax.random.split(jax.random.key(3), 2)
    small, large = (
        _deep_flows._starts(CELL._replace(scale=scale), keys) for scale in (0.1, 0.4)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(4 * a, b), small, large)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_a_flow_at_a_code_has_the_constants_of_the_theory(p):
    cell = CELL._replace(factors=p)
    codes = _deep_ends.codes_of(cell)
    rows = _deep_ends.end_rows(cell, stand_in(cell, len(codes)))
    assert [row["code"] for row in rows] == list(codes)
    for row in rows:
        assert row["distance"] < 1e-12
        assert row["norm_constant"] == pytest.approx(1, rel=1e-12)
        assert row["loss_constant"] == pytest.approx(1, rel=1e-10)
        assert row["value"] == pytest.approx(row["value_of_code"], rel=1e-12)
    assert [row["value"] for row in rows] == sorted(row["value"] for row in rows)


def test_a_flow_on_its_way_is_at_no_code():
    simplex, pairs = (
        _deep_ends.codes_of(CELL)[name].matrix for name in ("simplex", "pairs")
    )
    assert _deep_ends.nearest(simplex + 0.02 * pairs)[0] == "simplex"
    name, distance = _deep_ends.nearest(0.5 * simplex + 0.5 * pairs)
    assert name == BETWEEN
    assert distance > _deep_ends.NEAR


def test_a_start_that_does_not_separate_is_at_no_code():
    part = stand_in(CELL, 1)
    part["least_margin"][0, -1] = -0.1
    (row,) = _deep_ends.end_rows(CELL, part)
    assert row["code"] == BETWEEN
    assert math.isnan(row["value"])
    assert math.isnan(row["loss_constant"])


def test_the_interval_is_the_set_of_shares_that_a_score_test_keeps():
    for count, total in ((0, 10), (3, 20), (64, 64), (40, 64)):
        shares = np.linspace(0, 1, 100_001)[1:-1]
        deviation = np.sqrt(shares * (1 - shares) / total)
        kept = shares[np.abs(count / total - shares) <= 1.959963984540054 * deviation]
        expected = (kept[0], kept[-1])
        np.testing.assert_allclose(_deep_ends.wilson(count, total), expected, atol=2e-5)


def test_the_shares_of_a_cell_add_up_to_one():
    part = stand_in(CELL, 7)
    part["logits"][2, 0, 1:] += part["logits"][2].max()
    rows = _deep_ends.share_rows(CELL, _deep_ends.end_rows(CELL, part))
    assert sum(row["starts"] for row in rows) == 7
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[-1]["code"] == BETWEEN
    assert {row["least_code"] for row in rows} == {"simplex"}
    assert all(row["share_low"] <= row["share"] <= row["share_high"] for row in rows)


def test_the_least_code_has_a_row_without_starts():
    cell = CELL._replace(num_classes=6, width=6)
    ends = _deep_ends.end_rows(cell, stand_in(cell, 1))
    ends[0]["code"] = "polygon"
    found = {row["code"]: row["starts"] for row in _deep_ends.share_rows(cell, ends)}
    assert found == {"pairs": 0, "simplex": 0, "polygon": 1}


def test_the_cells_run_through_all_lists_in_order():
    config = deep_flow.Config(
        num_classes="6,4", factors="3,2", scales="1,0.1", widths="3,1"
    )
    cells = _deep_cells.cells(config)
    keys = [(c.num_classes, c.width, c.factors, c.scale) for c in cells]
    assert keys == sorted(keys)
    assert len({cell.name for cell in cells}) == 16
    assert {(c.num_classes, c.width) for c in cells} == {(4, 4), (4, 12), (6, 6), (6, 18)}
    assert len({cell.shape for cell in cells}) == 8


def test_two_scales_that_are_close_have_parts_of_their_own():
    config = deep_flow.Config(
        num_classes="4", factors="3", widths="1", scales="1,1.0000000001"
    )
    low, high = _deep_cells.cells(config)
    assert low.name != high.name
    assert _deep_ends.codes_of(low) is _deep_ends.codes_of(high)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": "4,x"}, "--num_classes must be integers separated by commas"),
        ({"num_classes": ""}, "--num_classes must be integers separated by commas"),
        ({"num_classes": "1"}, "--num_classes must be at least 2, got 1"),
        ({"num_classes": "4,100"}, "--num_classes must be at most 20"),
        ({"factors": "1,2"}, "--factors must be at least 2, got 1"),
        ({"factors": "3,3"}, "--factors must not repeat a number, got '3,3'"),
        ({"factors": "50"}, "--factors must be at most"),
        ({"scales": "0"}, "--scales must be finite and above 0, got 0"),
        ({"scales": "nan"}, "--scales must be finite and above 0, got nan"),
        ({"scales": "0.1;1"}, "--scales must be numbers separated by commas"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"widths": "0"}, "--widths must be at least 1, got 0"),
        ({"per_class": 0}, "--per_class must be at least 1, got 0"),
        ({"seed": -1}, "--seed must lie in"),
        ({"log_t_max": math.inf}, "--log_t_max must be finite and at least 10"),
        ({"per_class": 100_000_000}, "give smaller"),
    ],
)
def test_a_setting_out_of_range_is_named_before_any_work(tmp_path, settings, words):
    config = deep_flow.Config(workdir=str(tmp_path / "run"), **settings)
    with pytest.raises(ValueError, match=words):
        deep_flow.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("blank_figures")
def test_the_run_writes_its_files_and_resumes_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    computed = []

    def flow_of(cell, *settings):
        computed.append(cell.name)
        return stand_in(cell, *settings)

    monkeypatch.setattr(_deep_flows, "flow_of", flow_of)
    save, saves = folders.save_checkpoint, []

    def interrupt(folder, arrays):
        save(folder, arrays)
        saves.append(1)
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "save_checkpoint", interrupt)
    settings = {
        "seeds": 4,
        "widths": "1",
        "scales": "0.1,1",
        "workdir": str(tmp_path / "run"),
    }
    with pytest.raises(KeyboardInterrupt):
        deep_flow.run(deep_flow.Config(**settings))
    assert "resume with:" in capsys.readouterr().err
    folder = deep_flow.run(deep_flow.Config(**settings, resume=True))
    assert len(computed) == len(set(computed)) == 2 * 3 * 2
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "summary.json", *deep_flow.OUTPUTS}
    out = capsys.readouterr().out
    assert "48 of 48 starts" in out
    assert out.splitlines()[-1] == str(folder)
    ends = files.read_rows(folder / "ends.csv", {"code": str, "failed": str})
    assert len(ends) == 48
    path = files.read_rows(folder / "trajectory.csv", {"code": str})
    assert {row["code"] for row in path} == {"simplex", "pairs"}
    summary = files.read_json(folder / "summary.json")
    assert summary["value_error_worst"] < 1e-12
    findings = deep_flow.PAGE.show(summary)
    shares, codes = findings.tables
    assert len(shares.rows) == 12
    assert len(codes.head) == 1 + 6


def test_the_figure_has_a_bar_of_height_one_for_each_cell():
    cells = [CELL, CELL._replace(scale=1.0), CELL._replace(factors=4)]
    stored = {
        f"{cell.name}:{key}": value
        for cell in cells
        for key, value in stand_in(cell, 3).items()
    }
    figure = _deep_results.of(cells, stored).figure
    bars, *paths, layers = figure.axes
    heights = {}
    for bar in bars.patches:
        heights[bar.get_x()] = heights.get(bar.get_x(), 0) + bar.get_height()
    np.testing.assert_allclose(list(heights.values()), [1, 1, 1, 0][: len(heights)])
    assert len(paths) == 2
    assert [line.get_label() for line in layers.lines] == ["$H$", "layer 1", "layer 2"]
    (colour,) = {line.get_color() for line in paths[0].lines}
    assert colour in _deep_figures._COLOURS.values()


def test_the_statements_without_a_flow_hold():
    for check in (_deep_checks._pairs_below_collapse, _deep_checks._pyramid):
        statement = check(None)
        assert statement.passed, statement
