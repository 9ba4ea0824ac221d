"""The consuming connection of a process: shared by its threads, kept alive over the broker's absences.

One of the threads that wait reads the socket for all of them; the others sleep until it has news, and take over
when it leaves. Whoever has something to say to the broker interrupts the reader.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Protocol, TypeVar

from kombu.exceptions import OperationalError
from kombu.utils.compat import detect_environment

from fastres.connections import abandon
from fastres.logs import logger
from fastres.transport import Native, dialect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.transport import Dialect

__all__ = ("Link", "Subscriber")

T = TypeVar("T")

#: Seconds that a read may last where it cannot be interrupted (gevent, eventlet, transports without a socket).
SLICE = 0.05
#: Messages that kombu reads in one go before they are handed on.
BATCH = 1000
#: Seconds that the rest of a TLS record may take to come.
RECORD_TIMEOUT = 1.0
#: How often an operation is tried again when the connection breaks under it.
ATTEMPTS = 5


class Subscriber(Protocol):
    """What consumes through a link."""

    def open(self, speak: Dialect) -> None:
        """Subscribe, after the connection was made or made again."""

    def flush(self) -> None:
        """Hand on what was read."""


class Link:
    """See the module.

    Args:
        connect: returns a kombu connection, not yet established.
        retry_policy: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max`` (seconds). A wait
            seeks a connection that was lost for as long as it lasts.
    """

    def __init__(self, connect: Callable[[], Any], retry_policy: dict[str, Any]) -> None:
        self._connect = connect
        self._retry_policy = retry_policy
        self._connection: Any = None
        self._speak: Dialect | None = None
        self._established = False
        self._subscribers: list[Subscriber] = []
        # _io: who talks to the broker. _reader: who reads for all. _news: a batch was handed on.
        self._io = threading.RLock()
        self._reader = threading.Lock()
        self._news = threading.Condition()
        self._count = threading.Lock()
        self._wanted = 0
        self._bell: tuple[socket.socket, socket.socket] | None = None

    def call(self, operation: Callable[[Dialect], T], deadline: float | None = None) -> T:
        """Do something with the broker, over a new connection if the present one breaks.

        Args:
            deadline: until when to seek a connection, on the monotonic clock; None: as ``retry_policy`` says.

        Raises:
            kombu.exceptions.OperationalError: there was no connection to be had.
        """
        with self.exclusively():
            for attempt in range(ATTEMPTS):
                speak = self._ensure(deadline)
                speak.hand_back()
                try:
                    return operation(speak)
                except self._connection.connection_errors as exc:
                    self._lost(exc)
                    if attempt == ATTEMPTS - 1:
                        raise OperationalError(f"the connection broke {ATTEMPTS} times: {exc}") from exc
        raise AssertionError("unreachable")

    def attempt(self, operation: Callable[[Dialect], object]) -> None:
        """Do something that only has a meaning on the present connection, if that is still there."""
        with self.exclusively():
            if self._connection is None:
                return
            try:
                self._speak.hand_back()  # type: ignore[union-attr]
                operation(self._speak)  # type: ignore[arg-type]
            except self._connection.channel_errors as exc:
                logger.warning("The broker closed a channel: %s", exc)
            except self._connection.connection_errors as exc:
                self._lost(exc)

    def subscribe(self, subscriber: Subscriber, deadline: float | None = None) -> None:
        """Open a subscriber, now and after each reconnection, until :meth:`unsubscribe`."""
        with self.exclusively():
            if self._connection is None:
                self._subscribers.append(subscriber)
                try:
                    self._ensure(deadline)
                except BaseException:
                    self._subscribers.remove(subscriber)
                    raise
            else:
                self.call(subscriber.open, deadline)
                self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber, farewell: Callable[[Dialect], None]) -> None:
        """Close a subscriber with a last word to the broker, if it is there to hear it."""
        with self.exclusively():
            self._subscribers.remove(subscriber)
            self.attempt(farewell)

    def read(self, timeout: float, done: Callable[[], bool], deadline: float | None) -> None:
        """Read what comes within ``timeout`` seconds, or let another thread do it until ``done()``.

        Returns after a batch, when interrupted, or when the time is over. ``deadline`` is that of :meth:`call`.
        """
        if not self._reader.acquire(blocking=False):
            with self._news:
                self._news.wait_for(lambda: done() or not self._reader.locked(), timeout)
            return
        try:
            self._step_aside()
            with self._io:
                # Between the last look and now another thread may have read it.
                if done():
                    return
                self._ensure(deadline)
                try:
                    self._drain(timeout)
                except self._connection.connection_errors as exc:
                    self._lost(exc)
        finally:
            self._reader.release()
            with self._news:
                self._news.notify_all()

    def reset(self) -> None:
        """Close the connection; the next use opens a new one."""
        with self.exclusively():
            if self._connection is not None:
                connection, self._connection, self._speak = self._connection, None, None
                connection.release()

    def abandon(self) -> None:
        """In a forked child: forget the parent's connection, without a word on it."""
        abandon(self._connection)
        for end in self._bell or ():
            end.close()
        self.__init__(self._connect, self._retry_policy)  # type: ignore[misc]

    # -- the connection

    def _ensure(self, deadline: float | None) -> Dialect:
        while self._connection is None:
            connection = self._establish(deadline)
            self._connection, self._speak = connection, dialect(connection)
            try:
                for subscriber in self._subscribers:
                    subscriber.open(self._speak)
            except connection.connection_errors as exc:
                self._lost(exc)
            else:
                self._established = True
        return self._speak  # type: ignore[return-value]

    def _establish(self, deadline: float | None) -> Any:
        policy = self._retry_policy
        interval = policy["interval_start"]
        attempt = 0
        connection = self._connect()
        while True:
            try:
                return connection.ensure_connection(
                    max_retries=max(1, len(connection.alt) - 1), interval_start=0, interval_step=0,
                    interval_max=0, reraise_as_library_errors=False,
                )  # fmt: skip
            except connection.recoverable_connection_errors as exc:
                attempt += 1
                left = None if deadline is None else deadline - time.monotonic()
                patient = self._established and deadline is not None
                given_up = not patient and attempt > policy["max_retries"]
                if given_up or (left is not None and left <= 0):
                    raise OperationalError(f"cannot reach the broker {connection.as_uri()}: {exc}") from exc
                logger.warning("Cannot reach the broker %s, trying again: %s", connection.as_uri(), exc)
                time.sleep(max(0.0, min(interval, left if left is not None else interval)))
                interval = min(interval + policy["interval_step"], policy["interval_max"])

    def _lost(self, exc: BaseException) -> None:
        logger.warning("Lost the connection to the broker, reconnecting: %r", exc)
        connection, self._connection, self._speak = self._connection, None, None
        # Nothing that goes wrong while a broken connection is dropped can be news.
        with contextlib.suppress(Exception):
            connection.collect()

    # -- who may use it

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Nobody else reads or writes meanwhile; a reader is interrupted."""
        with self._count:
            self._wanted += 1
            if self._bell is not None:
                with contextlib.suppress(BlockingIOError):
                    self._bell[1].send(b"\0")
        self._io.acquire()
        with self._count:
            self._wanted -= 1
        try:
            yield
        finally:
            self._io.release()

    def _step_aside(self) -> None:
        """Let those who ring go first: a lock is not a queue, and the reader comes back fast."""
        for _ in range(100):
            if not self._wanted:
                return
            time.sleep(0.0005)

    # -- reading

    def _drain(self, timeout: float) -> None:
        try:
            with contextlib.suppress(socket.timeout):
                if not isinstance(self._speak, Native):
                    self._connection.drain_events(timeout=min(timeout, SLICE))
                    for _ in range(BATCH):
                        self._connection.drain_events(timeout=0.0001)
                elif detect_environment() != "default":
                    self._speak.drain(min(timeout, SLICE))
                elif self._readable(self._speak, timeout):
                    # A TLS record that has begun to come is waited for, but not without an end.
                    self._speak.drain(RECORD_TIMEOUT)
        finally:
            for subscriber in list(self._subscribers):
                subscriber.flush()

    def _readable(self, speak: Native, timeout: float) -> bool:
        """Whether the broker has sent something, within ``timeout`` seconds or until the bell rings."""
        if speak.buffered:
            return True
        if self._bell is None:
            self._bell = socket.socketpair()
            for end in self._bell:
                end.setblocking(False)
                # A backend need not be closed; an open socket that is dropped would be complained about.
                weakref.finalize(self, end.close)
        bell, sock = self._bell[0], speak.socket
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        poller.register(bell, select.POLLIN)
        events = dict(poller.poll(timeout * 1000))
        if bell.fileno() in events:
            with contextlib.suppress(BlockingIOError):
                bell.recv(4096)
        return sock.fileno() in events
