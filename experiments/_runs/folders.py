"""Run folders: nothing is overwritten unasked, and nothing is half written."""

import contextlib
import dataclasses
import datetime
import io
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._runs import files, lock
from experiments._runs.errors import BadUse
from experiments._runs.provenance import module_name
from experiments._runs.provenance import provenance as provenance

CONFIG = "config.json"
CHECKPOINT = "checkpoint.npz"
_SETTINGS = "settings"
# Flags that say where and on what to run, not what.
_HANDLING_FLAGS = (
    *("workdir", "overwrite", "resume", "data_dir"),
    *("cpu_devices", "coordinator", "num_processes", "process_id"),
)
SUMMARY = "summary.json"  # written last: a folder that holds it holds a finished run
_EXPERIMENT = "experiment"  # in config.json: its name
_EARLIER = "earlier"  # in config.json: what it said before a setting was changed
_FILES = "files"  # in summary.json: the SHA-256 of each output

_REWRITE_ADVICE = (
    f"remove its {SUMMARY} and give --resume, or --overwrite, to have all written anew"
)

# Settings that a resumed run may change, each with a check of the folder that raises
# BadUse where it may not.
Changes = Mapping[str, Callable[[Path], None]]


def workdir(config: Any, name: str) -> str:
    """The folder asked for; if none is, `runs/NAME/DATE-TIME`, new for every run."""
    if config.workdir or getattr(config, "resume", False):
        return config.workdir
    return f"runs/{name}/{datetime.datetime.now():%Y%m%d-%H%M%S}"


def settings(config: Any) -> dict[str, Any]:
    """The part of a config dataclass that determines the results."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _HANDLING_FLAGS}


@contextlib.contextmanager
def open_config(
    config: Any, name: str, outputs: Sequence[str], changes: Changes | None = None
) -> Iterator[tuple[Path, bool]]:
    """The folder of a run of the experiment `name`, for as long as this context lasts.

    No other run can open it meanwhile. Yields the folder, and whether the run in it has
    come to its end, which is told. Where the run is interrupted or a file fails, what to
    do is told.

    Raises:
      BadUse: the folder cannot be written, is in use, holds a run and neither
        --overwrite nor --resume is given, or is to be resumed and holds none or another.
      OSError: from within, with the command to give once the cause is gone.
    """
    resume = getattr(config, "resume", None)
    if config.overwrite and resume:
        raise BadUse("--overwrite and --resume exclude each other: give one of them")
    folder = _make_folder(workdir(config, name), bool(resume))
    with lock.held(folder), _advice_after_failed_write(config, folder):
        open_run(
            folder,
            settings(config),
            outputs,
            name=name,
            overwrite=config.overwrite,
            resume=resume,
            changes=changes,
        )
        finished = is_finished(folder)
        with _final_output(config, folder):
            if finished:
                print("nothing to resume, the run is finished")
            yield folder, finished


@contextlib.contextmanager
def _advice_after_failed_write(config: Any, folder: Path) -> Iterator[None]:
    """Add the next command to an error of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}; then {_next_command(config, folder)}") from error


@contextlib.contextmanager
def _final_output(config: Any, folder: Path) -> Iterator[None]:
    """However the run ends, stdout ends with its folder; what to do next is on stderr.

    Of several processes the first alone speaks.
    """
    is_first = jax.process_index() == 0
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            print(f"interrupted; {_next_command(config, folder)}", file=sys.stderr)
        raise
    finally:
        if is_first:
            print(folder)


def _next_command(config: Any, folder: Path) -> str:
    has_begun = hasattr(config, "resume") and (folder / CONFIG).exists()
    action = "go on" if has_begun else "start again"
    return f"{action} with: {resume_command(config, folder, has_begun)}"


def is_finished(folder: Path) -> bool:
    """Whether the run of this folder has come to its end.

    Raises:
      BadUse: it has, but its summary or another file is damaged.
    """
    path = folder / SUMMARY
    if not path.exists():
        return False
    try:
        damaged = changed_files(folder, files.read_json(path))
    except (BadUse, OSError) as error:
        raise BadUse(f"{error}: {_REWRITE_ADVICE}") from None
    if damaged:
        names = ", ".join(str(folder / name) for name in damaged)
        raise BadUse(f"missing or damaged: {names}; {_REWRITE_ADVICE}")
    return True


def changed_files(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """Outputs that are no longer there or not as the run has written them."""
    digests = summary.get(_FILES, {})  # not in summaries of earlier versions
    return [
        name
        for name, digest in digests.items()
        if files.file_digest(folder / name) != digest
    ]


def _make_folder(workdir: str, resume: bool) -> Path:
    """The folder asked for, made if it is not to be resumed from.

    Raises:
      BadUse: it cannot be written, or is to be resumed from and holds no run.
    """
    if resume and not workdir:
        raise BadUse("--resume needs --workdir, the folder of the run to go on with")
    folder = Path(workdir)
    try:
        if resume and not (folder / CONFIG).exists():
            raise BadUse(f"workdir {workdir!r} holds no run to resume")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadUse(f"cannot write to workdir {workdir!r}: {error.strerror}") from None
    return folder


def open_run(
    folder: Path,
    config: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    name: str = "",
    overwrite: bool,
    resume: bool | None,
    changes: Changes | None = None,
) -> None:
    """Begin a run in a folder and write its `config.json`, or go on with the one in it.

    Args:
      folder: which no other run uses.
      config: what determines the results; a resumed run must have the same, but for
        `changes`.
      outputs: names of the files that the run will write.
      name: of the experiment.
      overwrite: allow a folder that holds a run already; its files are replaced.
      resume: go on with the run that the folder holds; None for an experiment that has
        no such flag.
      changes: settings that may be other than before; `config.json` then says both.

    Raises:
      BadUse: the folder holds a run and neither flag is given, or is to be resumed and
        holds another or a damaged one.
    """
    names = (CONFIG, SUMMARY, CHECKPOINT, *outputs)
    existing = [name for name in names if (folder / name).exists()]
    if resume:
        _reopen(folder, config, changes or {})
    elif existing and not overwrite:
        resume_advice = "" if resume is None else "--resume to go on with it, "
        raise BadUse(
            f"workdir {str(folder)!r} holds a run already ({', '.join(existing)}): give "
            f"--overwrite to replace it, {resume_advice}or another --workdir"
        )
    else:
        _clear(folder, existing)
        identity = {_EXPERIMENT: name} if name else {}
        files.write_sealed(
            folder / CONFIG, identity | {"config": dict(config)} | provenance()
        )
    files.sweep(folder, names)


def _clear(folder: Path, existing: Sequence[str]) -> None:
    """Remove the outputs of the run in `folder`, its config last.

    Raises:
      BadUse: they include folders, and `folder` does not hold a run.
    """
    is_folder = {
        name: (folder / name).is_dir() and not (folder / name).is_symlink()
        for name in existing
    }
    if any(is_folder.values()):
        try:
            stored_config(folder)
        except BadUse as error:
            names = ", ".join(name for name in existing if is_folder[name])
            raise BadUse(
                f"{str(folder)!r} holds {names} but no run that --overwrite could replace: "
                f"{error}"
            ) from None
    for name in sorted(existing, key=CONFIG.__eq__):
        if is_folder[name]:
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


def _reopen(folder: Path, config: Mapping[str, Any], changes: Changes) -> None:
    """Go on with the run of this config, or of one that `changes` lead to from there.

    One atomic write makes the change: before it the run is the old one, after it the new.

    Raises:
      BadUse: the folder holds none, a damaged one or another.
    """
    stored = stored_config(folder)
    differences = {k for k in {*stored, *config} if stored.get(k) != config.get(k)}
    if fixed := sorted(differences - {*changes}):
        stored_flags = " ".join(
            shlex.quote(f"--{name}={stored.get(name)}") for name in fixed
        )
        raise BadUse(
            f"the run in {str(folder)!r} has other settings: resume it with {stored_flags}"
        )
    for name in sorted(differences):
        changes[name](folder)
    if differences:
        _change(folder, config, {name: stored.get(name) for name in sorted(differences)})
    _drop_earlier_summary(folder)


def _change(folder: Path, config: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Put new settings into config.json; what it and summary.json said is kept there."""
    previous = files.read_json(folder / CONFIG)
    earlier = previous.pop(_EARLIER, [])
    identity = {k: previous.pop(k) for k in (_EXPERIMENT,) if k in previous}
    entry: dict[str, Any] = {"changed": old} | {
        k: previous[k] for k in previous if k != "config"
    }
    if (folder / SUMMARY).exists():
        entry[SUMMARY] = files.read_json(folder / SUMMARY)
    new = {"config": dict(config)} | provenance() | {_EARLIER: [*earlier, entry]}
    files.write_sealed(folder / CONFIG, identity | new)
    changes_text = ", ".join(
        f"--{name}={config.get(name)} instead of {old[name]}" for name in old
    )
    print(f"the run in {folder} goes on with {changes_text}")


def _drop_earlier_summary(folder: Path) -> None:
    """Remove a summary that config.json keeps: it is not of the run as it is now."""
    earlier = files.read_json(folder / CONFIG).get(_EARLIER)
    if not earlier or not (folder / SUMMARY).exists():
        return
    if files.read_json(folder / SUMMARY) == earlier[-1].get(SUMMARY):
        (folder / SUMMARY).unlink()


def stored_config(folder: Path) -> dict[str, Any]:
    """The settings in config.json.

    Raises:
      BadUse: there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        stored = files.read_json(path).get("config")
    except FileNotFoundError:
        raise BadUse(f"{str(folder)!r} holds no run: no {CONFIG}") from None
    except OSError as error:
        raise BadUse(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(stored, dict):
        raise BadUse(f"{path} is damaged")
    return stored


def resume_command(config: Any, folder: Path, has_begun: bool = True) -> str:
    """The command that goes on with the run of `config` in `folder`, or begins it anew."""
    flag = "--resume" if has_begun else "--overwrite"
    flags = [f"--workdir={folder}", flag]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("workdir", "overwrite", "resume") and value != field.default:
            flags.append(f"--{field.name}={value}")
    return " ".join(["python -m", module_name(), *map(shlex.quote, flags)])


def write_summary(folder: Path, summary: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Write summary.json, as the sign of the end, with the SHA-256 of each output."""
    digests = {name: files.file_digest(folder / name) for name in outputs}
    found = {name: digest for name, digest in digests.items() if digest}
    files.write_sealed(folder / SUMMARY, {**summary, _FILES: found})


def save_checkpoint(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the folder's checkpoint by these named arrays."""
    buffer = io.BytesIO()
    identity = {_SETTINGS: np.asarray(json.dumps(stored_config(folder)))}
    np.savez(buffer, **identity, **arrays)  # type: ignore[arg-type]
    files.write_atomically(folder / CHECKPOINT, buffer.getvalue())


def drop_checkpoint(folder: Path) -> None:
    """Remove the folder's checkpoint, if it has one."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, np.ndarray] | None:
    """The folder's checkpoint, None if it has none.

    Raises:
      BadUse: it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        settings = json.loads(str(arrays.pop(_SETTINGS)))
    except Exception:
        raise BadUse(
            f"{path} is damaged: give --overwrite instead of --resume to start afresh"
        ) from None
    if settings != stored_config(folder):
        raise BadUse(f"{path} belongs to a run of other settings than {CONFIG} says")
    return arrays
