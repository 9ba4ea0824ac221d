"""Joins chords: a thread with one connection consumes the shards of the log, and commits bodies and errbacks.

A chord's body and the acknowledgement of its events are one transaction. The broker delivers a shard to one joiner at
a time; the other joiners stand by.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound

from fastres.amqp.connector import abandon, drop, establish
from fastres.amqp.rabbitmq import RabbitMQ, session_of
from fastres.amqp.session import is_open
from fastres.cancelling import revoke_rest
from fastres.chords.bodies import USERS, Bodies, Failed
from fastres.chords.forks import busy
from fastres.chords.producer import BodyProducer, NodeDown
from fastres.chords.reducer import MAX_MERGED
from fastres.chords.shard import Destinations, Shard, refusal_of
from fastres.errors import Error, NewerEvent
from fastres.logs import logger
from fastres.write.writer import SIZE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastres.amqp.publishing import Publishing
    from fastres.chords.reducer import Chord

__all__ = ("Joiner",)

#: The longest wait of a read, in seconds: a joiner stops within this time.
READ_TIMEOUT = 0.5
#: Seconds between two reads while events come in: the shortest pause, the longest, and how many for each part that
#: the next chord to be complete lacks. A part that is read by itself is several times as dear as one of many.
GATHER, MAX_GATHER, GATHER_PER_PART = 0.005, 0.05, 20e-6
#: Seconds after which a broker that does not answer is taken to be gone.
REPLY_TIMEOUT = 30.0
#: The same for a body that was not taken before; and seconds until it is tried again, at first and at most.
SHORT_REPLY_TIMEOUT, POSTPONEMENT, MAX_POSTPONEMENT = 5.0, 5.0, 60.0
#: Seconds between two attempts to connect, the first and the longest.
FIRST_RETRY, LONGEST_RETRY = 0.2, 10.0
#: Seconds between two looks at chords that have grown old, and at how the shards are shared out.
CHECK_INTERVAL, SHARE_INTERVAL = 1.0, 10.0
#: Threads that call errbacks.
NOTIFIERS = 8


class Joiner:
    """Joins the chords of a backend.

    Args:
        backend: an ``AMQPBackend``.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.addresses = backend.addresses
        self._app = backend.app
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._stop_at = math.inf
        self.since = time.time()
        self._connection: Any = None
        self._session: Any = None
        self._bodies: Bodies | None = None
        #: The connection that tasks are published with, if it is not this one.
        self._tasks: Any = None
        #: Publishings of the current commit.
        self._publishings: list[Publishing] | None = None
        self._producer: BodyProducer | None = None
        #: The exceptions of a broken connection.
        self.lost: tuple[type[BaseException], ...] = (OSError,)
        #: Chords in the commit that is under way, and whether commits are to hold one chord each: because of some
        #: chord in the last one the broker closed the channel.
        self.firing: list[Chord] = []
        self.one_by_one = False
        self.refused_by: set[Destinations] = set()
        #: Bytes from which messages are not merged any more.
        self.largest = MAX_MERGED
        #: Chords whose body the broker has refused, with its reason.
        self._refused: dict[str, str] = {}
        #: Failed chords by id and run, and whether their errbacks have been called.
        self._notified: dict[tuple[str, str], bool] = {}
        #: Postponed chords by id and run: when their body is tried again, on the monotonic clock, and the pause
        #: before that, in seconds.
        self._postponed: dict[tuple[str, str], tuple[float, float]] = {}
        #: Shards, and events to be written into them again.
        self._to_write_back: deque[tuple[str, list[bytes]]] = deque()
        #: Chords whose body was returned by the broker: there is no queue at its route.
        self._unrouted: set[tuple[str, str]] = set()
        #: Calls of errbacks that are due, and the number of threads that work on them.
        self._to_notify: deque[Callable[[], None]] = deque()
        self._notifiers = 0
        self._notifying = threading.Lock()
        self._unsupported = False

    def start(self) -> None:
        """Join chords in a thread of this process, from now on, if ``chord_joiner`` lets it."""
        if self._unsupported or not self.backend.options.chord_joiner:
            return
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(target=self.run, name="fastres-joiner", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Leave the chords to another joiner."""
        self._stop_at = time.monotonic() + REPLY_TIMEOUT
        self._stopping.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def abandon(self) -> None:
        """In a forked child: the joiner is the parent's."""
        abandon(self._connection)
        abandon(self._tasks)
        self.__init__(self.backend)  # type: ignore[misc]

    def run(self) -> None:
        """Join chords until stopped. Reconnects when the connection breaks."""
        retry = FIRST_RETRY
        while not self._stopping.is_set():
            shards: list[Shard] = []
            try:
                with busy():
                    shards = self._connect()
                if self._unsupported:
                    return
                if retry != FIRST_RETRY:
                    logger.warning("The joiner of chords reads again at %s", self._connection.as_uri())
                retry = FIRST_RETRY
                self._serve(shards)
            except NewerEvent as exc:
                # Nothing is acknowledged: the next joiner in the line gets it.
                logger.error("The joiner of chords leaves them to others: %s", exc)
                retry = LONGEST_RETRY
            except Exception as exc:
                self._handle_error(exc)
            finally:
                with busy():
                    self._close_connections()
            self._stopping.wait(retry)
            retry = min(retry * 2, LONGEST_RETRY)
        self._write_back()

    def _connect(self) -> list[Shard]:
        connector = self.backend.connector
        self._connection = connection = connector.open()
        connection.heartbeat = self._app.conf.broker_heartbeat or 0
        self.lost = (OSError, *connection.recoverable_connection_errors)
        establish(connection)
        self.backend.counts.connected("joiner")
        self._session = session = session_of(connection)
        if not isinstance(session, RabbitMQ) or not session.single_active_consumer:
            self._unsupported = True
            logger.info("%s has no single active consumers: chords are left to chord_unlock.", connection.as_uri())
            return []
        session.socket.settimeout(REPLY_TIMEOUT)
        self._bodies = self._bodies or Bodies(self.backend)
        if connector.is_applications:
            self._publishings = []
        else:
            # The parts are not acknowledged by the same transaction: before, the broker must have the body.
            self._tasks = self._app.connection_for_write(transport_options={"confirm_publish": True})
            self.lost += self._tasks.recoverable_connection_errors
        session.open_posting_channel()
        return [Shard(self, session, number) for number in range(self.backend.options.chord_shards)]

    def _serve(self, shards: list[Shard]) -> None:
        options, expires = self.backend.options, self._app.conf.get("result_chord_expires")
        if expires is None:
            expires = self.backend.expires
        next_check, next_share = 0.0, time.monotonic() + SHARE_INTERVAL
        while not self._stopping.is_set() or self._is_notifying():
            # Events that arrived during the last commit are handled without another read.
            if not any(shard.received for shard in shards):
                with contextlib.suppress(socket.timeout):
                    self._session.drain(READ_TIMEOUT)
            with busy():
                worked = [shard.work() for shard in shards]
                self.backend.counts.shards = sum(shard.active for shard in shards)
                if time.monotonic() >= next_check:
                    next_check = time.monotonic() + CHECK_INTERVAL
                    self._write_back()
                    for shard in shards:
                        shard.maintain(options.chord_renewal, expires)
                    if self._connection.heartbeat:
                        self._connection.heartbeat_check()
                if len(shards) > 1 and time.monotonic() >= next_share:
                    next_share = time.monotonic() + SHARE_INTERVAL
                    self._hand_over_shards(shards)
                for number, shard in enumerate(shards):
                    if shard.wanted_prefetch is not None:
                        shard.leave()
                        shards[number] = Shard(self, self._session, number, shard.wanted_prefetch)
                if any(shard.cancelled for shard in shards):
                    raise ConnectionResetError("the queue of a shard was deleted")
            if any(worked):
                fewest_missing = min(shard.reducer.fewest_missing() for shard in shards)
                time.sleep(min(max(fewest_missing * GATHER_PER_PART, GATHER), MAX_GATHER))

    def _is_notifying(self) -> bool:
        """Whether a joiner that stops waits for running errbacks, which another joiner would call again."""
        return False in self._notified.values() and time.monotonic() < self._stop_at

    def _hand_over_shards(self, shards: list[Shard]) -> None:
        """Leave shards to joiners that came later."""
        active = [number for number, shard in enumerate(shards) if shard.active]
        if not active:
            return
        states = [self._session.inspect(shard.name) for shard in shards]
        joiners = max((state.consumers for state in states if state is not None), default=1)
        for number in active[math.ceil(len(shards) / max(joiners, 1)) :]:
            shards[number].leave()
            shards[number] = Shard(self, self._session, number)

    def _close_connections(self) -> None:
        self.backend.counts.shards = 0
        connection, self._connection, self._session = self._connection, None, None
        tasks, self._tasks, self._producer = self._tasks, None, None
        for each in (connection, tasks):
            if each is not None:
                drop(each, broken=not self._stopping.is_set())

    def _handle_error(self, exc: Exception) -> None:
        firing, self.firing = self.firing, []
        if isinstance(exc, TimeoutError) and firing:
            self.postpone(firing, f"it was not taken in time ({exc})")
        channel_errors = getattr(self._connection, "channel_errors", ())
        limit = SIZE_LIMIT.search(getattr(exc, "reply_text", None) or "")
        if limit is not None:
            self.largest = min(self.largest, int(limit[2]) // 2)
        if firing and not isinstance(exc, self.lost):
            # One of the bodies cannot be sent, or the broker refuses it. Sending them one by one finds out which.
            self.one_by_one = len(firing) > 1
            if not self.one_by_one:
                self._refused[firing[0].id] = refusal_of(getattr(exc, "reply_text", None) or repr(exc))
        elif isinstance(exc, (*self.lost, *channel_errors, Error)):
            what = "cannot reach" if self._session is None else "has lost"
            where = "" if self._connection is None else f" {self._connection.as_uri()}"
            logger.warning("The joiner of chords %s the broker%s, and tries again: %r", what, where, exc)
        else:
            logger.exception("The joiner of chords starts again: %r", exc)

    # -- called by the shards: see Caller

    def postpone(self, chords: list[Chord], why: str) -> None:
        for chord in chords:
            key = chord.id, chord.run
            seconds = min(2 * self._postponed.get(key, (0.0, POSTPONEMENT / 2))[1], MAX_POSTPONEMENT)
            self._postponed[key] = time.monotonic() + seconds, seconds
        logger.warning(
            "The body of chord %s waits, and so do those of %d others that were sent with it: %s. Its queue has "
            "no majority, or its node is down or stands still. It is tried again; other chords go first.",
            chords[0].id, len(chords) - 1, why,
        )  # fmt: skip

    def is_postponed(self, chord: Chord) -> bool:
        return self._postponed.get((chord.id, chord.run), (0.0, 0.0))[0] > time.monotonic()

    def reply_timeout(self, chords: list[Chord]) -> float:
        again = any((chord.id, chord.run) in self._postponed for chord in chords)
        return SHORT_REPLY_TIMEOUT if again else REPLY_TIMEOUT

    def call(self, chord: Chord) -> list[Publishing]:
        assert self._bodies is not None
        if chord.id in self._refused:
            raise Failed(self._bodies.plan(chord)[0], self._refused.pop(chord.id))
        self._session.hand_back()
        if self._publishings is not None:
            self._publishings.clear()
        if self._producer is None or not is_open(self._producer.channel):
            channel = (self._tasks or self._connection).channel()
            self._producer = BodyProducer(channel, self._publishings, self._session.is_classic)
        self._producer.broken = None
        try:
            self._bodies.call(chord, self._producer)
        except Failed as failed:
            broken = self._producer.broken
            if isinstance(broken, NotFound):
                raise NodeDown(broken.reply_text) from failed
            if broken is not None:
                raise (TimeoutError if isinstance(broken, TimeoutError) else ConnectionResetError)(
                    repr(broken)
                ) from failed
            raise
        return list(self._publishings or ())

    def notified(self, chord: Chord) -> bool | None:
        notified = self._notified.get((chord.id, chord.run))
        return None if notified is False else bool(notified)

    def notify(self, chord: Chord, failed: Failed) -> None:
        """In another thread: errbacks are the user's, and may take their time."""
        bodies, key = self._bodies, (chord.id, chord.run)
        assert bodies is not None
        logger.error("Chord %s raised: %s", chord.id, failed, exc_info=failed.error)
        self.backend.counts.joiner.failed += 1

        def notify() -> None:
            with busy():
                try:
                    bodies.fail(chord, failed)
                except USERS:
                    logger.exception("An errback of chord %s failed, after: %s", chord.id, failed)
                if key in self._notified:
                    self._notified[key] = True

        self._notified[key] = False
        self._run_in_thread(notify)

    def _run_in_thread(self, notify: Callable[[], None]) -> None:
        """Have another thread do it."""
        with self._notifying:
            self._to_notify.append(notify)
            if self._notifiers < NOTIFIERS:
                self._notifiers += 1
                threading.Thread(target=self._notify, name="fastres-errbacks", daemon=True).start()

    def _notify(self) -> None:
        while True:
            with self._notifying:
                if not self._to_notify:
                    self._notifiers -= 1
                    return
                notify = self._to_notify.popleft()
            notify()

    def _revoke_rest(self, chord_id: str) -> None:
        try:
            revoke_rest(self.backend, chord_id)
        except Exception as exc:
            logger.warning("The other tasks of chord %s could not be revoked, and run: %r", chord_id, exc)

    def put_back(self, name: str, bodies: list[bytes]) -> None:
        # First: whatever goes wrong now, they are in no queue any more.
        self._to_write_back.append((name, bodies))
        self._write_back()

    def _write_back(self) -> None:
        """Publish the events that are held in memory only; those that the broker does not take are kept."""
        while self._to_write_back:
            try:
                self.backend.chords.put_back(*self._to_write_back[0])
            except Exception as exc:
                logger.error("Events of chords could not be written into the log again, and are kept: %r", exc)
                return
            self._to_write_back.popleft()

    def retry_unrouted(self, chord: Chord) -> bool:
        key = chord.id, chord.run
        known = key in self._unrouted
        self._unrouted.add(key)
        # kombu remembers declared queues.
        connection = self._tasks or self._connection
        connection.declared_entities.clear()
        return not known

    def forget(self, chord: Chord) -> None:
        if chord.terms is not None and chord.terms.revoke and len(chord.parts) < (chord.total or 0):
            self._run_in_thread(partial(self._revoke_rest, chord.id))
        key = chord.id, chord.run
        self._unrouted.discard(key)
        self._notified.pop(key, None)
        self._postponed.pop(key, None)
