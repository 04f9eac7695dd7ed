"""Orbax checkpoints of a training run; the newest complete one survives any kill."""

import contextlib
import errno
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ncjax.checks import check_integer

_DIGEST, _EPOCH, _NOTES = "sha256", "epoch", "notes"  # entries of the metadata
_SPACE = "No space left on device"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def newest_epoch(folder: Path) -> int | None:
    """Return the epoch of the newest complete checkpoint in `folder`, None without one.

    This reads names only. Unlike `Checkpoints`, one of several processes may call it alone.
    """
    return max(ocp.utils.checkpoint_steps(folder), default=None)


class Checkpoints:
    """The newest two checkpoints in a folder, by epoch.

    A checkpoint is written under a temporary name and renamed when it is complete, so that
    a process killed while writing leaves the previous one. It stores the SHA-256 of its
    arrays, its epoch and its notes, because Orbax restores changed bytes, and a folder that
    was renamed to another epoch, without an error. If there are several processes, each
    must call every method, on a folder that they share.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Open the checkpoints in `folder`.

        Args:
          folder: created if it does not exist.
          read_only: change nothing, because another program may be writing to the folder.

        Raises:
          ValueError: the folder cannot be read.
          OSError: it cannot be made, because no space or no inode is left.
        """
        self._folder, self._read_only = folder, read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 2,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                reason = f"{error.strerror}; free some space"
                raise OSError(f"cannot write {folder}: {reason}") from error
            raise ValueError(f"cannot read {folder}: {_reason(error)}") from error

    def newest(self) -> int | None:
        """Return the epoch of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any, notes: Mapping[str, str] | None = None) -> None:
        """Write `state`, a pytree of arrays, as the newest checkpoint.

        Args:
          epoch: an integer of at least 0, above the epoch of the newest checkpoint.
          state: arrays that each process holds in full.
          notes: text by name, stored with the arrays.

        Raises:
          ValueError: the epoch is not above the newest one, or the folder was opened with
            read_only=True. Orbax would then write nothing, without an error.
          OSError: the checkpoint cannot be written; the previous one stays.
        """
        check_integer("epoch", epoch, least=0)
        if self._read_only:
            raise ValueError(f"{self._folder} was opened with read_only=True")
        newest = self.newest()
        if newest is not None and epoch <= newest:
            raise ValueError(
                f"expected an epoch above {newest}, the newest checkpoint in "
                f"{self._folder}, got {epoch}"
            )
        kept = dict(notes or {})
        seal = _seal(_digest(state), int(epoch), kept)
        metadata = {_DIGEST: seal, _EPOCH: int(epoch), _NOTES: kept}
        try:
            with _quiet():
                self._manager.save(
                    epoch, args=ocp.args.StandardSave(state), custom_metadata=metadata
                )
                self._manager.wait_until_finished()
        except Exception as error:
            for part in self._folder.glob(f"{epoch}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(
                f"cannot write {self._folder / str(epoch)}: {_reason(error)}"
            ) from error

    def restore(self, like: Any) -> tuple[Any, dict[str, str]]:
        """Return the arrays and the notes of the newest checkpoint.

        Args:
          like: a pytree of arrays with the shapes, dtypes and shardings of the result.

        Raises:
          ValueError: there is none, or it is damaged, has other shapes, or was saved as
            another epoch.
        """
        epoch = self.newest()
        if epoch is None:
            raise ValueError(f"{self._folder} holds no checkpoint")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            with _quiet():
                state = self._manager.restore(
                    epoch, args=ocp.args.StandardRestore(abstract)
                )
                # Checkpoints of earlier versions have no metadata.
                metadata = self._manager.metadata(epoch).custom_metadata or {}
            notes = dict(metadata.get(_NOTES, {}))
            _check(metadata, _digest(state), epoch, notes)
            return state, notes
        except Exception as error:
            raise ValueError(
                f"cannot restore {self._folder / str(epoch)}, remove it to resume from "
                f"the previous one: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Finish writing and release the folder."""
        self._manager.close()


def _check(
    metadata: Mapping[str, Any], arrays: str, epoch: int, notes: Mapping[str, str]
) -> None:
    """Raise ValueError unless the metadata are of these arrays, epoch and notes."""
    saved_as = metadata.get(_EPOCH, epoch)
    if saved_as != epoch:
        raise ValueError(f"it was saved as {saved_as}, and renamed since")
    # Earlier versions stored the digest of the arrays alone.
    right = {_seal(arrays, epoch, notes)} if _EPOCH in metadata else {arrays, None}
    if metadata.get(_DIGEST) not in right:
        raise ValueError("its arrays are not those that were saved")


def _seal(arrays: str, epoch: int, notes: Mapping[str, str]) -> str:
    """Return the SHA-256 of the digest of all arrays, the epoch and the notes."""
    content = json.dumps([arrays, epoch, notes], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _digest(state: Any) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(
            leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        )
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the many lines that Orbax prints on an error, which it raises as well.

    Threads of TensorStore that are still writing after an error find the event loop of
    Orbax closed. No caller can catch that error, Orbax has no save without such a loop, and
    Python offers only `sys.unraisablehook` to keep the tracebacks off the terminal.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    was_disabled, logger.disabled = logger.disabled, True

    def report_others(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = report_others  # it stays after an error: writes may end later
    try:
        yield
    finally:
        logger.disabled = was_disabled
    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """Return one line on an error: the reason of the system if it has one."""
    text = str(error)
    if reasons := re.findall(r"([^:]+) \[os_error_code=", text):
        reason = reasons[-1].strip()
        return f"{reason}; free some space" if reason == _SPACE else reason
    return (text.splitlines() or [type(error).__name__])[0]
