"""Conventions give the numbers that other codebases print on the reference features."""

import json
from functools import cache

import numpy as np
import oracles
import pytest

import ncjax
from ncjax import conventions, statistics

FOLDER = oracles.FEATURES
# Outputs of the codebases on clusters.npz, and our own on both files.
CODEBASES = json.loads((FOLDER / "codebases.json").read_text())
VALUES = json.loads((FOLDER / "values.json").read_text())
FORMULAS = json.loads(
    (FOLDER.parents[1] / "tests" / "data" / "collapse_values.json").read_text()
)
# Relative errors of outputs in single precision, and of an iteration that stops early.
ROUNDED = {
    "rhubarb.nc1_cdnv": 1e-7,
    "rhubarb.nc1_cdnv_tile4": 1e-7,
    "rhubarb.nc1_cdnv_exp2": 2e-7,
    **{
        f"rhubarb.nc2g_{kernel}_{moment}": 1e-7
        for kernel in ("dist", "log", "riesz")
        for moment in ("mean", "var")
    },
    "guiding.NCC_mismatch_percent": 1e-8,
    "jiang2024.GNC2": 1e-6,
}
# The same number, computed by the codebase in tiles.
SAME = {"nc1_cdnv_tile4": "nc1_cdnv"}
OUTPUTS = [(name, number) for name, found in CODEBASES.items() for number in found]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stored(name):
    """Return the arrays of a file of reference features in float64."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        data = {name: arrays[name] for name in oracles.Data._fields if name in arrays}
    return oracles.float64(oracles.Data(**data))


def measured(convention, data, **options):
    if convention == "rhubarb" and data.ood_features is not None:
        size = int(data.ood_labels.max()) + 1
        seen = statistics.class_statistics(data.ood_features, data.ood_labels, size)
        options["ood_mean"] = statistics.global_mean(seen)
    return conventions.measure(convention, *data[:4], **options)


@cache
def on_file(name, convention):
    return measured(convention, stored(name))


def assert_same(got, expected, rtol):
    assert list(got) == list(expected)
    for name, value in got.items():
        assert isinstance(value, float)
        np.testing.assert_allclose(value, expected[name], rtol, 1e-13, err_msg=name)


def test_the_names_are_those_of_each_codebase():
    assert {*CODEBASES, "ji2022"} == set(conventions.NAMES)
    for name, outputs in CODEBASES.items():
        assert set(on_file("clusters", name)) == set(outputs) - SAME.keys()


@pytest.mark.parametrize(("convention", "number"), OUTPUTS)
def test_the_output_of_a_codebase_is_reproduced(convention, number):
    got = on_file("clusters", convention)[SAME.get(number, number)]
    rtol = ROUNDED.get(f"{convention}.{number}", 1e-10)
    np.testing.assert_allclose(got, CODEBASES[convention][number], rtol=rtol)


def test_the_figures_of_the_paper_have_the_fields_of_collapse_metrics():
    for field, value in on_file("clusters", "ji2022").items():
        reference = FORMULAS[f"formula.{oracles.FIELDS[field]}"]
        np.testing.assert_allclose(value, reference, rtol=1e-10, err_msg=field)


@pytest.mark.parametrize("name", ["clusters", "digits"])
def test_the_published_values_are_current(name):
    """`python docs/make_reference_features.py` brings them up to date."""
    assert list(VALUES[name]) == list(conventions.NAMES)
    for convention, expected in VALUES[name].items():
        assert_same(on_file(name, convention), expected, rtol=1e-9)


@pytest.mark.parametrize("convention", conventions.NAMES)
def test_chunks_change_no_number(convention, monkeypatch):
    monkeypatch.setattr(conventions, "_CHUNK_BYTES", 2**11)  # 6 samples of 305
    got = measured(convention, stored("clusters"))
    assert_same(got, on_file("clusters", convention), rtol=1e-11)


@pytest.mark.parametrize("convention", sorted({*conventions.NAMES} - {"han2022"}))
def test_a_missing_bias_is_a_bias_of_zeros(convention):
    data = stored("clusters")
    got, expected = (measured(convention, data._replace(b=b)) for b in (None, np.zeros(10)))
    assert_same(got, expected, rtol=1e-11)


def test_classes_of_few_samples_are_left_out_with_their_rows():
    data = stored("clusters")
    counts = np.bincount(data.labels)
    least = int(np.sort(counts)[3])
    few = oracles.without(data, np.flatnonzero(counts >= least))
    assert len(few.W) == np.sum(counts >= least) < 10
    got = conventions.measure("zhu2021", *data[:4], min_count=least)
    assert_same(got, conventions.measure("zhu2021", *few[:4]), rtol=1e-11)


@pytest.mark.parametrize("exponent", [-80, 60])
def test_ratios_and_decisions_are_right_at_any_scale_in_float32(exponent):
    data = stored("clusters")
    scale = 2.0**exponent
    near = [data.features.astype(np.float32), data.labels]
    near += [data.W.astype(np.float32), data.b.astype(np.float32)]
    far = [np.float32(scale) * near[0], *near[1:3], np.float32(scale) * near[3]]
    got, expected = (conventions.measure("guiding", *x) for x in (far, near))
    absolute = {"Wh_b": got.pop("Wh_b"), **{"expected": expected.pop("Wh_b")}}
    assert absolute["Wh_b"] == pytest.approx(scale * absolute["expected"], rel=1e-5)
    assert_same(got, expected, rtol=1e-5)


def test_the_weight_decay_is_that_of_the_last_layer():
    data = stored("clusters")
    squares = np.sum(data.W**2) + np.sum(data.b**2)
    got = measured("papyan2020", data, weight_decay=0.5)
    assert got["reg_loss"] == pytest.approx(got["loss"] + squares / 4, rel=1e-12)
    got = measured("han2022", data, weight_decay=0.5)
    expected = oracles.squared_error_parts(data, 0.5)
    np.testing.assert_allclose(list(got.values())[:3], expected, rtol=1e-9)
    assert got["MSE_wd_features"] == pytest.approx(got["loss"] / 2 + squares / 8)


def test_half_precision_and_any_integers_are_taken():
    data = stored("digits")
    features = data.features.astype(np.float16)
    got = conventions.measure("zhu2021", features, data.labels.astype(np.uint8), data.W)
    for name, value in VALUES["digits"]["zhu2021"].items():
        if name != "Wh_b":  # has the bias
            np.testing.assert_allclose(got[name], value, rtol=1e-3)


def test_unknown_names_and_options_of_others_are_refused():
    arrays = stored("digits")[:4]
    with pytest.raises(ValueError, match="convention must be one of ji2022, papyan2020, "):
        conventions.measure("papyan", *arrays)
    message = "weight_decay belongs to papyan2020 and han2022, got convention 'zhu2021'"
    with pytest.raises(ValueError, match=message):
        conventions.measure("zhu2021", *arrays, weight_decay=0.0)
    with pytest.raises(ValueError, match="ood_mean belongs to rhubarb"):
        conventions.measure("guiding", *arrays, ood_mean=arrays[0][0])
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
        conventions.measure("papyan2020", *arrays, weight_decay=-1.0)
    with pytest.raises(ValueError, match=r"expected ood_mean \(64,\), got \(3,\)"):
        conventions.measure("rhubarb", *arrays, ood_mean=np.ones(3))
    with pytest.raises(ValueError, match="every class needs a sample"):
        conventions.measure("zhou2022", *(x[:5] for x in arrays[:2]), *arrays[2:])


def test_every_convention_has_a_source_a_summary_and_a_section():
    page = (FOLDER.parents[1] / "docs" / "conventions.md").read_text()
    assert ncjax.conventions is conventions
    for name, convention in conventions.CONVENTIONS.items():
        section = page.partition(f'\n## `"{name}"`: ')[2].partition("\n## ")[0]
        assert convention.source in section
        assert convention.summary in " ".join(section.split())
        for number in VALUES["clusters"][name]:
            assert f"`{number}`" in section
