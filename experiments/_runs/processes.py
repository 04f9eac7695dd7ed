"""The processes of a run: they start with the same settings, and end together."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._runs import folders, links
from experiments._runs.errors import BadUse, RunFailed
from experiments._runs.group import EXPERIMENT, Group, Place, Several, Single, difference
from experiments._runs.provenance import module_name, version

# Settings that may differ between the processes.
_OWN = ("process_id", "local_device_ids", "data_dir", "cpu_devices")
# JAX's own limits come after --process_timeout: it aborts without a word of advice.
_JAX_FACTOR = 10
_SAME_FLAGS = "start all processes with the same flags"
_group: Group = Single()


def check(config: Any) -> None:
    """Raise BadUse if the flags of several processes contradict each other."""
    count, index = config.num_processes, config.process_id
    if count < 1:
        raise BadUse(f"--num_processes must be at least 1, got {count}")
    if not 0 <= index < count:
        raise BadUse(
            f"--process_id must lie in [0, {count}), the number of processes, got {index}"
        )
    if count > 1 and not config.workdir:
        raise BadUse("several processes need one --workdir, on a disk that they share")
    if (count > 1) != bool(config.coordinator):
        raise BadUse("--coordinator=HOST:PORT and --num_processes go together")
    if count == 1 and config.local_device_ids:
        raise BadUse(
            "--local_device_ids is for several processes: for one, set "
            f"CUDA_VISIBLE_DEVICES={config.local_device_ids}"
        )
    if not 1 <= config.process_timeout < 1e6:
        raise BadUse(
            f"--process_timeout must lie in [1, 1e6) seconds, got {config.process_timeout}"
        )
    _device_ids(config.local_device_ids)
    if count > 1:
        _address(config.coordinator)


def start(config: Any) -> None:
    """Connect the processes of a run, and compare their settings; before JAX is used.

    Raises:
      BadUse: settings differ or contradict each other.
      RunFailed: a process did not start in time.
    """
    check(config)
    if config.num_processes == 1:
        return
    global _group
    host, port = _address(config.coordinator)
    place = Place(
        host, port, config.num_processes, config.process_id, config.process_timeout
    )
    group = Several(place, lambda: folders.next_command(config, Path(config.workdir)))
    jax_port = group.meet(_settings(config), _SAME_FLAGS)
    _group = group
    _initialise_jax(place, jax_port, _device_ids(config.local_device_ids))


def _initialise_jax(place: Place, port: int, devices: list[int] | None) -> None:
    """Connect JAX; all others reach the first process by a port that stays open."""
    host, own = place.host, None
    if place.number:
        host, port = "127.0.0.1", links.forward(place.host, port, place.timeout)
    elif links.is_loopback(host):
        own = links.address(host, port)
    longer = int(_JAX_FACTOR * place.timeout) + 100
    jax.distributed.initialize(
        links.address(host, port),
        place.size,
        place.number,
        local_device_ids=devices,
        initialization_timeout=longer,
        heartbeat_timeout_seconds=longer,
        coordinator_bind_address=own,
    )
    # JAX has taken SIGTERM for notices of preemption, which nothing here asks for.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def is_first() -> bool:
    """Return whether this process is the first, which alone writes and prints."""
    return jax.process_index() == 0


def exchange(content: bytes) -> list[bytes]:
    """Return what every process has given, once all have called this."""
    return _group.exchange(content)


def exchange_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the named arrays that every process has given, once all have called this."""
    if isinstance(_group, Single):
        return [dict(arrays)]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    found = []
    for content in _group.exchange(buffer.getvalue()):
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            found.append(dict(stored))
    return found


def compare(values: Mapping[str, Any], advice: str) -> None:
    """Compare values over the processes, once all have called this.

    Args:
      values: what must be equal, by name.
      advice: what to do if it is not.

    Raises:
      BadUse: it is not; every process raises the same error.
    """
    found = exchange(json.dumps(dict(values)).encode())
    if text := difference(dict(enumerate(map(json.loads, found))), advice):
        raise BadUse(text)


@contextlib.contextmanager
def open_config(
    config: Any,
    name: str,
    outputs: Sequence[str],
    changes: folders.Changes | None = None,
) -> Iterator[tuple[Path, bool]]:
    """Open the run folder, as `folders.open_config`, in the first process for all.

    Raises:
      BadUse: the folder cannot be used; every process raises the same error.
      OSError: a file cannot be written; the others raise RunFailed.
    """
    with contextlib.ExitStack() as stack:
        answer: dict[str, Any] = {}
        error: BadUse | OSError | None = None
        if is_first():
            try:
                opening = folders.open_config(config, name, outputs, changes)
                folder, finished = stack.enter_context(opening)
                answer = {"folder": str(folder), "finished": finished}
            except (BadUse, OSError) as opening_error:
                error = opening_error
                answer = {"error": str(error), "bad_use": isinstance(error, BadUse)}
        answer = json.loads(exchange(json.dumps(answer).encode())[0])
        if "error" in answer:
            kind = BadUse if answer["bad_use"] else RunFailed
            raise error or kind(answer["error"])
        yield Path(answer["folder"]), answer["finished"]


def on_error(error: BaseException) -> BaseException:
    """Tell the other processes of an error; return it, or the loss that explains it."""
    return _group.fail(error)


def leave() -> None:
    """Wait, after a success, until all processes have come to their end."""
    _group.leave()


def _settings(config: Any) -> dict[str, Any]:
    """Return what must be the same in all processes."""
    fields = {k: v for k, v in vars(config).items() if k not in _OWN}
    fields["workdir"] = os.path.abspath(config.workdir)
    flags = {f"--{name}": value for name, value in fields.items()}
    of_packages = {f"the version of {k}": version(k) for k in ("ncjax", "jax", "jaxlib")}
    variable = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    return {EXPERIMENT: module_name()} | flags | of_packages | variable


def _address(text: str) -> tuple[str, int]:
    """Return host and port of --coordinator."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise BadUse(
            f"--coordinator must be HOST:PORT with a port below {2**16}, such as "
            f"node0:1234, got {text!r}"
        )
    try:
        host.encode("idna")  # as `socket` does
    except UnicodeError as error:
        raise BadUse(f"--coordinator: {host!r} is no name of a host: {error}") from None
    return host, int(port)


def _device_ids(text: str) -> list[int] | None:
    """Return the numbers of --local_device_ids, None if it is empty."""
    parts = [part.strip() for part in text.split(",")] if text else []
    good = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
    if not good or len({*map(int, parts)}) < len(parts):
        raise BadUse(
            "--local_device_ids must be different numbers separated by commas, such as "
            f"0,1, got {text!r}"
        )
    return [int(part) for part in parts] or None
