"""List the experiments: `python -m experiments`."""

import ast
from pathlib import Path

from experiments import COMMANDS


def listing() -> str:
    """Return a line for each command, its name and summary, without importing it."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "Usage: python -m experiments.NAME [--flag=value ...]; --help lists the flags",
        "",
    ]
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<{width}}{text.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
