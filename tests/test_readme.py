"""The README's map and its example hold."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def functions(path):
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


MAP = README.split("## Paper map")[1].split("\n## ")[0]
ENTRIES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", MAP)))


def test_the_map_has_code_and_a_test_for_each_statement():
    rows = [row for row in MAP.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 9
    for row in rows:
        assert len(re.findall(r"`[\w/]+\.py:\w+`", row)) == 2, row


@pytest.mark.parametrize(("path", "name"), ENTRIES)
def test_functions_in_the_map_exist(path, name):
    assert name in functions(path)


def test_the_example_prints_what_it_shows(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shown = re.findall(r"^print\(.*\)  # (.+)$", example, flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == shown
    assert [line.split()[0] for line in shown[:4]] == ["NC1", "NC2", "NC3", "NC4"]
    assert shown[-1] == "globally optimal direction"


def test_the_examples_of_the_training_page_run(capsys):
    page = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(example, "docs/training.md", "exec"), {})
    ratio, shape = capsys.readouterr().out.splitlines()
    assert float(ratio) < 1
    assert shape == "(10, 10, 129)"


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160
    prose = (line for line in lines if not line.startswith("|"))
    assert [line for line in prose if len(line) > 100] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_names_the_python_version_it_needs(tmp_path):
    """The command `false` stands for a Python that is too old."""
    command = ["make", "-C", ROOT, "flow", "PYTHON=false", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    needed = "Python 3.11 or later is needed, and false is not: make PYTHON=python3.12 flow"
    assert needed in done.stdout
    assert "-m venv" not in done.stdout
    assert not (tmp_path / "venv").exists()


def test_links_to_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
