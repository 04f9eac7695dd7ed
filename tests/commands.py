"""Every experiment, by its module."""

import importlib
from pathlib import Path

import experiments

EXPERIMENTS = [
    importlib.import_module(f"experiments.{path.stem}")
    for path in sorted(Path(experiments.__path__[0]).glob("[!_]*.py"))
]
