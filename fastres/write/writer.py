"""A connection of the publisher: declares queues, publishes messages, waits for confirms."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqp.exceptions import NotFound, PreconditionFailed

from fastres.amqp.connector import drop, establish
from fastres.amqp.rabbitmq import session_of
from fastres.amqp.session import is_missing_queue
from fastres.amqp.window import Window
from fastres.errors import BrokerUnreachable, MessageRefused, QueueGone, ResultTooLarge, refusal
from fastres.logs import logger

if TYPE_CHECKING:
    from fastres.addresses import Address
    from fastres.amqp.publishing import Publishing
    from fastres.amqp.session import Session
    from fastres.write.publisher import Publisher

__all__ = ("SIZE_LIMIT", "Writer")

#: The number of declared queues that a connection remembers.
MAX_DECLARED = 10_000
#: Seconds after which a queue is declared again, which also keeps it from expiring.
DECLARED_FOR = 60.0
#: Seconds for a confirm while the broker reports an alarm (memory, disk).
BLOCKED_TIMEOUT = 300.0
#: Seconds before each retry after a quorum queue has refused a message: it may still be being created.
QUORUM_RETRIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
#: Why a confirm may take longer.
ALARM = "an alarm (memory, disk) makes it wait"
SILENCE = "it stands still, or lacks something that it does not tell of: file handles, disk, most of its nodes"
#: The size of the unconfirmed messages of one connection, in bytes, at most.
WINDOW_SIZE = 16 << 20
#: While messages are published, confirms are read after this many messages, or this many seconds.
POLL_EVERY, POLL_INTERVAL = 64, 0.1
#: The text of RabbitMQ's refusal: "message size 300 is larger than configured max size 200".
SIZE_LIMIT = re.compile(r"message size (\d+)\D+(\d+)")


class Writer:
    """A connection of the publisher, its window, and the queues that it has declared."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._addresses = publisher.addresses
        self.connection = publisher.connect()
        #: The exceptions of a broken connection.
        self.errors: tuple[type[BaseException], ...] = self.connection.connection_errors
        #: The exceptions of refused operations.
        self.refusals: tuple[type[Exception], ...] = self.connection.channel_errors
        #: The same, and the exceptions that fastres raises for them.
        self.verdicts: tuple[type[Exception], ...] = (*self.refusals, ResultTooLarge, QueueGone, MessageRefused)
        #: Unconfirmed messages, and when the last one was published, on the monotonic clock.
        self.window = Window(publisher.window, WINDOW_SIZE)
        self.published_at = 0.0
        self._polled_at = 0.0
        self._session: Session | None = None
        #: When each queue was declared, on the monotonic clock.
        self._declared: dict[str, float] = {}

    def connect(self) -> Session:
        if self._session is None:
            establish(self.connection)
            self._publisher.counts.connected("writer")
            self._session = session_of(self.connection)
            self._session.limit(self._publisher.confirm_timeout)
        return self._session

    def drop(self) -> None:
        """Drop a broken connection; :meth:`connect` opens a new one."""
        # First: delivery tags of another channel must not get into the window.
        self.window.lose()
        drop(self.connection)
        self.connection = self._publisher.connect()
        self._session = None
        self._declared.clear()

    def clear(self, address: Address) -> None:
        """Declare a queue if needed, and empty it."""
        self.connect().declare(self._addresses.queue(address))
        self.connect().purge(address.name)

    def publish(self, publishings: list[Publishing], confirm: bool) -> None:
        """Send messages, and wait for their confirms, or keep them until they are confirmed."""
        session = self.connect()
        if self.window:
            self._make_room(session)
        if not confirm:
            self._send(session, publishings)
        elif len(publishings) == 1:
            self._send_and_wait(session, publishings)
        else:
            try:
                self._send_and_wait(session, publishings)
            except PreconditionFailed:
                # Of several, one may be too large.
                for publishing in publishings:
                    self._send_and_wait(session, [publishing])

    def wait_for_confirms(self) -> None:
        """Wait until all sent messages are confirmed."""
        session = self.connect()
        while self.window:
            self._send_again(session)
            self._confirm(session, lambda: not self.window.unconfirmed)

    def _make_room(self, session: Session) -> None:
        """Read confirms at intervals; wait for them when too many are outstanding."""
        window, now = self.window, time.monotonic()
        if window.is_full():
            self._confirm(session, window.has_room)
        elif not window.unconfirmed % POLL_EVERY or now - self._polled_at > POLL_INTERVAL:
            self._polled_at = now
            session.poll()
        self._send_again(session)

    def _confirm(self, session: Session, enough: Callable[[], bool]) -> None:
        # The broker closed the channel because of an earlier message, not because of the one to send now.
        with contextlib.suppress(*self.refusals):
            self._wait(session, enough)

    def _send_again(self, session: Session) -> None:
        """Publish returned messages again, and messages of a closed channel or connection."""
        window = self.window
        if window.again:
            # If this is interrupted, messages may be sent twice, but none is lost.
            again = list(window.again)
            try:
                window.again.clear()
                for publishing in again:
                    self._declared.pop(publishing.routing_key, None)
                window.republished(again)
                self._send(session, again)
            except BaseException:
                window.again.extendleft(reversed(again))
                raise
        while window.suspects:
            publishing = window.suspects[0]
            try:
                window.suspects.popleft()
                self._send_and_wait(session, [publishing])
            except self.verdicts as exc:
                if isinstance(exc, NotFound) and not is_missing_queue(exc):
                    window.suspects.appendleft(publishing)
                    raise
                logger.error("A result is lost that nobody waited for: %s", refusal(exc, session.uri))
            except BaseException:
                window.suspects.appendleft(publishing)
                raise

    def _send(self, session: Session, publishings: list[Publishing]) -> None:
        addresses = [each.address for each in publishings if each.address and self._is_due(each.address)]
        queues = [self._addresses.queue(address) for address in dict.fromkeys(addresses)]
        try:
            session.publish(publishings, queues, self.window)
        except BaseException:
            self.window.withdraw(publishings)
            raise
        for address in addresses:
            self._remember(address)
        self.published_at = time.monotonic()

    def _send_and_wait(self, session: Session, publishings: list[Publishing]) -> None:
        """Send messages, and wait for their confirms.

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            fastres.MessageRefused: the broker has refused a message.
            fastres.QueueGone: there is no queue for a message, although it was declared twice.
        """
        window, left = self.window, publishings
        returned = 0
        # A quorum queue refuses messages while another connection declares it.
        pauses = iter(QUORUM_RETRIES if any(each.address and each.address.is_quorum for each in left) else ())
        # A queue may have been deleted or have expired since this connection declared it. The broker then returns the
        # message, which is sent again after another declaration.
        while returned < 2:
            try:
                self._send(session, left)
                self._wait(session, lambda: not window.unconfirmed)
                refused = set(map(id, window.suspects))
            except PreconditionFailed as exc:
                limit = SIZE_LIMIT.search(exc.reply_text or "")
                if limit is None or len(publishings) > 1:
                    raise
                raise _too_large(publishings[0], *limit.groups()) from exc
            finally:
                came_back = window.withdraw(left)
            if not came_back:
                return
            left = came_back
            if not refused.isdisjoint(map(id, came_back)):
                pause = next(pauses, None)
                if pause is None:
                    raise MessageRefused(
                        f"the broker {session.uri} has refused a message to {left[0].routing_key!r}: the queue is "
                        "full (a policy with max-length and reject-publish), or not there on enough nodes"
                    )
                time.sleep(pause)
                continue
            returned += 1
            for publishing in left:
                self._declared.pop(publishing.routing_key, None)
            window.republished(left)
        raise QueueGone(f"queue {left[0].routing_key!r} is deleted as often as it is declared")

    def _wait(self, session: Session, enough: Callable[[], bool]) -> None:
        start = time.monotonic()
        while True:
            try:
                session.wait_for_confirms(self.window, enough)
                return
            except socket.timeout as exc:
                seconds = time.monotonic() - start
                if session.is_blocked and seconds < BLOCKED_TIMEOUT:
                    continue
                why = ALARM if session.is_blocked else SILENCE
                raise BrokerUnreachable(
                    f"the broker {session.uri} has not taken messages for {seconds:.0f} seconds: {why}"
                ) from exc

    def _is_due(self, address: Address) -> bool:
        """Whether a queue needs a declaration, the first one or another."""
        declared = self._declared.get(address.name)
        if declared is None:
            return True
        expires = self._addresses.expires
        return time.monotonic() - declared > (min(DECLARED_FOR, expires / 4) if expires else DECLARED_FOR)

    def _remember(self, address: Address) -> None:
        # The queue of a single task is declared once only: the oldest entries are dropped first.
        self._declared.pop(address.name, None)
        self._declared[address.name] = time.monotonic()
        if len(self._declared) > MAX_DECLARED:
            del self._declared[next(iter(self._declared))]


def _too_large(publishing: Publishing, size: str, limit: str) -> ResultTooLarge:
    return ResultTooLarge(
        f"the result of task {publishing.message.correlation_id} makes a message of {size} bytes, "
        f"over the broker's limit of {limit} bytes (RabbitMQ's max_message_size): "
        "store large values elsewhere and return where they are, or raise the limit"
    )
