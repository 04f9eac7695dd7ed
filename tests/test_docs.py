"""The documentation's code runs, its reference is complete, its notebook works."""

import ast
import importlib.util
import json
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest

from ncjax.networks import models

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(DOCS / name for name in ("tour.md", "objectives.md", "deep.md")),
    *sorted((DOCS / "howto").glob("*.md")),
]
# The reference lists all public names of these modules, and of `import ncjax`.
MODULES = (
    *("peeled.losses", "peeled.alternatives"),
    *(f"networks.{name}" for name in ("models", "data", "train", "loss_clock")),
    *(f"networks.{name}" for name in ("flow", "full_batch", "homogeneous", "capture")),
    "networks.checkpoint",
    *("plotting", "history"),
    *("torch.hooks", "torch.recording", "nnx", "lightning", "huggingface"),
)
# Modules that have no page in the reference: they serve others.
PRIVATE = {
    *("arrays", "checks", "numerics", "sizes", "singular"),
    *("metrics.inputs", "metrics.whitening"),
    *("metrics.batches", "metrics.devices", "metrics.tiles"),
    *(f"analysis.{name}" for name in ("figure", "inputs", "passes", "table")),
    *(f"command.{name}" for name in ("arguments", "arrays", "certify", "compare")),
    *(f"command.{name}" for name in ("device", "flow", "layers", "measure", "output")),
    "command.system",
    *("curvature.inputs", "curvature.lanczos", "curvature.meter"),
    *(
        "flow.block_solve",
        "flow.deep_solve",
        "peeled.points",
        "flow.saving",
        "flow.settle",
        "flow.steps",
        "flow.unchecked",
    ),
    *("networks.chunks", "networks.descriptions", "networks.records"),
    *("networks.grouping", "networks.platforms", "networks.winograd"),
    *("peeled.kernels", "peeled.logits", "peeled.samples", "objectives.settings"),
    *("peeled.factors", "peeled.search", "peeled.multipliers", "peeled.nonnegative"),
    *(f"objectives.{name}" for name in ("roots", "rays", "problem", "factors")),
    *(f"objectives.{name}" for name in ("collapse", "squared", "fixed", "blocks")),
    *("objectives.simplex", "objectives.coupling"),
    "objectives.free_bias",
    "torch.layers",
}
REFERENCE = (DOCS / "reference" / "index.md").read_text()
NAVIGATION = (ROOT / "mkdocs.yml").read_text()

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def plain_jax():
    """Use the default promotion of a reader, not the strict one of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_blocks(blocks, name, monkeypatch, tmp_path):
    """Execute code in one namespace and an empty folder; skip if PyTorch is missing."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        if "import torch" in block and not importlib.util.find_spec("torch"):
            continue
        exec(compile(block, f"{name}, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, plain_jax, monkeypatch, tmp_path):
    blocks = re.findall(
        r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    run_blocks(blocks, page.name, monkeypatch, tmp_path)


def test_the_network_of_the_howto_can_be_built_by_name(monkeypatch):
    """With every option of the commands, once registered as the page says."""
    page = (DOCS / "howto" / "extend.md").read_text()
    (network,) = re.findall(
        r"^class TwoLayers.*?(?=^\S.* = )", page, re.DOTALL | re.MULTILINE
    )
    names: dict[str, Any] = {"nn": flax.linen, "jnp": jnp, "Any": Any}
    exec(compile(network, "extend.md", "exec"), names)
    monkeypatch.setitem(models._MODELS, "two2", names["TwoLayers"])
    monkeypatch.setitem(models._OPTIONS, "two", ())
    monkeypatch.setattr(models, "MODELS", (*models._MODELS,))
    flags = {"width": 0.5, "use_bias": False, "dtype": jnp.bfloat16}
    built = models.build("two2", 3, **flags)
    images = jnp.ones((2, 4, 4, 1), jnp.float32)
    (logits, features), variables = built.init_with_output(jax.random.key(0), images)
    assert logits.shape == (2, 3)
    assert features.shape == (2, 32)
    assert logits.dtype == features.dtype == jnp.float32
    assert set(variables["params"]["classifier"]) == {"kernel"}


def test_the_first_page_has_the_example_of_the_readme():
    """test_readme.py runs it."""
    examples = [
        re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        for path in (DOCS / "index.md", ROOT / "README.md")
    ]
    assert examples[0] == examples[1]
    assert len(examples[0]) == 1


def test_the_notebook_runs(plain_jax, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 5
    run_blocks(cells, "quickstart.ipynb", monkeypatch, tmp_path)


def public(module):
    """Names that a module of ncjax defines without an underscore."""
    names = []
    for node in ast.parse(
        (ROOT / "ncjax" / f"{module.replace('.', '/')}.py").read_text()
    ).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def reexported(package):
    """Where each name that a package re-exports is defined, or the module itself.

    The names of `import ncjax` stand in a stub, because they load on first use. Its own
    modules, `from . import flow`, are no names of the reference: they have pages.
    """
    folder = ROOT.joinpath(*package.split("."))
    paths = [folder / "__init__.pyi", folder / "__init__.py"]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return {}
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
    homes = {
        alias.name: f"{package}.{node.module}" if node.level else node.module
        for node in nodes
        for alias in node.names
        if node.module
    }
    return {
        # A package that re-exports a module of its own defines it.
        name: f"{module}.{name}"
        if module == package
        else reexported(module).get(name, f"{module}.{name}")
        for name, module in homes.items()
    }


def test_the_reference_lists_every_public_name():
    of_modules = {f"ncjax.{m}.{name}" for m in MODULES for name in public(m)}
    expected = of_modules | set(reexported("ncjax").values())
    listed = re.findall(r"^\| \[`(\w+)`\]\[([\w.]+)\] \| \S", REFERENCE, re.MULTILINE)
    assert {full for _, full in listed} == expected
    assert all(full.endswith(f".{short}") for short, full in listed)


def test_the_reference_has_a_page_for_every_module():
    pages = "".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))
    documented = re.findall(r"^::: ncjax\.([\w.]+)$", pages, re.MULTILINE)
    paths = [p.relative_to(ROOT / "ncjax") for p in (ROOT / "ncjax").rglob("[!_]*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in paths}
    assert sorted(documented) == sorted(modules - PRIVATE)
    assert modules >= PRIVATE


def test_the_tables_are_of_the_committed_results():
    """`python docs/make_results.py` brings them up to date."""
    script = runpy.run_path(str(DOCS / "make_results.py"))
    pages = [page.read_text() for page in script["PAGES"]]
    assert [script["filled"](page) for page in pages] == pages
    named = re.findall(r"<!-- results: (\w+) -->\n.", "".join(pages))
    assert set(named) == set(script["TABLES"])


def test_the_navigation_lists_every_page():
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages <= set(re.findall(r": ([\w/]+\.md)$", NAVIGATION, re.MULTILINE))


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="needs requirements-docs.txt")
    hook: dict = {}
    exec((DOCS / "hooks" / "mathml.py").read_text(), hook)
    page = textwrap.dedent(r"""
        <p>a <span class="arithmatex">\(m &lt; q_{\min}\)</span> b</p>
        <div class="arithmatex">\[
        \frac{dZ}{dt} = -\nabla \mathcal L(Z)
        \]</div>""")
    made = hook["on_page_content"](page)
    assert made.count("<math") == 2
    assert "arithmatex" not in made
    assert "<mi>ℒ</mi>" in made
    assert "variant" not in made
    assert "\\" not in made
