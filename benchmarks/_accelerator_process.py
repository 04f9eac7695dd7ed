"""Run a section in a process of its own: a hang or an abort costs that section alone."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmarks._accelerator_checks import FAIL, Row, Setting, rows
from benchmarks._accelerator_sections import SECTIONS
from experiments._runs import cli

ROOT = Path(__file__).parents[1]
GRACE = 5.0  # seconds between the last start of a check and the kill, at least
_WAIT = 10.0  # seconds that a killed process has to vanish
_ENVIRONMENT = {
    # Several sections follow each other on one device: none keeps all of its memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # A program from an earlier run would make `compile_s` a lie.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "PYTHONUNBUFFERED": "1",
}


def section_rows(name: str, setting: Setting, seconds: float) -> Iterator[Row]:
    """Run a section in a new process and yield its rows as they come.

    At its limit the process is killed, with all processes that it has started. The rows
    so far are kept, and a further row says how the process ended, if it ended badly. What
    it prints goes to the file NAME.log in the folder of the report.
    """
    end = time.monotonic() + seconds
    log = Path(setting.folder) / f"{name}.log"
    with log.open("wb") as errors:
        process = _start(name, setting._replace(deadline=end - GRACE), errors)
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout.fileno(), end):
                yield Row(**json.loads(line))
            code = _code(process, end)
        finally:
            _kill(process)
    if code:
        reason = f"killed after {seconds:.0f} s" if code == "late" else f"ended with {code}"
        last = _last_line(log)
        yield Row(name, "the section", FAIL, reason=f"{reason}: {last}".rstrip(": "))


def _start(name: str, setting: Setting, errors) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    module = "benchmarks._accelerator_process"
    return subprocess.Popen(
        [sys.executable, "-m", module, name, json.dumps(setting._asdict())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
        start_new_session=True,
    )


def _lines(descriptor: int, end: float) -> Iterator[str]:
    """Yield the lines that a pipe carries until it is closed or the time is over."""
    rest = b""
    while (left := end - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            return
        chunk = os.read(descriptor, 2**16)
        if not chunk:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in whole)


def _code(process: subprocess.Popen, end: float) -> str:
    """Return how the process ended: empty if well, "late" if it has not ended."""
    try:
        code = process.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return "late"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}" if code else ""


def _kill(process: subprocess.Popen) -> None:
    """Kill the process and all that it has started, and wait, though not for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in a driver may outlive SIGKILL.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_WAIT)
    if process.stdout:
        process.stdout.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def main() -> None:
    """Run the section that the command names; write its rows to stdout as JSON."""
    name, settings = sys.argv[1:]
    setting = Setting(**json.loads(settings))
    # Other packages print to stdout too: send that to the log.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cli.set_up_jax(SimpleNamespace(cpu_devices=1))
    for row in rows(name, SECTIONS[name].checks(setting), setting):
        print(json.dumps(row._asdict()), file=channel, flush=True)


if __name__ == "__main__":
    main()
