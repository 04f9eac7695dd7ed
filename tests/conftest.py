"""Strict numerics for every test: x64, no silent promotion of rank or dtype."""

import os
import subprocess
import sys

import jax
import pytest
from hypothesis import settings
from matplotlib.figure import Figure

from ncjax import plotting

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("ncjax", deadline=None, derandomize=True, max_examples=25)
# `pytest --hypothesis-profile campaign` draws other examples every time.
settings.register_profile("campaign", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("ncjax")


# XLA's earlier code generation for CPUs takes half the time to compile.
QUICK = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Shorten compilation, which takes most of the time of the suite.

    All workers, subprocesses and later runs share one cache of compiled programs, which
    `--cache-clear` empties. If the environment sets `XLA_FLAGS`, even to the empty string,
    it is left as it is.
    """
    if "XLA_FLAGS" not in os.environ and knows(QUICK):
        os.environ["XLA_FLAGS"] = QUICK
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing in ~/.cache
        jax.config.update("jax_enable_compilation_cache", False)
        return
    for name, value in {
        "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def knows(flag):
    """Whether this XLA knows the flag. XLA aborts the process over an unknown one."""
    process = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    return process.returncode == 0


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Remove compiled programs after each module: all of them would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile with few optimisations, for tests that mostly compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def full_precision():
    """Compute products of float32 in float32 on every platform."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def blank_figures(monkeypatch):
    """Write blank figures, for tests of runs that do not look at them: half a run's time.

    Fixtures of a wider scope, such as the run of a module, still draw.
    """
    drawn = plotting.render(Figure(figsize=(1, 1)))
    monkeypatch.setattr(plotting, "render", lambda figure: drawn)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Choose the formulas of this platform, on whichever platform the tests run."""

    def choose(*arrays, default, **formulas):
        return formulas.get(request.param, default)(*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


@pytest.fixture
def key():
    return jax.random.key(0)
