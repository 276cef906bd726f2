"""Links: TCP connections between any two ranks, for what a backend of mx.distributed can't do.

The ring backend has neither subgroups nor sends to ranks that aren't neighbours, NCCL has no sends at all. Here every
rank listens; whoever wants to send connects, and a thread at the receiving end puts what comes into a mailbox, so that
a send never waits for a receive and two ranks can send to each other at once. A connection that ends without a
farewell means that its rank is gone: all who wait then learn it at once.

A message is a header (JSON, its length in 4 bytes before it) and raw bytes. Only ranks that know the run's token, which
travels over the backend, are listened to; nothing that comes is ever executed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import DistributedError

_LENGTH = struct.Struct("!I")
_MAX_HEADER = 1 << 20
_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Message:
    """What came: a header and bytes."""

    header: dict[str, Any]
    data: bytearray


class Links:
    """The mailboxes of a rank and its connections to others.

    exchange: gives a text of every rank to all of them, in the order of the ranks.  host: where this rank listens, as
    others reach it.  on_lost: called from a thread with a rank whose connection ended without a farewell.

    Attribute machines: the name of each rank's.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        exchange: Callable[[str], list[str]],
        host: str,
        on_lost: Callable[[int], None] = lambda rank: None,
    ):
        self.rank, self.size, self._on_lost = rank, size, on_lost
        self._boxes: dict[tuple[int, str], queue.SimpleQueue[Message | None]] = {}
        self._lock = threading.Lock()
        self._out: dict[int, tuple[socket.socket, threading.Lock]] = {}
        self._closed = False
        self.lost: dict[int, str] = {}
        self._listener = socket.create_server(("", 0), backlog=max(size, 8))
        own = {
            "host": host, "machine": socket.gethostname(), "port": self._listener.getsockname()[1],
            "token": secrets.token_hex(_TOKEN_BYTES),
        }  # fmt: skip
        everyone = [json.loads(text) for text in exchange(json.dumps(own))]
        self._token = everyone[0]["token"].encode()
        local = own["machine"]
        self.machines = [one["machine"] for one in everyone]
        self._addresses = [
            ("127.0.0.1" if one["machine"] == local else one["host"], one["port"]) for one in everyone
        ]  # fmt: skip
        threading.Thread(target=self._accept, name="links", daemon=True).start()

    def send(self, to: int, channel: str, header: dict[str, Any], data: memoryview | bytes = b"") -> None:
        """Send to a rank; returns when the operating system has taken it. Raises DistributedError when it is gone."""
        text = json.dumps({**header, "channel": channel, "bytes": len(data)}).encode()
        try:
            connection, lock = self._connection(to)
            with lock:
                connection.sendall(_LENGTH.pack(len(text)) + text)
                if len(data):
                    connection.sendall(data)
        except OSError as error:
            raise DistributedError(
                f"rank {self.rank} could not send {header.get('what', channel)!r} to rank {to}: "
                f"{self.lost.get(to) or error.strerror or error}"
            ) from error

    def receive(self, source: int, channel: str, timeout: float, what: str) -> Message:
        """The next message from a rank on a channel.

        Raises DistributedError, naming both ranks and `what`, when none comes in time or the rank is gone.
        """
        box = self._box(source, channel)
        try:
            message = box.get(timeout=timeout)
        except queue.Empty:
            raise DistributedError(
                f"rank {self.rank} waited for {what!r} from rank {source}: nothing came within {timeout:g} s"
            ) from None
        if message is None:
            box.put(None)
            raise DistributedError(f"rank {self.rank} waited for {what!r} from rank {source}: {self.lost[source]}")
        return message

    def close(self) -> None:
        """Take leave of all others and close everything."""
        if self._closed:
            return
        self._closed = True
        for to in list(self._out):
            with contextlib.suppress(DistributedError):
                self.send(to, "", {"farewell": True})
        for connection, _ in self._out.values():
            connection.close()
        self._listener.close()

    def pending(self, source: int, channel: str) -> Message | None:
        """The next message from a rank on a channel if there is one; never waits."""
        try:
            return self._box(source, channel).get_nowait()
        except queue.Empty:
            return None

    def _box(self, source: int, channel: str) -> queue.SimpleQueue[Message | None]:
        with self._lock:
            box = self._boxes.get((source, channel))
            if box is None:
                box = self._boxes[source, channel] = queue.SimpleQueue()
                if source in self.lost:
                    box.put(None)
            return box

    def _connection(self, to: int) -> tuple[socket.socket, threading.Lock]:
        with self._lock:
            if to not in self._out:
                connection = socket.create_connection(self._addresses[to], timeout=30)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._token + _LENGTH.pack(self.rank))
                self._out[to] = connection, threading.Lock()
            return self._out[to]

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), name="link", daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        source = None
        try:
            token = _exactly(connection, len(self._token))
            (source,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
            if not hmac.compare_digest(bytes(token), self._token) or source >= self.size:
                connection.close()
                return
            while True:
                (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
                if length > _MAX_HEADER:
                    raise OSError("a header of impossible length")
                header = json.loads(_exactly(connection, length))
                if header.get("farewell"):
                    self._lose(source, "it has finished", expected=True)
                    return
                self._box(source, header["channel"]).put(Message(header, _exactly(connection, header["bytes"])))
        except (OSError, ValueError, KeyError):
            if source is not None and not self._closed:
                self._lose(source, "it is gone, its connection closed")
        finally:
            connection.close()

    def _lose(self, source: int, why: str, expected: bool = False) -> None:
        with self._lock:
            if source in self.lost:
                return
            self.lost[source] = why
            for (rank, _), box in self._boxes.items():
                if rank == source:
                    box.put(None)
        if not expected:
            self._on_lost(source)


def _exactly(connection: socket.socket, count: int) -> bytearray:
    """The next `count` bytes. Raises OSError when the connection ends before."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = connection.recv_into(view[done:], min(count - done, 1 << 20))
        if not got:
            raise OSError("the connection ended")
        done += got
    return data


def own_address(listed: str | None) -> str:
    """The address at which other machines reach this one: the listed one, else that of the default route."""
    if listed:
        return listed
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # no packet is sent: this only asks for the route (RFC 5737 address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
