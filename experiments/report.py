"""One page of any set of runs: figures, tables, verdicts, settings, versions."""

import dataclasses
import importlib
from pathlib import Path

from experiments import EXPERIMENTS
from experiments._runs import cli, files, folders, page
from experiments._runs.errors import BadUse

NAME = "report"


@dataclasses.dataclass(frozen=True)
class Config:
    """One self-contained HTML page of any set of runs, to read, print or send.

    Example: python -m experiments.report --runs=results --output=report.html
    """

    runs: str = cli.flag(
        "runs", "run folders or folders of them, with commas between", cli.DATA
    )
    output: str = cli.flag("report.html", "the page, one HTML file", cli.OUTPUT)
    title: str = cli.flag(
        "Neural collapse: report of runs", "heading of the page", cli.OUTPUT
    )
    overwrite: bool = cli.flag(False, "replace the file that output names", cli.OUTPUT)


def run(config: Config) -> Path:
    """Write the page and return its path.

    It needs no network, no script and no other file. What a run folder holds is escaped;
    a run that is unfinished or damaged is on the page with what can be read of it.

    Raises:
      BadUse: a folder is or holds no run, a run is of an unknown kind, or the output
        is there already.
      OSError: the output cannot be written.
    """
    output = Path(config.output)
    _check_output(output, config.overwrite)
    runs, omissions = find_runs(config.runs)
    sections = [_section(folder) for folder in runs]
    text = page.render(config.title, config.runs, sections, omissions)
    files.write_atomically(output, text.encode())
    unfinished = [str(f) for f in runs if not (f / folders.SUMMARY).exists()]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"{count}, {output.stat().st_size / 1e6:.2g} MB")
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}")
    print(output)
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise BadUse unless the page can be written there, before any work."""
    if output.is_dir() or not output.name:
        raise BadUse(f"--output must be a file, got the folder {str(output)!r}")
    if not output.parent.is_dir():
        raise BadUse(f"--output={output}: there is no folder {str(output.parent)!r}")
    if output.exists() and not overwrite:
        raise BadUse(f"--output={output} exists: give --overwrite to replace it")


def find_runs(names: str) -> tuple[list[Path], list[str]]:
    """Run folders that `names`, separated by commas, are or hold; and what is left out.

    Runs named themselves must be of a known kind; those met below a folder are left out,
    each with a sentence.

    Raises:
      BadUse: a folder is or holds no run, or a run named is of an unknown kind.
    """
    runs_by_path: dict[Path, Path] = {}
    omissions = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        folder = Path(name)
        if not folder.is_dir():
            raise BadUse(f"--runs: there is no folder {name!r}")
        if (folder / folders.CONFIG).is_file():
            kind_of(folder)
            runs_by_path.setdefault(folder.resolve(), folder)
            continue
        nested = sorted(path.parent for path in folder.rglob(folders.CONFIG))
        if not nested:
            raise BadUse(f"--runs: {name!r} is and holds no run: no {folders.CONFIG}")
        for path in nested:
            try:
                kind_of(path)
            except BadUse as error:
                omissions.append(str(error))
            else:
                runs_by_path.setdefault(path.resolve(), path)
    if not runs_by_path:
        raise BadUse(
            f"--runs={names}: no run to show" + "".join(f"; {e}" for e in omissions)
        )
    runs = sorted(
        runs_by_path.values(),
        key=lambda path: (EXPERIMENTS.index(kind_of(path)), str(path)),
    )
    return runs, omissions


def kind_of(folder: Path) -> str:
    """The experiment that a run folder is of, one of `EXPERIMENTS`.

    Raises:
      BadUse: it holds no run, or one of an unknown kind.
    """
    folders.stored_config(folder)
    stored = files.read_json(folder / folders.CONFIG)
    # Runs of earlier versions hold the command alone.
    command = stored.get("command", "")
    words = command.split() if isinstance(command, str) else []
    modules = [word for word in words if word.startswith("experiments.")]
    module_name = "".join(modules[:1]).removeprefix("experiments.")
    name = str(stored.get("experiment", module_name))
    if name not in EXPERIMENTS:
        raise BadUse(
            f"{str(folder)!r} is a run of an unknown kind, {name!r}: expected one of "
            f"{', '.join(EXPERIMENTS)}"
        )
    return name


def _section(folder: Path) -> page.Section:
    """The section of a run, as its experiment shows it."""
    kind = kind_of(folder)
    # Here and by name: a page of flows alone needs no network library.
    experiment = importlib.import_module(f"experiments.{kind}")
    return page.section(folder, kind, experiment.PAGE)


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
