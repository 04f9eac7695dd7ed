"""The examples in docstrings print what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "ncjax").rglob("*.py"))
    if path.stem != "__init__"
]


@pytest.mark.parametrize("name", LIBRARY)
def test_examples_in_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # names the extra
        pytest.skip(str(error))
    done = doctest.testmod(module)
    assert done.failed == 0
