"""The write path: a result to its queue, confirmed by the broker."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from amqp.exceptions import PreconditionFailed
from kombu.exceptions import OperationalError
from kombu.utils.functional import LRUCache, retry_over_time

from fastres.connections import abandon, establish
from fastres.errors import ResultTooLarge
from fastres.logs import logger
from fastres.transport import dialect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.addresses import Address, Addresses
    from fastres.transport import Dialect

__all__ = ("Store",)

T = TypeVar("T")

#: Queues that a connection remembers to have declared.
DECLARED = 10_000
#: A declaration is made again after this many seconds at the latest: it also keeps a queue from expiring.
DECLARED_FOR = 60.0
#: Bodies from this size, in bytes, are confirmed whatever the option says: it is how their refusal is noticed.
LARGE = 1 << 20

#: How RabbitMQ words the refusal: "message size 300 is larger than configured max size 200".
SIZE_LIMIT = re.compile(r"message size (\d+)\D+(\d+)")


class Store:
    """Publishes results.

    Args:
        connect: returns a kombu connection, not yet established.
        addresses: the backend's addresses.
        producer_class: a subclass of ``kombu.Producer``.
        retry_policy: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max`` (seconds).
        confirm: wait for the broker's confirm.
        limit: how many connections the threads of this process may open.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        addresses: Addresses,
        producer_class: Any,
        retry_policy: dict[str, Any],
        confirm: bool,
        limit: int,
    ) -> None:
        self._connect = connect
        self._addresses = addresses
        self._producer_class = producer_class
        self._retry_policy = retry_policy
        self._confirm = confirm
        self._limit = limit
        self._idle: list[Writer] = []
        self._slots = threading.BoundedSemaphore(limit)

    def publish(self, address: Address, body: bytes | str, *, declare: bool, **properties: Any) -> None:
        """Send a message to an address, and wait for the broker's confirm.

        Args:
            body: encoded already.
            declare: create the queue if it is not there (a reply queue belongs to the one who waits at it).
            properties: of ``kombu.Producer.publish``.

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            kombu.exceptions.OperationalError: the broker was not there for as long as ``retry_policy`` says.
        """
        self.run(lambda writer: writer.publish(address, body, declare, properties))

    def run(self, operation: Callable[[Writer], T]) -> T:
        """Do something with a connection of this thread's own, and again if it breaks."""
        with self._writer() as writer:
            policy = self._retry_policy

            def attempt() -> T:
                writer.connect()
                return operation(writer)

            def on_error(exc: BaseException, intervals: Iterator[float], retries: int) -> float:
                logger.warning("Lost the connection to the broker while writing, trying again: %r", exc)
                writer.drop()
                return next(intervals)

            errors = writer.connection.recoverable_connection_errors
            try:
                return retry_over_time(  # type: ignore[no-any-return]
                    attempt, errors, errback=on_error,
                    max_retries=policy["max_retries"], interval_start=policy["interval_start"],
                    interval_step=policy["interval_step"], interval_max=policy["interval_max"],
                )  # fmt: skip
            except errors as exc:
                writer.drop()
                raise OperationalError(f"cannot write to {writer.connection.as_uri()}: {exc}") from exc

    @contextlib.contextmanager
    def _writer(self) -> Iterator[Writer]:
        with self._slots:
            writer = self._idle.pop() if self._idle else Writer(self)
            try:
                yield writer
            finally:
                self._idle.append(writer)

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().drop()

    def abandon(self) -> None:
        """In a forked child: forget the parent's connections, without a word on them."""
        for writer in self._idle:
            abandon(writer.connection)
        self._idle = []
        self._slots = threading.BoundedSemaphore(self._limit)


class Writer:
    """A connection of the store, and what was declared on it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.connection = store._connect()
        self._speak: Dialect | None = None
        self._channels: dict[bool, Any] = {}
        self._returned: list[Any] = []
        self._declared = LRUCache(limit=DECLARED)

    def connect(self) -> Dialect:
        if self._speak is None:
            establish(self.connection)
            self._speak = dialect(self.connection)
        return self._speak

    def drop(self) -> None:
        """Leave a connection that broke; :meth:`connect` makes a new one."""
        # Nothing that goes wrong while a broken connection is dropped can be news.
        with contextlib.suppress(Exception):
            self.connection.collect()
        self.connection = self._store._connect()
        self._speak = None
        self._channels.clear()
        self._declared.clear()

    def declare(self, address: Address, afresh: bool = False) -> None:
        known = self._declared.get(address.name)
        expires = self._store._addresses.expires
        lifetime = DECLARED_FOR if not expires else min(DECLARED_FOR, expires / 4)
        now = time.monotonic()
        if afresh or known is None or now - known > lifetime:
            self.connect().declare(self._store._addresses.queue(address))
            self._declared[address.name] = now

    def purge(self, address: Address) -> None:
        self.connect().purge(address.name)

    def publish(self, address: Address, body: bytes | str, declare: bool, properties: dict[str, Any]) -> None:
        if declare:
            self.declare(address)
        # A queue may have been deleted or have expired since this connection declared it: the broker then returns
        # the message, and it is sent again to a new one.
        for afresh in (False, True):
            if afresh:
                self.declare(address, afresh=True)
            self._returned.clear()
            self._send(address, body, mandatory=declare, **properties)
            if not self._returned:
                return
        raise OperationalError(f"queue {address.name!r} is deleted as often as it is declared")

    def _send(self, address: Address, body: bytes | str, mandatory: bool, **properties: Any) -> None:
        confirm = self.connect().confirms and (self._store._confirm or len(body) >= LARGE)
        channel = self._channel(confirm)
        producer = self._store._producer_class(channel, auto_declare=False)
        try:
            producer.publish(
                body, exchange=self._store._addresses.exchange, routing_key=address.name,
                mandatory=mandatory and confirm, **properties,
            )  # fmt: skip
        except PreconditionFailed as exc:
            limit = SIZE_LIMIT.search(exc.reply_text or "")
            if limit is None:
                raise
            raise ResultTooLarge(
                f"the result of task {properties.get('correlation_id')} makes a message of {limit[1]} bytes, "
                f"over the broker's limit of {limit[2]} bytes (RabbitMQ's max_message_size): "
                "store large values elsewhere and return where they are, or raise the limit"
            ) from exc

    def _channel(self, confirm: bool) -> Any:
        channel = self._channels.get(confirm)
        if channel is None or not getattr(channel, "is_open", True):
            channel = self._channels[confirm] = self.connect().channel()
            if confirm:
                channel.basic_publish = channel.basic_publish_confirm
                channel.events["basic_return"].add(self._on_return)
        return channel

    def _on_return(self, exc: BaseException, exchange: str, routing_key: str, message: Any) -> None:
        self._returned.append(routing_key)
