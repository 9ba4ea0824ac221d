"""What a process consumes from: queues of tasks and groups while a join waits for them, and its mailbox."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from celery import states
from kombu.utils.functional import LRUCache

from fastres.transport import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastres._protocols import Arrival, Delivery, Meta
    from fastres.addresses import Address
    from fastres.join import Join, Reader
    from fastres.transport import Dialect

__all__ = ("Feed", "Inbox", "Mailbox")

#: Seconds between two attempts to be the one reader of a queue.
TURN = 0.1
#: Results that were handed over and are kept for joins that come late, in each feed.
REMEMBERED = 1000
#: Final results that came to the mailbox and nobody has asked for yet.
UNCLAIMED = 8192


class Opening:
    """An inbox on one channel: what came over another one will be redelivered, and cannot be acknowledged here."""

    def __init__(self, inbox: Inbox, speak: Dialect, channel: Any) -> None:
        self.inbox = inbox
        self.speak = speak
        self.channel = channel
        self.addresses: dict[str, Address] = {}
        #: Delivery tags, in order.
        self.unacknowledged: dict[Any, None] = {}
        self.cancelled = False

    def receive(self, deliveries: list[Delivery]) -> None:
        waiting = self.unacknowledged
        for delivery in deliveries:
            delivery.source = self
            waiting[delivery.delivery_tag] = None
        if self is self.inbox.opening:
            self.inbox.received += deliveries

    def on_cancel(self, tag: str) -> None:
        """The queue was deleted under its consumer."""
        self.cancelled = True

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Acknowledge in as few frames as possible."""
        waiting = self.unacknowledged
        tags = [delivery.delivery_tag for delivery in deliveries if delivery.source is self]
        tags = [tag for tag in tags if tag in waiting]
        if not tags:
            return
        for tag in tags:
            del waiting[tag]
        lowest = next(iter(waiting), None)
        if lowest is None:
            all_up_to: Any = max(tags)
        else:
            all_up_to = max((tag for tag in tags if tag < lowest), default=None)
        self.speak.acknowledge(self.channel, tags, all_up_to)


class Inbox:
    """Consumes from some addresses through the link of a reader: what feeds and mailboxes have in common."""

    def __init__(self, reader: Reader, addresses: list[Address], exclusive: bool, prefetch: int) -> None:
        self.reader = reader
        self.addresses = addresses
        self.joins: list[Join] = []
        self.opening: Opening | None = None
        self.received: list[Delivery] = []
        #: When to try again to be the one reader, on the monotonic clock.
        self.retry_at: float | None = None
        self._exclusive = exclusive
        self._prefetch = prefetch

    def open(self, speak: Dialect) -> None:
        if self.opening is not None and self.opening.speak is speak:
            return
        self.received.clear()
        self.retry_at = None
        self.opening = Opening(self, speak, speak.channel())
        speak.prefetch(self.opening.channel, self._prefetch)
        try:
            for address in self.addresses:
                self._consume(self.opening, address)
        except Busy:
            # One reader at a time: results shared out between two would complete neither's join.
            self._leave()
            self.retry_at = time.monotonic() + TURN

    def flush(self) -> None:
        """Hand on what was received."""
        if self.received:
            deliveries, self.received = self.received, []
            self._deliver(deliveries)
        if self.opening is not None and self.opening.cancelled:
            self.reader.link.attempt(self._reopen)

    def _consume(self, opening: Opening, address: Address) -> None:
        state = opening.speak.declare(self.reader.addresses.queue(address))
        if self._exclusive and state.consumers:
            raise Busy(address.name)
        tag = self.reader.next_tag()
        opening.addresses[tag] = address
        opening.speak.consume(
            opening.channel, address.name, tag, opening.receive, opening.on_cancel, self._exclusive
        )

    def _reopen(self, speak: Dialect) -> None:
        self._leave()
        self.open(speak)

    def _leave(self) -> None:
        opening, self.opening = self.opening, None
        if opening is not None:
            opening.speak.leave(opening.channel, list(opening.addresses), list(opening.unacknowledged))

    def _deliver(self, deliveries: list[Delivery]) -> None:
        raise NotImplementedError

    def _decode(self, deliveries: list[Delivery]) -> list[Arrival]:
        arrivals, refused = self.reader.decoder.decode_all(deliveries)
        for delivery, exc in refused:
            self.reader.report_unreadable(delivery, self._name_of(delivery), exc)
            task_id = delivery.correlation_id
            for join in self.joins:
                if task_id in join.aggregate:
                    join.unreadable[str(task_id)] = exc
        return arrivals

    def _name_of(self, delivery: Delivery) -> str:
        return self._address_of(delivery).name

    @staticmethod
    def _address_of(delivery: Delivery) -> Address:
        address: Address = delivery.source.addresses[delivery.consumer_tag]
        return address

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

    def _report_repeated(self, delivery: Delivery, task_id: str) -> None:
        # The broker redelivers what was not acknowledged in time: nothing to tell anybody.
        if not delivery.redelivered:
            self.reader.reports.add(
                "repeated", self._name_of(delivery), task_id, delivery.delivery_tag,
                "this task's result came before; the first one counts", 0, recount=True,
            )  # fmt: skip


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
        #: For joins that come late: arrivals not handed over yet, by delivery tag, and the last that were.
        self._held: dict[Any, Arrival] = {}
        self._last: deque[Arrival] = deque(maxlen=REMEMBERED)
        self._latest_state: dict[str, Delivery] = {}

    def open(self, speak: Dialect) -> None:
        if self.opening is None or self.opening.speak is not speak:
            self._held.clear()
            self._latest_state.clear()
        super().open(speak)

    def attach(self, join: Join) -> None:
        self.joins.append(join)
        join.offer([(None, task_id, meta) for _, task_id, meta in self._last])
        join.offer(list(self._held.values()))

    def detach(self, join: Join) -> bool:
        """Whether that was the last join."""
        self.joins.remove(join)
        if join.aggregate:
            self._emptied = False
        return not self.joins

    def peek(self, task_id: str) -> Meta | None:
        """What has come for a task and was not handed over yet."""
        for _, held_id, meta in self._held.values():
            if held_id == task_id:
                return meta
        return None

    def held(self, address: Address) -> int:
        """How many results have come from an address and were not handed over yet."""
        deliveries = [delivery for delivery, _, _ in self._held.values()] + self.received
        return sum(self._address_of(delivery) == address for delivery in deliveries)

    def handed_over(self, arrivals: list[Arrival]) -> None:
        taken = self.reader.taken
        self._last.extend(arrivals)
        for delivery, _, _ in arrivals:
            self._held.pop(delivery.delivery_tag, None)
            if self.take:
                address = self._address_of(delivery)
                taken[address.name] = taken.get(address.name, 0) + 1
                if self._alone:
                    self._finished.append(address)
        if self.take:
            self._acknowledge([delivery for delivery, _, _ in arrivals])

    def close(self, speak: Dialect) -> None:
        if self.opening is None:
            return
        over: list[Address] = []
        if self.take and self.reader.auto_delete:
            if self._alone:
                over = self._finished
            elif self._emptied and not self.opening.unacknowledged:
                over = self.addresses + self._leftovers
        for address in over:
            speak.delete(self.opening.channel, address.name)
        self._leave()

    def _deliver(self, deliveries: list[Delivery]) -> None:
        arrivals = self._decode(deliveries)
        if self.take and any(delivery.keep for delivery in deliveries):
            self.take = False
        for arrival in arrivals:
            self._held[arrival[0].delivery_tag] = arrival
        self._supersede(arrivals)
        repeated, foreign = self._offer(arrivals)
        for delivery, task_id, meta in repeated:
            self._held.pop(delivery.delivery_tag, None)
            if meta["status"] in states.READY_STATES:
                self._report_repeated(delivery, task_id)
        if self.take and repeated:
            self._acknowledge([delivery for delivery, _, _ in repeated])
        for delivery, task_id, meta in foreign:
            self._held.pop(delivery.delivery_tag, None)
            self._emptied = False
            if self._alone:
                self.reader.reports.add(
                    "unknown", self._name_of(delivery), task_id, delivery.delivery_tag,
                    f"nobody waits for this task ({meta['status']}); the message is left in its queue", 0,
                )  # fmt: skip
        if self._prefetch and self.opening is not None:
            stuck = len(self.opening.unacknowledged) - len(self._held)
            if not self.take or stuck > self._prefetch / 2:
                self.reader.link.attempt(self._unlimit)

    def _supersede(self, arrivals: list[Arrival]) -> None:
        """Of a task's states that are not final, only the latest is held."""
        for delivery, task_id, meta in arrivals:
            if not self._latest_state and meta["status"] in states.READY_STATES:
                continue
            before = self._latest_state.pop(task_id, None)
            if before is not None and self.take:
                self._held.pop(before.delivery_tag, None)
                self._acknowledge([before])
            if meta["status"] not in states.READY_STATES:
                self._latest_state[task_id] = delivery

    def _unlimit(self, speak: Dialect) -> None:
        """Messages that stay unacknowledged must not keep others from coming."""
        self._prefetch = 0
        if self.opening is not None:
            speak.unlimit(self.opening.channel, list(self.opening.addresses))
            for address in self.addresses:
                self._consume(self.opening, address)

    def _acknowledge(self, deliveries: list[Delivery]) -> None:
        opening = self.opening
        if opening is not None:
            self.reader.link.attempt(lambda speak: opening.acknowledge(deliveries))


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
        #: Called with the id and the meta of each final result, in the thread of somebody who waits.
        self.on_final: Callable[[str, Meta], object] | None = None
        self._to_tell: deque[tuple[str, Meta]] = deque()

    def tell(self) -> None:
        """Call ``on_final`` for what has come since."""
        while self._to_tell and self.on_final is not None:
            self.on_final(*self._to_tell.popleft())

    def add(self, address: Address, deadline: float | None = None) -> None:
        """Receive at this address too, from now on."""

        link = self.reader.link

        def add(speak: Dialect) -> None:
            if address not in self.addresses:
                if self.opening is not None:
                    self._consume(self.opening, address)
                self.addresses.append(address)
            if not self._subscribed:
                link.subscribe(self, deadline)
                self._subscribed = True

        if address not in self.addresses:
            link.call(add, deadline)

    def expect(self, task_id: str) -> None:
        """A task was sent: keep its result until it is asked for, however many others come."""
        self._expected.add(task_id)
        self._handed_over.pop(task_id, None)

    def forget(self, task_id: str) -> None:
        """Nobody expects this result any more."""
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
        there = ((task_id, self.peek(task_id)) for task_id in join.aggregate.missing())
        join.offer([(None, task_id, meta) for task_id, meta in there if meta is not None])

    def detach(self, join: Join) -> None:
        self.joins.remove(join)

    def peek(self, task_id: str) -> Meta | None:
        """The latest that has come for a task and was not taken."""
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

    def _deliver(self, deliveries: list[Delivery]) -> None:
        arrivals = self._decode(deliveries)
        news = []
        for arrival in arrivals:
            delivery, task_id, meta = arrival
            if meta["status"] not in states.READY_STATES:
                self._states[task_id] = meta
            elif task_id in self._arrived or task_id in self._unclaimed or task_id in self._handed_over:
                self._report_repeated(delivery, task_id)
                continue
            else:
                (self._arrived if task_id in self._expected else self._unclaimed)[task_id] = meta
                self._states.pop(task_id, None)
                if self.on_final is not None:
                    self._to_tell.append((task_id, meta))
                group_id = meta.get("group_id")
                if group_id:
                    self._per_group[group_id] = self._per_group.get(group_id, 0) + 1
            news.append(arrival)
        if self.joins:
            self._offer(news)
        if self.opening is not None:
            opening = self.opening
            self.reader.link.attempt(lambda speak: opening.acknowledge(deliveries))
