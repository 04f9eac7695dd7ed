"""Checkpoints of a training run, by Orbax: the newest whole one survives any kill."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def newest_epoch(folder: Path) -> int | None:
    """The epoch of the newest whole checkpoint in `folder`, by the names in it alone.

    None if there is none. Other than `Checkpoints`, for one of several processes.
    """
    return max(ocp.utils.checkpoint_steps(folder), default=None)


class Checkpoints:
    """The checkpoints in a folder, the newest two, by epoch.

    A checkpoint is written beside the old ones and renamed when it is whole, so that what
    is killed half-way leaves the one before. With several processes each must call every
    method, on a folder that they share.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Open the checkpoints in `folder`.

        Args:
          folder: made if it does not exist.
          read_only: touch nothing, for a folder that another program may be writing to.
        """
        self._folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 2,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The epoch of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any) -> None:
        """Write `state`, a pytree of arrays, as the newest checkpoint."""
        self._manager.save(epoch, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """The newest checkpoint.

        Args:
          like: a pytree of arrays with the shapes, dtypes and shardings of the result.

        Raises:
          ValueError: it is damaged, or of other shapes.
        """
        epoch = self.newest()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(epoch, args=ocp.args.StandardRestore(abstract))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"cannot restore {self._folder / str(epoch)}, remove it to go on from the "
                f"one before: {reason}"
            ) from None

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()
