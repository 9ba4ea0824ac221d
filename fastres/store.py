"""The write path: a result to its queue, confirmed by the broker."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, TypeVar
from weakref import WeakSet

from amqp.exceptions import PreconditionFailed
from kombu.utils.functional import retry_over_time

from fastres.connections import abandon, establish
from fastres.errors import BrokerUnreachable, QueueGone, ResultTooLarge, refusal
from fastres.logs import logger
from fastres.native import dialect
from fastres.transport import Post

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.addresses import Address, Addresses
    from fastres.transport import Dialect, Message

__all__ = ("Store",)

T = TypeVar("T")

#: Queues that a connection remembers to have declared.
DECLARED = 10_000
#: A declaration is made again after this many seconds at the latest: it also keeps a queue from expiring.
DECLARED_FOR = 60.0
#: Bodies from this size, in bytes, are confirmed whatever the option says: it is how their refusal is noticed.
LARGE = 1 << 20

#: Seconds that the broker may take to take in a message and to confirm it: an alarm of its memory, or of its disk,
#: holds all of them back until it is over.
CONFIRMED = 300.0

#: Seconds between two looks for a connection that its thread has lost.
LOST = 1.0

#: How RabbitMQ words the refusal: "message size 300 is larger than configured max size 200".
SIZE_LIMIT = re.compile(r"message size (\d+)\D+(\d+)")


class Letter(NamedTuple):
    """A message and where it is sent."""

    address: Address
    message: Message
    #: Whether to create the queue if it is not there.
    declare: bool


class Store:
    """Publishes results.

    Args:
        connect: returns a kombu connection, not yet established.
        addresses: the backend's addresses.
        retry_policy: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max``, and perhaps
            ``timeout`` (seconds).
        confirm: wait for the broker's confirm.
        limit: how many connections the threads of this process may open.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        addresses: Addresses,
        retry_policy: dict[str, Any],
        confirm: bool,
        limit: int,
    ) -> None:
        self._connect = connect
        self._addresses = addresses
        self._retry_policy = retry_policy
        self._confirm = confirm
        self._limit = limit
        self._idle: list[Writer] = []
        #: Those there are. One that an exception took from its thread is not counted for longer than it is held.
        self._writers: WeakSet[Writer] = WeakSet()
        self._returned = threading.Condition()
        self._gathered = threading.local()

    def publish(self, address: Address, message: Message, *, declare: bool) -> None:
        """Send a message to an address, and wait for the broker's confirm.

        Args:
            declare: create the queue if it is not there (a reply queue belongs to the one who waits at it).

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            fastres.BrokerUnreachable: the broker was not there for as long as ``retry_policy`` says.
        """
        letter = Letter(address, message, declare)
        together = getattr(self._gathered, "letters", None)
        if together is None:
            self.run(lambda writer: writer.publish([letter]))
        else:
            together.append(letter)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread publishes in here is sent at the end, in one write, with one wait for all confirms."""
        letters = self._gathered.letters = []
        try:
            yield
        finally:
            del self._gathered.letters
        if letters:
            self.run(lambda writer: writer.publish(letters))

    def run(self, operation: Callable[[Writer], T]) -> T:
        """Do something with a connection of this thread's own, and again if it breaks.

        Raises:
            fastres.AccessRefused: the user lacks a permission.
            fastres.BrokerUnreachable: the broker was not there for as long as ``retry_policy`` says.

        After an exception that may have come in the middle of a frame (a signal's, a killed greenlet's), the
        connection is not used again: the broker takes back what was read over it.
        """
        writer = self._take()
        try:
            try:
                result = operation(writer)
            except writer.errors as exc:
                result = self._again(writer, operation, exc)
        except BaseException as exc:
            if isinstance(exc, writer.refusals):
                self._put_back(writer)
                said = refusal(exc, writer.connection.as_uri())
                if said is exc:
                    raise
                raise said from exc
            if not isinstance(exc, ResultTooLarge):
                writer.drop()
            self._put_back(writer)
            raise
        self._put_back(writer)
        return result

    def _take(self) -> Writer:
        with self._returned:
            while True:
                if self._idle:
                    return self._idle.pop()
                if len(self._writers) < self._limit:
                    writer = Writer(self)
                    self._writers.add(writer)
                    return writer
                self._returned.wait(LOST)

    def _put_back(self, writer: Writer) -> None:
        with self._returned:
            self._idle.append(writer)
            self._returned.notify()

    def _again(self, writer: Writer, operation: Callable[[Writer], T], broken: BaseException) -> T:
        policy = self._retry_policy
        failed: BaseException | None = broken

        def attempt() -> T:
            # The first attempt was made before.
            nonlocal failed
            if failed is not None:
                exc, failed = failed, None
                raise exc
            return operation(writer)

        def on_error(exc: BaseException, intervals: Iterator[float], retries: int) -> float:
            logger.warning("Lost the connection to the broker while writing, trying again: %r", exc)
            writer.drop()
            return next(intervals)

        try:
            return retry_over_time(  # type: ignore[no-any-return]
                attempt, writer.errors, errback=on_error,
                max_retries=policy["max_retries"], interval_start=policy["interval_start"],
                interval_step=policy["interval_step"], interval_max=policy["interval_max"],
                timeout=policy.get("timeout"),
            )  # fmt: skip
        except writer.errors as exc:
            writer.drop()
            raise BrokerUnreachable(f"cannot write to {writer.connection.as_uri()}: {exc}") from exc

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._returned:
            idle, self._idle = self._idle, []
        for writer in idle:
            writer.drop()

    def abandon(self) -> None:
        """In a forked child: forget the parent's connections, without a word on them."""
        for writer in self._idle:
            abandon(writer.connection)
        self._idle = []
        self._writers = WeakSet()
        self._returned = threading.Condition()


class Writer:
    """A connection of the store, and what was declared on it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.connection = store._connect()
        #: What a connection breaks with.
        self.errors: tuple[type[BaseException], ...] = self.connection.connection_errors
        #: What the broker says no with, to an operation that has come to its end.
        self.refusals: tuple[type[Exception], ...] = self.connection.channel_errors
        self._speak: Dialect | None = None
        #: When each queue was declared, on the monotonic clock.
        self._declared: dict[str, float] = {}

    def connect(self) -> Dialect:
        if self._speak is None:
            establish(self.connection)
            self._speak = dialect(self.connection)
            self._speak.limit(CONFIRMED)
        return self._speak

    def drop(self) -> None:
        """Leave a connection that broke; :meth:`connect` makes a new one."""
        # Nothing that goes wrong while a broken connection is dropped can be news.
        with contextlib.suppress(Exception):
            self.connection.collect()
        self.connection = self._store._connect()
        self._speak = None
        self._declared.clear()

    def clear(self, address: Address) -> None:
        """Make sure that there is a queue, and that it is empty."""
        self.connect().declare(self._store._addresses.queue(address))
        self.connect().purge(address.name)

    def publish(self, letters: list[Letter]) -> None:
        speak = self.connect()
        confirm = speak.confirms and (
            self._store._confirm or any(len(letter.message.body) >= LARGE for letter in letters)
        )
        # A queue may have been deleted or have expired since this connection declared it: the broker then returns
        # the message, and it is sent again to a new one.
        for afresh in (False, True):
            posts = [self._post(letter, afresh, confirm) for letter in letters]
            try:
                returned = speak.publish(posts, confirm)
            except socket.timeout as exc:
                raise BrokerUnreachable(
                    f"the broker {speak.uri} has not taken a message to {letters[0].address.name!r} for "
                    f"{CONFIRMED:.0f} seconds: it stands still, or an alarm (memory, disk) makes it wait"
                ) from exc
            except PreconditionFailed as exc:
                if len(letters) == 1:
                    limit = SIZE_LIMIT.search(exc.reply_text or "")
                    if limit is None:
                        raise
                    raise _too_large(letters[0], *limit.groups()) from exc
                for letter in letters:
                    self.publish([letter])
                return
            for letter, post in zip(letters, posts):
                if post.queue is not None:
                    self._remember(letter.address)
            if not returned:
                return
            letters = [letter for letter in letters if letter.address.name in returned]
        raise QueueGone(f"queue {letters[0].address.name!r} is deleted as often as it is declared")

    def _post(self, letter: Letter, afresh: bool, confirm: bool) -> Post:
        address, message, declare = letter
        addresses = self._store._addresses
        queue = addresses.queue(address) if declare and (afresh or self._is_due(address)) else None
        return Post(message, addresses.exchange.name, address.name, queue, mandatory=declare and confirm)

    def _is_due(self, address: Address) -> bool:
        """Whether a queue is to be declared, for the first time or again."""
        declared = self._declared.get(address.name)
        if declared is None:
            return True
        expires = self._store._addresses.expires
        return time.monotonic() - declared > (min(DECLARED_FOR, expires / 4) if expires else DECLARED_FOR)

    def _remember(self, address: Address) -> None:
        # A lone task's queue is declared once and never again: the oldest go first.
        self._declared.pop(address.name, None)
        self._declared[address.name] = time.monotonic()
        if len(self._declared) > DECLARED:
            del self._declared[next(iter(self._declared))]


def _too_large(letter: Letter, size: str, limit: str) -> ResultTooLarge:
    return ResultTooLarge(
        f"the result of task {letter.message.correlation_id} makes a message of {size} bytes, "
        f"over the broker's limit of {limit} bytes (RabbitMQ's max_message_size): "
        "store large values elsewhere and return where they are, or raise the limit"
    )
