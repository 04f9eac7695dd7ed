"""Scalars for TensorBoard, written to disk before the call returns."""

import contextlib
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from experiments._runs import files


class Events:
    """A new file of events in a folder.

    It replaces tensorboardX's `SummaryWriter`, whose writing thread dies silently on a full
    disk; training would then wait for it forever.
    """

    def __init__(self, folder: Path, purge_epoch: int):
        """Create the file.

        Args:
          folder: created if it does not exist.
          purge_epoch: TensorBoard hides values of earlier files from this epoch on.

        Raises:
          OSError: the file cannot be written.
        """
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._path = folder / name
        try:
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter(str(self._path))
        except OSError as error:
            raise files.write_error(self._path, error) from error
        begin = SessionLog(status=SessionLog.START)
        self._write(
            Event(file_version="brain.Event:2"), Event(step=purge_epoch, session_log=begin)
        )

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values, by name.

        Raises:
          OSError: the file cannot be written.
        """
        self._write(*(Event(step=epoch, summary=scalar(*item)) for item in values.items()))

    def _write(self, *events: Event) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._writer.close()
            raise files.write_error(self._path, error) from error

    def close(self) -> None:
        """Close the file.

        Raises:
          OSError: values that are still buffered cannot be written.
        """
        try:
            self._writer.close()
        except OSError as error:
            raise files.write_error(self._path, error) from error
