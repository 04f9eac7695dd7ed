"""One HTML page of run folders: figures, tables, verdicts, provenance."""

import base64
import collections
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from experiments._runs import files, folders

GOOD, BAD, OPEN = "good", "bad", "open"
_TEMPLATE = "page.html"
_COLOURS = 24
_MOST_PIXELS = 50_000_000
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Errors of reading a summary that has another shape.
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, OSError)


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
    notes: Sequence[str]  # what could not be read, and why
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
    """Return the section of one run folder, of the experiment `kind`."""
    stored = files.read_json(folder / folders.CONFIG)
    notes: list[str] = []
    summary, findings = _read_summary(folder, kind, page, notes)
    figures = [
        figure
        for name, caption in page.figures.items()
        if (folder / name).exists() or name not in page.optional
        if (figure := _figure(folder / name, caption, notes))
    ]
    return Section(
        page=page,
        anchor="run-" + "".join(c if c.isalnum() else "-" for c in str(folder)).strip("-"),
        title=page.title.format_map(collections.defaultdict(lambda: "?", stored["config"])),
        folder=str(folder),
        **findings._asdict(),
        notes=notes,
        figures=figures,
        settings={name: str(value) for name, value in stored["config"].items()},
        provenance=_provenance(summary or stored),
        summary=summary,
    )


def _read_summary(
    folder: Path, kind: str, page: Page, notes: list[str]
) -> tuple[Mapping[str, Any], Findings]:
    """Return summary and findings of a run; add a note on each fault to `notes`."""
    if not (folder / folders.SUMMARY).exists():
        notes.append(f"There is no {folders.SUMMARY}: the run is not finished.")
        return {}, Findings(OPEN, "unfinished", [])
    try:
        summary = files.read_json(folder / folders.SUMMARY)
        findings = page.show(summary)
    except _DAMAGED:
        notes.append(f"{folders.SUMMARY} is damaged, or not of a run of {kind}.")
        return {}, Findings(BAD, "cannot be read", [])
    for name in folders.changed_files(folder, summary):
        notes.append(f"{name} is missing or damaged: not as the run wrote it.")
    return summary, findings


def _figure(path: Path, caption: str, notes: list[str]) -> Figure | None:
    """Return a PNG reduced to a palette, or None with a note if it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError("too many pixels")
            # Thin curves keep their colours, which are rare among the pixels.
            cover, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
            palette = image.convert("RGB").quantize(_COLOURS, cover, dither=plain)
    except FileNotFoundError:
        notes.append(f"There is no {path.name}.")
        return None
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
    packages = versions.items() if isinstance(versions, Mapping) else ()
    entries = {
        name: str(source[name])
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
            tables.append(page.compare(finished))
    return tables


def render(title: str, runs: str, sections: Sequence[Section], omissions: list[str]) -> str:
    """Return the page as HTML, with everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=title,
        runs=runs,
        sections=sections,
        comparisons=comparisons(sections),
        omissions=omissions,
    )
