"""Time `import ncjax` and the help of an experiment, each in a fresh process."""

import subprocess
import sys
from typing import Any

from benchmarks._timing import Program, interleave, rows

COMMANDS = {
    "import ncjax": ("-c", "import ncjax"),
    "import jax, diffrax": ("-c", "import jax, diffrax"),
    "python -m experiments.ulpm_flow --help": ("-m", "experiments.ulpm_flow", "--help"),
}


def measure(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes; a first, untimed start of each fills the file cache."""
    programs = [_program(name, arguments) for name, arguments in COMMANDS.items()]
    interleave(programs, 1)
    for program in programs:
        program.seconds.clear()
    interleave(programs, repeats)
    return rows("start-up", programs), []


def _program(name: str, arguments: tuple[str, ...]) -> Program:
    def call(_):
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return Program(name, call)
