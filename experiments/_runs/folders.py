"""Run folders: nothing is overwritten unasked, and nothing is half written."""

import contextlib
import csv
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._runs import lock

CONFIG = "config.json"
CHECKPOINT = "checkpoint.npz"
_SETTINGS = "settings"
# Flags that say where and on what to run, not what.
_HANDLING = (
    *("workdir", "overwrite", "resume", "data_dir"),
    *("cpu_devices", "coordinator", "num_processes", "process_id"),
)
SUMMARY = "summary.json"  # written last: a folder that holds it holds a finished run
_EXPERIMENT = "experiment"  # in config.json: its name
_EARLIER = "earlier"  # in config.json: what it said before a setting was changed
_DIGEST = "sha256"  # in config.json and summary.json: of all that stands beside it
_FILES = "files"  # in summary.json: the SHA-256 of each output
_PART = ".part"  # ends the names of files that are being written
_FULL = (errno.ENOSPC, errno.EDQUOT)

_ANEW = f"remove its {SUMMARY} and give --resume, or --overwrite, to have all written anew"

# Settings that a resumed run may change, each with a check of the folder that raises
# ValueError where it may not.
Changes = Mapping[str, Callable[[Path], None]]


def workdir(config: Any, name: str) -> str:
    """The folder asked for; if none is, `runs/NAME/DATE-TIME`, new for every run."""
    if config.workdir or getattr(config, "resume", False):
        return config.workdir
    return f"runs/{name}/{datetime.datetime.now():%Y%m%d-%H%M%S}"


def settings(config: Any) -> dict[str, Any]:
    """The part of a config dataclass that determines the results."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _HANDLING}


@contextlib.contextmanager
def open_config(
    config: Any, name: str, outputs: Sequence[str], changes: Changes | None = None
) -> Iterator[tuple[Path, bool]]:
    """The folder of a run of the experiment `name`, for as long as this context lasts.

    No other run can open it meanwhile. Yields the folder, and whether the run in it has
    come to its end, which is told. Where the run is interrupted or a file fails, what to
    do is told.

    Raises:
      ValueError: the folder cannot be written, is in use, holds a run and neither
        --overwrite nor --resume is given, or is to be resumed and holds none or another.
      OSError: from within, with the command to give once the cause is gone.
    """
    resume = getattr(config, "resume", None)
    if config.overwrite and resume:
        raise ValueError("--overwrite and --resume exclude each other: give one of them")
    folder = _make(workdir(config, name), bool(resume))
    with lock.held(folder), _after_a_failed_write(config, folder):
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
        with _told(config, folder):
            if finished:
                print("nothing to resume, the run is finished")
            yield folder, finished


@contextlib.contextmanager
def _after_a_failed_write(config: Any, folder: Path) -> Iterator[None]:
    """Add the next command to an error of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}; then {_next_command(config, folder)}") from error


@contextlib.contextmanager
def _told(config: Any, folder: Path) -> Iterator[None]:
    """However the run ends, stdout ends with its folder; what to do next is on stderr.

    Of several processes the first alone speaks.
    """
    speaks = jax.process_index() == 0
    try:
        yield
    except KeyboardInterrupt:
        if speaks:
            print(f"interrupted; {_next_command(config, folder)}", file=sys.stderr)
        raise
    finally:
        if speaks:
            print(folder)


def _next_command(config: Any, folder: Path) -> str:
    begun = hasattr(config, "resume") and (folder / CONFIG).exists()
    then = "go on" if begun else "start again"
    return f"{then} with: {resume_command(config, folder, begun)}"


def is_finished(folder: Path) -> bool:
    """Whether the run of this folder has come to its end.

    Raises:
      ValueError: it has, but its summary or another file is damaged.
    """
    path = folder / SUMMARY
    if not path.exists():
        return False
    try:
        damaged = changed_files(folder, read_json(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}: {_ANEW}") from None
    if damaged:
        names = ", ".join(str(folder / name) for name in damaged)
        raise ValueError(f"missing or damaged: {names}; {_ANEW}")
    return True


def changed_files(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """Outputs that are no longer there or not as the run has written them."""
    files = summary.get(_FILES, {})  # not in summaries of earlier versions
    return [name for name, digest in files.items() if _file_digest(folder / name) != digest]


def _file_digest(path: Path) -> str | None:
    """SHA-256 of a file, None without one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _make(workdir: str, resume: bool) -> Path:
    """The folder asked for, made if it is not to be resumed from.

    Raises:
      ValueError: it cannot be written, or is to be resumed from and holds no run.
    """
    if resume and not workdir:
        raise ValueError("--resume needs --workdir, the folder of the run to go on with")
    folder = Path(workdir)
    try:
        if resume and not (folder / CONFIG).exists():
            raise ValueError(f"workdir {workdir!r} holds no run to resume")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to workdir {workdir!r}: {error.strerror}") from None
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
      ValueError: the folder holds a run and neither flag is given, or is to be resumed and
        holds another or a damaged one.
    """
    names = (CONFIG, SUMMARY, CHECKPOINT, *outputs)
    held = [name for name in names if (folder / name).exists()]
    if resume:
        _reopen(folder, config, changes or {})
    elif held and not overwrite:
        go_on = "" if resume is None else "--resume to go on with it, "
        raise ValueError(
            f"workdir {str(folder)!r} holds a run already ({', '.join(held)}): give "
            f"--overwrite to replace it, {go_on}or another --workdir"
        )
    else:
        _clear(folder, held)
        named = {_EXPERIMENT: name} if name else {}
        _seal(folder / CONFIG, named | {"config": dict(config)} | provenance())
    _sweep(folder, names)


def _sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove what runs killed in the middle of a write have left behind."""
    for name in names:
        for path in folder.glob(f".{name}.*{_PART}"):
            path.unlink()


def _clear(folder: Path, held: Sequence[str]) -> None:
    """Remove the outputs of the run in `folder`, its config last.

    Raises:
      ValueError: they include folders, and `folder` does not hold a run.
    """
    is_folder = {
        name: (folder / name).is_dir() and not (folder / name).is_symlink() for name in held
    }
    if any(is_folder.values()):
        try:
            stored_config(folder)
        except ValueError as error:
            names = ", ".join(name for name in held if is_folder[name])
            raise ValueError(
                f"{str(folder)!r} holds {names} but no run that --overwrite could replace: "
                f"{error}"
            ) from None
    for name in sorted(held, key=CONFIG.__eq__):
        if is_folder[name]:
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


def _reopen(folder: Path, config: Mapping[str, Any], changes: Changes) -> None:
    """Go on with the run of this config, or of one that `changes` lead to from there.

    One atomic write makes the change: before it the run is the old one, after it the new.

    Raises:
      ValueError: the folder holds none, a damaged one or another.
    """
    stored = stored_config(folder)
    other = {k for k in {*stored, *config} if stored.get(k) != config.get(k)}
    if refused := sorted(other - {*changes}):
        asked = " ".join(shlex.quote(f"--{name}={stored.get(name)}") for name in refused)
        raise ValueError(
            f"the run in {str(folder)!r} has other settings: resume it with {asked}"
        )
    for name in sorted(other):
        changes[name](folder)
    if other:
        _change(folder, config, {name: stored.get(name) for name in sorted(other)})
    _drop_earlier_summary(folder)


def _change(folder: Path, config: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Put new settings into config.json; what it and summary.json said is kept there."""
    said = read_json(folder / CONFIG)
    earlier = said.pop(_EARLIER, [])
    named = {k: said.pop(k) for k in (_EXPERIMENT,) if k in said}
    entry: dict[str, Any] = {"changed": old} | {k: said[k] for k in said if k != "config"}
    if (folder / SUMMARY).exists():
        entry[SUMMARY] = read_json(folder / SUMMARY)
    new = {"config": dict(config)} | provenance() | {_EARLIER: [*earlier, entry]}
    _seal(folder / CONFIG, named | new)
    told = ", ".join(f"--{name}={config.get(name)} instead of {old[name]}" for name in old)
    print(f"the run in {folder} goes on with {told}")


def _drop_earlier_summary(folder: Path) -> None:
    """Remove a summary that config.json keeps: it is not of the run as it is now."""
    earlier = read_json(folder / CONFIG).get(_EARLIER)
    if not earlier or not (folder / SUMMARY).exists():
        return
    if read_json(folder / SUMMARY) == earlier[-1].get(SUMMARY):
        (folder / SUMMARY).unlink()


def stored_config(folder: Path) -> dict[str, Any]:
    """The settings in config.json.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        stored = read_json(path).get("config")
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no run: no {CONFIG}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged")
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, less its digest.

    Raises:
      ValueError: it holds none, or not the one that was written.
      OSError: there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged")
    # Files of earlier versions have no digest.
    if _DIGEST in content and content.pop(_DIGEST) != _digest(content):
        raise ValueError(
            f"{path} is damaged: its {_DIGEST} does not fit (if you edited it, remove that)"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resume_command(config: Any, folder: Path, begun: bool = True) -> str:
    """The command that goes on with the run of `config` in `folder`, or begins it anew."""
    how = "--resume" if begun else "--overwrite"
    flags = [f"--workdir={folder}", how]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("workdir", "overwrite", "resume") and value != field.default:
            flags.append(f"--{field.name}={value}")
    return " ".join(["python -m", _module_name(), *map(shlex.quote, flags)])


def provenance(*others: str) -> dict[str, Any]:
    """Command, date, versions (of `others` too) and device of a run."""
    packages = ("ncjax", "jax", "jaxlib", "diffrax", "numpy", *others)
    return {
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    Raises:
      OSError: it cannot be written; the old one stays.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=_PART, delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: OSError) -> OSError:
    """What to raise where a file could not be written: which one, why, what to do."""
    cure = "; free some space" if error.errno in _FULL else ""
    return OSError(f"cannot write {path}: {error.strerror or error}{cure}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, numbers that are not finite as null."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def write_summary(folder: Path, summary: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Write summary.json, as the sign of the end, with the SHA-256 of each output."""
    digests = {name: _file_digest(folder / name) for name in outputs}
    files = {name: digest for name, digest in digests.items() if digest}
    _seal(folder / SUMMARY, {**summary, _FILES: files})


def _seal(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its digest, for `read_json`."""
    stored = json.loads(json.dumps(_finite(content), allow_nan=False))
    write_json(path, stored | {_DIGEST: _digest(stored)})


def write_files(stem: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that are called `stem` but for their suffix, as of `plotting.render`."""
    for suffix, content in contents.items():
        write_atomically(stem.with_suffix(suffix), content)


def _finite(content: Any) -> Any:
    """`content` with None for every float that JSON cannot hold."""
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def write_csv(path: Path, log_times: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns (S, T) as rows of seed, log_t and values to nine digits."""
    rows = [
        {"seed": seed, "log_t": log_t} | dict(zip(columns, values, strict=True))
        for seed, series in enumerate(zip(*columns.values(), strict=True))
        for log_t, values in zip(log_times, zip(*series, strict=True), strict=True)
    ]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, floats to nine digits."""
    write_atomically(path, csv_of(rows))


def csv_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as the content of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def write_table(stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as `stem`.csv and, for reading, as the Markdown table `stem`.md."""
    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0])]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    # NaN says in the CSV what it is; to a reader that there is no number.
    lines += [["-" if cell == "nan" else cell for cell in row] for row in cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_files(stem, {".csv": csv_of(rows), ".md": text.encode()})


def _cell(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)


def save_checkpoint(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the folder's checkpoint by these named arrays."""
    buffer = io.BytesIO()
    of_run = {_SETTINGS: np.asarray(json.dumps(stored_config(folder)))}
    np.savez(buffer, **of_run, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / CHECKPOINT, buffer.getvalue())


def drop_checkpoint(folder: Path) -> None:
    """Remove the folder's checkpoint, if it has one."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, np.ndarray] | None:
    """The folder's checkpoint, None if it has none.

    Raises:
      ValueError: it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        settings = json.loads(str(arrays.pop(_SETTINGS)))
    except Exception:
        raise ValueError(
            f"{path} is damaged: give --overwrite instead of --resume to start afresh"
        ) from None
    if settings != stored_config(folder):
        raise ValueError(f"{path} belongs to a run of other settings than {CONFIG} says")
    return arrays
