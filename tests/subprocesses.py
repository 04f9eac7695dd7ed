"""Programs of tests/programs, each run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# A program finds the project and the helpers of its tests.
PATHS = (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", ""))
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}


def command(name, *arguments, strict=False):
    """The command that runs a program; every warning is an error if it is strict."""
    flags = ("-W", "error") if strict else ()
    return [sys.executable, *flags, str(TESTS / "programs" / f"{name}.py"), *arguments]


def run(command, env=os.environ, **settings):
    """The finished process of a command, with its output as text."""
    return subprocess.run(
        command, env=env | PATH, capture_output=True, text=True, **settings
    )


def output(command, env=os.environ):
    """What a command prints, if it succeeds."""
    done = run(command, env)
    assert done.returncode == 0, done.stderr
    return done.stdout
