"""A check of a device: a name, a verdict, one number with its unit."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

OK, FAIL, SKIP, DRY = "ok", "FAIL", "skip", "dry"
NO_ACCELERATOR = "needs an accelerator, and JAX runs on the CPU"
_LEAST_SECONDS = 3.0  # below, no further check of a section starts
_LENGTH = 300  # characters of an error's message


class Setting(NamedTuple):
    """Settings of all sections."""

    tiny: bool = False  # sizes of a dry run
    data: str = ""  # .npz file or folder of TFDS with CIFAR-10; if empty, noise
    folder: str = ""  # for tables and figures
    deadline: float = math.inf  # of the section, on the clock of time.monotonic

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


class Finding(NamedTuple):
    """Result of a check."""

    ok: bool
    value: float | int | str
    unit: str = ""
    details: Mapping[str, Any] = {}


class Check(NamedTuple):
    """One check. It raises `Skipped` if it cannot run here."""

    name: str
    call: Callable[[], Finding]
    # If true, the check is skipped on a CPU. With tiny sizes it runs there, as a dry run
    # that says nothing about an accelerator.
    accelerator: bool = True


class Skipped(Exception):
    """A check cannot run here, for the reason in the message."""


class Row(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    verdict: str  # OK, FAIL, SKIP or DRY
    value: float | int | str = ""
    unit: str = ""
    details: Mapping[str, Any] = {}
    reason: str = ""  # why the check was skipped, or failed before it found a number


def rows(section: str, checks: Iterable[Check], setting: Setting) -> Iterator[Row]:
    """Run the checks of a section in their order, and yield a row for each.

    An exception is the row of its check; the next check runs all the same.
    """
    on_cpu = jax.default_backend() == "cpu"
    for check in checks:
        row = Row(section, check.name, SKIP)
        if on_cpu and check.accelerator and not setting.tiny:
            yield row._replace(reason=NO_ACCELERATOR)
        elif setting.seconds_left() < _LEAST_SECONDS:
            yield row._replace(reason="the section has no time left")
        else:
            yield _run(check, row, DRY if on_cpu and check.accelerator else OK)


def _run(check: Check, row: Row, passed: str) -> Row:
    print(f"{row.section}: {check.name}", file=sys.stderr)  # the last line, if it hangs
    try:
        found = check.call()
    except Skipped as skipped:
        return row._replace(reason=str(skipped))
    except Exception as error:  # a check may raise whatever its parts raise
        traceback.print_exc(file=sys.stderr)
        first = next(iter(str(error).strip().splitlines()), "")[:_LENGTH]
        reason = f"{type(error).__name__}: {first}"
        return row._replace(verdict=FAIL, reason=reason)
    return row._replace(
        verdict=passed if found.ok else FAIL,
        value=_plain(found.value),
        unit=found.unit,
        details={
            name: value if value is None else _plain(value)
            for name, value in found.details.items()
        },
    )


def _plain(value: Any) -> float | int | str:
    """Return a value that JSON holds."""
    if isinstance(value, int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
