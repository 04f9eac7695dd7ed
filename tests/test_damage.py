"""A damaged file gives the right numbers or a one-line error that names it."""

import collections

import damage
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import report

# After a damaged checkpoint Orbax leaves coroutines that are never awaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STATES = [(name, "finished") for name in damage.MODULES] + [
    (name, "interrupted")
    for name in ("ulpm_flow", "train_small", "peel", "deep_flow", "neighbours")
]
ACTIONS = ("resume", "overwrite", "report", "peel")
RESUMABLE = ("ulpm_flow", "train_small", "peel", "deep_flow", "neighbours")


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Make a run folder in each state, and keep the stand-ins in place."""
    root = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        damage.stand_in(patch)
        damage.run("train_small", root / "source")
        for name, state in STATES:
            folder = root / f"{name}_{state}"
            if state == "finished":
                damage.run(name, folder)
            else:
                damage.interrupted(patch, name, folder)
        yield root


def content(folder):
    """Results of a run: its tables and its summary, without dates."""
    found = {
        path.name: path.read_bytes() for path in folder.glob("*") if path.suffix == ".csv"
    }
    summary = damage.files.read_json(folder / "summary.json")
    keys = ("final", "metrics", "points", "statements", "family", "network", "directions")
    return found | {key: summary.get(key) for key in keys}


def act(root, name, action):
    """Act on the folder `case` and return the results, to be compared."""
    case = root / "case"
    if action == "report":
        page = root / "page.html"
        report.run(report.Config(runs=str(case), output=str(page), overwrite=True))
        return page.read_text()
    if action == "peel":
        damage.run("peel", root / "peeled", run=str(case), overwrite=True)
        return content(root / "peeled")
    damage.run(name, case, **{action: True})
    return content(case)


def bystanders(case):
    """Files beside the run, which no action may change."""
    for path in (case / "notes.txt", case / "other" / "summary.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"precious {path.name}")
    return [case / "notes.txt", case / "other" / "summary.json"]


def trial(root, state, action, choice, kind, where):
    """Damage a file of a run, act, return how that ended, and overwrite the run."""
    name = state[0]
    case, template = root / "case", root / "_".join(state)
    damage.fresh(template, case)
    expected = act(root, name, action)
    damage.fresh(template, case)
    files = sorted(path for path in case.rglob("*") if path.is_file())
    path = files[int(choice * len(files))]
    before = path.read_bytes()
    damage.DAMAGES[kind](path, where)
    what = f"{action} of {'_'.join(state)} with {path.relative_to(case)}: {kind}, {where}"
    kept = bystanders(case)
    outcome = judge(root, name, action, path, expected, what)
    damaged = not path.is_file() or path.read_bytes() != before
    if action != "overwrite" and damaged:
        judge(root, name, "overwrite", path, None, f"after that, overwrite: {what}")
    assert [p.read_text() for p in kept] == [f"precious {p.name}" for p in kept], what
    assert not list(case.rglob("*.part")), what
    if kind == "a link instead":
        assert damage.outside(path).read_bytes() == before, what
    return outcome


def judge(root, name, action, path, expected, what):
    """Assert that an action gives the right numbers or a helpful error; return which."""
    case = root / "case"
    try:
        with damage.within(60):
            found = act(root, name, action)
    except (ValueError, OSError) as error:
        return refusal(error, case, path, what)
    except Exception as error:
        raise AssertionError(what) from error
    if expected is None or found == expected:
        return "right"
    assert action == "report", what
    assert any(word in found for word in ("damaged", "There is no", "cannot be read")), what
    return "reported on the page"


def refusal(error, case, path, what):
    """Assert that an error names the folder and the file, or that there is no run."""
    message = str(error)
    assert str(case) in message, (what, message)
    named = path.relative_to(case).parts[0] in message
    assert named or "no run" in message, (what, message)
    return "refused by name"


def actions(name):
    """Actions that a folder of this experiment allows."""
    chosen = ["overwrite", "report"]
    chosen += ["resume"] if name in RESUMABLE else []
    return chosen + (["peel"] if name == "train_small" else [])


@pytest.fixture
def campaign(templates):
    """Run this many trials and count their outcomes."""

    def run(examples):
        counts = collections.Counter()

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def holds(data):
            state = data.draw(st.sampled_from(STATES))
            action = data.draw(st.sampled_from(actions(state[0])))
            kind = data.draw(st.sampled_from(sorted(damage.DAMAGES)))
            choice, where = (data.draw(st.floats(0, 1, exclude_max=True)) for _ in "ab")
            outcome = trial(templates, state, action, choice, kind, where)
            counts[f"{'_'.join(state)}, {action}: {outcome}"] += 1

        holds()
        return counts

    return run


def test_damaged_files_give_the_right_numbers_or_an_error_that_names_them(campaign):
    assert campaign(25).total() >= 25


@pytest.mark.slow
def test_a_thousand_damaged_files(campaign):
    counts = campaign(1000)
    print(*(f"{count:5} {how}" for how, count in sorted(counts.items())), sep="\n")
    assert counts.total() >= 1000
