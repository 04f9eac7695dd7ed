"""Check ncjax on the accelerator of this machine, and time it, in under nine minutes.

    pip install -e '.[all,gpu,test]' && python -m benchmarks.accelerator
    python -m benchmarks.accelerator --data=cifar.npz --only=step,train
    python -m benchmarks.accelerator --tiny  # a dry run, on a CPU too

One line for each check says ok or FAIL, a number and its unit. The numbers of the
accelerator are compared with the CPU's. Steps, flows, metrics and spectra are timed: the
median of calls after warm-up, each to the end of the device's work. docs/howto/devices.md
says what each section means.

A section runs in a process of its own (`_accelerator_process`) and has a limit of time, so
that a hang or an abort costs the rest of that section alone.

**To add a check**, write a function without arguments that returns a
`_accelerator_checks.Finding`, and list it in the `checks` of its section. **To add a
section**, write a module with `checks(setting)`, and enter it in `_accelerator_sections`.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import _accelerator_images, _accelerator_tests, _accelerator_train
from benchmarks._accelerator_checks import Setting
from benchmarks._accelerator_process import section_rows
from benchmarks._accelerator_report import LINES, TEXT, Report
from benchmarks._accelerator_sections import SECTIONS
from experiments._runs import cli, folders, lock
from experiments._runs.errors import BadUse, RunFailed

NAME = "accelerator"
OUTPUTS = (
    *(TEXT, LINES, _accelerator_tests.LOG, *_accelerator_train.OUTPUTS),
    *(f"{name}.log" for name in SECTIONS),
)


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Check ncjax on the accelerator of this machine, and time it.

    Example: python -m benchmarks.accelerator --only=numerics,step
    """

    data: str = cli.path_flag(
        "", "folder of TFDS with CIFAR-10, or a .npz file; noise if empty", cli.DATA
    )
    only: str = cli.flag(
        "all", "sections to run, with commas between; an unknown one lists them", cli.TIME
    )
    tiny: bool = cli.flag(False, "tiny sizes, for a dry run without accelerator", cli.TIME)
    slowness: float = cli.flag(
        1.0, "factor of the limits of time, for a slow machine", cli.TIME
    )
    workdir: str = cli.path_flag(
        "", "folder of the report; if empty, a new one under runs/", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the report that workdir holds", cli.FOLDER)


def run(config: Config) -> Path:
    """Run the requested sections and return the folder of the report.

    Write report.txt and report.jsonl, a line for each check, NAME.log with the messages of
    each section, pytest.log, and the figures and metrics.csv of the section `train`.

    Raises:
      BadUse: a setting is out of range, or the folder cannot be used.
      RunFailed: a check failed.
    """
    names = _check(config)
    with _opened(config) as folder:
        command = f"python -m benchmarks.{NAME} {shlex.join(sys.argv[1:])}".rstrip()
        report = Report(folder, f"{command}, {time.strftime('%Y-%m-%d %H:%M %Z')}")
        started = time.monotonic()
        data = str(Path(config.data).absolute()) if config.data else ""
        setting = Setting(config.tiny, data, str(folder.absolute()))
        for name in names:
            limit = config.slowness * SECTIONS[name].seconds
            for row in section_rows(name, setting, limit):
                report.add(row)
        report.close(time.monotonic() - started)
        print(folder)
    if failed := report.failures():
        raise RunFailed(
            f"{len(failed)} of {len(report.rows)} checks failed, in {folder / TEXT}: "
            f"{failed[0]}{' and others' if len(failed) > 1 else ''}"
        )
    return folder


def _check(config: Config) -> list[str]:
    """Return the sections to run, in their order; raise BadUse if a setting is wrong."""
    names = [*SECTIONS] if config.only == "all" else config.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise BadUse(f"--only must be all, or among {sorted(SECTIONS)}, got {unknown}")
    if not 0.1 <= config.slowness <= 100:
        raise BadUse(f"--slowness must lie in [0.1, 100], got {config.slowness:g}")
    if not _accelerator_images.exists(config.data):
        raise BadUse(f"--data={config.data}: there is no such file or folder")
    return [name for name in SECTIONS if name in names]


@contextmanager
def _opened(config: Config) -> Iterator[Path]:
    """Make the folder of the report, and lock it.

    The run folders of the experiments name the device, so opening one would take memory of
    the accelerator in this process, which lasts while the sections run.

    Raises:
      BadUse: the folder cannot be written, is in use, or holds results.
    """
    folder = Path(folders.workdir(config, NAME))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise BadUse(f"cannot write to workdir {str(folder)!r}: {reason}") from None
    with lock.held(folder):
        present = [name for name in OUTPUTS if (folder / name).exists()]
        if present and not config.overwrite:
            raise BadUse(
                f"workdir {str(folder)!r} holds results already ({', '.join(present)}): "
                "give --overwrite to replace them, or another --workdir"
            )
        for name in present:
            (folder / name).unlink()
        yield folder


if __name__ == "__main__":
    cli.main(Config, run, f"benchmarks.{NAME}", computes=False)
