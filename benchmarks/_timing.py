"""Programs that solve one problem, timed in turns within one run."""

import configparser
import dataclasses
import importlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._runs import cli, folders

_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Program:
    """One row of a table."""

    name: str
    call: Callable[[int], Any]  # number of the repeat -> result, once it is there
    warm: Callable[[], Any] | None = None  # compiles; None if nothing is
    note: str = ""
    steps: float = 1  # of one call; seconds are for one
    compile_seconds: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self, repeat: int) -> None:
        """Call once."""
        begun = time.perf_counter()
        result = self.call(repeat)
        self.seconds.append((time.perf_counter() - begun) / self.steps)
        self.keep(result)

    def keep(self, result: Any) -> None:
        """What is done with the result, out of the time."""


def warm_up(programs: Sequence[Program]) -> None:
    """Compile, and time that."""
    for program in programs:
        if program.warm is not None:
            begun = time.perf_counter()
            program.warm()
            program.compile_seconds = time.perf_counter() - begun


def interleave(programs: Sequence[Program], repeats: int) -> None:
    """Every program once in each repeat, so that they share the machine's moods."""
    for repeat in range(repeats):
        for program in programs:
            program.time(repeat)


def rows(problem: str, programs: Sequence[Program], **more: Any) -> list[dict[str, Any]]:
    """A row for each timed program; the first is what the others are compared with.

    Returns:
      Dictionaries of `problem`, `program`, `note`, `median_seconds`, `seconds` of each
      repeat, `compile_seconds` (most with the first call), `over_ncjax`, and `more`.
      `over_ncjax` is the median over repeats of its seconds by those of the first program
      in the same repeat: above 1, ncjax is faster.
    """
    first = np.array(programs[0].seconds)
    return [
        {
            "problem": problem,
            "program": program.name,
            "note": program.note,
            "median_seconds": float(np.median(program.seconds)),
            "over_ncjax": float(
                np.median(np.array(program.seconds) / first[: len(program.seconds)])
            ),
            "seconds": program.seconds,
            "compile_seconds": program.compile_seconds,
            **more,
        }
        for program in programs
    ]


def missing(*packages: str) -> str:
    """Why peers of these packages are left out; empty if all are there."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"peers left out: {error}; pip install .[bench]"
    return ""


def provenance() -> dict[str, Any]:
    """Command, date, versions of the peers too, device and processor."""
    known = folders.provenance(
        "flax", "optax", "scipy", "torch", "torchvision", "torchdiffeq", "pyhessian"
    )
    known["versions"]["ncjax"] = version()
    return known | {"processor": _processor(), "threads": threads()}


def version() -> str:
    """Return the version of ncjax, also if it runs from a clone and is not installed."""
    try:
        return importlib.metadata.version("ncjax")
    except importlib.metadata.PackageNotFoundError:
        metadata = configparser.ConfigParser(interpolation=None)
        metadata.read(_ROOT / "setup.cfg", encoding="utf-8")
        return f"{metadata['metadata']['version']} (clone)"


def threads() -> str:
    """Threads that the programs may use."""
    if missing("torch"):
        return f"{cli.cores()} of JAX"
    import torch

    return f"{cli.cores()} of JAX, {torch.get_num_threads()} of PyTorch"


def _processor() -> str:
    """Model of the processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor()
