"""Messages between the processes of a run over TCP, and a forwarded port."""

import ipaddress
import math
import socket
import struct
import threading
import time

_HEADER = struct.Struct("!cQ")  # kind and length of a message
_PIECE = 2**20  # bytes sent at once: each has the whole timeout
_RETRY_SECONDS = 0.05
BEAT, PART, ALL, END = b"b", b"p", b"a", b"e"
FIRST_LIMIT = 2**20  # bytes of the first message, which a stranger may have sent


class Link:
    """A connection to another process of the run."""

    def __init__(self, connection: socket.socket, timeout: float):
        """Take a connection; a peer that is silent for `timeout` seconds has failed."""
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._lock = threading.Lock()  # two threads send: messages, and the heartbeat

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """Send a message.

        Raises:
          OSError: the connection is lost.
        """
        with self._lock:
            self._connection.sendall(_HEADER.pack(kind, len(content)))
            for start in range(0, len(content), _PIECE):
                self._connection.sendall(content[start : start + _PIECE])

    def receive(
        self, limit: int | None = None, seconds: float = math.inf
    ) -> tuple[bytes, bytes]:
        """Return kind and content of the next message.

        Raises:
          OSError: the connection is lost, or its bytes are no message of at most `limit`
            bytes. TimeoutError: no byte came in time, or not all came within `seconds`.
        """
        deadline = time.monotonic() + seconds
        kind, length = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if kind not in (BEAT, PART, ALL, END) or (limit is not None and length > limit):
            raise ConnectionError("no message of a run")
        return kind, self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        content = bytearray()
        while len(content) < length:
            part = self._connection.recv(min(_PIECE, length - len(content)))
            if not part:
                raise ConnectionError("closed")
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
            content += part
        return bytes(content)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def pack(parts: list[bytes]) -> bytes:
    """Return byte strings as one, which `unpack` takes apart."""
    return b"".join(struct.pack("!Q", len(part)) + part for part in parts)


def unpack(content: bytes) -> list[bytes]:
    """Return the byte strings of `pack`."""
    parts, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("!Q", content, place)
        parts.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    return parts


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `port`: on loopback if `host` is a loopback address.

    A cluster may know a machine by a name that is no address of its own, so that another
    `host` means every address.

    Raises:
      OSError: the port is in use.
    """
    if is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def is_loopback(host: str) -> bool:
    """Return whether `host` is an address of this machine alone, or localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """Return an address as flags and JAX write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str) -> int:
    """Return a port that nobody uses."""
    with listen(host, 0) as server:
        return server.getsockname()[1]


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect as soon as the other side listens.

    Raises:
      OSError: it does not until `deadline`, of `time.monotonic`.
    """
    while True:
        remaining = max(deadline - time.monotonic(), _RETRY_SECONDS)
        try:
            return socket.create_connection((host, port), timeout=remaining)
        except OSError:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
        time.sleep(_RETRY_SECONDS)


def forward(host: str, port: int, timeout: float) -> int:
    """Forward a port of this machine to another one, and return its number.

    The near side of a connection stays open when the far side is lost: a JAX client whose
    connection to the first process closes aborts this process from C++, before any Python
    code can say which process is lost.
    """
    server = socket.create_server(("127.0.0.1", 0))
    _in_background(_accept, server, host, port, timeout)
    return server.getsockname()[1]


def _accept(server: socket.socket, host: str, port: int, timeout: float) -> None:
    while True:
        near, _ = server.accept()
        _in_background(_join, near, host, port, timeout)


def _join(near: socket.socket, host: str, port: int, timeout: float) -> None:
    try:
        far = connect(host, port, time.monotonic() + timeout)
    except OSError:
        near.close()  # the client tries again, or reports that it cannot connect
        return
    far.settimeout(None)
    _in_background(_copy, far, near)
    _copy(near, far)
    far.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until the source ends or the target is lost."""
    try:
        while part := source.recv(_PIECE):
            target.sendall(part)
    except OSError:
        pass


def _in_background(function, *arguments) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()
