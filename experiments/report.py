"""Write one page on any set of runs: figures, tables, verdicts, settings, versions."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from experiments import EXPERIMENTS
from experiments._runs import cli, files, folders, page, reading
from experiments._runs.errors import BadUse

NAME = "report"
# Modules that hold the page of an experiment whose own module needs a network library.
_PAGE_MODULES = {
    **{"peel": "_peel_page", "layers": "_layers_page", "network_flow": "_flow_page"},
    **dict.fromkeys(("train_resnet", "train_vgg", "train_small"), "_network_page"),
}


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """One self-contained HTML page on any set of runs, to read, print or send.

    Example: python -m experiments.report --runs=results --output=report.html
    """

    runs: str = cli.path_flag(
        "runs",
        "run folders, or folders that hold some, separated by commas",
        cli.DATA,
        separator=",",
    )
    output: str = cli.path_flag("report.html", "HTML file to write", cli.OUTPUT)
    title: str = cli.flag(
        "Neural collapse: report of runs", "title of the page", cli.OUTPUT
    )
    overwrite: bool = cli.flag(False, "replace the file that output names", cli.OUTPUT)


def run(config: Config) -> Path:
    """Write the page and return its path.

    The page needs no network, no script and no other file. The content of the run folders
    is escaped. An unfinished or damaged run is shown as far as it can be read.

    Raises:
      BadUse: a folder is not a run folder and contains none, a run is of an unknown kind,
        or the output exists already.
      OSError: the output cannot be written.
    """
    output = Path(config.output)
    _check_output(output, config.overwrite)
    runs, omissions = find_runs(config.runs)
    sections = [page.section(folder, kind, page_of(kind)) for folder, kind in runs]
    text = page.render(config.title, config.runs, sections, omissions)
    content = text.encode(errors="replace")
    files.write_atomically(output, content)
    unfinished = [s.folder for s in sections if s.verdict == page.UNFINISHED]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"{count}, {len(content) / 1e6:.2g} MB")
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}")
    print(reading.shown(output, reading.MOST_OF_PATH))
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise BadUse if the page cannot be written there, before any work."""
    if output.is_dir() or not output.name:
        raise BadUse(f"--output must be a file, got the folder {str(output)!r}")
    if output.exists() and not output.is_file():
        raise BadUse(f"--output={output} is a named pipe or a device: give another name")
    if not output.parent.is_dir():
        raise BadUse(f"--output={output}: there is no folder {str(output.parent)!r}")
    if output.exists() and not overwrite:
        raise BadUse(f"--output={output} exists: give --overwrite to replace it")


def find_runs(names: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """Find the runs in `names`, folders separated by commas; list the omissions too.

    A folder that is itself a run must be of a known kind. Below a folder, runs that are of
    other kinds or cannot be read are left out, with a sentence each.

    Returns:
      The folders with the experiment of each, and the sentences.

    Raises:
      BadUse: a folder is not a run folder and contains none, or it is a run of an unknown
        kind.
    """
    runs_by_path: dict[Path, tuple[Path, str]] = {}
    omissions = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        folder = Path(name)
        if not os.path.isdir(folder):
            raise BadUse(f"--runs: there is no folder {name!r}")
        if os.path.isfile(folder / folders.CONFIG):
            runs_by_path.setdefault(folder.resolve(), (folder, kind_of(folder)))
            continue
        nested = sorted(_folders_of_runs(folder))
        if not nested:
            raise BadUse(
                f"--runs: {name!r} is not a run folder and contains none: no "
                f"{folders.CONFIG}"
            )
        for path in nested:
            try:
                run = (path, kind_of(path))
            except Exception as error:  # the content of a folder may be anything
                omissions.append(reading.reason(error))
            else:
                runs_by_path.setdefault(path.resolve(), run)
    if not runs_by_path:
        raise BadUse(
            f"--runs={names}: no run to show" + "".join(f"; {e}" for e in omissions)
        )
    runs = sorted(
        runs_by_path.values(), key=lambda run: (EXPERIMENTS.index(run[1]), str(run[0]))
    )
    return runs, omissions


def _folders_of_runs(folder: Path) -> Iterator[Path]:
    """Yield the folders below that hold a config.json; follow no link."""
    for root, subfolders, names in os.walk(folder):
        if folders.CONFIG in (*subfolders, *names):
            yield Path(root)


def kind_of(folder: Path) -> str:
    """Return the experiment of a run folder, one of `EXPERIMENTS`.

    Raises:
      BadUse: the folder holds no run, or one of an unknown kind.
    """
    folders.stored_config(folder)
    stored = files.read_json(folder / folders.CONFIG)
    # Earlier versions stored the command only.
    command = stored.get("command", "")
    words = command.split() if isinstance(command, str) else []
    modules = [word for word in words if word.startswith("experiments.")]
    module_name = "".join(modules[:1]).removeprefix("experiments.")
    name = str(stored.get("experiment", module_name))
    if name not in EXPERIMENTS:
        raise BadUse(
            f"{str(folder)!r} is a run of an unknown kind, {name[:100]!r}: expected one of "
            f"{', '.join(EXPERIMENTS)}"
        )
    return name


def page_of(kind: str) -> page.Page:
    """Return the page of an experiment, without the network libraries."""
    module_name = _PAGE_MODULES.get(kind, kind)
    return importlib.import_module(f"experiments.{module_name}").PAGE


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}", computes=False)
