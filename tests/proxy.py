"""A TCP proxy on 127.0.0.1 that cuts, stalls or refuses the connections through it, and keeps what it forwards."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
#: On close, the kernel sends a reset and drops unsent bytes, as if the network were lost.
RESET = struct.pack("ii", 1, 0)
#: AMQP's frame of it.
HEARTBEAT = b"\x08\0\0\0\0\0\0\xce"


class Proxy:
    """Forwards connections to `port` to another port of this machine; a context manager.

    Args:
        cuts: after how many bytes from the server each connection is cut; those that come after it are not.
    """

    def __init__(self, target: int, cuts: tuple[int, ...] = ()) -> None:
        self._target = target
        self._cuts = list(cuts)
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self.cut_count = 0
        #: The bytes of clients and of the server.
        self.asked, self.answered = bytearray(), bytearray()
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._clients: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._refusing = False

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.resume()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Break every open connection."""
        for end in list(self._open):
            self._close(end)

    def refuse(self, refusing: bool = True) -> None:
        """Break every open connection, and each new one at once, until called with False."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def stall(self, heartbeats: bool = False) -> None:
        """Forward nothing any more, except heartbeats of the broker if asked: connections hang."""
        self._flowing.clear()
        if heartbeats:
            self._run(self._beat)

    def _beat(self) -> None:
        while not self._flowing.wait(0.1):
            for client in list(self._clients & self._open):
                with contextlib.suppress(OSError):
                    client.sendall(HEARTBEAT)

    def resume(self) -> None:
        self._flowing.set()

    def _run(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                if self._refusing:
                    self._close(client)
                    continue
                try:
                    server = socket.create_connection((HOST, self._target))
                except OSError:
                    self._close(client)
                    continue
                limit = self._cuts.pop(0) if self._cuts else None
                self._open |= {client, server}
                self._clients.add(client)
                self._run(self._forward, client, server, self.asked, None)
                self._run(self._forward, server, client, self.answered, limit)

    def _forward(self, source: socket.socket, sink: socket.socket, seen: bytearray, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16 if limit is None else min(limit, 1 << 16)):
                self._flowing.wait()
                seen += data
                sink.sendall(data)
                if limit is not None:
                    limit -= len(data)
                    if limit <= 0:
                        self.cut_count += 1
                        break
        self._close(source)
        self._close(sink)

    def _close(self, end: socket.socket) -> None:
        self._open.discard(end)
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            # Wakes the thread that reads it, which close() alone does not.
            end.shutdown(socket.SHUT_RDWR)
        end.close()
