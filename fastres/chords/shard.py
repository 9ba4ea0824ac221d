"""A shard of the log: consumes events, and commits bodies and merged events in transactions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import amqp
from kombu.utils.uuid import uuid

from fastres.amqp.publishing import Publishing
from fastres.amqp.session import LARGEST_PREFETCH, all_up_to
from fastres.chords.bodies import Failed
from fastres.chords.events import CONTENT_TYPE, PERSISTENT, Event, write_event
from fastres.chords.producer import NodeDown
from fastres.chords.reducer import Reducer
from fastres.chords.status import answer_to
from fastres.errors import MessageRefused
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres._protocols import Delivery
    from fastres.addresses import Address, Addresses
    from fastres.amqp.rabbitmq import RabbitMQ
    from fastres.chords.reducer import Chord, Merge

__all__ = ("Shard", "refusal_of")

#: Messages that the broker sends ahead of their acknowledgement; more when that many are needed to hold the open
#: chords, without a limit in the end.
PREFETCH = 20_000
#: Bytes, and messages, that one commit publishes: RabbitMQ 4.3 takes 10,000 (``channel_tx_message_max``).
COMMIT_BYTES, COMMIT_MESSAGES = 1 << 24, 5_000
#: Messages of each open chord that are held before all are merged, if the prefetch allows so many.
HELD_PER_CHORD = 4
#: Steps that RabbitMQ may take to acknowledge the messages of complete chords, which lie among others: it seeks each
#: from the oldest unacknowledged message on.
MAX_STEPS = 20_000_000
#: Seconds before each other attempt to have a queue take a body that it has refused: it may just be made.
REFUSED_RETRIES = (0.05, 0.2)
#: The text of RabbitMQ's error after it has carried out a part of a commit.
PARTIAL = "partial tx completion"


#: The exchanges and routing keys that the messages of a body go to.
Destinations = frozenset[tuple[str, str]]


class Batch:
    """Complete chords of one commit, with the messages to publish."""

    def __init__(self) -> None:
        self.chords: list[tuple[Chord, list[Publishing]]] = []
        self._count = self._size = 0

    def add(self, chord: Chord, publishings: list[Publishing]) -> None:
        self.chords.append((chord, publishings))
        self._count += len(publishings)
        self._size += sum(len(publishing.message.body) for publishing in publishings)

    def has_no_room(self, publishings: list[Publishing]) -> bool:
        return bool(self.chords) and (
            self._size > COMMIT_BYTES or self._count + len(publishings) > COMMIT_MESSAGES
        )


class Caller(Protocol):
    """The interface of the joiner that shards use: calls bodies and errbacks."""

    backend: Any
    addresses: Addresses
    #: Bytes from which messages are not merged any more.
    largest: int
    #: The exceptions of a broken connection.
    lost: tuple[type[BaseException], ...]
    #: Since when it runs, in seconds since the epoch.
    since: float
    #: Chords in the commit that is under way, and whether commits are to hold one chord each.
    firing: list[Chord]
    one_by_one: bool
    #: Destinations of a commit of several chords that a queue has refused in part: there, each chord is sent alone.
    refused_by: set[Destinations]

    def call(self, chord: Chord) -> list[Publishing]:
        """Make a complete chord's body: its messages that are not published yet.

        Raises:
            Failed: its errbacks are to be notified.
            NodeDown: the queue of its body is on a node that is down.
        """

    def is_postponed(self, chord: Chord) -> bool:
        """Whether a chord waits because the broker has not accepted its body in time."""

    def postpone(self, chords: list[Chord], why: str) -> None:
        """Try these chords again later: perhaps only their queue does not answer."""

    def reply_timeout(self, chords: list[Chord]) -> float:
        """Seconds that the broker may take to accept the bodies of these chords."""

    def notified(self, chord: Chord) -> bool | None:
        """Whether a chord has failed and its errbacks were notified; None: they are about to be."""

    def notify(self, chord: Chord, failed: Failed) -> None:
        """Have a chord's errbacks called by another thread."""

    def forget(self, chord: Chord) -> None:
        """Drop what is kept of a chord that has fired."""

    def put_back(self, name: str, bodies: list[bytes]) -> None:
        """Publish events to a shard again that the broker has acknowledged although it refused the body."""

    def retry_unrouted(self, chord: Chord) -> bool:
        """Whether to publish a body once more that had no queue. Its queues are declared again before."""


class Shard:
    """One shard, on a channel of its own. If the channel breaks, the broker delivers its events again.

    Args:
        prefetch: messages that the broker sends ahead. It counts for each consumer, and cannot be changed for one
            that is there.

    Raises:
        RuntimeError: its queue lets several joiners read at once.
    """

    def __init__(self, joiner: Caller, session: RabbitMQ, number: int, prefetch: int = 0) -> None:
        self._joiner = joiner
        self._session = session
        address = joiner.addresses.chords(number)
        self.name = address.name
        self.reducer = Reducer(joiner.largest)
        self.received: list[Delivery] = []
        self.cancelled = False
        #: More messages are to be held than the broker sends: the shard is to be read anew with this prefetch.
        self.wanted_prefetch: int | None = None
        #: The delivery tags that are not acknowledged, in order.
        self._open: dict[int, None] = {}
        #: The mark of the event that this reader publishes first. Once it has arrived, so have all older events.
        self._mark = ""
        self._caught_up = False
        self._channel = session.channel()
        self._channel.tx_select()
        #: Routes of messages that were returned since the last commit: there is no queue.
        self._returned: set[tuple[str, str]] = set()
        self._channel.events["basic_return"].add(self._on_return)
        session.declare(joiner.addresses.queue(address))
        if session.has_other_arguments(self.name):
            # A queue that was declared with the other queue_type works too.
            address = replace(address, is_quorum=not address.is_quorum)
            if not session.is_there_as(joiner.addresses.queue(address)):
                raise RuntimeError(
                    f"queue {self.name!r} is there without x-single-active-consumer, and cannot be read by one "
                    "joiner at a time: stop the workers, delete it, and start them again"
                )
        self._prefetch = prefetch or PREFETCH
        if address.is_quorum:
            # For a quorum queue RabbitMQ would turn 0, no limit, into 2,000.
            self._prefetch = min(self._prefetch, LARGEST_PREFETCH)
        session.prefetch(self._channel, self._prefetch if self._prefetch <= LARGEST_PREFETCH else 0)
        self._tag = f"fastres-joiner-{number}"
        session.consume(self._channel, self.name, self._tag, self._receive, self._on_cancel)

    @property
    def active(self) -> bool:
        """Whether this joiner has received events, and so is the active consumer."""
        return bool(self._mark)

    def leave(self) -> None:
        """Stop reading, so that the next joiner becomes the active consumer."""
        self._session.hand_back()
        self._session.leave(self._channel, [self._tag], self._open)

    def _receive(self, deliveries: list[Delivery]) -> None:
        self.received += deliveries
        self._open.update(dict.fromkeys([delivery.delivery_tag for delivery in deliveries]))

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: Any) -> None:
        self._returned.add((exchange, routing_key))

    def _on_cancel(self, tag: str) -> None:
        self.cancelled = True

    def work(self) -> bool:
        """Handle received events. Returns: whether there were any."""
        received, self.received = self.received, []
        self.reducer.feed(received, time.monotonic())
        if received and not self._mark:
            self._mark = uuid()
            self._commit_internal([self._publishing(write_event(Event(mark=self._mark)))], [])
        self._answer()
        # Not before: the event of an added task may be behind the last part.
        if self._caught_up and self.reducer.complete:
            complete = list(self.reducer.complete.values())
            if self._are_scattered(complete):
                self._gather()
                complete = [chord for chord in complete if chord.id in self.reducer.complete]
            self._fire(complete)
        self._replace(self.reducer.merges())
        self._make_room()
        return bool(received)

    def _are_scattered(self, chords: list[Chord]) -> bool:
        """Whether acknowledging the messages of these chords takes the broker too long. Merged, each chord has one."""
        messages = sum(len(level) for chord in chords for level in chord.held)
        return messages > len(chords) and messages * len(self._open) > 2 * MAX_STEPS

    def _answer(self) -> None:
        """Handle questions, messages that are not events, and events that are not needed any more."""
        reducer = self.reducer
        publishings: list[Publishing] = []
        tags, reducer.obsolete = reducer.obsolete, []
        others, reducer.others = reducer.others, []
        for tag, event in others:
            tags.append(tag)
            if event.mark == self._mark:
                self._caught_up = True
            if event.ask:
                # Outside the transaction: RabbitMQ 4 refuses the commit if the reply queue is gone.
                self._session.answer(event.ask, answer_to(event, reducer, self._joiner))
        refused, reducer.refused = reducer.refused, []
        for delivery, exc in refused:
            tags.append(delivery.delivery_tag)
            publishings.append(self._set_aside(delivery))
            self._joiner.backend.reports.add(
                "malformed",
                self.name,
                delivery.correlation_id,
                delivery.delivery_tag,
                f"{exc}; it was put into {publishings[-1].routing_key}",
                hash(delivery.body),
            )
        if tags:
            self._commit_internal(publishings, tags)

    def _set_aside(self, delivery: Delivery) -> Publishing:
        return Publishing(_message(delivery.body, delivery.content_type), "", self._refused_queue().name)

    def _refused_queue(self) -> Address:
        address = self._joiner.addresses.refused()
        self._session.declare(self._joiner.addresses.queue(address))
        return address

    def _fire(self, chords: Iterable[Chord]) -> None:
        """Publish the bodies of complete chords, several in a commit."""
        joiner = self._joiner
        # RabbitMQ carries out a part of a commit that a queue refuses. If all messages go to one queue, it is known
        # which part.
        batches: dict[Destinations, Batch] = {}
        for chord in chords:
            if joiner.is_postponed(chord):
                continue
            try:
                notified = joiner.notified(chord)
                if notified is None:
                    continue
                with self._session.within(joiner.reply_timeout([chord])):
                    found = [] if notified else joiner.call(chord)
            except Failed as failed:
                joiner.notify(chord, failed)
                continue
            except NodeDown as away:
                joiner.postpone([chord], str(away))
                continue
            except joiner.lost:
                joiner.firing = [chord]
                raise
            except Exception as exc:
                self._give_up(chord, exc)
                continue
            destinations = frozenset((publishing.exchange, publishing.routing_key) for publishing in found)
            batch = batches.setdefault(destinations, Batch())
            if batch.has_no_room(found):
                self._commit_bodies(batches.pop(destinations), destinations)
                batch = batches[destinations] = Batch()
            batch.add(chord, found)
            if joiner.one_by_one or destinations in joiner.refused_by:
                self._commit_bodies(batches.pop(destinations))
                joiner.refused_by.discard(destinations)
        for destinations, batch in batches.items():
            self._commit_bodies(batch, destinations)
        joiner.one_by_one = False

    def _commit_bodies(self, batch: Batch, destinations: Destinations = frozenset()) -> None:
        """Publish bodies and acknowledge their events, in one transaction."""
        self._joiner.firing = firing = [chord for chord, _ in batch.chords]
        with self._session.within(self._joiner.reply_timeout(firing)):
            self._send_confirmed(batch)
        self._joiner.firing = chords = [chord for chord, _ in batch.chords]
        if not chords:
            return
        try:
            self._commit(
                [publishing for _, found in batch.chords for publishing in found],
                [held.tag for chord in chords for held in chord.messages()],
            )
        except self._session.channel_errors as exc:
            if PARTIAL in str(exc):
                # RabbitMQ has acknowledged the parts before a queue refused a body.
                self._joiner.firing = []
                if len(chords) == 1:
                    chords[0].failed = refusal_of(str(exc))
                else:
                    # Sending each by itself shows which of them it refuses.
                    self._joiner.refused_by.add(destinations)
                self._joiner.put_back(
                    self.name, [body for chord in chords for body in self.reducer.snapshot(chord)]
                )
            raise
        self._joiner.firing = []
        returned, self._returned = self._returned, set()
        now = time.monotonic()
        for chord, found in batch.chords:
            lost = {(each.exchange, each.routing_key) for each in found} & returned
            self.reducer.forget(chord, now, over=not lost)
            if lost:
                if not self._joiner.retry_unrouted(chord):
                    queues = ", ".join(sorted(routing_key for _, routing_key in lost))
                    chord.failed = f"There is no queue for its body: {queues}"
                self._joiner.put_back(self.name, self.reducer.snapshot(chord))
            else:
                # A failed chord has no body, but its errbacks were called.
                self._joiner.backend.counts.joiner.bodies += not self._joiner.notified(chord)
                self._joiner.forget(chord)

    def _send_confirmed(self, batch: Batch) -> None:
        """Publish the messages that need a confirm before the transaction, and leave the others to it.

        So are returned messages, for which there is no queue. Chords with a refused message are left out, and
        fail when they are fired again.
        """
        everything = self._session.acknowledges_first
        first = [each for _, found in batch.chords for each in found if each.confirm or everything]
        if not first:
            return
        unrouted, refused = self._session.post_confirmed(first)
        for pause in REFUSED_RETRIES:
            if not refused:
                break
            time.sleep(pause)
            more, refused = self._session.post_confirmed(refused)
            unrouted += more
        left = {id(each) for each in unrouted}
        left.update(id(each) for _, found in batch.chords for each in found if not (each.confirm or everything))
        refused_by = {id(each): each.routing_key for each in refused}
        chords, batch.chords = batch.chords, []
        for chord, found in chords:
            queues = sorted({refused_by[id(each)] for each in found if id(each) in refused_by})
            if queues:
                chord.failed = refusal_of(f"queue {', '.join(queues)} does not take it")
            else:
                batch.chords.append((chord, [each for each in found if id(each) in left]))

    def _give_up(self, chord: Chord, exc: Exception) -> None:
        """Neither body nor errbacks are known: keep the events for an operator."""
        address = self._refused_queue()
        logger.error(
            "Chord %s has all its parts, but what to do with them cannot be read; they were put into %s: %r",
            chord.id, address.name, exc, exc_info=exc,
        )  # fmt: skip
        bodies = self.reducer.snapshot(chord)
        self._commit_internal(
            [Publishing(_message(body, CONTENT_TYPE), "", address.name) for body in bodies],
            [held.tag for held in chord.messages()],
        )
        self.reducer.forget(chord, time.monotonic())

    def maintain(self, renewal: float, expires: float | None) -> None:
        """Renew events that have been held for long, and drop expired chords."""
        now, wall = time.monotonic(), time.time()
        # Not before all older events were read: an unread event may keep a chord from expiring.
        expired = self.reducer.expired(expires, now, wall) if self._caught_up else []
        for chord in expired:
            if chord.size is not None:
                logger.warning(
                    "Chord %s has expired: %d of %s parts came, the last one %.0f seconds ago (result_expires).",
                    chord.id, len(chord.parts), chord.total, wall - chord.at,
                )  # fmt: skip
        if expired:
            self._commit([], [held.tag for chord in expired for held in chord.messages()])
            for chord in expired:
                self.reducer.forget(chord, now)
        if self._caught_up:
            self.reducer.close_at_deadline(wall)
        self._replace(self.reducer.renew(now - renewal))

    def _replace(self, merges: Iterable[Merge]) -> None:
        """Replace messages by merged ones with the same content.

        All are published before the first is acknowledged: what is acknowledged together is one frame, if nothing
        else lies in between.
        """
        replaced: list[tuple[Chord, list[int]]] = []
        publishings: list[Publishing] = []
        size = 0
        for merge in merges:
            replaced.append((merge.chord, merge.tags))
            publishings += map(self._publishing, merge.bodies)
            size += sum(map(len, merge.bodies))
            if size > COMMIT_BYTES or len(publishings) > COMMIT_MESSAGES:
                self._commit_internal(publishings, [])
                publishings, size = [], 0
        self._commit_internal(publishings, [tag for _, tags in replaced for tag in tags])
        for chord, tags in replaced:
            self.reducer.release(chord, tags)

    def _gather(self) -> None:
        """Merge the messages of each chord."""
        counts = [sum(map(len, chord.held)) for chord in self.reducer.chords.values()]
        singles = counts.count(1)
        self._replace(self.reducer.gather(singles * (sum(counts) - singles) > MAX_STEPS))

    def _make_room(self) -> None:
        """Merge held messages, or raise the prefetch, when the open chords fill it."""
        reducer, prefetch = self.reducer, self._prefetch
        unlimited = prefetch > LARGEST_PREFETCH
        limit = max(LARGEST_PREFETCH, HELD_PER_CHORD * len(reducer.chords)) if unlimited else prefetch // 2
        if reducer.count < limit:
            return
        self._gather()
        # Otherwise there is time before the next merge.
        crowded = (reducer.count + reducer.pending) * HELD_PER_CHORD >= prefetch
        if crowded and not unlimited and prefetch != LARGEST_PREFETCH:
            self.wanted_prefetch = prefetch * 2

    def _publishing(self, body: bytes) -> Publishing:
        return Publishing(_message(body, CONTENT_TYPE), "", self.name)

    def _commit_internal(self, publishings: list[Publishing], tags: list[int]) -> None:
        """Publish to queues of fastres with confirms, and then acknowledge the replaced messages.

        In one transaction RabbitMQ would acknowledge although a queue is full.

        Raises:
            fastres.MessageRefused: one is.
        """
        if publishings:
            _, refused = self._session.post_confirmed(publishings)
            if refused:
                raise MessageRefused(
                    f"the queue {refused[0].routing_key!r} is full, with what is to be written into it again: "
                    "a policy with max-length and reject-publish must not be for the queues of fastres"
                )
        if tags:
            self._commit([], tags)

    def _commit(self, publishings: list[Publishing], tags: list[int]) -> None:
        # A body may be a group of more tasks than one commit takes: the last has the acknowledgements.
        while len(publishings) > COMMIT_MESSAGES:
            self._commit(publishings[:COMMIT_MESSAGES], [])
            publishings = publishings[COMMIT_MESSAGES:]
        start = time.perf_counter()
        for publishing in publishings:
            self._session.post(self._channel, publishing.message, publishing.exchange, publishing.routing_key)
        if tags:
            for tag in tags:
                del self._open[tag]
            # In order, so that the broker finds each behind few others.
            self._session.acknowledge(self._channel, sorted(tags), all_up_to(tags, self._open))
        self._session.commit(self._channel)
        self._joiner.backend.counts.joiner.commits.add(time.perf_counter() - start)


def refusal_of(text: str) -> str:
    """The error of a chord whose body the broker has refused."""
    return (
        f"The broker refused the message with the results of the header: {text}. If they are too large for one "
        "message (RabbitMQ's max_message_size), let the body have them by reference: "
        "chord(header)(fastres.lazy(body)); if its queue is full (x-overflow), make room there"
    )


def _message(body: Any, content_type: str | None) -> Any:
    return amqp.Message(body, content_type=content_type, content_encoding="binary", delivery_mode=PERSISTENT)
