"""List the experiments: `python -m experiments`."""

import ast
from pathlib import Path


def listing() -> str:
    """A line for each experiment: its command, what it does. Imports none of them."""
    paths = sorted(Path(__file__).parent.glob("[!_]*.py"))
    width = max(len(path.stem) for path in paths) + 2
    lines = [
        "Usage: python -m experiments.NAME [--flag=value ...]; --help lists the flags",
        "",
    ]
    for path in paths:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {path.stem:<{width}}{text.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
