"""Imports point up the table; nothing private, nothing set from inside the library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "ncjax").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))

MAY_IMPORT = {
    "types": set(),
    "magnitude": set(),
    "losses": {"types"},
    "geometry": {"types", "magnitude"},
    "measures": {"types", "magnitude"},
    "statistics": {"types"},
    "metrics": {"types", "magnitude", "measures", "statistics"},
    "classifier": {"types", "losses", "measures", "statistics", "metrics"},
    "variants": {"types", "measures", "statistics", "metrics", "classifier"},
    "separation": {"types", "magnitude", "losses", "geometry"},
    "implicit": {"types", "losses"},
    "rosenbrock": set(),
    "stabilised": set(),
    "clock": {"types", "losses", "implicit", "rosenbrock"},
    "invariants": {"types", "magnitude", "geometry"},
    "flow": {
        *("types", "magnitude", "losses", "geometry", "invariants", "clock"),
        "stabilised",
    },
    "lanczos": {"magnitude"},
    "hessian": {"types"},
    "landscape": {"types", "hessian", "lanczos"},
    "peeling": {"types", "magnitude", "losses", "metrics"},
    "grouping": {"types"},
    "winograd": {"types", "grouping"},
    "convolution": {"types", "grouping", "winograd"},
    "models": {"types", "convolution"},
    "data": {"types"},
    "train": {"types", "losses", "metrics", "peeling", "data"},
    "checkpoint": {"types"},
    "plotting": set(),
}


def imported(path):
    """Dotted names of the modules that a file imports, with what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_package(names, package):
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def ids(path):
    return path.stem


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "__init__"], ids=ids)
def test_library_imports_point_up_the_table(path):
    assert of_package(imported(path), "ncjax") <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if p.stem[0] != "_"], ids=ids)
def test_experiments_share_only_their_glue(path):
    shared = of_package(imported(path), "experiments")
    assert all(name.startswith("_") for name in shared)


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS + BENCHMARKS, ids=ids)
def test_no_private_or_experimental_jax(path):
    private = [n for n in imported(path) if n.startswith(("jax._src", "jax.experimental"))]
    assert private == []


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS + BENCHMARKS, ids=ids)
def test_jax_is_configured_on_the_command_line_only(path):
    assert path.stem == "_cli" or "config.update(" not in path.read_text().replace(
        "jax.config.update('jax_enable_x64', True)", ""
    )


def test_importing_ncjax_loads_no_heavy_packages():
    code = (
        "import sys, ncjax; "
        "heavy = {'flax', 'tensorflow_datasets', 'orbax', 'matplotlib', 'tqdm', 'absl'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in ("[]", "['absl']"), done.stderr
