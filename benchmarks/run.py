"""Time ncjax against its peers: tables, `benchmarks/results.json` and `results.md`.

    pip install -e .[bench] && python -m benchmarks.run
    python -m benchmarks.run --only=startup,metrics --repeats=9

About half an hour on two cores, most of it `hessian_resnet` and `hessian`. The extra
`bench` holds torch, whose default wheel for Linux brings gigabytes of CUDA; the CPU wheel
does here: `pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu`
and `pip install --no-deps pyhessian`. A peer that is not installed is left out, and a line
says so.

All programs of a problem are warmed up, compiled apart, and take turns within each repeat
of one process. A row gives the median of the seconds and the median over repeats of the
ratio to ncjax in the same repeat: above 1, ncjax is faster.

**To add a section**, write a module with `measure(repeats) -> (rows, notes)`: make one
`_timing.Program` for each program, the first being ncjax's, then call `_timing.warm_up`,
`_timing.interleave` and `_timing.rows`; notes are lines for the reader, such as which peer
was missing. Enter it in `SECTIONS`. Each section keeps its own command, date, versions and
device, and a run replaces only the sections that it is asked for.
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
    flow_reach,
    hessian,
    hessian_resnet,
    metrics,
    startup,
    training_step,
)
from experiments._runs import cli, folders

NAME = "run"
SECTIONS: dict[str, Callable[[int], tuple[list[dict[str, Any]], list[str]]]] = {
    "flow": flow.measure,
    "flow_wide": flow.measure_wide,
    "flow_peers": flow.peers,
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
class Config:
    """Time ncjax against its peers.

    Example: python -m benchmarks.run --only=training_step,metrics
    """

    only: str = cli.flag(
        ",".join(SECTIONS), "sections timed, with commas between", cli.TIME
    )
    repeats: int = cli.flag(5, "timed calls of each program; medians are told", cli.TIME)
    torch_threads: int = cli.flag(
        0, "threads of PyTorch; 0 for its own choice", cli.MACHINE
    )
    cpu_devices: int = cli.flag(
        0, "JAX devices to split the CPU into; 0: one a core", cli.MACHINE
    )
    out: str = cli.flag(
        "benchmarks/results.json", "JSON file of the numbers; tables beside it", cli.OUTPUT
    )


def run(config: Config) -> dict[str, Any]:
    """Time the sections, print their tables, replace them in the file.

    Raises:
      ValueError: a setting is out of range, or the file holds something else.
    """
    names = config.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ValueError(f"--only must be among {sorted(SECTIONS)}, got {unknown}")
    if config.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {config.repeats}")
    path = Path(config.out)
    if path.suffix != ".json":
        raise ValueError(f"--out must end with .json, got {config.out!r}")
    stored(path)
    if config.torch_threads and not _timing.missing("torch"):
        import torch

        torch.set_num_threads(config.torch_threads)
    for name in names:
        print(f"timing {name}", file=sys.stderr)
        measured, notes = SECTIONS[name](config.repeats)
        section = {"rows": measured, "notes": notes} | _timing.provenance()
        # Read again and after each: an interrupted run, and one beside it, lose nothing.
        sections = stored(path) | {name: section}
        folders.write_json(path, sections)
        text = "\n".join(table(*item) for item in sections.items())
        folders.write_atomically(path.with_suffix(".md"), text.encode())
        print(table(name, section))
    print(path)
    return stored(path)


def stored(path: Path) -> dict[str, Any]:
    """The sections in the file; none if there is no file.

    Raises:
      ValueError: it cannot be read, or is no such file.
    """
    if not path.exists():
        return {}
    try:
        sections = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--out={path} cannot be read: {error}") from None
    if not isinstance(sections, dict) or not all(
        isinstance(section, dict) and "rows" in section for section in sections.values()
    ):
        raise ValueError(f"--out={path} holds something else than benchmark sections")
    return sections


def table(name: str, section: dict[str, Any]) -> str:
    """A section in Markdown."""
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
    versions = ", ".join(f"{key} {value}" for key, value in section["versions"].items())
    machine = (
        f"{section['processor']}, {section['platform']}, threads: {section['threads']}"
    )
    return "\n".join([*lines, "", *section["notes"], f"{machine}; {versions}.", ""])


def _number(value: float | None, form: str) -> str:
    return _DASH if value is None else format(value, form)


if __name__ == "__main__":
    cli.main(Config, run, f"benchmarks.{NAME}")
