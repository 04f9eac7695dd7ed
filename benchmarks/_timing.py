"""Time programs that solve one problem, in turns within one run."""

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


@dataclasses.dataclass
class Program:
    """One row of a table."""

    name: str
    call: Callable[[int], Any]  # number of the repeat -> finished result
    warm: Callable[[], Any] | None = None  # compiles; None if nothing compiles
    note: str = ""
    steps: float = 1  # per call; seconds are for one step
    compile_seconds: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self, repeat: int) -> None:
        """Call once and record the seconds of a step."""
        started = time.perf_counter()
        result = self.call(repeat)
        self.seconds.append((time.perf_counter() - started) / self.steps)
        self.keep(result)

    def keep(self, result: Any) -> None:
        """Store the result, outside the timed part; here it is dropped."""


def warm_up(programs: Sequence[Program]) -> None:
    """Compile every program and record the seconds."""
    for program in programs:
        if program.warm is not None:
            started = time.perf_counter()
            program.warm()
            program.compile_seconds = time.perf_counter() - started


def interleave(programs: Sequence[Program], repeats: int) -> None:
    """Run every program once per repeat, so that load on the machine hits all alike."""
    for repeat in range(repeats):
        for program in programs:
            program.time(repeat)


def rows(problem: str, programs: Sequence[Program], **more: Any) -> list[dict[str, Any]]:
    """Return one row per timed program; the first program is the reference.

    Returns:
      Dictionaries of `problem`, `program`, `note`, `median_seconds`, `seconds` of each
      repeat, `compile_seconds` (usually including the first call), `over_ncjax` and `more`.
      `over_ncjax` is the median over repeats of the program's seconds divided by the first
      program's seconds in the same repeat: above 1, ncjax is faster.
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
    """Return why peers are left out, or an empty text if all packages are installed."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"peers left out: {error}; pip install '.[all,bench]'"
    return ""


def provenance() -> dict[str, Any]:
    """Return command, date, device, processor, and versions of ncjax and its peers."""
    known = folders.provenance(
        "flax", "optax", "scipy", "torch", "torchvision", "torchdiffeq", "pyhessian"
    )
    return known | {"processor": _processor(), "threads": threads()}


def threads() -> str:
    """Return the numbers of threads that the programs may use."""
    if missing("torch"):
        return f"{cli.cores()} of JAX"
    import torch

    return f"{cli.cores()} of JAX, {torch.get_num_threads()} of PyTorch"


def _processor() -> str:
    """Return the model of the processor, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor()
