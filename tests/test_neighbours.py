"""The comparison of the models of Table 1: predictions, fits, files, resuming."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from experiments import (
    _neighbours_checks,
    _neighbours_flows,
    _neighbours_minority,
    _neighbours_models,
    _neighbours_parts,
    _neighbours_path,
    neighbours,
)
from experiments._runs import files, folders
from experiments._statements import below

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = _neighbours_models.Sizes(4, 3, 6, 4, 0.1)


@pytest.fixture(scope="module")
def models():
    return {model.name: model for model in _neighbours_models.models(SIZES)}


def test_the_path_to_seli_has_the_constants_of_the_theory():
    found = _neighbours_path.at_references(4)
    np.testing.assert_allclose(found, [0.18599, 0.22464, 0.23306], atol=6e-6)
    assert _neighbours_path.first_order(4)["cosine"] == pytest.approx(0.24223, abs=6e-6)


def test_the_path_tends_to_its_first_order():
    path, limits = _neighbours_path.decay_path(10, 2), _neighbours_path.first_order(10)
    x = path.log_inverse[-1]
    assert path.cosine[-1] * x == pytest.approx(limits["cosine"], rel=5e-3)
    assert path.logits[-1] * x == pytest.approx(limits["logits"], rel=2e-2)


def test_decay_and_ball_trace_one_path():
    """The minimiser on a ball has the decay that is its multiplier."""
    path = _neighbours_path.ball_path(4, 3)
    points = [_neighbours_path._minimiser(4, math.exp(-x)) for x in path.log_inverse]
    same = _neighbours_path._path(4, path.log_inverse, points)
    np.testing.assert_allclose(path.cosine, same.cosine, atol=1e-9)
    np.testing.assert_allclose(path.logits, same.logits, atol=1e-9)


def test_classes_of_one_size_are_on_the_path_at_any_decay():
    for mu in (0.5, 1e-3, 1e-30):
        objective = ncjax.Objective(weight_decay=(mu, mu))
        params = ncjax.minimiser(objective, (3,) * 4, 5).params
        best = ncjax.solve_separation((3,) * 4, 5).params
        assert _neighbours_models.distance_to_optimum(params, best) < 1e-14


def test_the_minority_merges_at_the_ratios_of_the_theory():
    found = _neighbours_minority.thresholds(_neighbours_minority.LPM)
    np.testing.assert_allclose(found, [245.496931, 12.1924471, 4.00046671], rtol=1e-8)
    at_flows = _neighbours_minority.at_flows(_neighbours_minority.LPM, weighted=False)
    ratios = _neighbours_minority.RATIOS
    at = [at_flows[0, ratios.index(ratio)] for ratio in (2, 10, 100)]
    np.testing.assert_allclose(at, [-0.0902615, -0.0202319, 0.3106899], atol=1e-7)


def test_class_weights_undo_imbalance_in_the_lpm_and_nothing_in_the_limit_of_the_ulpm():
    lpm = _neighbours_minority.at_flows(_neighbours_minority.LPM, weighted=True)
    np.testing.assert_allclose(lpm, -1 / 9, atol=1e-12)
    ulpm = [
        _neighbours_minority.at_flows(_neighbours_minority.ULPM, weighted)
        for weighted in (False, True)
    ]
    np.testing.assert_array_equal(*ulpm)


def test_ball_and_temperature_give_the_margins_of_the_decay(models):
    for kind in ("balanced", "STEP"):
        margins = [models[f"{name}-{kind}"].best().margin for name in ("ufm", "lpm")]
        assert margins[1] == pytest.approx(margins[0], rel=1e-10)
    margins = [models[f"{name}-balanced"].best().margin for name in ("ufm", "normalised")]
    assert margins[1] == pytest.approx(margins[0], rel=1e-12)


def test_the_distance_is_zero_at_rotations_of_the_optimum_alone(key):
    weights = ncjax.sample_weights((3, 1))
    best = ncjax.init_params(key, 2, (3, 1), 4)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0])
    turned = ncjax.Params(2 * best.W @ rotation, 2 * best.H @ rotation)
    outside = turned._replace(H=turned.H.at[1, 2].set(7.0))  # a sample of weight 0
    distance = _neighbours_models.distance_to_optimum
    assert abs(distance(outside, best, weights)) < 1e-14
    moved = turned._replace(W=turned.W.at[0, 0].add(0.1))
    assert distance(moved, best, weights) > 1e-6


def test_the_distance_is_the_least_over_rotations(key):
    """In two dimensions every rotation and reflection can be tried."""
    first, second = (ncjax.init_params(k, 3, 2, 2) for k in jax.random.split(key))
    a, b = (_neighbours_models._rows(params, None) for params in (first, second))
    angles = np.linspace(0, 2 * np.pi, 2001)
    turns = [
        np.array([[np.cos(t), -s * np.sin(t)], [np.sin(t), s * np.cos(t)]])
        for t in angles
        for s in (1, -1)
    ]
    size = np.linalg.norm(a) * np.linalg.norm(b)
    least = min(1 - np.sum(np.asarray(a) * (np.asarray(b) @ turn)) / size for turn in turns)
    found = _neighbours_models.distance_to_optimum(first, second)
    assert found == pytest.approx(least, abs=1e-5)


def test_a_bias_counts_in_the_distance(key):
    params = ncjax.init_params(key, 3, 2, 3)
    first = ncjax.BiasedParams(*params, jnp.zeros(3))
    second = ncjax.BiasedParams(*params, jnp.ones(3))
    squares = float(ncjax.squared_norm(params))
    expected = 1 - math.sqrt(squares / (squares + 3))
    found = _neighbours_models.distance_to_optimum(second, first)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_fitted_rate_is_the_rate_of_the_slow_direction():
    times = np.geomspace(0.1, 200, 160)
    fast, slow = np.exp(-0.15 * times), np.exp(-0.13 * times)
    gradient = np.stack([fast, slow], axis=1)
    rate = _neighbours_flows._rate(times, gradient, np.array([[0.0], [1.0]]))
    assert rate == pytest.approx(0.13, rel=1e-12)
    still = np.ones((160, 2))
    assert math.isnan(_neighbours_flows._rate(times, still, np.eye(2)))


def test_a_statement_with_no_number_fails():
    assert not below("ncjax", "nothing", "nowhere", math.nan, 1.0).passed
    assert below("ncjax", "zero", "here", 0, 0.0).passed


def test_the_statements_without_a_flow_hold():
    for check in (
        _neighbours_checks._seli,
        _neighbours_checks._path,
        _neighbours_checks._lpm_threshold,
        _neighbours_checks._ufm_threshold,
    ):
        statement = check(None)
        assert statement.passed, statement


def test_a_wrong_multiplicity_of_a_saddle_is_an_error():
    objective = ncjax.Objective("squared_error", weight_decay=(0.2, 0.2))
    point = ncjax.rank_point(objective, 1, 2, 1, 2)
    assert _neighbours_checks._unstable_error(objective, point) < 1e-12
    wrong = point._replace(multiplicity=point.multiplicity + 1)
    assert _neighbours_checks._unstable_error(objective, wrong) == math.inf


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"num_classes": 2}, "--num_classes must be at least 3, got 2"),
        ({"ratio": 1}, "--ratio must be at least 2, got 1"),
        ({"dim": 3}, "--dim must be at least --num_classes = 4"),
        ({"decay": 0.0}, "--decay must lie in"),
        ({"decay": math.nan}, "--decay must lie in"),
        ({"log_t_max": 10.0}, "--log_t_max must be finite and at least 100"),
        ({"seed": -1}, "--seed must lie in"),
        ({"per_class": 100_000}, "give smaller"),
    ],
)
def test_a_setting_out_of_range_is_named_before_any_work(tmp_path, settings, words):
    config = neighbours.Config(workdir=str(tmp_path / "run"), **settings)
    with pytest.raises(ValueError, match=words):
        neighbours.run(config)
    assert not (tmp_path / "run").exists()


def stand_in(name):
    """Return the arrays of a part: of the right shapes, different for each name."""
    rng = np.random.default_rng(sum(map(ord, name)))
    kind, _, rest = name.partition("/")
    if kind == "flow":
        names = ("value", "bound_gap", "sigma_ratio", "rate_fitted")
        numbers = {key: rng.uniform(0.5, 1, 2) for key in names}
        scalars = {"optimum": 0.7, "rate_predicted": 0.1, "proved": True, "failed": 0}
        return (
            numbers
            | {key: np.asarray(value) for key, value in scalars.items()}
            | curve(rng)
        )
    if kind == "small":
        return curve(rng)
    if kind == "path":
        x = np.linspace(1, 100, 5)
        return {
            "decay": np.stack([x, 0.2 / x, 0.3 / x]),
            "ball": np.stack([x, 0.2 / x, 0.3 / x]),
            "flow_log_times": x,
            "flow_logits": rng.uniform(0.1, 1, (2, 5)),
            "limits": np.array([0.2, 0.3]),
            "references": np.array([0.1, 0.2, 0.2]),
        }
    if rest.count("/") == 2:
        return {"cosine": rng.uniform(0, 1, (3, 2))}
    model = rest.partition("/")[0]
    sizes = len(_neighbours_minority.ratios(model)), len(_neighbours_minority.RATIOS)
    keys = ("predicted", "at_flows", "features")
    return {
        key: rng.uniform(0, 1, (3, sizes[place == 1])) for place, key in enumerate(keys)
    }


def curve(rng):
    log_times = np.linspace(0.1, 6, 40)
    distance = np.exp(-0.2 * np.exp(log_times)) * rng.uniform(0.5, 1, (2, 1))
    return {"log_times": log_times, "distance": distance}


@pytest.fixture
def quick(monkeypatch, models, blank_figures):
    """Replace every part by its stand-in, and record which were computed."""
    computed = []

    def part(name):
        def compute():
            computed.append(name)
            return stand_in(name)

        return compute

    names = [*_neighbours_parts.parts(SIZES, neighbours.Config())]
    monkeypatch.setattr(
        _neighbours_parts, "parts", lambda *_: {name: part(name) for name in names}
    )
    monkeypatch.setattr(
        _neighbours_parts, "labels", lambda _: {f"flow/{k}": v for k, v in models.items()}
    )
    return computed


def test_the_run_writes_its_files_and_resumes_where_it_stopped(
    quick, tmp_path, monkeypatch, capsys
):
    config = neighbours.Config(workdir=str(tmp_path / "run"))
    save, saves = folders.save_checkpoint, []

    def interrupt(folder, arrays):
        save(folder, arrays)
        saves.append(1)
        if len(saves) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        neighbours.run(config)
    assert "resume with:" in capsys.readouterr().err
    folder = neighbours.run(neighbours.Config(workdir=config.workdir, resume=True))
    assert len(quick) == len(set(quick)) == len(_neighbours_parts.parts())
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "summary.json", *neighbours.OUTPUTS}
    out = capsys.readouterr().out
    assert "worst error" in out
    assert out.splitlines()[-1] == str(folder)
    summary = files.read_json(folder / "summary.json")
    assert len(summary["models"]) == len(_neighbours_parts.labels(None))
    part = stand_in("flow/lpm-STEP")
    (row,) = (r for r in summary["models"] if (r["model"], r["classes"]) == ("LPM", "STEP"))
    errors = np.abs(part["value"] / 0.7 - 1)
    assert row["value_error_worst"] == pytest.approx(errors.max())
    assert row["rate_fitted"] == pytest.approx(np.median(part["rate_fitted"]))
    findings = neighbours.PAGE.show(summary)
    assert len(findings.tables) == 3


@pytest.mark.slow
def test_a_part_of_each_kind_computes_what_its_stand_in_has(models):
    config = neighbours.Config(seeds=2, log_t_max=100.0)
    parts = _neighbours_parts.parts(SIZES, config)
    flow = parts["flow/ufm-STEP"]()
    assert np.abs(flow["value"] / flow["optimum"] - 1).max() < 1e-12
    assert flow["bound_gap"].max() < 1e-10
    np.testing.assert_allclose(flow["rate_fitted"], flow["rate_predicted"], rtol=1e-3)
    cosine = parts["minority/LPM/plain/10"]()["cosine"]
    expected = _neighbours_minority.at_flows("LPM", weighted=False)[:, 3]
    np.testing.assert_allclose(cosine[:2].T, expected[None, :2].repeat(2, 0), atol=1e-8)
    for name in ("flow/ulpm-STEP", "small/0.01", "path/4", "minority/ULPM/plain"):
        found = parts[name]()
        assert {*stand_in(name)} == {*found}, name
