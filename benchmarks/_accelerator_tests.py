"""Run the part of the suite that checks numbers, with the accelerator as JAX's device."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._timing import missing

ROOT = Path(__file__).parents[1]
# They need neither data sets nor a CPU; the quick ones first, for the time may not last.
FILES = (
    *("losses", "metrics", "statistics", "geometry", "step", "stabilised", "rosenbrock"),
    *("implicit", "peeling", "convolution", "flow", "landscape", "separation"),
)
TINY = ("types",)
_RESERVE = 5.0  # seconds to end pytest
LOG = "pytest.log"


def checks(setting: Setting) -> list[Check]:
    """Return one check: the tests pass."""
    return [Check("tests of the numbers", partial(_run, setting), accelerator=False)]


def _run(setting: Setting) -> Finding:
    """Run the tests until they or the time end; what has run by then counts."""
    names = TINY if setting.tiny else FILES
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    spread = ["-n", "8"] if not setting.tiny and not missing("xdist") else []
    options = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *files, *spread, *options]
    log = Path(setting.folder) / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        try:
            code: int | str = process.wait(max(setting.seconds_left() - _RESERVE, 1.0))
        except subprocess.TimeoutExpired:
            code = "the time was over"
        finally:
            process.kill()
            process.wait()
    counts = tally(log.read_text(errors="replace"))
    passed = counts.pop("PASSED")
    good = passed > 0 and not counts["FAILED"] and not counts["ERROR"]
    # Tests that did not run in the time are no failures; another end of pytest is.
    good = good and code in (0, "the time was over")
    details = {name.lower(): count for name, count in counts.items()} | {"end": code}
    return Finding(good, passed, "passed", details | {"log": LOG})


def tally(output: str) -> dict[str, int]:
    """Return the number of tests of each outcome in the lines of `pytest -v`."""
    outcomes = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL")
    # A line is "tests/test_x.py::name PASSED [ 3%]", or with xdist
    # "[gw0] [ 3%] PASSED tests/test_x.py::name".
    pattern = rf"^(?:\S+::.*? |\[gw\d+\] \[ *\d+%\] )({'|'.join(outcomes)})\b"
    found = re.findall(pattern, output, re.MULTILINE)
    return {outcome: found.count(outcome) for outcome in outcomes}
