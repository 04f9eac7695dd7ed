"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

LIBRARY = sorted((Path(__file__).parents[1] / "ncjax").glob("*.py"))


@pytest.mark.parametrize("name", [p.stem for p in LIBRARY if p.stem != "__init__"])
def test_examples(name):
    done = doctest.testmod(importlib.import_module(f"ncjax.{name}"))
    assert done.failed == 0
