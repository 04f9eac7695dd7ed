"""Keep compiled programs on disk, so that the second run of an experiment starts at once.

The folder is `ncjax/compiled` in `$XDG_CACHE_HOME`, or in `~/.cache`. The user's own
`JAX_COMPILATION_CACHE_DIR` wins, and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

import hashlib
import os
import platform
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

# Bytes of all programs together; JAX's own bound needs another package.
_LARGEST = 2**30
_SUFFIX = "-cache"  # of JAX's files
_DAMAGED = re.compile("Error reading persistent compilation cache entry for '([^']+)'")
_NOT_WRITTEN = "Error writing persistent compilation cache entry"


def keep_programs() -> None:
    """Let JAX keep its compiled programs, where a folder for them can be had.

    A folder that cannot be made or written, or that others may write, is not used: the run
    compiles as it would without one. Programs from a damaged file are compiled anew.
    """
    settings: Any = jax.config
    enabled, own = (
        settings.jax_enable_compilation_cache,
        settings.jax_compilation_cache_dir,
    )
    if own is not None or not enabled:
        return
    try:
        folder = _folder()
        _remove_oldest(folder)
    except (OSError, RuntimeError):  # RuntimeError: no home directory is known
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also small programs: a run has dozens, and each takes 20 ms to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.filterwarnings("ignore", message=_NOT_WRITTEN)  # such as on a full disk
    _forget_damaged(folder)


def _folder() -> Path:
    """Return the folder for this machine, which exists and takes files.

    Raises:
      OSError: there is none.
      RuntimeError: the home directory is unknown.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored.
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder = parent / "ncjax" / "compiled" / _machine()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    # Programs are run as they are, so nobody else may put one there.
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"written")
    return folder


def _machine() -> str:
    """Return a name of the processor with its instructions.

    A home directory may be shared by machines, and a program that uses instructions which
    a processor lacks kills the process. JAX's name of a program does not say them.
    """
    text = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            text += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:  # on macOS
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remove_oldest(folder: Path) -> None:
    """Remove the programs that were not used for the longest time, down to the bound."""
    entries = sorted(_programs(folder), key=lambda entry: entry[1].st_atime, reverse=True)
    total = 0
    for path, found in entries:
        total += found.st_size
        if total > _LARGEST or not found.st_size:  # nothing was written to a full disk
            path.unlink(missing_ok=True)


def _programs(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of programs; another process may remove one meanwhile."""
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue


def _forget_damaged(folder: Path) -> None:
    """Remove a program that JAX cannot read, before JAX compiles and writes it anew."""
    show = warnings.showwarning

    def remove_and_show(message, *rest, **settings):
        damaged = _DAMAGED.match(str(message))
        if damaged:
            name = damaged[1]
            message = (
                f"a damaged file of a compiled program is replaced: {name} in {folder}"
            )
            for path in folder.glob(f"{name}-*{_SUFFIX}"):
                path.unlink(missing_ok=True)
        show(message, *rest, **settings)

    warnings.showwarning = remove_and_show
