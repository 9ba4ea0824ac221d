"""The read path: results out of their queues and into the joins that wait for them, over any transport."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Callable

from celery import states
from celery.exceptions import TimeoutError
from kombu.exceptions import ContentDisallowed
from kombu.utils.functional import LRUCache

from fastres._impl import Aggregate
from fastres.errors import MalformedResult
from fastres.transport import Busy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres._protocols import Aggregate as AggregateProtocol
    from fastres._protocols import Arrival, Decoder, Meta
    from fastres.addresses import Address, Addresses
    from fastres.link import Link
    from fastres.logs import Reports
    from fastres.transport import Dialect

__all__ = ("KEEP", "Feed", "Inbox", "Join", "Mailbox", "Reader")

#: Header of a result that stays in its queue when it is read: a chord's part, wanted by the join and by users.
KEEP = "fastres-keep"

#: Seconds between two looks at the interval callback, and at results that are peeked at.
INTERVAL = 1.0
#: Seconds between two attempts to be the one reader of a queue.
TURN = 0.1
#: A wait of no seconds still lets the broker answer once.
LEAST_TIMEOUT = 0.05
#: Final results that came to the mailbox and nobody has asked for yet.
UNCLAIMED = 8192


class Join:
    """A wait for some results: what is still to come, and what came but was not handed over yet.

    Args:
        task_ids: the tasks.
        ready_states: the states that are final.
        timeout: seconds from now, None: for ever.
        now: the clock that the timeout is measured with, in seconds.
    """

    def __init__(
        self,
        task_ids: Iterable[str],
        ready_states: Iterable[str] = states.READY_STATES,
        timeout: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout = timeout
        self._now = now
        self._end = math.inf if timeout is None else now() + max(timeout, LEAST_TIMEOUT)
        self.inboxes: list[Inbox] = []
        self.aggregate: AggregateProtocol = Aggregate(task_ids, ready_states)
        self.alone = len(self.aggregate) == 1
        #: (arrival, whether it is final), in order.
        self.news: deque[tuple[Arrival, bool]] = deque()
        #: Ids of which a message came that cannot be read, and why.
        self.unreadable: dict[str, Exception] = {}

    def offer(self, arrivals: list[Arrival]) -> tuple[list[Arrival], list[Arrival], list[Arrival], list[Arrival]]:
        """Take what this join waits for; the answer is that of ``Aggregate.feed``."""
        sorted_out = self.aggregate.feed(arrivals)
        ready, states_, _, _ = sorted_out
        # A state is told before the final result of the same batch: it came first.
        self.news.extend((arrival, False) for arrival in states_)
        self.news.extend((arrival, True) for arrival in ready)
        return sorted_out

    def has_news(self) -> bool:
        return bool(self.news)

    def left(self) -> float:
        """Seconds until the timeout."""
        return self._end - self._now()

    @property
    def deadline(self) -> float:
        """The timeout on the monotonic clock."""
        return time.monotonic() + self.left()

    def time_is_over(self) -> TimeoutError:
        missing = self.aggregate.missing()
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        text = f"The operation timed out: {len(missing)} results are missing ({shown})."
        for task_id, why in list(self.unreadable.items())[:1]:
            text += f" For {len(self.unreadable)} of them something came that cannot be read, for task {task_id}: "
            text += f"{type(why).__name__}: {why}"
        return TimeoutError(text)


class Inbox:
    """A channel of the link that consumes from some addresses: what feeds and mailboxes have in common."""

    def __init__(self, reader: Reader, addresses: list[Address], exclusive: bool, prefetch: int) -> None:
        self.reader = reader
        self.addresses = addresses
        self.joins: list[Join] = []
        self.retry_at: float | None = None
        self._exclusive = exclusive
        self._prefetch = prefetch
        self._channel: Any = None
        self._speak: Dialect | None = None
        self._messages: list[tuple[Any, Address]] = []
        self._unacknowledged: dict[Any, None] = {}
        self._tags: dict[str, Address] = {}
        self._cancelled = False

    def open(self, speak: Dialect) -> None:
        if self._channel is not None and self._speak is speak:
            return
        self._speak = speak
        self._messages.clear()
        self._unacknowledged.clear()
        self._tags.clear()
        self._cancelled = False
        self.retry_at = None
        self._channel = speak.channel()
        speak.prefetch(self._channel, self._prefetch)
        try:
            for address in self.addresses:
                self._consume(speak, address)
        except Busy:
            # One reader at a time: results shared out between two would complete neither's join.
            speak.leave(self._channel, list(self._tags), ())
            self._channel = None
            self.retry_at = time.monotonic() + TURN

    def _consume(self, speak: Dialect, address: Address) -> None:
        state = speak.declare(self.reader.addresses.queue(address))
        if self._exclusive and state.consumers:
            raise Busy(address.name)
        channel, tag = self._channel, self.reader.next_tag()

        def receive(message: Any) -> None:
            # A message of a channel that was left behind will be redelivered.
            if channel is self._channel:
                self._unacknowledged[message.delivery_tag] = None
                self._messages.append((message, address))

        def cancelled(tag: str) -> None:
            self._cancelled = self._cancelled or channel is self._channel

        speak.consume(channel, address.name, tag, receive, cancelled, self._exclusive)
        self._tags[tag] = address

    def reopen(self, speak: Dialect) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            speak.leave(channel, list(self._tags), list(self._unacknowledged))
        self.open(speak)

    def flush(self) -> None:
        if self._messages:
            messages, self._messages = self._messages, []
            self._deliver(messages)
        if self._cancelled:
            # The queue was deleted under the consumer.
            self.reader.link.call(self.reopen)

    def _deliver(self, messages: list[tuple[Any, Address]]) -> None:
        raise NotImplementedError

    def _decode(self, messages: list[tuple[Any, Address]]) -> list[Arrival]:
        arrivals: list[Arrival] = []
        for message, address in messages:
            try:
                meta = self.reader.decode(message)
            except Exception as exc:
                self._set_aside(message, address, exc)
            else:
                arrivals.append(((self, message, address), meta["task_id"], meta))
        return arrivals

    def _set_aside(self, message: Any, address: Address, exc: Exception) -> None:
        self.reader.report_unreadable(message, address, exc)
        task_id = message.properties.get("correlation_id")
        for join in self.joins:
            if task_id in join.aggregate:
                join.unreadable[task_id] = exc

    def _offer(self, arrivals: list[Arrival]) -> tuple[list[Arrival], list[Arrival]]:
        """Offer arrivals to every join: the answer is what came before, and what no join has asked for."""
        if len(self.joins) == 1:
            _, _, repeated, foreign = self.joins[0].offer(arrivals)
            return repeated, foreign
        claimed: set[int] = set()
        before: set[int] = set()
        for join in self.joins:
            ready, states_, repeated, _ = join.offer(arrivals)
            claimed.update(id(arrival) for arrival in ready)
            claimed.update(id(arrival) for arrival in states_)
            before.update(id(arrival) for arrival in repeated)
        left = [arrival for arrival in arrivals if id(arrival) not in claimed]
        return (
            [arrival for arrival in left if id(arrival) in before],
            [arrival for arrival in left if id(arrival) not in before],
        )

    def _acknowledge(self, messages: Iterable[Any]) -> None:
        waiting = self._unacknowledged
        tags = [
            message.delivery_tag
            for message in messages
            if message.channel is self._channel and message.delivery_tag in waiting
        ]
        if not tags:
            return
        for tag in tags:
            del waiting[tag]
        lowest = next(iter(waiting), None)
        if lowest is None:
            all_up_to: Any = max(tags)
        else:
            all_up_to = max((tag for tag in tags if tag < lowest), default=None)
        self.reader.link.attempt(lambda speak: speak.acknowledge(self._channel, tags, all_up_to))


class Feed(Inbox):
    """Results of lone tasks or of a group, for as long as a join waits for them.

    Messages are acknowledged when they have been handed over, so that a lost connection loses none.

    Args:
        reader: whose link it consumes through.
        addresses: the queues.
        take: acknowledge what is handed over; otherwise everything goes back in the end.
        exclusive: one reader at a time: others wait for their turn.
        prefetch: messages that the broker sends ahead, 0: all it has.
        alone: each queue is that of one task; otherwise they are those of one group.
        leftovers: queues to delete with the others.
    """

    def __init__(
        self,
        reader: Reader,
        addresses: list[Address],
        *,
        take: bool,
        exclusive: bool,
        prefetch: int,
        alone: bool,
        leftovers: list[Address],
    ) -> None:
        super().__init__(reader, addresses, exclusive, prefetch)
        self.take = take
        self._alone = alone
        self._leftovers = leftovers
        self._emptied = True
        #: Queues of lone tasks whose result was handed over.
        self._finished: list[Address] = []
        #: Arrivals that were not handed over yet, for joins that come late.
        self._held: dict[Any, Arrival] = {}
        self._latest_state: dict[str, Any] = {}
        self._limited = prefetch > 0

    def open(self, speak: Dialect) -> None:
        self._held.clear()
        self._latest_state.clear()
        super().open(speak)

    def attach(self, join: Join) -> None:
        self.joins.append(join)
        if self._held:
            join.offer(list(self._held.values()))

    def peek(self, task_id: str) -> Meta | None:
        """What has come for a task and was not handed over yet."""
        for _, held_id, meta in self._held.values():
            if held_id == task_id:
                return meta
        return None

    def _deliver(self, messages: list[tuple[Any, Address]]) -> None:
        arrivals = self._decode(messages)
        if self.take and any(message.headers.get(KEEP) for message, _ in messages):
            self.take = False
        for arrival in arrivals:
            self._held[arrival[0][1].delivery_tag] = arrival
        self._supersede(arrivals)
        repeated, foreign = self._offer(arrivals)
        self._drop_repeated(repeated)
        for (_, message, address), task_id, meta in foreign:
            self._held.pop(message.delivery_tag, None)
            self._emptied = False
            if self._alone:
                self.reader.reports.add(
                    "unknown", address.name, task_id, message.delivery_tag,
                    f"nobody waits for this task ({meta['status']}); the message is left in its queue",
                    hash(meta["status"]),
                )  # fmt: skip
        if self._limited and (not self.take or len(self._unacknowledged) - len(self._held) > self._prefetch / 2):
            self._lift_limit()

    def _supersede(self, arrivals: list[Arrival]) -> None:
        """Of states that are not final, only the latest is held."""
        for arrival in arrivals:
            (_, message, _), task_id, _ = arrival
            before = self._latest_state.pop(task_id, None)
            if before is not None and self.take:
                self._held.pop(before.delivery_tag, None)
                self._acknowledge([before])
            if arrival[2]["status"] not in states.READY_STATES:
                self._latest_state[task_id] = message

    def _drop_repeated(self, repeated: list[Arrival]) -> None:
        for (_, message, address), task_id, _ in repeated:
            self._held.pop(message.delivery_tag, None)
            # The broker redelivers what was not acknowledged in time: nothing to tell anybody.
            if not message.delivery_info.get("redelivered"):
                self.reader.reports.add(
                    "repeated", address.name, task_id, message.delivery_tag,
                    "this task's result came before; the first one counts", 0,
                )  # fmt: skip
        if self.take:
            self._acknowledge(message for (_, message, _), _, _ in repeated)

    def _lift_limit(self) -> None:
        """Messages that stay unacknowledged must not keep others from coming."""
        self._limited = False
        self._prefetch = 0

        def again(speak: Dialect) -> None:
            if self._channel is not None:
                speak.unlimit(self._channel, list(self._tags))
                self._tags.clear()
                for address in self.addresses:
                    self._consume(speak, address)

        self.reader.link.attempt(again)

    def handed_over(self, arrivals: list[Arrival]) -> None:
        for (_, message, address), _, _ in arrivals:
            self._held.pop(message.delivery_tag, None)
            if self._alone:
                self._finished.append(address)
        if self.take:
            self._acknowledge(message for (_, message, _), _, _ in arrivals)

    def detach(self, join: Join) -> bool:
        """Whether that was the last join."""
        self.joins.remove(join)
        if join.aggregate:
            self._emptied = False
        return not self.joins

    def close(self, speak: Dialect) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        over: list[Address] = []
        if self.take and self.reader.auto_delete:
            if self._alone:
                over = self._finished
            elif self._emptied and not self._unacknowledged:
                over = self.addresses + self._leftovers
        for address in over:
            speak.delete(channel, address.name)
        speak.leave(channel, list(self._tags), list(self._unacknowledged))


class Mailbox(Inbox):
    """The reply queues of a client: all its results come here, whoever waits for them.

    Nobody else reads these queues, so what came is acknowledged at once and kept here until it is asked for.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader, [], exclusive=False, prefetch=0)
        self._expected: set[str] = set()
        self._arrived: dict[str, Meta] = {}
        self._unclaimed = LRUCache(limit=UNCLAIMED)
        self._states = LRUCache(limit=UNCLAIMED)
        self._handed_over = LRUCache(limit=UNCLAIMED)
        self._per_group = LRUCache(limit=UNCLAIMED)
        self._subscribed = False

    def add(self, address: Address, deadline: float | None = None) -> None:
        """Receive at this address too, from now on."""

        def add(speak: Dialect) -> None:
            if address not in self.addresses:
                if self._channel is not None:
                    self._consume(speak, address)
                self.addresses.append(address)

        if address in self.addresses:
            return
        with self.reader.link.exclusively():
            self.reader.link.call(add, deadline)
            if not self._subscribed:
                self.reader.link.subscribe(self, deadline)
                self._subscribed = True

    def expect(self, task_id: str) -> None:
        """Keep this result until it is asked for, however many others come."""
        self._expected.add(task_id)

    def forget(self, task_id: str) -> None:
        self._expected.discard(task_id)
        self._states.pop(task_id, None)
        unwanted = self._arrived.pop(task_id, None)
        if unwanted is not None:
            self._unclaimed[task_id] = unwanted

    def drop(self, task_id: str) -> None:
        """Delete a result."""
        self.forget(task_id)
        self._unclaimed.pop(task_id, None)

    def attach(self, join: Join) -> None:
        self.joins.append(join)
        for task_id in join.aggregate.missing():
            meta = self.peek(task_id)
            if meta is not None:
                join.offer([((self, None, None), task_id, meta)])

    def detach(self, join: Join) -> None:
        self.joins.remove(join)

    def peek(self, task_id: str) -> Meta | None:
        for place in (self._arrived, self._unclaimed, self._states):
            meta: Meta | None = place.get(task_id)
            if meta is not None:
                return meta
        return None

    def in_group(self, group_id: str) -> int:
        """How many final results of a group have come."""
        return int(self._per_group.get(group_id, 0))

    def taken(self, task_id: str) -> None:
        self._expected.discard(task_id)
        self._arrived.pop(task_id, None)
        self._unclaimed.pop(task_id, None)
        self._handed_over[task_id] = True

    def _deliver(self, messages: list[tuple[Any, Address]]) -> None:
        arrivals = self._decode(messages)
        for (_, message, address), task_id, meta in arrivals:
            if meta["status"] not in states.READY_STATES:
                self._states[task_id] = meta
            elif self.peek_final(task_id) or task_id in self._handed_over:
                if not message.delivery_info.get("redelivered"):
                    self.reader.reports.add(
                        "repeated", address.name, task_id, message.delivery_tag,
                        "this task's result came before; the first one counts", 0,
                    )  # fmt: skip
            else:
                (self._arrived if task_id in self._expected else self._unclaimed)[task_id] = meta
                self._states.pop(task_id, None)
                group_id = meta.get("group_id")
                if group_id:
                    self._per_group[group_id] = self._per_group.get(group_id, 0) + 1
        if self.joins:
            self._offer(arrivals)
        self._acknowledge(message for message, _ in messages)

    def peek_final(self, task_id: str) -> bool:
        return task_id in self._arrived or task_id in self._unclaimed


class Reader:
    """The inboxes of a process and the waits on them.

    Args:
        link: the consuming connection.
        addresses: the backend's addresses.
        decoder: message to result.
        reports: where unusable messages are reported.
        prefetch: messages of a group that the broker sends ahead of their acknowledgement.
        auto_delete: delete a queue when all its results were taken.
    """

    def __init__(
        self,
        link: Link,
        addresses: Addresses,
        decoder: Decoder,
        reports: Reports,
        prefetch: int,
        auto_delete: bool,
    ) -> None:
        self.link = link
        self.addresses = addresses
        self.reports = reports
        self.auto_delete = auto_delete
        self.mailbox = Mailbox(self)
        self._decoder = decoder
        self._prefetch = prefetch
        self._feeds: dict[str, Feed] = {}
        self._tag = 0

    def forget_all(self) -> None:
        """In a forked child: what came is the parent's."""
        self.mailbox = Mailbox(self)
        self._feeds.clear()

    def next_tag(self) -> str:
        self._tag += 1
        return f"fastres-{self._tag}"

    def decode(self, message: Any) -> Meta:
        return self._decoder.decode(
            message.body,
            message.content_type,
            message.content_encoding,
            message.headers.get("compression"),
            message.properties.get("correlation_id"),
        )

    def report_unreadable(self, message: Any, address: Address, exc: Exception) -> None:
        if isinstance(exc, ContentDisallowed):
            kind = "disallowed"
        elif isinstance(exc, MalformedResult):
            kind = "malformed"
        else:
            kind = "undecodable"
        self.reports.add(
            kind, address.name, message.properties.get("correlation_id"), message.delivery_tag,
            f"{type(exc).__name__}: {exc}", hash(message.body),
        )  # fmt: skip

    def feed_of(self, address: Address) -> Feed | None:
        """The feed that reads an address at present."""
        return self._feeds.get(address.name)

    def tasks(self, join: Join, addresses: list[Address], take: bool) -> None:
        """Let a join have the results of lone tasks."""
        self._attach(join, addresses, take=take, exclusive=False, prefetch=0, alone=True, leftovers=[])

    def group(self, join: Join, addresses: list[Address], leftovers: list[Address], take: bool) -> None:
        """Let a join have the results of a group, and delete ``leftovers`` when they were all taken."""
        prefetch = self._prefetch if take else 0
        self._attach(
            join, addresses, take=take, exclusive=True, prefetch=prefetch, alone=False, leftovers=leftovers
        )

    def mail(self, join: Join) -> None:
        """Let a join have what comes to the mailbox."""
        with self.link.exclusively():
            self.mailbox.attach(join)
        join.inboxes.append(self.mailbox)

    def _attach(self, join: Join, addresses: list[Address], take: bool, **how: Any) -> None:
        def attach() -> tuple[list[Feed], Feed | None]:
            shared: list[Feed] = []
            for address in addresses:
                feed = self._feeds.get(address.name)
                if feed is not None and feed not in shared:
                    shared.append(feed)
            for feed in shared:
                feed.take = feed.take and take
                feed.attach(join)
            own = [address for address in addresses if address.name not in self._feeds]
            if not own:
                return shared, None
            feed = Feed(self, own, take=take, **how)
            feed.joins.append(join)
            for address in own:
                self._feeds[address.name] = feed
            return shared, feed

        with self.link.exclusively():
            shared, feed = attach()
            join.inboxes += shared
            if feed is not None:
                try:
                    self.link.subscribe(feed, join.deadline)
                except BaseException:
                    self._release(feed)
                    raise
                join.inboxes.append(feed)

    def leave(self, join: Join) -> None:
        """End a join, however it ended."""
        with self.link.exclusively():
            for inbox in join.inboxes:
                if isinstance(inbox, Mailbox):
                    inbox.detach(join)
                elif isinstance(inbox, Feed) and inbox.detach(join):
                    self._release(inbox)
                    self.link.unsubscribe(inbox, inbox.close)

    def _release(self, feed: Feed) -> None:
        for address in feed.addresses:
            self._feeds.pop(address.name, None)

    def handed_over(self, arrivals: list[Arrival], take: bool) -> None:
        """These results are the user's now."""
        by_feed: dict[Feed, list[Arrival]] = {}
        for arrival in arrivals:
            inbox = arrival[0][0]
            if isinstance(inbox, Feed):
                by_feed.setdefault(inbox, []).append(arrival)
            elif isinstance(inbox, Mailbox) and take:
                inbox.taken(arrival[1])
        if by_feed:
            with self.link.exclusively():
                for feed, own in by_feed.items():
                    feed.handed_over(own)

    def wait(
        self,
        join: Join,
        *,
        on_interval: Callable[[], Any] | None = None,
        pump: Callable[[Join], float] | None = None,
        rounds: int | None = None,
    ) -> Iterator[list[tuple[Arrival, bool]]]:
        """What comes for a join, batch by batch, until all of it is there.

        Args:
            on_interval: called about once a second, and after each batch.
            pump: brings results that are not consumed; returns in how many seconds it wants to look again.
            rounds: how often to look, None: until all is there.

        Raises:
            celery.exceptions.TimeoutError: not all came in time.
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: what is missing came, and cannot be
                read.
        """
        while True:
            pause = pump(join) if pump is not None and join.aggregate else INTERVAL
            if join.news:
                # Another thread may be adding to it.
                yield [join.news.popleft() for _ in range(len(join.news))]
                continue
            if not join.aggregate:
                return
            # Everything else was handed over. A lone wait need not wait for its timeout to be told.
            if len(join.unreadable) >= len(join.aggregate) and (join.timeout is None or join.alone):
                self._raise_unreadable(join)
            left = join.left()
            if left <= 0:
                raise join.time_is_over()
            if rounds is not None:
                rounds -= 1
                if rounds < 0:
                    return
            self._look(join, min(pause, INTERVAL, left))
            if on_interval is not None:
                on_interval()

    def _look(self, join: Join, seconds: float) -> None:
        for inbox in join.inboxes:
            if inbox.retry_at is not None:
                seconds = min(seconds, TURN)
                if time.monotonic() >= inbox.retry_at:
                    self.link.call(inbox.open, join.deadline)
        self.link.read(seconds, join.has_news, join.deadline)

    @staticmethod
    def _raise_unreadable(join: Join) -> None:
        task_id, why = next(iter(join.unreadable.items()))
        if len(join.unreadable) == 1:
            raise why
        raise type(why)(f"{len(join.unreadable)} results cannot be read, the first of task {task_id}: {why}")
