"""Time the start: imports, help, and the first metrics, each in a fresh process.

The first metrics are all metrics of features (2000, 512) of 10 classes, from the start of
Python on: imports, tracing, compilation, result. They are timed without JAX's cache of
compiled programs, and with a cache that an earlier process has filled.
"""

import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks._timing import Program, interleave, rows

FIRST_METRICS = """
import numpy as np, ncjax
rng = np.random.default_rng(0)
labels, W = np.arange(2000) % 10, rng.normal(size=(10, 512)).astype(np.float32)
features = W[labels] + rng.normal(size=(2000, 512)).astype(np.float32)
print(ncjax.collapse_metrics_from_features(features, labels, W, np.zeros(10, np.float32)))
"""
FIRST = "first metrics of (2000, 512), K = 10"
COMMANDS = {
    "import ncjax": ("-c", "import ncjax"),
    "import jax": ("-c", "import jax"),
    "import ncjax, all names but networks": ("-c", "from ncjax import *"),
    "ncjax measure --help": ("-m", "ncjax", "measure", "--help"),
    "python -m experiments.ulpm_flow --help": ("-m", "experiments.ulpm_flow", "--help"),
    FIRST: ("-c", FIRST_METRICS),
    f"{FIRST}, with JAX's cache": ("-c", FIRST_METRICS),
}


def measure(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes; a first, untimed start of each fills the file cache."""
    with tempfile.TemporaryDirectory() as cache:
        programs = [
            _program(name, arguments, cache) for name, arguments in COMMANDS.items()
        ]
        interleave(programs, 1)
        for program in programs:
            program.seconds.clear()
        interleave(programs, repeats)
        return rows("start-up", programs), []


def _program(name: str, arguments: tuple[str, ...], cache: str) -> Program:
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if name.endswith("cache"):
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def call(_):
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment,
        )

    return Program(name, call)
