"""Publishes: a declaration where one is due and a message are one write, confirmed by the broker."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from amqp.exceptions import NotFound, PreconditionFailed
from kombu.utils.functional import retry_over_time
from kombu.utils.uuid import uuid

from fastres.amqp.connector import abandon, drop, establish
from fastres.amqp.publishing import Message, Publishing
from fastres.amqp.rabbitmq import session_of
from fastres.amqp.session import says_no_queue
from fastres.amqp.window import Window
from fastres.errors import BrokerUnreachable, MessageRefused, QueueGone, ResultTooLarge, refusal
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.addresses import Address, Addresses
    from fastres.amqp.session import Session
    from fastres.counts import Counts
    from fastres.options import Options

__all__ = ("Publisher",)

T = TypeVar("T")

#: Queues that a connection remembers to have declared.
DECLARED = 10_000
#: A declaration is made again after this many seconds at the latest: it also keeps a queue from expiring.
DECLARED_FOR = 60.0
#: Bodies from this size, in bytes, are confirmed whatever the option says: it is how their refusal is noticed.
LARGE = 1 << 20

#: Seconds that the broker may take for it in all once it has said that an alarm of its memory, or of its disk,
#: holds everything back.
BLOCKED = 300.0
#: Seconds after each time that a quorum queue has refused a message, which may be because it is not yet made.
MADE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

#: Why it may take longer.
ALARM = "an alarm (memory, disk) makes it wait"
SILENCE = "it stands still, or lacks something that it does not tell of: file handles, disk, most of its nodes"

#: Bytes of messages that may wait for their confirm on one connection.
WINDOW_SIZE = 16 << 20
#: How often the confirms that have come are read while more is published: after how many messages, and seconds.
POLL_EVERY, POLLED = 64, 0.1
#: Seconds between two looks at what is not confirmed, and since something was added to it.
WATCHED_EVERY = 0.2

#: Seconds between two looks for a connection that its thread has lost.
LOST = 1.0

#: How RabbitMQ words the refusal: "message size 300 is larger than configured max size 200".
SIZE_LIMIT = re.compile(r"message size (\d+)\D+(\d+)")


class Publisher:
    """Publishes results and events, over a few connections that the threads of a process share.

    Args:
        connect: returns a kombu connection, not yet established.
        addresses: the backend's addresses.
        retry_policy: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max``, and perhaps
            ``timeout`` (seconds).
        options: of the backend. With ``confirm`` each message waits for the broker's confirm; otherwise messages
            are kept until it has come, and sent again when a connection breaks: up to ``confirm_window`` of them,
            or ``WINDOW_SIZE`` bytes, for each connection.
        limit: how many connections the threads of this process may open.
        counts: what it counts.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        addresses: Addresses,
        retry_policy: dict[str, Any],
        options: Options,
        limit: int,
        counts: Counts,
    ) -> None:
        self.connect = connect
        self.counts = counts
        self.addresses = addresses
        self.confirm = options.confirm
        self.window = options.confirm_window
        self.confirm_timeout = options.confirm_timeout
        self._retry_policy = retry_policy
        self._limit = limit
        self._gathered = threading.local()
        self.abandon()

    def abandon(self) -> None:
        """In a forked child: forget the parent's connections, without a word on them."""
        for writer in getattr(self, "_idle", ()):
            abandon(writer.connection)
        self._idle: list[Writer] = []
        #: Those there are. One that an exception took from its thread is not counted for longer than it is held;
        #: what it had not got confirmed is in one of the windows.
        self._writers: WeakSet[Writer] = WeakSet()
        self._windows: list[Window] = []
        self._returned = threading.Condition()
        self._waiting = threading.RLock()
        #: Waits for confirms when nobody publishes any more.
        self._watcher: threading.Thread | None = None

    def publish(self, address: Address, message: Message, *, declare: bool) -> None:
        """Send a message to an address, and wait for the broker's confirm if that is asked for.

        Args:
            declare: create the queue if it is not there (a reply queue belongs to the one who waits at it).

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            fastres.BrokerUnreachable: the broker was not there for as long as ``retry_policy`` says.
        """
        publishing = Publishing(message, self.addresses.exchange.name, address.name, address if declare else None)
        together = getattr(self._gathered, "publishings", None)
        if together is None:
            self._publish([publishing])
        else:
            together.append(publishing)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread publishes in here is sent at the end, in one write, with one wait for all confirms."""
        publishings = self._gathered.publishings = []
        try:
            yield
        finally:
            del self._gathered.publishings
        if publishings:
            self._publish(publishings)

    def _publish(self, publishings: list[Publishing]) -> None:
        # A large one is confirmed at once in any case: it is how its refusal is noticed.
        confirm = self.confirm or any(len(publishing.message.body) >= LARGE for publishing in publishings)
        start = time.perf_counter()
        self.run(lambda writer: writer.publish(publishings, confirm))
        self.counts.published += len(publishings)
        if confirm:
            self.counts.confirms.add(time.perf_counter() - start)
        else:
            self._watch_confirms()

    def unconfirmed(self) -> int:
        """How many messages wait for the broker's confirm."""
        return sum(len(window) for window in list(self._windows))

    # -- what is not confirmed yet

    def check(self, address: Address | None) -> None:
        """Declare the queue of an address, and publish a message that is for nobody.

        Raises: what :meth:`publish` does.
        """
        nobody = Message(b"", "application/octet-stream", "binary", "", 1, {})
        nowhere = f"{self.addresses.prefix}.nobody.{uuid()}"
        publishing = Publishing(nobody, self.addresses.exchange.name, nowhere)

        def check(writer: Writer) -> None:
            if address is not None:
                writer.connect().declare(self.addresses.queue(address))
            writer.publish([publishing], confirm=True)

        self.run(check)

    def wait_for_confirms(self, seconds: float = 0.0) -> None:
        """Wait until the broker has confirmed what was published, for ``retry_policy`` if it is away.

        Args:
            seconds: only what has not been added to for so long.

        What nobody waited for is an error of nobody's: it is logged.
        """
        with self._waiting:
            self._confirm(time.monotonic() - seconds)

    def _confirm(self, quiet: float) -> None:
        with self._returned:
            writers = [writer for writer in self._idle if writer.window and writer.published_at <= quiet]
            self._idle = [writer for writer in self._idle if writer not in writers]
            held = {id(writer.window) for writer in self._writers}
            orphans = [window for window in self._windows if window and id(window) not in held]
            if orphans:
                # A signal has taken a thread from its writer, and the writer is no more.
                writers.append(self._new_writer())
                held.add(id(writers[-1].window))
                for window in orphans:
                    writers[-1].window.adopt(window)
            self._windows = [window for window in self._windows if window or id(window) in held]
        for writer in writers:
            try:
                self._run(writer, Writer.wait_for_confirms)
            except Exception as exc:
                logger.error(
                    "%d messages with results are kept, and sent again: the broker has not confirmed them: %r",
                    len(writer.window),
                    exc,
                )

    def _watch_confirms(self) -> None:
        # The watcher looks for the last time, and ends, under this lock.
        with self._returned:
            if self._watcher is not None:
                return
            watcher = threading.Thread(target=self._keep_watch, name="fastres-confirms", daemon=True)
            self._watcher = watcher
        try:
            watcher.start()
        except RuntimeError:
            # The interpreter ends, and starts no thread any more.
            self._watcher = None
            self.wait_for_confirms()

    def _keep_watch(self) -> None:
        """Until everything is confirmed: what its thread does not add to any more is waited for here."""
        while True:
            time.sleep(WATCHED_EVERY)
            with self._returned:
                if self._watcher is not threading.current_thread():
                    return
                if not any(self._windows):
                    self._watcher = None
                    return
            self.wait_for_confirms(WATCHED_EVERY)

    # -- connections

    def run(self, operation: Callable[[Writer], T]) -> T:
        """Do something with a connection of this thread's own, and again if it breaks.

        Raises:
            fastres.AccessRefused: the user lacks a permission.
            fastres.BrokerUnreachable: the broker was not there for as long as ``retry_policy`` says.

        After an exception that may have come in the middle of a frame (a signal's, a killed greenlet's), the
        connection is not used again: the broker takes back what was read over it.
        """
        return self._run(self._take(), operation)

    def _run(self, writer: Writer, operation: Callable[[Writer], T]) -> T:
        try:
            try:
                result = _perform(operation, writer)
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
                    return self._new_writer()
                self._returned.wait(LOST)

    def _new_writer(self) -> Writer:
        writer = Writer(self)
        self._writers.add(writer)
        self._windows.append(writer.window)
        return writer

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
            return _perform(operation, writer)

        def on_error(exc: BaseException, intervals: Iterator[float], retries: int) -> float:
            logger.warning("Lost the connection to the broker while writing, trying again: %r", exc)
            writer.drop()
            return next(intervals)

        # To kombu a timeout of 0 is none.
        retries = 0 if policy.get("timeout") == 0 else policy["max_retries"]
        try:
            return retry_over_time(  # type: ignore[no-any-return]
                attempt, writer.errors, errback=on_error,
                max_retries=retries, interval_start=policy["interval_start"],
                interval_step=policy["interval_step"], interval_max=policy["interval_max"],
                timeout=policy.get("timeout"),
            )  # fmt: skip
        except writer.errors as exc:
            writer.drop()
            raise BrokerUnreachable(f"cannot write to {writer.connection.as_uri()}: {exc}") from exc

    def close(self) -> None:
        """Close the connections that are not in use, after what was published over them was confirmed."""
        self.wait_for_confirms()
        with self._returned:
            idle, self._idle = self._idle, []
        for writer in idle:
            if writer.window:
                logger.error("%d messages with results are lost: the broker was not there", len(writer.window))
            writer.drop()


class Writer:
    """A connection of the publisher, and what was declared on it."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._addresses = publisher.addresses
        self.connection = publisher.connect()
        #: What a connection breaks with.
        self.errors: tuple[type[BaseException], ...] = self.connection.connection_errors
        #: What the broker says no with, to an operation that has come to its end.
        self.refusals: tuple[type[Exception], ...] = self.connection.channel_errors
        #: The same, and what is made of it.
        self.verdicts: tuple[type[Exception], ...] = (*self.refusals, ResultTooLarge, QueueGone, MessageRefused)
        #: What is not confirmed, and when the last of it was sent, on the monotonic clock.
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
        """Leave a connection that broke; :meth:`connect` makes a new one."""
        # First: numbers of another channel must not come into it.
        self.window.lose()
        drop(self.connection)
        self.connection = self._publisher.connect()
        self._session = None
        self._declared.clear()

    def clear(self, address: Address) -> None:
        """Make sure that there is a queue, and that it is empty."""
        self.connect().declare(self._addresses.queue(address))
        self.connect().purge(address.name)

    def publish(self, publishings: list[Publishing], confirm: bool) -> None:
        """Send messages: they are confirmed then, or kept until they are."""
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
        """Wait until everything is confirmed that was sent."""
        session = self.connect()
        while self.window:
            self._send_again(session)
            self._confirm(session, lambda: not self.window.unconfirmed)

    def _make_room(self, session: Session) -> None:
        """Read the confirms that have come, now and then; wait for them when too many are awaited."""
        window, now = self.window, time.monotonic()
        if window.is_full():
            self._confirm(session, window.has_room)
        elif not window.unconfirmed % POLL_EVERY or now - self._polled_at > POLLED:
            self._polled_at = now
            session.poll()
        self._send_again(session)

    def _confirm(self, session: Session, enough: Callable[[], bool]) -> None:
        # The broker closes the channel over a message, not over the one that is to be sent now.
        with contextlib.suppress(*self.refusals):
            self._wait(session, enough)

    def _send_again(self, session: Session) -> None:
        """Send what came back, or went down with a channel or a connection."""
        window = self.window
        if window.again:
            # Interrupted at any line, they are sent twice rather than not at all.
            again = list(window.again)
            try:
                window.again.clear()
                for publishing in again:
                    self._declared.pop(publishing.routing_key, None)
                window.taken_again(again)
                self._send(session, again)
            except BaseException:
                window.again.extendleft(reversed(again))
                raise
        while window.doubtful:
            publishing = window.doubtful[0]
            try:
                window.doubtful.popleft()
                self._send_and_wait(session, [publishing])
            except self.verdicts as exc:
                if isinstance(exc, NotFound) and not says_no_queue(exc):
                    window.doubtful.appendleft(publishing)
                    raise
                logger.error("A result is lost that nobody waited for: %s", refusal(exc, session.uri))
            except BaseException:
                window.doubtful.appendleft(publishing)
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
        # A quorum queue refuses what comes while another connection has it made.
        pauses = iter(MADE if any(each.address and each.address.is_quorum for each in left) else ())
        # A queue may have been deleted or have expired since this connection declared it: the broker then returns
        # the message, and it is sent again to a new one.
        while returned < 2:
            try:
                self._send(session, left)
                self._wait(session, lambda: not window.unconfirmed)
                refused = set(map(id, window.doubtful))
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
            window.taken_again(left)
        raise QueueGone(f"queue {left[0].routing_key!r} is deleted as often as it is declared")

    def _wait(self, session: Session, enough: Callable[[], bool]) -> None:
        start = time.monotonic()
        while True:
            try:
                session.wait_for_confirms(self.window, enough)
                return
            except socket.timeout as exc:
                seconds = time.monotonic() - start
                if session.is_blocked and seconds < BLOCKED:
                    continue
                why = ALARM if session.is_blocked else SILENCE
                raise BrokerUnreachable(
                    f"the broker {session.uri} has not taken messages for {seconds:.0f} seconds: {why}"
                ) from exc

    def _is_due(self, address: Address) -> bool:
        """Whether a queue is to be declared, for the first time or again."""
        declared = self._declared.get(address.name)
        if declared is None:
            return True
        expires = self._addresses.expires
        return time.monotonic() - declared > (min(DECLARED_FOR, expires / 4) if expires else DECLARED_FOR)

    def _remember(self, address: Address) -> None:
        # A lone task's queue is declared once and never again: the oldest go first.
        self._declared.pop(address.name, None)
        self._declared[address.name] = time.monotonic()
        if len(self._declared) > DECLARED:
            del self._declared[next(iter(self._declared))]


def _perform(operation: Callable[[Writer], T], writer: Writer) -> T:
    try:
        return operation(writer)
    except NotFound as exc:
        if says_no_queue(exc):
            raise
        # The node that a queue is on is down: it comes back, as a broker does.
        raise ConnectionResetError(exc.reply_text) from exc


def _too_large(publishing: Publishing, size: str, limit: str) -> ResultTooLarge:
    return ResultTooLarge(
        f"the result of task {publishing.message.correlation_id} makes a message of {size} bytes, "
        f"over the broker's limit of {limit} bytes (RabbitMQ's max_message_size): "
        "store large values elsewhere and return where they are, or raise the limit"
    )
