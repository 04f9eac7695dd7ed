"""Imports point one way. The library uses public JAX and does not configure it."""

import ast
import graphlib
import json
from pathlib import Path

import pytest
import subprocesses

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "ncjax").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = LIBRARY + EXPERIMENTS + BENCHMARKS

# What the modules of each wing may import from other wings of ncjax.
BASE = {"types", "arrays", "checks", "numerics", "sizes", "singular"}
WINGS = {
    "types": set(),
    "arrays": {"types"},
    "checks": {"types", "arrays", "sizes"},
    "numerics": set(),
    "sizes": set(),
    "singular": {"numerics"},
    "peeled": BASE,
    "objectives": BASE | {"peeled"},
    "flow": BASE | {"peeled", "objectives"},
    "metrics": BASE | {"peeled"},
    "curvature": BASE,
    "networks": BASE | {"peeled", "metrics"},
    "plotting": {"checks"},
    "history": {"checks", "plotting"},
    "nnx": BASE | {"metrics"},
    "torch": BASE | {"metrics", "history"},
    "lightning": {"checks", "history", "torch"},
    "huggingface": {"checks", "history", "torch"},
    "analysis": BASE | {"metrics", "plotting"},
    "command": BASE | {"analysis", "objectives", "peeled", "flow", "metrics", "plotting"},
    "__main__": {"command"},
}


def dotted(path):
    """Name of a module, `ncjax.flow.solve`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in ALL}


def imported(path):
    """Dotted names of the modules that a file imports, with what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_imported(path):
    """Modules of this project that a file imports."""
    names = imported(path)
    found = names & MODULES.keys()
    rest = {name.rpartition(".")[0] for name in names - found}
    return found | (rest & MODULES.keys())


def part(name, package):
    """Second part of the name of a module of `package`, None for other modules."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == package and rest else None


def parts_imported(path, package):
    return {part(name, package) for name in modules_imported(path)} - {None}


def test_the_table_lists_every_wing():
    assert {part(dotted(path), "ncjax") for path in LIBRARY} - {None} == WINGS.keys()


@pytest.mark.parametrize("path", [p for p in LIBRARY if dotted(p) != "ncjax"], ids=dotted)
def test_a_wing_imports_what_the_table_allows(path):
    wing = part(dotted(path), "ncjax")
    assert parts_imported(path, "ncjax") <= WINGS[wing] | {wing}
    assert "ncjax" not in modules_imported(path)


def test_imports_have_no_cycle():
    # A package depends on the modules that it lists; they do not depend on it.
    graph = {name: modules_imported(path) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_only_convolution_imports_its_algorithms():
    inner = {f"ncjax.networks.{name}" for name in ("winograd", "grouping", "platforms")}
    users = {name for name, path in MODULES.items() if modules_imported(path) & inner}
    assert users <= inner | {"ncjax.networks.convolution"}


@pytest.mark.parametrize(
    "path",
    [p for p in EXPERIMENTS if p.stem[0] != "_" and len(p.relative_to(ROOT).parts) == 2],
    ids=dotted,
)
def test_no_experiment_imports_another(path):
    assert all(name.startswith("_") for name in parts_imported(path, "experiments"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "_runs").glob("*.py")), ids=dotted
)
def test_run_folders_know_nothing_of_neural_collapse(path):
    assert all(name.startswith("experiments._runs") for name in modules_imported(path))


@pytest.mark.parametrize("path", TESTS, ids=dotted)
def test_nothing_imports_a_test_module(path):
    """strategies.py holds shared inputs, oracles.py shared reference values."""
    assert not [name for name in imported(path) if name.startswith(("test_", "tests."))]


@pytest.mark.parametrize("path", ALL, ids=dotted)
def test_no_private_or_experimental_jax(path):
    private = [n for n in imported(path) if n.startswith(("jax._src", "jax.experimental"))]
    assert private == []


@pytest.mark.parametrize("path", ALL, ids=dotted)
def test_jax_is_configured_on_the_command_line_only(path):
    glue = ("experiments._runs.cli", "experiments._runs.compilation")
    glue += ("ncjax.command.device",)
    assert dotted(path) in glue or "config.update(" not in path.read_text().replace(
        "jax.config.update('jax_enable_x64', True)", ""
    )


def test_a_heavy_package_is_loaded_on_first_use_alone():
    found = json.loads(subprocesses.output(subprocesses.command("heavy_imports")))
    of_metrics, of_all = found.pop("metrics"), found.pop("every name")
    assert found
    assert not any(found.values()), found
    assert of_metrics == ["jax", "numpy"]
    assert of_all == ["diffrax", "equinox", "jax", "numpy", "optimistix"]
