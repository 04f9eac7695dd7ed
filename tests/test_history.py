"""The history of epochs: rows in order, columns with NaN for gaps, a figure."""

import numpy as np
import pytest

import ncjax
from ncjax.history import History

REPORT = dict.fromkeys(ncjax.CollapseMetrics._fields, 0.5)


def test_values_that_an_epoch_lacks_are_nan():
    history = History()
    history.append({"cdnv": 1.0})
    history.append({"cdnv": 0.5, "accuracy": 0.75}, epoch=5)
    columns = history.columns()
    np.testing.assert_array_equal(columns["epoch"], [1, 5])
    np.testing.assert_array_equal(columns["accuracy"], [np.nan, 0.75])
    assert history[-1] == {"epoch": 5, "cdnv": 0.5, "accuracy": 0.75}


def test_the_table_has_no_column_of_nan_and_whole_counts():
    history = History()
    for epoch in (1, 12345):
        history.append({"cdnv": 0.123456, "accuracy": np.nan, "samples": 50000.0}, epoch)
    assert str(history).splitlines() == [
        "epoch      CDNV   samples",
        "    1    0.1235     50000",
        "12345    0.1235     50000",
    ]


def test_epochs_must_grow():
    history = History()
    history.append(REPORT, 3)
    with pytest.raises(ValueError, match="epoch must be above 3, the last one, got 3"):
        history.append(REPORT, 3)
    history.append(REPORT)
    assert history[-1]["epoch"] == 4


def test_the_figure_shows_every_epoch():
    history = History()
    for epoch in range(1, 8):
        history.append(dict.fromkeys(REPORT, 1 / epoch))
    figure = history.plot()
    for axis in figure.axes:
        x, y = axis.lines[0].get_data()
        np.testing.assert_array_equal(x, np.arange(1, 8))
        np.testing.assert_allclose(y, 1 / x)


def test_a_figure_of_nothing_or_of_other_reports_is_refused():
    with pytest.raises(ValueError, match="a plot needs an epoch"):
        History().plot()
    history = History()
    history.append({"loss": 1.0})
    with pytest.raises(ValueError, match="without 'mean_norm_variation'"):
        history.plot()
