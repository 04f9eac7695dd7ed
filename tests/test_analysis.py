"""`ncjax.analyze`: the same numbers as the functions, read in chunks, put into words."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.analysis.verdict import ANGLES, WITHIN

K, N, D = 4, 48, 7
RNG = np.random.default_rng(0)
LABELS = np.arange(N) % K
SIMPLEX = np.pad(np.eye(K) - 1 / K, ((0, 0), (0, D - K)))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def features(noise, means=SIMPLEX, labels=LABELS):
    rng = np.random.default_rng(1)
    return means[labels] + noise * rng.normal(size=(len(labels), means.shape[1]))


def assert_same(found, expected, rtol=1e-9):
    for name, value in expected._asdict().items():
        number = float(getattr(found, name))
        np.testing.assert_allclose(number, float(value), rtol, atol=1e-12, err_msg=name)


def test_the_metrics_are_those_of_one_call_whatever_the_chunks():
    x, W, b = features(0.1), RNG.normal(size=(K, D)), RNG.normal(size=K)
    expected = ncjax.collapse_metrics_from_features(x, LABELS, W, b)
    for chunk_size in (None, 20):
        found = ncjax.analyze(x, LABELS, W, b, chunk_size=chunk_size)
        assert_same(found.report.metrics, expected)


def test_a_memory_mapped_file_gives_the_metrics_of_its_array(tmp_path):
    x, W = features(0.1), RNG.normal(size=(K, D))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = ncjax.analyze(mapped, LABELS, W, chunk_size=20)
    assert found.as_dict() == ncjax.analyze(x, LABELS, W, chunk_size=20).as_dict()


def test_features_are_read_one_chunk_at_a_time():
    """In order, twice with a classifier and once without."""
    read = []

    class Rows:
        shape = (N, D)

        def __getitem__(self, rows):
            read.append((rows.start, rows.stop))
            return features(0.1)[rows]

    steps = []
    ncjax.analyze(
        Rows(), LABELS, SIMPLEX, chunk_size=20, progress=lambda *x: steps.append(x)
    )
    chunks = [(0, 20), (20, 40), (40, N)]
    assert read == [(None, 0), *chunks, *chunks]
    assert steps == [(stop + start, 2 * N) for start in (0, N) for _, stop in chunks]
    read.clear()
    ncjax.analyze(Rows(), LABELS, chunk_size=20)
    assert read == [(None, 0), *chunks]


def test_jax_arrays_and_lists_are_taken_too():
    x = features(0.1)
    expected = ncjax.analyze(x, LABELS, SIMPLEX).as_dict()
    on_device = ncjax.analyze(jnp.asarray(x), jnp.asarray(LABELS), jnp.asarray(SIMPLEX))
    assert on_device.as_dict() == expected
    assert ncjax.analyze(x.tolist(), LABELS.tolist(), SIMPLEX).as_dict() == expected


def test_without_a_classifier_only_the_features_are_measured():
    found = ncjax.analyze(features(0.01), LABELS)
    whole = ncjax.collapse_metrics_from_features(features(0.01), LABELS, SIMPLEX)
    for name, value in found.report.metrics._asdict().items():
        expected = float(getattr(whole, name))
        if re.search("classifier|duality|product|ncc|accuracy", name):
            expected = np.nan
        np.testing.assert_allclose(float(value), expected, 1e-9, err_msg=name)
    assert "self-duality" not in str(found)


def test_the_ignored_label_leaves_a_sample_out():
    x, labels = features(0.1), LABELS.copy()
    x[5], labels[5] = np.nan, -100
    found = ncjax.analyze(x, labels, SIMPLEX)
    rest = np.arange(N) != 5
    expected = ncjax.collapse_metrics_from_features(x[rest], LABELS[rest], SIMPLEX)
    assert_same(found.report.metrics, expected)
    assert "1 sample has the label -100 and is left out." in found.notes


def test_min_count_measures_the_frequent_classes():
    labels = np.where(LABELS == 3, 2, LABELS)
    labels[-1] = 3
    x = features(0.1, labels=labels)
    found = ncjax.analyze(x, labels, SIMPLEX, min_count=5)
    expected = ncjax.collapse_metrics_from_features(x, labels, SIMPLEX, min_count=5)
    assert_same(found.report.metrics, expected)
    assert "3 of 4 classes have at least 5 samples, and are measured." in found.notes
    assert found.plot().axes


def test_centres_known_beforehand_enter_nc4():
    x, centres = features(0.3), RNG.normal(size=(K, D))
    found = ncjax.analyze(x, LABELS, SIMPLEX, centres=centres)
    expected = ncjax.collapse_metrics_from_features(x, LABELS, SIMPLEX, centres=centres)
    assert_same(found.report.metrics, expected)


def test_a_convention_adds_its_own_numbers_under_its_own_names():
    x, labels = features(0.1), LABELS.copy()
    labels[5] = -100
    found = ncjax.analyze(x, labels, SIMPLEX, convention="zhu2021")
    rest = labels >= 0
    expected = ncjax.conventions.measure("zhu2021", x[rest], labels[rest], SIMPLEX)
    assert found.published == expected
    for name, value in expected.items():
        assert found.as_dict()[f"zhu2021/{name}"] == value
    assert "Convention zhu2021\n" in str(found)
    assert all(f"<td>{name}</td>" in found._repr_html_() for name in expected)
    plain = ncjax.analyze(x, labels, SIMPLEX).as_dict()
    assert found.as_dict().items() >= plain.items()


# Verdicts


def test_collapse_to_a_simplex_is_called_collapsed():
    found = ncjax.analyze(features(1e-3), LABELS, SIMPLEX)
    metrics = found.report.metrics
    assert metrics.within_class_quotient < WITHIN
    assert metrics.mean_cosine_deviation < ANGLES
    assert found.verdict == (
        f"Collapsed: variation within classes is {metrics.within_class_quotient:.2g} times "
        "the spread of the class means, cosines of class means differ by "
        f"{metrics.mean_cosine_deviation:.2g} from the simplex's -0.33, and the classifier "
        f"is {metrics.centred_self_duality:.2g} from self-duality."
    )
    assert found.notes == []


SKEWED = SIMPLEX * np.array([1, 1, 1, 5])[:, None]


@pytest.mark.parametrize(
    ("noise", "means", "W", "expected"),
    [
        (1.0, SIMPLEX, SIMPLEX, "Not collapsed: "),
        (0.07, SIMPLEX, SIMPLEX, "Close to collapse: "),
        (1e-3, SKEWED, SKEWED, "Collapsed within classes, but not to a simplex: "),
        (1e-3, SIMPLEX, -SIMPLEX, "but the classifier is 2 from self-duality."),
        (1.0, SIMPLEX, -SIMPLEX, "and the classifier is 1."),
        (1e-3, SIMPLEX[:, :1], None, "no simplex of 4 classes fits into 1 dimension."),
        (1e-3, SIMPLEX[:, :2], None, "Collapsed within classes: "),
        (1e-3, SIMPLEX[:, :2], None, "no simplex of 4 classes fits into 2 dimensions."),
        (0.0, np.zeros((K, D)), None, "Undefined: all class means are equal"),
    ],
)
def test_the_verdict_says_what_was_found(noise, means, W, expected):
    assert expected in ncjax.analyze(features(noise, means), LABELS, W).verdict


def test_two_classes_are_always_a_simplex():
    x = features(1e-3, SKEWED[:2], LABELS % 2)
    assert "two class means are always a simplex" in ncjax.analyze(x, LABELS % 2).verdict


def test_one_sample_of_each_class_has_no_verdict():
    found = ncjax.analyze(features(1e-3, labels=np.arange(K)), np.arange(K))
    assert found.verdict.startswith("Undefined: every class has one sample")
    assert found.notes == []


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.arange(2 * K) % K, "The smallest class has 2 samples"),
        (np.repeat(np.arange(K), [10, 10, 10, 30]), "Classes have 10 to 30 samples"),
    ],
)
def test_notes_name_what_limits_the_verdict(labels, expected):
    (note,) = ncjax.analyze(features(1e-3, labels=labels), labels).notes
    assert note.startswith(expected)


def test_errors_of_the_classifier_are_noted():
    (note,) = ncjax.analyze(features(1e-3), LABELS, SIMPLEX[::-1]).notes
    assert note.startswith("The classifier is wrong on 100.0% of the samples")


# Table, HTML, figure


def test_the_table_holds_every_number():
    found = ncjax.analyze(features(0.1), LABELS, SIMPLEX)
    rows = dict(line.split() for line in str(found).splitlines() if line[:2] == "  ")
    numbers = found.as_dict()
    assert rows.keys() == numbers.keys() - {"samples", "classes"}
    for name, shown in rows.items():
        assert float(shown) == pytest.approx(numbers[name], rel=1e-3, abs=1e-12)
    assert str(found).endswith(found.verdict)
    assert str(found).startswith(f"{N} samples of {K} classes in {D} dimensions\n")


def test_the_html_escapes_every_text(monkeypatch):
    found = ncjax.analyze(features(0.1), LABELS, SIMPLEX)
    monkeypatch.setattr("ncjax.analysis.table.PROPERTIES", {"<b>&": ("cdnv",)})
    page = found._repr_html_()
    assert f"<tr><td>cdnv</td><td>{found.as_dict()['cdnv']:.4g}</td></tr>" in page
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert html.escape(found.verdict) in page


def test_the_figure_shows_a_simplex_in_white():
    figure = ncjax.analyze(features(0.0), LABELS, SIMPLEX).plot()
    means, classifier, bars, scale = figure.axes
    for axis in (means, classifier):
        cosines = axis.images[0].get_array()
        off = cosines[~np.eye(K, dtype=bool)]
        np.testing.assert_allclose(off, -1 / (K - 1), atol=1e-12)
        assert axis.images[0].norm(-1 / (K - 1)) == pytest.approx(0.5)
    assert bars.texts[0].get_text() == "0"
    assert "simplex" in scale.get_yticklabels()[1].get_text()


def test_many_classes_are_drawn_as_histograms():
    size = 120
    rows = np.eye(size)
    found = ncjax.analyze(np.repeat(rows, 2, axis=0), np.repeat(np.arange(size), 2), rows)
    means, classifier, _ = found.plot().axes
    for axis in (means, classifier):
        assert len(axis.patches) == 60
        assert not axis.images


# Bad input

GOOD = {"features": features(0.1), "labels": LABELS, "W": SIMPLEX}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": GOOD["features"][0]}, r"expected features \(N, d\), got \(7,\)"),
        ({"features": np.zeros((3, 4, 5))}, r"got \(3, 4, 5\): reshape them"),
        ({"features": np.zeros((0, D)), "labels": []}, "at least one sample"),
        ({"features": np.zeros((N, 0)), "W": None}, r"d of at least 1, got \(48, 0\)"),
        ({"features": np.ones((N, D), int)}, "features must be floating, got int64: cast"),
        ({"labels": LABELS[:5]}, r"got int64 \(5,\): pass one label for each row"),
        ({"labels": LABELS * 1.0}, "expected labels of integers .*: cast them"),
        ({"labels": LABELS + 1}, "got 1 to 4: number the classes from 0"),
        ({"labels": LABELS - 1}, r"in \[0, 4\), got -1: mark samples to leave out by -100"),
        ({"labels": LABELS * 0}, r"every class needs a sample, none has label \[1, 2, 3\]"),
        ({"labels": LABELS * 0, "W": None}, "expected labels of at least two classes"),
        ({"W": SIMPLEX.T}, r"\(48, 7\) and \(7, 4\): transpose W"),
        ({"W": SIMPLEX * np.nan}, "W must be finite, got 28 of 28"),
        ({"W": None, "b": np.ones(K)}, "a bias b needs the weight W"),
        ({"b": np.ones(3)}, r"expected b \(4,\), got \(3,\): pass one entry for each row"),
        ({"convention": "zhu"}, "convention must be one of .*zhu2021.*, got 'zhu'"),
        ({"convention": "zhu2021", "W": None}, "'zhu2021' needs the weight W"),
        ({"num_classes": 5}, "num_classes is 5 but W has 4 rows"),
        ({"min_count": 0}, "min_count must be an integer of at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"centres": SIMPLEX, "W": None}, "centres are for NC4, which needs the weight W"),
    ],
)
def test_bad_input_is_refused_before_any_pass(changes, message, monkeypatch):
    monkeypatch.setattr("ncjax.analysis.result.measure", None)
    with pytest.raises(ValueError, match=message):
        ncjax.analyze(**GOOD | changes)


def test_features_that_are_not_finite_are_named_by_their_sample():
    x = features(0.1)
    x[17, 3] = np.inf
    with pytest.raises(ValueError, match="in float64 in sample 17 of 48: leave such"):
        ncjax.analyze(x, LABELS, SIMPLEX, chunk_size=20)


def test_features_whose_squares_overflow_are_refused_with_advice():
    with pytest.raises(ValueError, match="squares overflow in float64: divide all"):
        ncjax.analyze(1e200 * features(0.1), LABELS, SIMPLEX)


def test_names_are_the_same_objects_however_they_are_imported():
    from ncjax.analysis import analyze
    from ncjax.types import Params

    assert ncjax.analyze is analyze
    assert ncjax.Params is Params
    assert {"analyze", "collapse_metrics", "losses"} <= set(dir(ncjax))
    assert "networks" not in ncjax.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        ncjax.no_such_name  # noqa: B018
    assert jax.tree.leaves(ncjax.Params(1, 2)) == [1, 2]
