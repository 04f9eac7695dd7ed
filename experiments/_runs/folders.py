"""Open, resume and finish run folders; nothing is overwritten without --overwrite."""

import contextlib
import dataclasses
import datetime
import io
import json
import os
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._runs import files, lock, reading
from experiments._runs.errors import BadUse, RunFailed, first_line, is_out_of_memory
from experiments._runs.output import note
from experiments._runs.provenance import module_name
from experiments._runs.provenance import provenance as provenance

CONFIG = "config.json"
CHECKPOINT = "checkpoint.npz"
_SETTINGS = "settings"
# Flags that do not change the results: where to run, and on which machine.
_HANDLING_FLAGS = (
    *("workdir", "overwrite", "resume", "data_dir"),
    *("cpu_devices", "coordinator", "num_processes", "process_id"),
    *("local_device_ids", "process_timeout"),
)
# Settings that decide how much memory a run needs.
_SIZES = (
    *("seeds", "num_classes", "per_class", "dim", "num_times", "max_classes"),
    *("batch_size", "width", "image_size"),
)
SUMMARY = "summary.json"  # written last: its presence marks a finished run
_EXPERIMENT = "experiment"  # in config.json: the name of the experiment
_EARLIER = "earlier"  # in config.json: its content before each change of a setting
_FILES = "files"  # in summary.json: the SHA-256 of each output

_REWRITE_ADVICE = (
    f"remove its {SUMMARY} and give --resume, or give --overwrite, to write all files again"
)

# Settings that a resumed run may change, each with a check that raises BadUse if the run
# in the folder does not allow it.
Changes = Mapping[str, Callable[[Path], None]]


def workdir(config: Any, name: str) -> str:
    """Return the requested folder, by default `runs/NAME/DATE-TIME`, new for every run."""
    if config.workdir or getattr(config, "resume", False):
        return config.workdir
    return f"runs/{name}/{datetime.datetime.now():%Y%m%d-%H%M%S}"


def settings(config: Any) -> dict[str, Any]:
    """Return the fields of a config that determine the results."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _HANDLING_FLAGS}


def defaults(config: Any) -> dict[str, Any]:
    """Return the defaults of the fields that determine the results."""
    fields = dataclasses.fields(config)
    return {f.name: f.default for f in fields if f.name not in _HANDLING_FLAGS}


@contextlib.contextmanager
def open_config(
    config: Any, name: str, outputs: Sequence[str], changes: Changes | None = None
) -> Iterator[tuple[Path, bool]]:
    """Open the run folder of the experiment `name`, and lock it for this context.

    Yield the folder, and whether the run in it is finished; print it if so. If the run is
    interrupted or a file cannot be written, print the command that resumes it.

    Raises:
      BadUse: the folder cannot be written, another run uses it, it holds a run but neither
        --overwrite nor --resume is given, or --resume is given and it holds no such run.
      OSError: a file could not be written; the message ends with the next command.
      RunFailed: memory was exhausted; the message ends with the next command.
    """
    resume = getattr(config, "resume", None)
    if config.overwrite and resume:
        raise BadUse("--overwrite and --resume exclude each other: give one of them")
    folder = _make_folder(workdir(config, name), bool(resume))
    with lock.held(folder), _advice_after_failure(config, folder):
        open_run(
            folder,
            settings(config),
            outputs,
            name=name,
            overwrite=config.overwrite,
            resume=resume,
            changes=changes,
            defaults=defaults(config),
        )
        finished = is_finished(folder)
        with _final_output(config, folder):
            if finished:
                print("nothing to resume, the run is finished")
            yield folder, finished


@contextlib.contextmanager
def _advice_after_failure(config: Any, folder: Path) -> Iterator[None]:
    """Append the resume command to an OSError, and to the message of exhausted memory."""
    try:
        yield
    except BrokenPipeError:  # nothing reads stdout or stderr any more
        raise
    except OSError as error:
        raise OSError(f"{error}; then {next_command(config, folder)}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sizes = [f"--{name}" for name in _SIZES if hasattr(config, name)]
        smaller = f" (a new run with a smaller {', '.join(sizes)} needs less)"
        raise RunFailed(
            f"out of memory: {first_line(error) or type(error).__name__}; free some"
            f"{smaller if sizes else ''}, then {next_command(config, folder)}"
        ) from error


@contextlib.contextmanager
def _final_output(config: Any, folder: Path) -> Iterator[None]:
    """End stdout with the folder, however the run ends.

    After an interruption print the next command to stderr. Only the first of several
    processes prints.
    """
    is_first = jax.process_index() == 0
    try:
        yield
    except BaseException as error:
        if is_first and isinstance(error, KeyboardInterrupt):
            note(f"interrupted; {next_command(config, folder)}")
        with contextlib.suppress(OSError):  # nothing reads stdout: keep the first error
            if is_first:
                print(reading.shown(folder, reading.MOST_OF_PATH), flush=True)
        raise
    if is_first:
        print(reading.shown(folder, reading.MOST_OF_PATH))


def next_command(config: Any, folder: Path) -> str:
    """Return the command that resumes the run, or starts it again if none has begun."""
    has_begun = hasattr(config, "resume") and (folder / CONFIG).exists()
    action = "resume" if has_begun else "start again"
    return f"{action} with: {resume_command(config, folder, has_begun)}"


def is_finished(folder: Path) -> bool:
    """Return whether the run in the folder is finished.

    Raises:
      BadUse: it is, but its summary or an output is damaged.
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
    """Return the outputs that are missing or differ from the run's own.

    Raises:
      BadUse: the summary has no table of digests.
    """
    digests = summary.get(_FILES, {})  # summaries of earlier versions have none
    if not isinstance(digests, Mapping):
        raise BadUse(
            f"{folder / SUMMARY} is damaged: {_FILES!r} must be a table of digests"
        )
    return [name for name, digest in digests.items() if _has_changed(folder, name, digest)]


def _has_changed(folder: Path, name: str, digest: Any) -> bool:
    """Return whether an output is missing, cannot be read or differs."""
    if Path(name).name != name:  # outputs lie in the folder itself
        return True
    try:
        return files.file_digest(folder / name) != digest
    except (OSError, ValueError):  # also a name that no file can have
        return True


def _make_folder(workdir: str, resume: bool) -> Path:
    """Return the folder; create it unless a run in it is to be resumed.

    Raises:
      BadUse: it cannot be written, or it holds no run to resume.
    """
    if resume and not workdir:
        raise BadUse("--resume needs --workdir, the folder of the run to resume")
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
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Begin a run in a folder and write its `config.json`, or resume the run in it.

    Args:
      folder: a folder that no other run uses.
      config: settings that determine the results; a resumed run must have the same ones,
        except for `changes`.
      outputs: names of the files that the run will write.
      name: name of the experiment.
      overwrite: replace the run that the folder holds.
      resume: resume the run that the folder holds; None if the experiment has no such
        flag.
      changes: settings that may differ from the stored ones; `config.json` keeps both.
      defaults: values of settings that `config.json` lacks because an earlier version,
        which had no such setting, wrote it.

    Raises:
      BadUse: the folder holds a run and neither flag is given, or the run to resume is
        another one or damaged.
    """
    names = (CONFIG, SUMMARY, CHECKPOINT, *outputs)
    existing = [name for name in names if os.path.lexists(folder / name)]
    if resume:
        for name in names:
            reading.check_tree(folder / name)
        _reopen(folder, config, changes or {}, defaults or {})
    elif existing and not overwrite:
        resume_advice = "" if resume is None else "--resume to continue it, "
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
      BadUse: some outputs are folders, and `folder` does not hold a run.
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


def _reopen(
    folder: Path,
    config: Mapping[str, Any],
    changes: Changes,
    defaults: Mapping[str, Any],
) -> None:
    """Resume the run in `folder`, after the changes of settings that `changes` allows.

    One atomic write makes all changes, so that a kill leaves the old run or the new one.

    Raises:
      BadUse: the folder holds no run, a damaged one, or one with other settings.
    """
    stored = known_settings(folder, dict.fromkeys(config) | dict(defaults))
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
    """Store new settings in config.json, which keeps its old content and summary.json."""
    previous = files.read_json(folder / CONFIG)
    earlier = _earlier(folder)
    previous.pop(_EARLIER, None)
    identity = {k: previous.pop(k) for k in (_EXPERIMENT,) if k in previous}
    entry: dict[str, Any] = {"changed": old} | {
        k: previous[k] for k in previous if k != "config"
    }
    if (folder / SUMMARY).exists():
        entry[SUMMARY] = files.read_json(folder / SUMMARY)
    new = {"config": dict(config)} | provenance() | {_EARLIER: [*earlier, entry]}
    files.write_sealed(folder / CONFIG, identity | new)
    changes_text = ", ".join(
        f"--{name}={config.get(name)} (was {old[name]})" for name in old
    )
    print(f"the run in {folder} resumes with {changes_text}")


def _drop_earlier_summary(folder: Path) -> None:
    """Remove summary.json if config.json keeps it: it belongs to the earlier settings."""
    earlier = _earlier(folder)
    if not earlier or not (folder / SUMMARY).exists():
        return
    if files.read_json(folder / SUMMARY) == earlier[-1].get(SUMMARY):
        (folder / SUMMARY).unlink()


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of config.json on earlier settings.

    Raises:
      BadUse: they have another type.
    """
    earlier = files.read_json(folder / CONFIG).get(_EARLIER, [])
    if not (isinstance(earlier, list) and all(isinstance(e, dict) for e in earlier)):
        raise BadUse(f"{folder / CONFIG} is damaged: {_EARLIER!r} must be a list of tables")
    return earlier


def known_settings(folder: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in config.json, with `defaults` for those that it lacks.

    An earlier version, which had no such setting, did what the default does.

    Raises:
      BadUse: config.json is missing or damaged, or has a setting without a default here:
        another version, which knows it, made the run.
    """
    stored = stored_config(folder)
    if unknown := sorted(stored.keys() - defaults.keys()):
        flags = reading.shown(
            " ".join(shlex.quote(f"--{name}={stored[name]}") for name in unknown)
        )
        raise BadUse(
            f"the run in {str(folder)!r} has settings that this version of ncjax does not "
            f"know, {flags}: use {_maker(folder)} made the run"
        )
    return {**defaults, **stored}


def experiment(folder: Path) -> str:
    """Return the experiment in config.json, "" if an earlier version wrote it."""
    return str(files.read_json(folder / CONFIG).get(_EXPERIMENT, ""))


def _maker(folder: Path) -> str:
    """Return the version of ncjax that began a run, for "... made the run"."""
    versions = files.read_json(folder / CONFIG).get("versions")
    found = versions.get("ncjax") if isinstance(versions, dict) else None
    return f"ncjax {found}, which" if found else "the version of ncjax that"


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the settings in config.json.

    Raises:
      BadUse: the file is missing or damaged.
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


def _differ(settings: Any, others: Mapping[str, Any]) -> bool:
    """Return whether a setting has two values; another version may know more of them."""
    if not isinstance(settings, dict):
        return True
    return any(settings[name] != others[name] for name in settings.keys() & others.keys())


def resume_command(config: Any, folder: Path, has_begun: bool = True) -> str:
    """Return the command that resumes the run in `folder`, or begins it again."""
    flag = "--resume" if has_begun else "--overwrite"
    flags = [f"--workdir={folder}", flag]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("workdir", "overwrite", "resume") and value != field.default:
            flags.append(f"--{field.name}={value}")
    return " ".join(["python -m", module_name(), *map(shlex.quote, flags)])


def write_summary(folder: Path, summary: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Write summary.json, which marks the end, with the SHA-256 of each output."""
    digests = {name: files.file_digest(folder / name) for name in outputs}
    found = {name: digest for name, digest in digests.items() if digest}
    files.write_sealed(folder / SUMMARY, {**summary, _FILES: found})


def save_checkpoint(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the folder's checkpoint by these named arrays.

    The format is npz because the 20 saves of a flow then take 0.3 s; with Orbax they take
    2.7 s, and its import 1.3 s.
    """
    buffer = io.BytesIO()
    identity = {_SETTINGS: np.asarray(json.dumps(stored_config(folder)))}
    np.savez(buffer, **identity, **arrays)  # type: ignore[arg-type]
    files.write_atomically(folder / CHECKPOINT, buffer.getvalue())


def drop_checkpoint(folder: Path) -> None:
    """Remove the folder's checkpoint, if it has one."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of the folder's checkpoint, None if it has none.

    Raises:
      BadUse: the checkpoint is damaged, or belongs to other settings.
    """
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        return None
    try:
        with reading.opened(path) as file:
            _check_stored(file)
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
        settings = json.loads(str(arrays.pop(_SETTINGS)))
    except BadUse:
        raise
    except Exception:
        raise BadUse(
            f"{path} is damaged: give --overwrite instead of --resume to start again"
        ) from None
    if _differ(settings, stored_config(folder)):
        raise BadUse(f"{path} belongs to a run of other settings than {CONFIG} says")
    return arrays


def _check_stored(file: io.BufferedReader) -> None:
    """Raise ValueError if an archive is compressed: its arrays might have any size."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
    file.seek(0)
