"""Polling the socket of the reading thread, which other threads can end."""

from __future__ import annotations

import contextlib
import select
import socket
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastres.amqp.rabbitmq import RabbitMQ

__all__ = ("Wakeup",)

#: While many results are awaited, a read waits for ``RESULT_SIZE`` bytes for each, up to ``MAX_READ``, for at most
#: ``GATHER_PER_RESULT`` seconds for each, up to ``MAX_GATHER``. Up to ``READ_AT_ONCE`` results are read as they arrive.
MAX_READ, RESULT_SIZE = 1 << 18, 200
MAX_GATHER, GATHER_PER_RESULT = 0.05, 5e-5
READ_AT_ONCE = 50


class Wakeup:
    """Ends the poll of the reading thread, by a socket pair that is made when it first polls."""

    def __init__(self) -> None:
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def wake(self) -> None:
        """End the poll of a reader, or the one that begins next."""
        if self._ends is not None:
            with contextlib.suppress(BlockingIOError):
                self._ends[1].send(b"\0")

    def close(self) -> None:
        ends, self._ends = self._ends, None
        for end in ends or ():
            end.close()

    def wait(self, session: RabbitMQ, timeout: Callable[[], float], awaited: Callable[[], int]) -> bool:
        """Wait for bytes of the broker, a timeout, or a wake-up. Returns: whether there are bytes.

        Args:
            timeout: returns the seconds. Called after the socket pair was made, so that no later wake-up is missed.
            awaited: returns how many results are waited for.
        """
        if session.buffered:
            return True
        wakeup, sock = self._reading_end(), session.socket
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        poller.register(wakeup, select.POLLIN)

        def poll(seconds: float) -> set[int]:
            return {fileno for fileno, _ in poller.poll(max(seconds, 0.0) * 1000)}

        seconds = timeout()
        ready = poll(seconds)
        count = awaited()
        if ready == {sock.fileno()} and count > READ_AT_ONCE:
            # A system call costs more than the messages that it brings, if they are few.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(count * RESULT_SIZE, MAX_READ))
            ready = poll(min(count * GATHER_PER_RESULT, MAX_GATHER, seconds)) | ready
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if wakeup.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wakeup.recv(4096)
        return sock.fileno() in ready

    def _reading_end(self) -> socket.socket:
        if self._ends is None:
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
                # A backend need not be closed; an open socket that is dropped would be complained about.
                weakref.finalize(self, end.close)
        return self._ends[0]
