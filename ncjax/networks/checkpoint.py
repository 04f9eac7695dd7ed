"""Checkpoints of a training run, by Orbax: the newest whole one survives any kill."""

import contextlib
import hashlib
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

_DIGEST = "sha256"
_SPACE = "No space left on device"


def newest_epoch(folder: Path) -> int | None:
    """The epoch of the newest whole checkpoint in `folder`, by the names in it alone.

    None if there is none. Other than `Checkpoints`, for one of several processes.
    """
    return max(ocp.utils.checkpoint_steps(folder), default=None)


class Checkpoints:
    """The checkpoints in a folder, the newest two, by epoch.

    A checkpoint is written beside the old ones and renamed when it is whole, so that what
    is killed half-way leaves the one before. It holds the SHA-256 of its arrays, which
    Orbax itself would read without notice if a byte of their files has changed. With
    several processes each must call every method, on a folder that they share.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Open the checkpoints in `folder`.

        Args:
          folder: made if it does not exist.
          read_only: touch nothing, for a folder that another program may be writing to.

        Raises:
          ValueError: it cannot be read.
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
            raise ValueError(f"cannot read {folder}: {_reason(error)}") from error

    def newest(self) -> int | None:
        """The epoch of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any, notes: Mapping[str, str] | None = None) -> None:
        """Write `state`, a pytree of arrays, as the newest checkpoint.

        Args:
          epoch: an integer of at least 0, above that of the newest.
          state: arrays that each process has whole.
          notes: to be restored with it.

        Raises:
          ValueError: epoch is not above that of the newest, or the folder was opened to
            be read only: Orbax would write nothing.
          OSError: it cannot be written; the one before stays.
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
        metadata = {_DIGEST: _digest(state), "notes": dict(notes or {})}
        try:
            with _unlogged():
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
        """The newest checkpoint, and the notes with it.

        Args:
          like: a pytree of arrays with the shapes, dtypes and shardings of the result.

        Raises:
          ValueError: it is damaged, or of other shapes.
        """
        epoch = self.newest()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            with _unlogged():
                state = self._manager.restore(
                    epoch, args=ocp.args.StandardRestore(abstract)
                )
                # Checkpoints of earlier versions have none.
                metadata = self._manager.metadata(epoch).custom_metadata or {}
            if metadata.get(_DIGEST, "") not in ("", _digest(state)):
                raise ValueError("its arrays are not those that were saved")
            return state, dict(metadata.get("notes", {}))
        except Exception as error:
            raise ValueError(
                f"cannot restore {self._folder / str(epoch)}, remove it to go on from the "
                f"one before: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()


def _digest(state: Any) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all arrays."""
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
def _unlogged() -> Iterator[None]:
    """Without Orbax's own words on an error, of many lines: it is raised too."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before, logger.disabled = logger.disabled, True

    def rest(unraisable):
        # Of writes that were under way: they find the loop of the failed one closed.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = rest  # stays after an error: such writes may end later
    try:
        yield
    finally:
        logger.disabled = before
    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """What an error says, in short: that of the system if there is one, else a line."""
    text = str(error)
    if of_system := re.findall(r"([^:]+) \[os_error_code=", text):
        reason = of_system[-1].strip()
        return f"{reason}; free some space" if reason == _SPACE else reason
    return (text.splitlines() or [type(error).__name__])[0]
