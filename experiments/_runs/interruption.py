"""Stop long work on a signal, after the state is saved."""

import os
import signal
import threading


class Interruption:
    """On Ctrl-C or SIGTERM, request a stop after this unit of work, such as an epoch.

    A second signal stops at once.

    Python handles no signal while a function is being compiled.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, unit: str):
        """Prepare; `unit` names the work after which the run stops."""
        self.requested = False
        self._note = f"\ninterrupted: saving after this {unit}; once more to stop now\n"

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._request) for s in self._SIGNALS}
        return self

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # No print: the signal may have interrupted another write to the same stream.
        os.write(2, self._note.encode())

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
