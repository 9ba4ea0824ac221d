"""Publishes messages with confirms. A message and the declaration of its queue are one write."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from amqp.exceptions import NotFound
from kombu.utils.functional import retry_over_time
from kombu.utils.uuid import uuid

from fastres.amqp.connector import abandon
from fastres.amqp.publishing import Message, Publishing
from fastres.amqp.session import is_missing_queue
from fastres.amqp.window import Window
from fastres.errors import BrokerUnreachable, ResultTooLarge, refusal
from fastres.logs import logger
from fastres.write.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.addresses import Address, Addresses
    from fastres.counts import Counts
    from fastres.options import Options

__all__ = ("Publisher",)

T = TypeVar("T")

#: Messages from this size, in bytes, always wait for their confirm, so that a refusal fails the task.
LARGE = 1 << 20


#: Seconds between two checks for unconfirmed messages. Connections that published later than that are left out.
WATCH_INTERVAL = 0.2

#: Seconds between two checks for a connection whose thread was interrupted.
LOST_INTERVAL = 1.0


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
        counts: the counters of the process.
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
        """In a forked child: abandon the parent's connections."""
        for writer in getattr(self, "_idle", ()):
            abandon(writer.connection)
        self._idle: list[Writer] = []
        #: All writers. If an exception takes a writer from its thread, the garbage collector removes it from the set;
        #: its unconfirmed messages stay in one of the windows.
        self._writers: WeakSet[Writer] = WeakSet()
        self._windows: list[Window] = []
        self._returned = threading.Condition()
        self._waiting = threading.RLock()
        #: The thread that waits for confirms when no thread publishes any more.
        self._watcher: threading.Thread | None = None

    def publish(self, address: Address, message: Message, *, declare: bool) -> None:
        """Send a message to an address, and wait for the broker's confirm if the option ``confirm`` is set.

        Args:
            declare: declare the queue. False for a reply queue, which its client declares.

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            fastres.BrokerUnreachable: the broker could not be reached within ``retry_policy``.
        """
        publishing = Publishing(message, self.addresses.exchange.name, address.name, address if declare else None)
        together = getattr(self._gathered, "publishings", None)
        if together is None:
            self._publish([publishing])
        else:
            together.append(publishing)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context in which this thread's messages are collected, and published in one write at its end."""
        publishings = self._gathered.publishings = []
        try:
            yield
        finally:
            del self._gathered.publishings
        if publishings:
            self._publish(publishings)

    def _publish(self, publishings: list[Publishing]) -> None:
        # A large message always waits for its confirm: only so is its refusal noticed.
        confirm = self.confirm or any(len(publishing.message.body) >= LARGE for publishing in publishings)
        start = time.perf_counter()
        self.run(lambda writer: writer.publish(publishings, confirm))
        self.counts.published += len(publishings)
        if confirm:
            self.counts.confirms.add(time.perf_counter() - start)
        else:
            self._watch_confirms()

    def unconfirmed(self) -> int:
        """The number of unconfirmed messages."""
        return sum(len(window) for window in list(self._windows))

    # -- unconfirmed messages

    def check(self, address: Address | None) -> None:
        """Declare the queue of an address, and publish a message without a queue, to check the permissions.

        Raises: as :meth:`publish`.
        """
        message = Message(b"", "application/octet-stream", "binary", "", 1, {})
        nowhere = f"{self.addresses.prefix}.nobody.{uuid()}"
        publishing = Publishing(message, self.addresses.exchange.name, nowhere)

        def check(writer: Writer) -> None:
            if address is not None:
                writer.connect().declare(self.addresses.queue(address))
            writer.publish([publishing], confirm=True)

        self.run(check)

    def wait_for_confirms(self, seconds: float = 0.0) -> None:
        """Wait until the broker has confirmed all messages; within ``retry_policy`` if it cannot be reached.

        Args:
            seconds: only for connections without a new message for so many seconds.

        Errors are logged: no call waits for these messages.
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
                # An interrupted thread has lost its writer, which is gone.
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
        # The watcher does its last check and ends under this lock.
        with self._returned:
            if self._watcher is not None:
                return
            watcher = threading.Thread(target=self._keep_watch, name="fastres-confirms", daemon=True)
            self._watcher = watcher
        try:
            watcher.start()
        except RuntimeError:
            # The interpreter is shutting down, and starts no more threads.
            self._watcher = None
            self.wait_for_confirms()

    def _keep_watch(self) -> None:
        """The watcher thread: wait for confirms on connections on which no thread publishes any more."""
        while True:
            time.sleep(WATCH_INTERVAL)
            with self._returned:
                if self._watcher is not threading.current_thread():
                    return
                if not any(self._windows):
                    self._watcher = None
                    return
            self.wait_for_confirms(WATCH_INTERVAL)

    # -- connections

    def run(self, operation: Callable[[Writer], T]) -> T:
        """Call an operation with a connection that no other thread uses, and again if the connection breaks.

        Raises:
            fastres.AccessRefused: the user lacks a permission.
            fastres.BrokerUnreachable: the broker could not be reached within ``retry_policy``.

        After an exception that may have come in the middle of a frame (a signal's, a killed greenlet's), the
        connection is not used again, and the broker requeues its messages.
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
                error = refusal(exc, writer.connection.as_uri())
                if error is exc:
                    raise
                raise error from exc
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
                self._returned.wait(LOST_INTERVAL)

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

        # kombu takes a timeout of 0 for no timeout.
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
        """Wait for outstanding confirms, and close idle connections."""
        self.wait_for_confirms()
        with self._returned:
            idle, self._idle = self._idle, []
        for writer in idle:
            if writer.window:
                logger.error("%d messages with results are lost: the broker was not there", len(writer.window))
            writer.drop()


def _perform(operation: Callable[[Writer], T], writer: Writer) -> T:
    try:
        return operation(writer)
    except NotFound as exc:
        if is_missing_queue(exc):
            raise
        # The queue's node is down: retry as for a lost connection.
        raise ConnectionResetError(exc.reply_text) from exc
