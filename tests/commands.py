"""Modules of all commands: the experiments and the report."""

import importlib

from experiments import COMMANDS

MODULES = [importlib.import_module(f"experiments.{name}") for name in COMMANDS]
