"""Random flags are accepted, or refused by name before a run folder is made."""

import collections
import contextlib
import dataclasses
import math

import pytest
from absl import flags
from commands import MODULES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import train_small, ulpm_flow
from experiments._runs import cli, files, folders, memory

# Flags of devices and processes are checked before the experiment begins.
OF_THE_MACHINE = (
    *("cpu_devices", "coordinator", "num_processes", "process_id"),
    *("local_device_ids", "process_timeout"),
)
INTEGERS = st.one_of(
    st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 10**6, 10**9, 2**31, 2**63, 10**30]),
    st.integers(-5, 100),
    st.integers(),
)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-320, 1e300, 1e9, math.inf, -math.inf, math.nan]),
    st.floats(),
)
WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "NaN", "1e9", "-", "--", "/dev/null", ".", "~", "train[:]", "x" * 300]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/")),
)
OF_TYPE = {int: INTEGERS, float: NUMBERS, bool: st.booleans(), str: WORDS}


class Accepted(BaseException):
    """Raised in place of making a run folder."""


@contextlib.contextmanager
def accepted(*_args, **_kwargs):
    raise Accepted
    yield


@pytest.fixture
def nothing_done(monkeypatch, tmp_path):
    """End runs where they would make their folder, and download nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("ncjax.networks.data._has_network", lambda: False)
    monkeypatch.setattr(folders, "open_config", accepted)
    monkeypatch.setattr(files, "write_atomically", accepted)
    monkeypatch.setattr(memory, "total", lambda: 2**28)  # not what this machine has
    return tmp_path


def arguments(draw, experiment):
    """Draw a command line of few flags, most with values of their type."""
    fields = [
        field
        for field in dataclasses.fields(experiment.Config)
        if field.name not in OF_THE_MACHINE
    ]
    chosen = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3))
    line = [""]
    for field in chosen:
        strategy = OF_TYPE[field.type]
        if draw(st.integers(0, 9)) == 0:
            strategy = st.one_of(*OF_TYPE.values())
        line.append(f"--{field.name}={draw(strategy)}")
    return line


def try_flags(experiment, line):
    """Run an experiment; return whether its flags were accepted or refused."""
    names = [field.name for field in dataclasses.fields(experiment.Config)]
    try:
        experiment.run(cli.parse(experiment.Config, line))
    except Accepted:
        return "accepted"
    except (ValueError, OSError, flags.Error) as error:
        values = [part.partition("=")[2] for part in line[1:]]
        given = [*map(repr, values), *(value for value in values if len(value) > 1)]
        message = str(error)
        assert any(word in message for word in (*names, *given)), (line, message)
        return "refused"
    raise AssertionError(f"{line} was neither accepted nor refused")


def campaign(experiment, folder, examples):
    """Try random command lines, none of which may leave a file, and count the results."""
    counts = collections.Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data):
        counts[try_flags(experiment, arguments(data.draw, experiment))] += 1
        assert list(folder.iterdir()) == []

    holds()
    return counts


@pytest.mark.parametrize("experiment", MODULES, ids=lambda module: module.NAME)
def test_random_flags_are_accepted_or_refused_by_name(nothing_done, experiment):
    assert campaign(experiment, nothing_done, 10).total() >= 10


@pytest.mark.slow
@pytest.mark.parametrize("experiment", MODULES, ids=lambda module: module.NAME)
def test_many_more_random_flags_are_accepted_or_refused_by_name(nothing_done, experiment):
    trains = issubclass(experiment.Config, train_small._training.Config)
    print(experiment.NAME, campaign(experiment, nothing_done, 200 if trains else 1000))


def test_a_run_larger_than_the_memory_is_refused_at_once(nothing_done):
    with pytest.raises(ValueError, match=r"needs at least .* GB .*: give smaller --seeds"):
        ulpm_flow.run(ulpm_flow.Config(seeds=10**9))
    with pytest.raises(ValueError, match="give smaller --image_size"):
        train_small.run(train_small.Config(image_size=10**6))
    with pytest.raises(ValueError, match="give smaller --width or --seeds"):
        train_small.run(train_small.Config(width=1e6))
    with pytest.raises(ValueError, match="give smaller --measurements or --seeds"):
        train_small.run(train_small.Config(seeds=10**9))
