"""Time ncjax against its peers: tables, `benchmarks/results.json` and `results.md`.

    pip install -e '.[all,bench]' && python -m benchmarks.run
    python -m benchmarks.run --only=startup,metrics --repeats=9

A run takes about half an hour on two cores, most of it for `hessian_resnet` and `hessian`.
The extra `bench` includes torch, whose default wheel for Linux brings gigabytes of CUDA.
The CPU wheel suffices here:
`pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu` and
`pip install --no-deps pyhessian`. A peer that is not installed is left out, and a note says
so.

All programs of a problem are compiled first, then take turns within each repeat of one
process. A row gives the median of the seconds and the median over repeats of the ratio to
ncjax in the same repeat: above 1, ncjax is faster.

**To add a section**, write a module with `measure(repeats) -> (rows, notes)`. Make one
`_timing.Program` per program, with ncjax's first, then call `_timing.warm_up`,
`_timing.interleave` and `_timing.rows`. Notes are lines for the reader, such as a missing
peer. Enter the section in `SECTIONS`. Each section keeps its own command, date, versions
and device, and a run replaces only the requested sections.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    _timing,
    flow,
    flow_deep,
    flow_objectives,
    flow_reach,
    hessian,
    hessian_resnet,
    metrics,
    startup,
    training_step,
)
from experiments._runs import cli, files
from experiments._runs.errors import BadUse

NAME = "run"
SECTIONS: dict[str, Callable[[int], tuple[list[dict[str, Any]], list[str]]]] = {
    "flow": flow.measure,
    "flow_wide": flow.measure_wide,
    "flow_peers": flow.peers,
    "flow_deep": flow_deep.measure,
    "flow_objectives": flow_objectives.measure,
    "flow_reach": flow_reach.measure,
    "training_step": training_step.measure,
    "training_step_winograd": training_step.measure_winograd,
    "metrics": metrics.measure,
    "startup": startup.measure,
    "hessian": hessian.measure,
    "hessian_resnet": hessian_resnet.measure,
}
_DASH = "-"


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Time ncjax against its peers.

    Example: python -m benchmarks.run --only=training_step,metrics
    """

    only: str = cli.flag(
        "all", "sections to time, with commas between; an unknown one lists them", cli.TIME
    )
    repeats: int = cli.flag(
        5, "timed calls of each program; medians are reported", cli.TIME
    )
    torch_threads: int = cli.flag(0, "threads of PyTorch; 0: its own choice", cli.MACHINE)
    cpu_devices: int = cli.flag(
        0, "JAX devices to split the CPU into; 0: one per core", cli.MACHINE
    )
    out: str = cli.path_flag(
        "benchmarks/results.json",
        "JSON file of the numbers; the tables go beside it",
        cli.OUTPUT,
    )


def run(config: Config) -> dict[str, Any]:
    """Time the requested sections, print their tables and replace them in the file.

    Raises:
      BadUse: a setting is out of range, or the file does not hold benchmark sections.
    """
    names = [*SECTIONS] if config.only == "all" else config.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise BadUse(f"--only must be all, or among {sorted(SECTIONS)}, got {unknown}")
    if config.repeats < 1:
        raise BadUse(f"--repeats must be at least 1, got {config.repeats}")
    path = Path(config.out)
    if path.suffix != ".json":
        raise BadUse(f"--out must end with .json, got {config.out!r}")
    stored(path)
    if config.torch_threads and not _timing.missing("torch"):
        import torch

        torch.set_num_threads(config.torch_threads)
    for name in names:
        print(f"timing {name}", file=sys.stderr)
        measured, notes = SECTIONS[name](config.repeats)
        section = {"rows": measured, "notes": notes} | _timing.provenance()
        # Read and write after each section: no interrupted or parallel run loses results.
        sections = stored(path) | {name: section}
        files.write_json(path, sections)
        text = "\n".join(table(*item) for item in sections.items())
        files.write_atomically(path.with_suffix(".md"), text.encode())
        print(table(name, section))
    print(path)
    return stored(path)


def stored(path: Path) -> dict[str, Any]:
    """Return the sections in the file, none if the file does not exist.

    Raises:
      BadUse: the file cannot be read, or does not hold benchmark sections.
    """
    if not path.exists():
        return {}
    try:
        sections = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadUse(f"--out={path} cannot be read: {error}") from None
    if not isinstance(sections, dict) or not all(
        isinstance(section, dict) and "rows" in section for section in sections.values()
    ):
        raise BadUse(f"--out={path} does not hold benchmark sections")
    return sections


def table(name: str, section: dict[str, Any]) -> str:
    """Return a section as Markdown."""
    lines = [
        f"**{name}**: `{section['command']}`, {section['date'][:10]}",
        "",
        "| problem | program | seconds | over ncjax | compile, s |",
        "|---|---|---|---|---|",
    ]
    for row in section["rows"]:
        note = f" ({row['note']})" if row["note"] else ""
        cells = [
            row["problem"],
            row["program"] + note,
            f"{row['median_seconds']:.3g}",
            _number(row["over_ncjax"], ".2f"),
            _number(row["compile_seconds"], ".1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(
        f"{package} {version}"
        for package, version in section["versions"].items()
        if version != "not installed"
    )
    machine = (
        f"{section['processor']}, {section['platform']}, threads: {section['threads']}"
    )
    return "\n".join([*lines, "", *section["notes"], f"{machine}; {versions}.", ""])


def _number(value: float | None, form: str) -> str:
    return _DASH if value is None else format(value, form)


if __name__ == "__main__":
    cli.main(Config, run, f"benchmarks.{NAME}")
