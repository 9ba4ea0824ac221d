"""Asks joiners about open chords, through the shards that they consume."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import amqp
import msgspec
from kombu.utils.uuid import uuid

from fastres.amqp.connector import abandon, drop, establish
from fastres.amqp.rabbitmq import session_of
from fastres.chords.events import CONTENT_TYPE, Event, write_event
from fastres.chords.status import Open, OpenChord, ShardStatus

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Asker",)

T = TypeVar("T")

#: Seconds between two looks for an answer.
INTERVAL = 0.01
#: Seconds that the broker may take to answer, at least.
LEAST_LIMIT = 5.0


class Asker:
    """Asks the joiners of an application, over a connection that it keeps.

    Args:
        backend: the backend of the chords.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._connection: Any = None
        #: Closes the connection of a backend that is dropped without being closed.
        self._finalizer: Any = None
        self._lock = threading.Lock()

    def status(self, timeout: float) -> list[ShardStatus]:
        """The status of all shards. Waits for the answer of each joiner for ``timeout`` seconds."""
        shards = range(self._backend.options.chord_shards)
        return self._over(lambda session: [self._status(session, number, timeout) for number in shards])

    def chord(self, chord_id: str, timeout: float) -> OpenChord | None:
        """The status of a chord; None: its joiner does not know the chord, or there is no joiner."""
        number = self._backend.chords.shard(chord_id)
        body = self._over(lambda session: self._ask(session, number, timeout, Event(about=chord_id))[1])
        try:
            return None if body is None else msgspec.json.decode(body, type=OpenChord)
        except msgspec.ValidationError:
            # Null, or the answer of a joiner that is older than this question.
            return None

    def close(self) -> None:
        # A question that is under way keeps the connection, which is closed with this object.
        if self._lock.acquire(blocking=False):
            try:
                self._drop(broken=False)
            finally:
                self._lock.release()

    def abandon(self) -> None:
        """In a forked child: leave the parent's connection alone."""
        if self._connection is not None:
            self._finalizer.detach()
            abandon(self._connection)
        self._connection, self._lock = None, threading.Lock()

    def _over(self, operation: Callable[[Any], T]) -> T:
        if not self._lock.acquire(blocking=False):
            # Another thread asks, or a signal handler has interrupted this one while it asked.
            with contextlib.closing(Asker(self._backend)) as other:
                return other._over(operation)
        try:
            if self._connection is not None:
                broken = (*self._connection.connection_errors, OSError)
                # It may have broken since the last question: the broker closes a connection without heartbeats.
                with contextlib.suppress(*broken):
                    return self._try(operation)
            return self._try(operation)
        finally:
            self._lock.release()

    def _try(self, operation: Callable[[Any], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._backend.connector.open()
                self._finalizer = weakref.finalize(self, drop, self._connection)
                self._finalizer.atexit = False
                establish(self._connection)
            return operation(session_of(self._connection))
        except BaseException:
            self._drop()
            raise

    def _drop(self, broken: bool = True) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._finalizer.detach()
            drop(connection, broken)

    def _status(self, session: Any, number: int, timeout: float) -> ShardStatus:
        status, body = self._ask(session, number, timeout, Event())
        if body is not None:
            status.open = msgspec.json.decode(body, type=Open)
        return status

    def _ask(self, session: Any, number: int, timeout: float, question: Event) -> tuple[ShardStatus, bytes | None]:
        """Ask the joiner of a shard. Returns the broker's part of the status, and the answer."""
        address = self._backend.addresses.chords(number)
        # A broker that does not respond is not waited for without an end.
        session.limit(max(timeout, LEAST_LIMIT))
        state = session.declare(self._backend.addresses.queue(address))
        status = ShardStatus(address.name, state.consumers, state.messages, None)
        if not state.consumers:
            return status, None
        channel = session.channel()
        question.ask = f"{address.name}.{uuid()}"
        channel.queue_declare(question.ask, exclusive=True)
        message = amqp.Message(write_event(question), content_type=CONTENT_TYPE)
        channel.basic_publish(message, "", address.name)
        end = time.monotonic() + timeout
        answer = None
        while answer is None and time.monotonic() < end:
            got = channel.basic_get(question.ask, no_ack=True)
            if got is None:
                time.sleep(INTERVAL)
            else:
                answer = got.body if isinstance(got.body, bytes) else got.body.encode()
        channel.queue_delete(question.ask)
        channel.close()
        return status, answer
