"""The connections of a run's processes: they meet, exchange bytes, and end together.

The first process listens; each other one keeps one connection to it, over which both send
a heartbeat. A process that dies closes its connections; one that hangs is silent.
"""

import contextlib
import itertools
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from experiments._runs import links
from experiments._runs.errors import BadUse, RunFailed, first_line

EXPERIMENT = "the experiment"  # decides which other settings there are
_GRACE_SECONDS = 2.0  # in which a process may find the error of another one by itself
_STRANGER_SECONDS = 5.0  # for the first message, and for processes that come too late
_NAMED = 8  # absent processes that an error names
_BEATS = 4  # in the time after which a silent process is lost
_PORT, _FAILURE = "port", "failure"  # in the answer of the first process


class Place(NamedTuple):
    """The place of this process in the run, and the address of the first one."""

    host: str
    port: int
    size: int  # number of processes
    number: int  # of this process, from 0
    timeout: float  # seconds


class _Arrival(NamedTuple):
    process: int
    values: dict[str, Any]
    link: links.Link


class Group(Protocol):
    """The processes of a run, seen from one of them."""

    def exchange(self, content: bytes) -> list[bytes]:
        """Return what every process has given, once all have called this."""

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others of an error, and return it, or the loss that explains it."""

    def leave(self) -> None:
        """Wait until all processes have come to their end."""


class Single:
    """A `Group` of one process."""

    def exchange(self, content: bytes) -> list[bytes]:
        """Return what this process gives."""
        return [content]

    def fail(self, error: BaseException) -> BaseException:
        """Return the error."""
        return error

    def leave(self) -> None:
        """Do nothing."""


class Several:
    """A `Group` of several processes."""

    def __init__(self, place: Place, advice: Callable[[], str]):
        """Prepare; `advice` returns the command that resumes the run."""
        self.place, self._advice = place, advice
        self._links: dict[int, links.Link] = {}
        self._messages: dict[int, queue.SimpleQueue] = {}
        self._loss = ""
        self._lost = threading.Event()  # another process has ended
        self._ending = threading.Event()  # this process ends by itself
        self._lock = threading.Lock()  # of both events

    def meet(self, values: Mapping[str, Any], advice: str) -> int:
        """Connect the processes, compare values, and return a free port of the first one.

        Args:
          values: what must be equal in all processes, by name.
          advice: what to do if it is not.

        Raises:
          BadUse: values differ, or the address cannot be used; if values differ, every
            process raises the same error.
          RunFailed: a process did not start in time.
        """
        if self.place.number:
            return self._join(values)
        return self._gather(values, advice)

    def _join(self, values: Mapping[str, Any]) -> int:
        """Connect to the first process, and return what it answers."""
        host, port, _, number, timeout = self.place
        hello = {"process": number, "values": dict(values)}
        with contextlib.ExitStack() as stack:
            try:
                connection = links.connect(host, port, time.monotonic() + timeout)
                link = links.Link(connection, timeout + _STRANGER_SECONDS)
                stack.callback(link.close)
                link.send(links.PART, json.dumps(hello).encode())
                kind, content = link.receive()
            except OSError as error:
                raise RunFailed(
                    f"process 0 did not answer at --coordinator="
                    f"{links.address(host, port)} within {timeout:g} s "
                    f"(--process_timeout): {error}; {self._advice()}"
                ) from None
            if kind == links.END:
                raise BadUse(content.decode())
            answer = json.loads(content)
            if _FAILURE in answer:
                raise RunFailed(f"{answer[_FAILURE]}; {self._advice()}")
            stack.pop_all()
        self._watch(0, link)
        return answer[_PORT]

    def _gather(self, values: Mapping[str, Any], advice: str) -> int:
        """Wait for all other processes, and answer them."""
        arrivals, found_difference = self._arrivals({0: dict(values)}, advice)
        receivers = [arrival.link for arrival in arrivals]
        if found_difference:
            _refuse(receivers, links.END, found_difference)
            raise BadUse(found_difference)
        present = {0, *(arrival.process for arrival in arrivals)}
        if len(present) < self.place.size:
            absent = (i for i in range(self.place.size) if i not in present)
            names = ", ".join(map(str, itertools.islice(absent, _NAMED)))
            more = self.place.size - len(present) - _NAMED
            names += f" and {more} others" if more > 0 else ""
            failure = (
                f"process {names} of {self.place.size} did not start within "
                f"{self.place.timeout:g} s (--process_timeout)"
            )
            _refuse(receivers, links.PART, json.dumps({_FAILURE: failure}))
            raise RunFailed(f"{failure}; {self._advice()}")
        free = links.free_port(self.place.host)
        _tell(receivers, links.PART, json.dumps({_PORT: free}).encode())
        for arrival in arrivals:
            self._watch(arrival.process, arrival.link)
        return free

    def _arrivals(
        self, found: dict[int, dict[str, Any]], advice: str
    ) -> tuple[list[_Arrival], str]:
        """Return the processes that came in time, and the first difference of values."""
        arrivals: list[_Arrival] = []
        first_difference = ""
        deadline = time.monotonic() + self.place.timeout
        with self._listen() as server:
            while len(arrivals) < self.place.size - 1 and time.monotonic() < deadline:
                arrival = _next_arrival(server, deadline, self.place.timeout)
                if arrival is None:
                    continue
                arrivals.append(arrival)
                process = arrival.process
                if process in found:
                    new = f"two processes have --process_id={process}"
                else:
                    new = difference({0: found[0], process: arrival.values}, advice)
                found[process] = arrival.values
                if new and not first_difference:  # the others learn of it if they come soon
                    first_difference = new
                    deadline = min(deadline, time.monotonic() + _STRANGER_SECONDS)
        return arrivals, first_difference

    def _listen(self) -> socket.socket:
        host, port = self.place.host, self.place.port
        try:
            return links.listen(host, port)
        except OSError as error:
            raise BadUse(
                f"--coordinator={links.address(host, port)}: process 0 cannot listen "
                f"there: {error.strerror or error}; give another port"
            ) from None

    def _watch(self, process: int, link: links.Link) -> None:
        """Read the messages of a process, and send it a heartbeat."""
        self._links[process] = link
        self._messages[process] = queue.SimpleQueue()
        for function in (self._read, self._beat):
            threading.Thread(target=function, args=(process, link), daemon=True).start()

    def _read(self, process: int, link: links.Link) -> None:
        while True:
            try:
                kind, content = link.receive()
            except TimeoutError:
                return self._lose(
                    f"process {process} has not answered for {self.place.timeout:g} s "
                    "(--process_timeout)"
                )
            except OSError:
                return self._lose(f"process {process} has died")
            if kind == links.END:
                return self._lose(content.decode())
            if kind != links.BEAT:
                self._messages[process].put(content)

    def _beat(self, process: int, link: links.Link) -> None:
        while not self._lost.wait(self.place.timeout / _BEATS):
            _tell([link], links.BEAT)

    def _lose(self, text: str) -> None:
        """End this process because another one has ended, unless it ends by itself."""
        with self._lock:
            if self._lost.is_set() or self._ending.is_set():
                return
            self._loss = f"{text}; {self._advice()}"
            self._lost.set()
        if self.place.number == 0:
            _tell(self._links.values(), links.END, text.encode())
        if self._ending.wait(_GRACE_SECONDS):
            return
        # No print: the main thread may hold the stream, or hang in a collective operation.
        # The first process may have a progress bar on the line.
        start = "" if self.place.number else "\n"
        os.write(2, f"{start}error: {self._loss}\n".encode())
        os._exit(1)

    def exchange(self, content: bytes) -> list[bytes]:
        """Return what every process has given, once all have called this."""
        if self.place.number:
            _tell(self._links.values(), links.PART, content)
            return links.unpack(self._messages[0].get())
        parts = [content, *self._parts_of_others()]
        _tell(self._links.values(), links.ALL, links.pack(parts))
        return parts

    def _parts_of_others(self) -> list[bytes]:
        """Return what every other process has sent to the first one."""
        return [self._messages[process].get() for process in range(1, self.place.size)]

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others of an error, and return it, or the loss that explains it.

        A process that is lost lets the collective operations of the others fail.
        """
        explained = isinstance(error, BadUse | RunFailed | OSError | KeyboardInterrupt)
        lost = not explained and self._lost.wait(_GRACE_SECONDS)
        with self._lock:
            self._ending.set()
        if lost:
            return RunFailed(self._loss)
        interrupted = isinstance(error, KeyboardInterrupt)
        cause = " ".join(first_line(error, None).split()) or type(error).__name__
        reason = "was interrupted" if interrupted else f"failed: {cause}"
        text = f"process {self.place.number} {reason}"
        _tell(self._links.values(), links.END, text.encode())
        return error

    def leave(self) -> None:
        """Wait until all processes have come to their end."""
        if self.place.number:
            self.exchange(b"")
        else:
            self._parts_of_others()
        with self._lock:
            self._ending.set()
        # Only now: a process that has the answer ends, which would else be a loss here.
        if not self.place.number:
            _tell(self._links.values(), links.ALL)


def difference(found: Mapping[int, Mapping[str, Any]], advice: str) -> str:
    """Return which values of a process differ from the first one's; "" if none."""
    first = found[0]
    for process, values in found.items():
        names = [
            name
            for name in {**first, **values}
            if repr(first.get(name)) != repr(values.get(name))
        ]
        if EXPERIMENT in names:
            names = [EXPERIMENT]
        if names:
            texts = [
                f"{name} is {first.get(name)!r} in process 0 and {values.get(name)!r} in "
                f"process {process}"
                for name in names
            ]
            return f"{', '.join(texts)}: {advice}"
    return ""


def _next_arrival(
    server: socket.socket, deadline: float, timeout: float
) -> _Arrival | None:
    """Return the next process that connects, None if it is none of a run."""
    server.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
        connection, _ = server.accept()
    except OSError:
        return None
    patience = min(timeout, _STRANGER_SECONDS)
    link = links.Link(connection, patience)
    try:
        _, content = link.receive(links.FIRST_LIMIT, patience)
        hello = json.loads(content)
        arrival = _Arrival(int(hello["process"]), dict(hello["values"]), link)
    # A stranger may send any JSON: infinite numbers, or lists nested too deeply to read.
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        link.close()
        return None
    connection.settimeout(timeout)
    return arrival


def _tell(receivers: Iterable[links.Link], kind: bytes, content: bytes = b"") -> None:
    for link in receivers:
        with contextlib.suppress(OSError):  # the reading thread reports a loss
            link.send(kind, content)


def _refuse(receivers: Iterable[links.Link], kind: bytes, text: str) -> None:
    """Tell processes that the run does not begin."""
    _tell(receivers, kind, text.encode())
    for link in receivers:
        link.close()
