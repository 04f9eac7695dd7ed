"""Print the rows of `benchmarks.accelerator`, and keep them in two files."""

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks._accelerator_checks import DRY, FAIL, NO_ACCELERATOR, OK, SKIP, Row
from experiments._runs import files

TEXT, LINES = "report.txt", "report.jsonl"
_WIDTH = 52  # of the names of checks


class Report:
    """The lines so far; both files are written again with each, so that none is lost."""

    def __init__(self, folder: Path, title: str):
        """Begin the report with a line."""
        self.rows: list[Row] = []
        self._folder, self._text = folder, ""
        self._print(title)

    def add(self, row: Row) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        lines = "".join(json.dumps(row._asdict()) + "\n" for row in self.rows)
        files.write_atomically(self._folder / LINES, lines.encode())
        self._print(line(row))

    def close(self, seconds: float) -> None:
        """End the report with the counts, and with what says nothing of an accelerator."""
        counts = collections.Counter(row.verdict for row in self.rows)
        found = ", ".join(f"{counts[kind]} {kind}" for kind in (OK, FAIL, SKIP, DRY))
        self._print(f"{found}; {seconds:.0f} s")
        for text, missed in (
            (
                "need an accelerator, skipped on this CPU",
                [row for row in self.rows if row.reason == NO_ACCELERATOR],
            ),
            (
                "need an accelerator, dry run on this CPU with tiny sizes",
                [row for row in self.rows if row.verdict == DRY],
            ),
        ):
            if missed:
                self._print(f"{text}: {_by_section(missed)}")

    def failures(self) -> list[str]:
        """Return section and name of the checks that failed."""
        return [f"{row.section}: {row.name}" for row in self.rows if row.verdict == FAIL]

    def _print(self, text: str) -> None:
        print(text, flush=True)
        self._text += text + "\n"
        files.write_atomically(self._folder / TEXT, self._text.encode())


def line(row: Row) -> str:
    """Return a row as one line: verdict, section, check, number, unit, further numbers."""
    numbers = f"{_number(row.value)} {row.unit}".strip()
    more = [
        f"{name}={_number(value)}"
        for name, value in row.details.items()
        if value is not None
    ]
    found = row.reason or "  ".join([numbers, *more])
    return f"{row.verdict:<5}{row.section:<12}{row.name:<{_WIDTH}} {found}".rstrip()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _by_section(rows: Iterable[Row]) -> str:
    """Return the number of checks of each section."""
    counts = collections.Counter(row.section for row in rows)
    return ", ".join(f"{section} {count}" for section, count in counts.items())
