"""The consuming connection of a process. Its threads share it, and it is opened again when it breaks.

One of the waiting threads reads the socket for all of them. The others sleep until that thread notifies them, and one
of them takes over when it leaves. A thread that has a request for the broker interrupts the reader. While the broker
cannot be reached, no thread holds the connection, so that each thread keeps its own timeout.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kombu.utils.compat import detect_environment

from fastres.amqp.connector import abandon, drop, establish
from fastres.amqp.framed import RECORD_TIMEOUT
from fastres.amqp.rabbitmq import RabbitMQ, session_of
from fastres.amqp.session import Busy
from fastres.amqp.wakeup import Wakeup
from fastres.errors import BrokerUnreachable
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fastres.amqp.session import Session
    from fastres.counts import Counts

__all__ = ("Link", "Subscriber")

T = TypeVar("T")

#: Seconds that a read may last where it cannot be interrupted (gevent, eventlet, transports without a socket).
UNINTERRUPTIBLE_READ = 0.05
#: Messages that kombu reads before they are passed on.
BATCH = 1000
#: Seconds without a reply after which the broker is taken to be gone, and the tolerance beyond a deadline. Less than
#: the time between two heartbeats with Celery's ``broker_heartbeat``, each of which restarts py-amqp's waits.
REPLY_TIMEOUT, MARGIN = 25.0, 0.2
#: Seconds for a broker to confirm the end of a connection.
CLOSE_TIMEOUT = 1.0
#: Seconds after which a thread that waits for another one checks by itself.
RECHECK_INTERVAL = 0.1
#: How many times an operation is repeated when the connection breaks.
ATTEMPTS = 5


class Subscriber(Protocol):
    """An object that consumes through a link."""

    def open(self, session: Session) -> None:
        """Subscribe over a new connection."""

    def flush(self) -> None:
        """Pass received deliveries on."""

    def awaited(self) -> int:
        """The number of awaited results that may arrive before one is acknowledged."""


class Link:
    """The consuming connection of a process: see the module.

    Args:
        connect: returns a kombu connection, not yet established.
        retry_policy: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max``, and perhaps
            ``timeout`` (seconds). A wait seeks a connection that was lost for as long as it lasts.
        heartbeat: seconds of silence, twice, after which the broker takes this process for gone, 0: never.
        counts: the counters of the process.
    """

    def __init__(
        self, connect: Callable[[], Any], retry_policy: dict[str, Any], heartbeat: float, counts: Counts
    ) -> None:
        self._connect = connect
        self._counts = counts
        self._heartbeat = heartbeat
        self._retry_policy = retry_policy
        self._connection: Any = None
        self._session: Session | None = None
        self._connecting: Any = None
        self._established = False
        self._failures = 0
        self._connecting_since = 0.0
        #: The error of the last attempt to connect.
        self._last_error = "cannot reach the broker in so short a time"
        self._retry_at = 0.0
        self._subscribers: list[Subscriber] = []
        self._deferred: deque[Callable[[], object]] = deque()
        # The threads that use the connection, and that read for all. These are no locks: an exception of a signal
        # handler between acquiring a lock and noting it would leave the lock acquired for ever.
        self._owner: int | None = None
        self._reading: int | None = None
        #: Notified when a thread has stopped using the connection, and when a batch was passed on.
        self._released = threading.Condition()
        self._new_messages = threading.Condition()
        # Reentrant: the garbage collector may end a wait of this thread at any line.
        self._count = threading.RLock()
        self._wanted = 0
        #: Whether :meth:`beat` is called by the loop reader instead of a thread, and when it is due.
        self.attended = False
        self._beat_at = 0.0
        self._wakeup = Wakeup()

    @property
    def uri(self) -> str:
        """The broker's URL, without the password."""
        return str((self._connection or self._connecting or self._connect()).as_uri())

    def uses(self, session: Session) -> bool:
        """Whether this session is in use."""
        return self._session is session

    def call(self, operation: Callable[[Session], T], deadline: float | None = None) -> T:
        """Run an operation, over a new connection if the present one breaks.

        Args:
            deadline: the end of attempts to connect, on the monotonic clock; None: ``retry_policy`` decides.

        Raises:
            fastres.BrokerUnreachable: there was no connection to be had.
        """
        broken = 0
        while True:
            with self.exclusively(deadline):
                session = self._session or self._try_to_connect(deadline)
                if session is not None:
                    connection = self._connection
                    try:
                        with _with_timeout(session, deadline), self._discarded_if_interrupted(connection):
                            session.hand_back()
                            return operation(session)
                    except connection.connection_errors as exc:
                        self._lost(exc)
                        broken += 1
                        if broken == ATTEMPTS or _passed(deadline):
                            raise BrokerUnreachable(f"the connection broke {broken} times: {exc!r}") from exc
            self._pause(math.inf, deadline)

    def attempt(
        self, operation: Callable[[Session], object], deadline: float | None = None, reads: bool = True
    ) -> None:
        """Run an operation that only makes sense on the present connection, if that still exists.

        Args:
            reads: whether the operation reads an answer of the broker.
        """
        with self.exclusively():
            connection, session = self._connection, self._session
            if session is None:
                return
            try:
                with _with_timeout(session, deadline), self._discarded_if_interrupted(connection):
                    if reads:
                        session.hand_back()
                    operation(session)
            except connection.channel_errors as exc:
                logger.warning("The broker closed a channel: %s", exc)
            except connection.connection_errors as exc:
                self._lost(exc)

    def soon(self, action: Callable[[], object], afterwards: Callable[[], object] = lambda: None) -> None:
        """Run an action exclusively: now, or by the next thread that acquires the connection.

        Args:
            afterwards: done when the connection is not needed any more.
        """

        def both() -> None:
            action()
            afterwards()

        if self._owner == threading.get_ident():
            # The garbage collector ends a wait while this thread awaits an answer that must not be taken from it.
            self._deferred.append(both)
            return
        try:
            with self.exclusively(time.monotonic() + MARGIN):
                action()
        except ConnectionInUse:
            self._deferred.append(both)
        else:
            afterwards()

    def subscribe(self, subscriber: Subscriber, deadline: float | None = None) -> None:
        """Open a subscriber, now or with the next connection and after each that follows."""
        with self.exclusively(deadline):
            self._subscribers.append(subscriber)
            self.attempt(subscriber.open, deadline)

    def unsubscribe(
        self, subscriber: Subscriber, on_close: Callable[[Session], None], deadline: float | None = None
    ) -> None:
        """Remove a subscriber, and call ``on_close`` if there is a connection."""
        with self.exclusively():
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
            self.attempt(on_close, deadline)

    def read(self, timeout: float, done: Callable[[], bool], deadline: float | None) -> None:
        """Read for ``timeout`` seconds, or let another thread read until ``done()``.

        Returns after a batch, when interrupted, or when the time is over. ``deadline`` is that of :meth:`call`.
        """
        me = threading.get_ident()
        try:
            with self._count:
                if self._reading in (None, me):
                    self._reading = me
            if self._reading == me:
                self._read(timeout, done, deadline)
                return
        finally:
            if self._reading == me:
                self._reading = None
                with self._new_messages:
                    self._new_messages.notify_all()
        with self._new_messages:
            self._new_messages.wait_for(lambda: done() or self._reading is None, timeout)

    def _read(self, timeout: float, done: Callable[[], bool], deadline: float | None) -> None:
        self._yield_to_waiting()
        with self.exclusively(deadline, wake=False):
            # Between the last look and now another thread may have read it, or it came before an answer.
            self._flush()
            if done():
                return
            session = self._session or self._try_to_connect(deadline)
            if session is not None:
                connection = self._connection
                try:
                    with self._discarded_if_interrupted(connection):
                        self._drain(session, timeout)
                except connection.channel_errors:
                    pass  # the owner of the channel was notified, and opens it again
                except connection.connection_errors as exc:
                    self._lost(exc)
                return
        self._pause(timeout, deadline)

    def interrupt(self) -> None:
        """Make the reading thread return soon, without waiting for it."""
        with self._count:
            self._wakeup.wake()
        with self._new_messages:
            self._new_messages.notify_all()

    def beat(self) -> float:
        """Let the broker know of the connection, if there is one, that this process lives.

        Returns: seconds until that is due again.
        """
        session = self._session
        if session is None or not session.heartbeat:
            return math.inf
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + session.heartbeat / 2
            self.attempt(lambda now: now.beat(), reads=False)
        return max(0.0, self._beat_at - time.monotonic())

    def drop_with(self, subscribers: Collection[Subscriber]) -> None:
        """Drop the connection with these subscribers, so that the broker requeues their messages. Others reconnect."""
        self._subscribers = [subscriber for subscriber in self._subscribers if subscriber not in subscribers]
        self._drop()

    def reset(self) -> None:
        """Close the connection; the next use opens a new one."""
        with self.exclusively():
            connection, session, self._connection, self._session = self._connection, self._session, None, None
            if connection is not None and session is not None:
                # The broker may not respond.
                with contextlib.ExitStack() as stack:
                    with contextlib.suppress(OSError):
                        stack.enter_context(session.with_timeout(CLOSE_TIMEOUT))
                    drop(connection, broken=False)
            with self._count:
                self._wakeup.close()

    def abandon(self) -> None:
        """In a forked child: drop the parent's connection, and send nothing over it."""
        abandon(self._connection)
        self._wakeup.close()
        self.__init__(self._connect, self._retry_policy, self._heartbeat, self._counts)  # type: ignore[misc]

    @contextlib.contextmanager
    def exclusively(self, deadline: float | None = None, wake: bool = True) -> Iterator[None]:
        """A context with exclusive use of the connection. Interrupts the reading thread.

        Raises: ConnectionInUse: another thread was at it until the deadline.
        """
        me = threading.get_ident()
        nested = self._owner == me
        # An exception may come between any two lines, and must find nothing wanted.
        counted = False
        try:
            if not nested:
                with self._count:
                    counted = wake
                    self._wanted += wake
                    # A thread that is about to read, and was not seen here, checks _wanted before it sleeps.
                    if wake and self._reading not in (None, me):
                        self._wakeup.wake()
                self._acquire(me, math.inf if deadline is None else deadline)
                with self._count:
                    self._wanted -= counted
                    counted = False
            if not nested:
                self._catch_up()
            yield
            if not nested:
                self._catch_up()
        finally:
            if counted:
                with self._count:
                    self._wanted -= 1
            if self._owner == me and not nested:
                self._owner = None
                with self._released:
                    self._released.notify()

    def _catch_up(self) -> None:
        while self._deferred:
            self._deferred.popleft()()

    def _acquire(self, me: int, deadline: float) -> None:
        with self._released:
            while self._owner is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ConnectionInUse("another thread is waiting for an answer of the broker")
                # A thread that was interrupted at its end has notified no other thread.
                self._released.wait(min(left, RECHECK_INTERVAL))
            self._owner = me

    def _yield_to_waiting(self) -> None:
        """Let waiting threads go first: a condition is not fair, and the reader would return before them."""
        for _ in range(100):
            if not self._wanted:
                return
            time.sleep(0.0005)

    # -- the connection

    def _try_to_connect(self, deadline: float | None) -> Session | None:
        """Connect if it is time for an attempt. Returns: the session; None: there is no connection.

        Raises:
            fastres.BrokerUnreachable: that was the last attempt.
        """
        if time.monotonic() < self._retry_at:
            return None
        if self._connecting is None:
            self._connecting = self._connect()
            self._connecting.heartbeat = self._heartbeat
        connection = self._connecting
        timeout = connection.connect_timeout
        # If there are several URLs, the time is shared between them.
        connection.connect_timeout = min(
            timeout or REPLY_TIMEOUT, _left(deadline, math.inf) / max(1, len(connection.alt))
        )
        try:
            establish(connection)
            self._counts.connected("reader")
            session = session_of(connection)
            self._connection, self._session, self._connecting = connection, session, None
            with _with_timeout(session, deadline):
                for subscriber in list(self._subscribers):
                    subscriber.open(session)
        except connection.connection_errors as exc:
            self._failed(connection, exc, deadline)
            return None
        except BaseException:
            # Interrupted, perhaps during the handshake.
            self._connecting = None
            self._drop()
            raise
        finally:
            connection.connect_timeout = timeout
        self._established = True
        self._failures = 0
        negotiated = session.heartbeat
        if negotiated and not self.attended:
            # Not a Thread: a signal while that one waits for its start leaves it with a lock that is not locked.
            _thread.start_new_thread(_beat, (weakref.ref(self), weakref.ref(session), negotiated / 2))
        return session

    def _failed(self, connection: Any, exc: BaseException, deadline: float | None) -> None:
        policy = self._retry_policy
        self._failures += 1
        if self._failures == 1:
            self._connecting_since = time.monotonic()
        self._last_error = f"cannot reach the broker {connection.as_uri()}: {exc!r}"
        self._drop()
        keeps_trying = self._established and deadline is not None
        elapsed = time.monotonic() - self._connecting_since
        gives_up = self._failures > policy["max_retries"] or elapsed >= policy.get("timeout", math.inf)
        if _passed(deadline) or (gives_up and not keeps_trying):
            self._failures = 0
            raise BrokerUnreachable(self._last_error) from exc
        logger.warning("Trying again: %s", self._last_error)
        interval = policy["interval_start"] + policy["interval_step"] * (self._failures - 1)
        self._retry_at = time.monotonic() + min(interval, policy["interval_max"])

    def _lost(self, exc: BaseException) -> None:
        logger.warning("Lost the connection to the broker, reconnecting: %r", exc)
        self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._session = self._connection, None, None
        if connection is not None:
            drop(connection)

    @contextlib.contextmanager
    def _discarded_if_interrupted(self, connection: Any) -> Iterator[None]:
        """Drop the connection after an exception that may have come in the middle of a frame.

        The exception may be that of a signal handler or of a killed greenlet. The broker requeues its messages.
        """
        try:
            yield
        except (*connection.connection_errors, *connection.channel_errors, Busy):
            raise
        except BaseException:
            if connection is self._connection:
                self._drop()
            raise

    def _pause(self, timeout: float, deadline: float | None) -> None:
        """Wait for the next attempt to connect. Raises BrokerUnreachable at the deadline."""
        pause = min(self._retry_at - time.monotonic(), timeout, _left(deadline, math.inf))
        if pause > 0:
            time.sleep(pause)
        if _passed(deadline):
            raise BrokerUnreachable(self._last_error)

    # -- reading

    def _drain(self, session: Session, timeout: float) -> None:
        try:
            with contextlib.suppress(socket.timeout):
                if not isinstance(session, RabbitMQ):
                    self._connection.drain_events(timeout=min(timeout, UNINTERRUPTIBLE_READ))
                    for _ in range(BATCH):
                        self._connection.drain_events(timeout=0.0001)
                elif detect_environment() != "default":
                    session.drain(min(timeout, UNINTERRUPTIBLE_READ))
                # A thread that interrupted the previous reader still waits, and does not interrupt again.
                elif self._wakeup.wait(session, lambda: 0 if self._wanted else timeout, self._awaited):
                    # A TLS record that has begun to come is waited for, but not without an end.
                    session.drain(RECORD_TIMEOUT)
        finally:
            self._flush()

    def _flush(self) -> None:
        for subscriber in list(self._subscribers):
            subscriber.flush()

    def _awaited(self) -> int:
        return sum(subscriber.awaited() for subscriber in self._subscribers)


def _beat(link_ref: weakref.ref[Link], session_ref: weakref.ref[Session], interval: float) -> None:
    """Send heartbeats over a connection, whatever the other threads of the process do.

    Without them the broker would not notice that a host is gone, and would keep its messages and consumers.
    """
    while True:
        time.sleep(interval)
        link, session = link_ref(), session_ref()
        if link is None or session is None or not link.uses(session):
            return
        link.attempt(lambda now: now.beat(), reads=False)
        del link, session


class ConnectionInUse(BrokerUnreachable):
    """The connection is in use by another thread."""


def _left(deadline: float | None, most: float) -> float:
    """Seconds until the deadline, ``most`` at most."""
    return most if deadline is None else max(0.01, min(most, deadline - time.monotonic()))


def _passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _with_timeout(session: Session, deadline: float | None) -> contextlib.AbstractContextManager[None]:
    """Let an operation wait for answers of the broker no longer than makes sense."""
    return session.with_timeout(_left(deadline, REPLY_TIMEOUT) + MARGIN)
