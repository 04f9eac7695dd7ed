"""One HTML page of run folders: figures, tables, verdicts, provenance."""

import base64
import collections
import dataclasses
import functools
import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from experiments._runs import files, folders, reading
from experiments._runs.errors import BadUse

GOOD, BAD, OPEN = "good", "bad", "open"
UNFINISHED = "unfinished"  # verdict on a run without summary.json
_TEMPLATE = "page.html"
_COLOURS = 24
_MOST_PIXELS = 50_000_000
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_BYTES = 64 * 2**20  # of a picture
_MOST_ROWS = 1000  # of a table, and of other lists
_MOST_COLUMNS = 100
_MOST_NOTES = 20


class Figure(NamedTuple):
    """A picture as part of the page."""

    source: str  # data URI
    width: int  # pixels
    height: int
    caption: str


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Findings(NamedTuple):
    """The result of a run."""

    state: str  # GOOD, BAD or OPEN
    verdict: str  # one line
    tables: Sequence[Table]


@dataclasses.dataclass(frozen=True, eq=False)
class Page:
    """How the page shows the runs of an experiment; each has one, named `PAGE`."""

    title: str  # {name} is replaced by that setting of the run
    figures: Mapping[str, str]  # file name to caption
    show: Callable[[Mapping[str, Any]], Findings]  # reads summary.json
    # Return one table of several finished runs, for the head of the page.
    compare: Callable[[Sequence["Section"]], Table] | None = None
    optional: tuple[str, ...] = ()  # figures that only some runs have


class Section(NamedTuple):
    """One run on the page."""

    page: Page
    anchor: str
    title: str
    folder: str
    state: str  # GOOD, BAD or OPEN
    verdict: str  # one line
    notes: list[str]  # what could not be read, and why
    figures: Sequence[Figure]
    tables: Sequence[Table]
    settings: Mapping[str, str]
    provenance: Mapping[str, str]
    summary: Mapping[str, Any]  # as read; empty if the run is unfinished or damaged


def number(value: Any, digits: int = 4) -> str:
    """Format a number: plain, as a power of ten, or as 1 - x if it is just below 1."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{value:.0f}".replace("-", "−")
    if 0.999 < value < 1:
        return f"1\u00a0−\u00a0{number(1 - value, digits)}"
    if 1e-3 <= abs(value) < 1e5:
        places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{places}f}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa}\u00a0×\u00a010{power}".replace("-", "−")


def section(folder: Path, kind: str, page: Page) -> Section:
    """Return the section of one run folder, of the experiment `kind`.

    Whatever is wrong with the folder is a note of its section.
    """
    try:
        return _section(folder, kind, page)
    except Exception as error:  # the content of a folder may be anything
        return Section(
            page=page,
            anchor=_anchor(folder),
            title=kind,
            folder=reading.shown(folder),
            **Findings(BAD, "cannot be read", [])._asdict(),
            notes=[f"The folder cannot be read: {reading.reason(error)}."],
            figures=[],
            settings={},
            provenance={},
            summary={},
        )


def _section(folder: Path, kind: str, page: Page) -> Section:
    """Return the section of a folder that holds a config.json."""
    stored = files.read_json(folder / folders.CONFIG)
    notes: list[str] = []
    summary, findings = _read_summary(folder, kind, page, notes)
    figures = [
        figure
        for name, caption in page.figures.items()
        if os.path.lexists(folder / name) or name not in page.optional
        if (figure := _figure(folder / name, caption, notes))
    ]
    title = page.title.format_map(collections.defaultdict(lambda: "?", stored["config"]))
    return Section(
        page=page,
        anchor=_anchor(folder),
        title=reading.shown(title, 200),
        folder=reading.shown(folder),
        **findings._asdict(),
        notes=notes,
        figures=figures,
        settings=_entries(stored["config"]),
        provenance=_provenance(summary or stored),
        summary=summary,
    )


def _anchor(folder: Path) -> str:
    """Return the name of a folder's section within the page."""
    return "run-" + "".join(c if c.isalnum() else "-" for c in str(folder)).strip("-")


def _read_summary(
    folder: Path, kind: str, page: Page, notes: list[str]
) -> tuple[Mapping[str, Any], Findings]:
    """Return summary and findings of a run; add a note on each fault to `notes`."""
    if not os.path.lexists(folder / folders.SUMMARY):
        notes.append(f"There is no {folders.SUMMARY}: the run is not finished.")
        return {}, Findings(OPEN, UNFINISHED, [])
    try:
        summary = files.read_json(folder / folders.SUMMARY)
        findings = _as_text(page.show(summary))
    except Exception as error:  # the summary may have any shape
        notes.append(
            f"{folders.SUMMARY} is damaged, or not of a run of {kind}: "
            f"{reading.reason(error)}."
        )
        return {}, Findings(BAD, "cannot be read", [])
    notes += _changes(folder, summary)
    return summary, findings


def _changes(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """Return a note on each output that is not as the run wrote it."""
    try:
        names = [
            reading.shown(name, 100) for name in folders.changed_files(folder, summary)
        ]
    except BadUse as error:
        return [f"{reading.reason(error)}."]
    if len(names) > _MOST_NOTES:
        return [f"{len(names):,} files are missing or damaged: not as the run wrote them."]
    return [f"{name} is missing or damaged: not as the run wrote it." for name in names]


def _as_text(findings: Findings) -> Findings:
    """Return findings that hold texts alone, whatever the summary held."""
    tables = [_table_as_text(table) for table in findings.tables]
    return Findings(reading.shown(findings.state), reading.shown(findings.verdict), tables)


def _table_as_text(table: Table) -> Table:
    """Return a table with its cells as text and no more rows than a page can hold."""
    rows = [_cells(row) for row in table.rows[:_MOST_ROWS]]
    if len(table.rows) > _MOST_ROWS:
        rows.append([f"and {len(table.rows) - _MOST_ROWS:,} rows more"])
    return Table(reading.shown(table.caption), _cells(table.head), rows)


def _cells(row: Sequence[Any]) -> list[str]:
    return [reading.shown(cell) for cell in row[:_MOST_COLUMNS]]


def _entries(content: Mapping[str, Any]) -> dict[str, str]:
    """Return names and values as text."""
    entries = list(content.items())[:_MOST_ROWS]
    return {reading.shown(name, 100): reading.shown(value) for name, value in entries}


def _figure(path: Path, caption: str, notes: list[str]) -> Figure | None:
    """Return a PNG reduced to a palette, or None with a note if it cannot be read."""
    try:
        content = reading.read_bytes(path, _MOST_BYTES)
    except FileNotFoundError:
        notes.append(f"There is no {path.name}.")
        return None
    except (BadUse, OSError) as error:
        notes.append(f"{path.name} cannot be read: {reading.reason(error)}.")
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=["PNG"])
        with image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError("too many pixels")
            # Thin curves keep their colours, which are rare among the pixels.
            cover, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
            palette = image.convert("RGB").quantize(_COLOURS, cover, dither=plain)
    except Exception:  # Pillow raises many kinds for a damaged picture
        notes.append(f"{path.name} is damaged.")
        return None
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Figure(f"data:image/png;base64,{text}", *palette.size, caption)


def _provenance(source: Mapping[str, Any]) -> dict[str, str]:
    """Return command, date, device and versions, as far as they are stored."""
    versions = source.get("versions", {})
    packages = _entries(versions).items() if isinstance(versions, Mapping) else ()
    entries = {
        name: reading.shown(source[name], 2000)
        for name in ("command", "date", "device", "platform")
        if name in source
    }
    return entries | {
        "versions": ", ".join(f"{name} {version}" for name, version in packages)
    }


def comparisons(sections: Sequence[Section]) -> list[Table]:
    """Return the table of each `Page.compare` that has two finished runs or more."""
    tables = []
    for page in dict.fromkeys(section.page for section in sections):
        finished = [s for s in sections if s.page is page and s.summary]
        if page.compare and len(finished) > 1:
            fit = [s for s in finished if _comparison(page.compare, [s])]
            if len(fit) > 1 and (table := _comparison(page.compare, fit)):
                tables.append(table)
    return tables


def _comparison(
    compare: Callable[[Sequence[Section]], Table], sections: Sequence[Section]
) -> Table | None:
    """Return the table of runs; if it fails, None, with a note in each section."""
    try:
        return _table_as_text(compare(sections))
    except Exception as error:  # the summaries may have any shape
        note = f"It is not compared with other runs: {reading.reason(error)}."
        for section in sections:
            section.notes.append(note)
        return None


def render(title: str, runs: str, sections: Sequence[Section], omissions: list[str]) -> str:
    """Return the page as HTML, with everything escaped."""
    return _template().render(
        title=title,
        runs=reading.shown(runs, reading.MOST_OF_PATH),
        sections=sections,
        comparisons=comparisons(sections),
        omissions=omissions,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)
