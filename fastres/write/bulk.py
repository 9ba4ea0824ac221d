"""Publishes many messages over one channel, with confirms for windows of them."""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from fastres.amqp.connector import drop, establish, set_socket_options
from fastres.amqp.rabbitmq import RabbitMQ, session_of
from fastres.errors import BrokerUnreachable
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ("AT_ONCE", "Bulk")

#: Bytes to write in one system call.
AT_ONCE = 1 << 17
#: The number and the size, in bytes, of unconfirmed messages at most. They are kept, to be sent again.
DEPTH, SIZE = 20_000, 1 << 23
#: Seconds between two warnings that the broker accepts nothing.
WARNING_INTERVAL = 60.0


class Chunk(NamedTuple):
    """Messages that are written together, as frames."""

    #: How many messages were sent before them, and with them.
    before: int
    last: int
    frames: bytes


class Bulk:
    """Publishes messages that are encoded as frames; a context manager.

    Args:
        connection: a kombu connection to RabbitMQ. The caller closes it.
        confirm: use confirms. If False, messages that are lost with a connection are not noticed.
        confirm_timeout: seconds after which a silent broker is considered unreachable. No limit while it reports an
            alarm (memory, disk).
        policy: ``max_retries``, ``interval_start``, ``interval_step`` and ``interval_max`` of attempts to connect.
    """

    def __init__(self, connection: Any, confirm: bool, confirm_timeout: float, policy: Mapping[str, Any]) -> None:
        self.connection = connection
        self._confirm = confirm
        self._confirm_timeout = confirm_timeout
        self._policy = policy
        #: How many were written, and how many of the first ones the broker has answered for.
        self.written = 0
        self.answered = 0
        #: By their ``group_index``, why it did not keep them.
        self.refused: dict[int, str] = {}
        self._chunks: deque[Chunk] = deque()
        self._bytes = 0
        #: How many messages were sent before the first one on this channel.
        self._before = 0
        #: Answered for, out of order.
        self._apart: set[int] = set()
        self._number: int | None = None
        self.session: Any = None
        try:
            if not connection.connected:
                establish(connection)
            self._open()
        except connection.channel_errors:
            raise
        except connection.connection_errors as exc:
            self._reconnect(exc)

    def __enter__(self) -> Bulk:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            # The exception may have come in the middle of a frame.
            drop(self.connection)

    def _open(self) -> None:
        """Open a channel with the same number on each connection, because the frames contain the number."""
        self.session = session_of(self.connection)
        assert isinstance(self.session, RabbitMQ)
        set_socket_options(self.session.socket)
        with self.session.with_timeout(self._confirm_timeout):
            self.channel = self.connection.connection.channel(self._number)
            self._number = self.channel.channel_id
            if self._confirm:
                self.channel.confirm_select()
                for event, handle in (
                    ("basic_ack", self._on_ack),
                    ("basic_nack", self._on_nack),
                    ("basic_return", self._on_return),
                ):
                    self.channel.events[event].add(handle)

    @property
    def frame_max(self) -> int:
        return int(self.connection.connection.frame_max)

    def write(self, frames: bytes, count: int) -> None:
        """Send messages, and wait for confirms if too many are outstanding.

        Raises:
            fastres.BrokerUnreachable: the broker could not be reached within the policy.
            amqp.exceptions.ChannelError: the broker refuses to publish there.
        """
        chunk = Chunk(self.written, self.written + count, frames)
        self.written = chunk.last
        if self._confirm:
            self._chunks.append(chunk)
            self._bytes += len(frames)
        try:
            self._send(chunk)
        except self.connection.channel_errors:
            raise
        except self.connection.connection_errors as exc:
            self._reconnect(exc)
        if self._confirm and (self.written - self.answered >= DEPTH or self._bytes >= SIZE):
            # Confirms arrive many at a time.
            self.wait(lambda: self.written - self.answered <= DEPTH // 2 and self._bytes <= SIZE // 2)

    def finish(self) -> None:
        """Wait until all messages are confirmed, returned or refused. Raises: as :meth:`write`."""
        if self._confirm:
            self.wait(lambda: self.answered >= self.written)
        try:
            self.session.hand_back()
            with self.session.with_timeout(self._confirm_timeout):
                # The broker reads earlier messages before it replies to this.
                self.channel.close()
            self.session.hand_back()
        except self.connection.connection_errors as exc:
            drop(self.connection)
            if not self._confirm:
                raise self._gives_up(exc) from exc

    def wait(self, enough: Callable[[], bool]) -> None:
        """Read until ``enough()``. Raises as :meth:`write`."""
        while not enough():
            try:
                self._read(enough)
            except self.connection.channel_errors:
                raise
            except self.connection.connection_errors as exc:
                self._reconnect(exc)

    def _read(self, enough: Callable[[], bool]) -> None:
        """Read until ``enough()``. No time limit while the broker reports an alarm.

        Raises:
            fastres.BrokerUnreachable: the broker does not respond.
            Exception: one of the connection's errors.
        """
        complained = time.monotonic()
        while not enough():
            try:
                with self.session.with_timeout(self._confirm_timeout):
                    self.session.wait_on(self.channel, enough)
            except socket.timeout as exc:
                if exc.errno is not None:
                    # The operating system has closed the connection: the broker has read nothing for too long.
                    raise
                if not self.session.is_blocked:
                    raise BrokerUnreachable(
                        f"the broker {self.connection.as_uri()} has not confirmed a message for "
                        f"{self._confirm_timeout:.0f} seconds: {self._progress()}"
                    ) from exc
                if time.monotonic() - complained >= WARNING_INTERVAL:
                    complained = time.monotonic()
                    logger.warning(
                        "The broker %s takes no messages for now, being short of memory or disk: %s",
                        self.connection.as_uri(), self._progress(),
                    )  # fmt: skip

    def _send(self, chunk: Chunk) -> None:
        # If the broker reads nothing, the socket fills up in the middle of a frame.
        self._read(lambda: not self.session.is_blocked)
        with self.session.with_timeout(self._confirm_timeout):
            self.session.write(chunk.frames)
            self.session.poll()

    def _reconnect(self, exc: Exception) -> None:
        """Publish unconfirmed messages again, over a new connection."""
        policy = self._policy
        interval = policy.get("interval_start") or 0.0
        failures, answered = 0, self.answered
        while True:
            # An alarm of the broker does not count as a failed attempt.
            blocked = self.session is not None and self.session.is_blocked
            failures = 0 if self.answered > answered or blocked else failures + 1
            answered = self.answered
            most = policy.get("max_retries")
            drop(self.connection)
            # Nothing is known about alarms of the next connection.
            self.session = None
            if (self.written and not self._confirm) or (most is not None and failures > most):
                raise self._gives_up(exc) from exc
            logger.warning("Lost the connection to the broker while sending, trying again: %r", exc)
            time.sleep(interval)
            interval = min(interval + (policy.get("interval_step") or 0.0), policy.get("interval_max") or 1.0)
            try:
                establish(self.connection)
                self._open()
                self._apart.clear()
                self._before = self._chunks[0].before if self._chunks else self.written
                # These messages are published again, and confirmed then.
                self.refused = {place: why for place, why in self.refused.items() if place < self._before}
                for chunk in list(self._chunks):
                    self._send(chunk)
                return
            except self.connection.channel_errors:
                raise
            except self.connection.connection_errors as again:
                exc = again

    def _gives_up(self, exc: Exception) -> BrokerUnreachable:
        return BrokerUnreachable(f"cannot send to {self.connection.as_uri()}: {exc!r}; {self._progress()}")

    def _progress(self) -> str:
        confirmed = f"the broker has confirmed the first {self.answered}" if self._confirm else "none is confirmed"
        return f"{self.written} messages were written, {confirmed}"

    def _on_ack(self, tag: int, multiple: bool) -> None:
        number = tag + self._before
        if multiple:
            self.answered = max(self.answered, number)
        else:
            self._apart.add(number)
        while self.answered + 1 in self._apart:
            self._apart.discard(self.answered + 1)
            self.answered += 1
        if multiple and self._apart:
            self._apart = {each for each in self._apart if each > self.answered}
        while self._chunks and self._chunks[0].last <= self.answered:
            self._bytes -= len(self._chunks.popleft().frames)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        number = tag + self._before
        first = self.answered + 1 if multiple else number
        for each in range(first, number + 1):
            if each not in self._apart:
                # Messages are numbered from 1, places in a group from 0.
                self.refused.setdefault(each - 1, "the broker has refused it: its queue is full, or not available")
        self._on_ack(tag, multiple)

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: Any) -> None:
        place = message.headers["group_index"]
        where = f"exchange {exchange!r} with routing key {routing_key!r}" if exchange else f"queue {routing_key!r}"
        self.refused[int(place)] = f"no queue gets what is sent to {where}"
