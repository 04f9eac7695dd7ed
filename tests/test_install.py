"""The installation: files of the wheel, ranges, pins, extras, Python versions."""

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = dict(SETUP["options.extras_require"])
PAGE = (ROOT / "docs" / "install.md").read_text()
PYTHONS = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.M)


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def requirements(text, python=PYTHONS[0]):
    """Requirements of one Python by the normalised name of their package."""
    parsed = [
        requirement
        for requirement in map(Requirement, lines(text))
        if not requirement.marker or requirement.marker.evaluate({"python_version": python})
    ]
    names = [canonicalize_name(requirement.name) for requirement in parsed]
    assert len(names) == len({*names}), names
    return dict(zip(names, parsed, strict=True))


def pins(name, python=PYTHONS[0]):
    """Versions in a file that pins each package to exactly one."""
    found = {}
    for package, requirement in requirements((ROOT / name).read_text(), python).items():
        (only,) = requirement.specifier
        assert only.operator == "==", requirement
        found[package] = Version(only.version)
    return found


def ranges(*extras):
    """Requirements of the core and of extras, by name."""
    found = requirements(SETUP["options"]["install_requires"])
    for extra in extras:
        for name, requirement in requirements(EXTRAS[extra]).items():
            if name == "ncjax":  # an extra made of others
                found |= ranges(*requirement.extras)
            else:
                found[name] = requirement
    return found


def bound(requirement):
    (only,) = requirement.specifier
    assert only.operator == ">=", f"{requirement} needs one lower bound"
    return Version(only.version)


def test_every_dependency_has_a_lower_bound():
    for extra in EXTRAS:
        for requirement in ranges(extra).values():
            bound(requirement)


def test_the_least_versions_are_the_bounds():
    least = pins("requirements-min.txt")
    bounds = {name: bound(r) for name, r in ranges("all", "test", "docs").items()}
    # Stubs are dated: the pin is the first of the release that the bound names.
    stubs = least.pop("types-tqdm"), bounds.pop("types-tqdm")
    assert stubs[0].release[:2] == stubs[1].release
    assert least == bounds


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (["requirements.txt"], ["all", "test"]),
        (["requirements.txt", "requirements-docs.txt"], ["docs"]),
        (
            ["requirements.txt", "requirements-hooks.txt"],
            ["torch", "lightning", "huggingface"],
        ),
    ],
)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_lie_in_the_ranges(files, extras, python):
    pinned = {name: v for file in files for name, v in pins(file, python).items()}
    for name, requirement in ranges(*extras).items():
        assert pinned[name] in requirement.specifier, requirement


def test_the_page_names_the_pins_of_jax():
    versions = {str(pins("requirements.txt", python)["jax"]) for python in PYTHONS}
    assert versions == {*re.findall(r"JAX (0\.\d+\.\d+)\b", PAGE.split("## What was")[0])}


def test_the_wheel_holds_every_file_of_the_library_and_nothing_else():
    include = lines(SETUP["options.packages.find"]["include"].replace(", ", "\n"))
    assert include == ["ncjax", "ncjax.*"]
    files = [path for path in (ROOT / "ncjax").rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name != "__pycache__"]
    assert all((path.parent / "__init__.py").exists() for path in files)
    data = {path.name for path in files if path.suffix != ".py"}
    assert data == set(SETUP["options.package_data"]["ncjax"].split())


def test_the_core_works_without_the_extras():
    program = ROOT / "tests" / "programs" / "light_install.py"
    command = [sys.executable, "-W", "error", program, "--hide"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_all_files_name_the_same_python_versions():
    oldest = f"py{PYTHONS[0].replace('.', '')}"
    assert SETUP["options"]["python_requires"] == f">={PYTHONS[0]}"
    assert SETUP["mypy"]["python_version"] == PYTHONS[0]
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == oldest


def test_the_table_has_every_python_and_extra():
    table = [row.strip("|").split("|") for row in PAGE.splitlines() if row[:2] == "| "]
    (head,) = [row for row in table if PYTHONS[0] in row[1].split()]
    assert [cell.strip() for cell in head[1:]] == PYTHONS
    first = " ".join(row[0] for row in table)
    assert set(re.findall(r"`pip install \.\[(\w+)\]`", first)) == set(EXTRAS)
