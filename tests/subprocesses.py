"""Run the programs of tests/programs, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# A program finds the project and the helpers of its tests.
PATHS = (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", ""))
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}


def command(name, *arguments, strict=False):
    """Return the command of a program. If `strict`, warnings are errors."""
    flags = ("-W", "error") if strict else ()
    return [sys.executable, *flags, str(TESTS / "programs" / f"{name}.py"), *arguments]


def run(command, env=os.environ, **settings):
    """Run a command and return the finished process, with its output as text."""
    return subprocess.run(
        command, env=env | PATH, capture_output=True, text=True, **settings
    )


def output(command, env=os.environ):
    """Run a command that must succeed and return its standard output."""
    done = run(command, env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_to(command, output, env=os.environ):
    """Run a command that writes to the file number `output`."""
    errors = subprocess.PIPE
    return subprocess.run(command, env=env | PATH, stdout=output, stderr=errors, text=True)
