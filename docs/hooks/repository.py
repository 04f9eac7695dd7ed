"""Add files outside `docs/` to the site: figures, the report, pages of the root."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# File of the repository: its name in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results.md": "benchmarks.md",
}
_SHOWN = ("*.png", "*.gif", "*.html")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of `docs/`, and the files outside it that its pages show."""
    root = Path(config.config_file_path).parent
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(root / path)))
    for pattern in _SHOWN:
        for found in (root / "results").rglob(pattern):
            name = found.relative_to(root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, page, **_kwargs) -> str:
    """Turn the page's links into the repository into links within the site."""
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    for path, name in PAGES.items():
        markdown = markdown.replace(f"](../{path})", f"]({name})")
        markdown = markdown.replace(f"]({path})", f"]({name})")
    if page.file.src_uri == "benchmarks.md" and not markdown.startswith("# "):
        markdown = f"# Benchmarks\n\n{markdown}"
    return re.sub(r"\]\(\.\./results/", "](results/", markdown)
