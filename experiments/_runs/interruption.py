"""Stop long work on a signal, after the state is saved."""

import contextlib
import os
import signal
import threading

# Of Ctrl-C, of `kill` and batch systems, and of a terminal that is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """Let all signals that end a process raise KeyboardInterrupt, as Ctrl-C does.

    A signal that the caller ignores stays ignored, as SIGHUP is by `nohup`.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


class Interruption:
    """On Ctrl-C, SIGTERM or SIGHUP, request a stop after this unit, such as an epoch.

    A second signal stops at once. A signal that is ignored stays ignored.

    Python handles no signal while a function is being compiled.
    """

    def __init__(self, unit: str):
        """Prepare; `unit` names the work after which the run stops."""
        self.requested = False
        self._note = f"\ninterrupted: saving after this {unit}; once more to stop now\n"

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._request)
                for number in _SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # No print: the signal may have interrupted another write to the same stream.
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, self._note.encode())

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
