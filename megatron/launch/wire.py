"""Messages between the launchers of a run's hosts: JSON objects, one a line, over one TCP connection each.

Knows neither ranks nor jobs. Invariant: a connection is used only after the other side has proved to know the job's
token, so that a stranger's service on the same port, or another job's launcher, is never taken for ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
# A host that loses its power or its network says nothing: after about 45 s without an answer the kernel gives it up.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6), ("TCP_USER_TIMEOUT", 45_000))
_HANDSHAKE_S = 10.0
# Linux: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915
# Ports below the range from which systems hand out ports by themselves.
_FIRST_PORT, _LAST_PORT, _NUM_CANDIDATES = 20000, 32000, 24


def candidate_ports() -> tuple[int, ...]:
    """Ports at random: the first host's launcher takes the first that is free there, the others try them in turn."""
    return tuple(secrets.randbelow(_LAST_PORT - _FIRST_PORT) + _FIRST_PORT for _ in range(_NUM_CANDIDATES))


class Channel:
    """One connection. `send` may be called from several threads, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> bool:
        """Returns whether the message could be handed over; a broken connection also ends `receive`."""
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._connection.sendall(line)
            return True
        except OSError:
            return False

    def receive(self) -> Message | None:
        """The next message, or None when the connection is over."""
        try:
            line = self._reader.readline()
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def set_timeout(self, seconds: float | None) -> None:
        """How long `receive` and `send` may wait."""
        self._connection.settimeout(seconds)

    def finish(self) -> None:
        """Say that nothing more is sent; the other side's `receive` then ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the connection, whoever waits on it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._connection.close()

    @property
    def local_address(self) -> str:
        """The address of this host that the other one sees."""
        return str(self._connection.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface of this host with an IPv4 address; None if it is not found, or never leaves the host."""
    address = address.removeprefix("::ffff:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address and not address.startswith("127."):
                    return name
    return None


def listen(ports: Iterable[int]) -> socket.socket:
    """A listening socket on the first free port. Raises: OSError if none is."""
    failure: OSError = OSError("no port was named")
    for port in ports:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            failure = error
    raise failure


def welcome(connection: socket.socket, token: str) -> tuple[Channel, Message] | None:
    """The other side of a new connection, if it knows the token and says hello in time; else None."""
    channel = Channel(connection)
    channel.set_timeout(_HANDSHAKE_S)
    hello = channel.receive()
    if hello is None or not hmac.compare_digest(str(hello.pop("token", "")).encode(), token.encode()):
        channel.close()
        return None
    channel.send({"welcome": True})
    channel.set_timeout(None)
    return channel, hello


def connect(host: str, ports: Iterable[int], token: str, hello: Message, timeout_s: float) -> Channel | None:
    """A connection to the listener with this token at one of the ports, or None if there is none in time."""
    deadline = time.monotonic() + timeout_s
    ports = tuple(ports)
    while True:
        for port in ports:
            with contextlib.suppress(OSError):
                channel = Channel(socket.create_connection((host, port), timeout=5.0))
                channel.set_timeout(_HANDSHAKE_S)
                if channel.send({"token": token, **hello}) and (channel.receive() or {}).get("welcome"):
                    channel.set_timeout(None)
                    return channel
                channel.close()
            if time.monotonic() > deadline:
                return None
        time.sleep(0.1)
