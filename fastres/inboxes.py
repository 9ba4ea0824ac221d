"""What a process consumes from: queues of tasks and groups while a join waits for them, and its mailbox."""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from celery import states

from fastres.transport import Busy, all_up_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastres._protocols import Arrival, Delivery, Meta, Sorted
    from fastres.addresses import Address
    from fastres.join import Batch, Join, Reader
    from fastres.transport import Dialect

__all__ = ("Feed", "Inbox", "Mailbox")

#: Seconds between two attempts to be the one reader of a queue.
TURN = 0.1
#: Results that were handed over and are kept for joins that come late, in each feed: few, because while thousands
#: rush by, each that is kept pushes out of the processor's cache what the next one needs.
REMEMBERED = 250
#: Whether a delivery is to stay in its queue.
KEPT = attrgetter("keep")
TAG, CONSUMER = attrgetter("delivery_tag"), attrgetter("consumer_tag")
#: What a result came with.
MARK = itemgetter(0)
#: Final results that came to the mailbox and nobody has asked for yet.
UNCLAIMED = 8192


class Opening:
    """An inbox on one channel: what came over another one will be redelivered, and cannot be acknowledged here."""

    def __init__(self, inbox: Inbox, speak: Dialect, channel: Any) -> None:
        self.inbox = inbox
        self.speak = speak
        self.channel = channel
        #: By consumer tag.
        self.addresses: dict[str, Address] = {}
        #: Consumer tags by delivery tag, in order.
        self.unacknowledged: dict[Any, str] = {}
        self.cancelled = False

    def receive(self, deliveries: list[Delivery]) -> None:
        """Called with deliveries of the consumers."""
        if len(self.addresses) == 1:
            self.unacknowledged.update(dict.fromkeys(map(TAG, deliveries), deliveries[0].consumer_tag))
        else:
            self.unacknowledged.update(zip(map(TAG, deliveries), map(CONSUMER, deliveries)))
        if self is self.inbox.opening:
            self.inbox.received += deliveries

    def on_cancel(self, tag: str) -> None:
        """The queue was deleted under its consumer."""
        self.cancelled = True

    def address_of(self, delivery: Delivery) -> Address:
        return self.addresses[delivery.consumer_tag]

    def settle(self, deliveries: Iterable[Delivery]) -> list[Any]:
        """The delivery tags that were not acknowledged before, and are about to be."""
        settle = self.unacknowledged.pop
        return [tag for tag in map(TAG, deliveries) if settle(tag, None)]

    def acknowledge(self, tags: list[Any]) -> None:
        """Acknowledge in as few frames as possible."""
        self.speak.acknowledge(self.channel, tags, all_up_to(tags, self.unacknowledged))


class Inbox:
    """Consumes from some addresses through the link of a reader: what feeds and mailboxes have in common."""

    def __init__(self, reader: Reader, addresses: list[Address], exclusive: bool, prefetch: int) -> None:
        self.reader = reader
        self.addresses = addresses
        self.joins: list[Join] = []
        self.opening: Opening | None = None
        #: Deliveries that came since the last flush.
        self.received: list[Delivery] = []
        #: When to try again to be the one reader, on the monotonic clock.
        self.retry_at: float | None = None
        self._exclusive = exclusive
        self._prefetch = prefetch

    def open(self, speak: Dialect) -> None:
        if self.opening is not None and self.opening.speak is speak:
            return
        self.retry_at = None
        try:
            if self._exclusive or not self._subscribe(self._begin(speak)):
                opening = self._begin(speak)
                for address in self.addresses:
                    self._consume(opening, address)
        except Busy:
            # One reader at a time: results shared out between two would complete neither's join.
            self._leave()
            self.retry_at = time.monotonic() + TURN

    def _begin(self, speak: Dialect) -> Opening:
        self.received.clear()
        self.opening = Opening(self, speak, speak.channel())
        speak.prefetch(self.opening.channel, self._prefetch)
        return self.opening

    def _subscribe(self, opening: Opening) -> bool:
        """Consume from all addresses at once, if they let us."""
        queues = [self.reader.addresses.queue(address) for address in self.addresses]
        tags = [self.reader.next_tag() for _ in queues]
        opening.addresses.update(zip(tags, self.addresses))
        return opening.speak.subscribe(
            opening.channel, list(zip(queues, tags)), opening.receive, opening.on_cancel
        )

    def flush(self) -> None:
        """Hand on what was received."""
        received, self.received = self.received, []
        if received and self.opening is not None:
            self._deliver(self.opening, received)
        if self.opening is not None and self.opening.cancelled:
            self.reader.link.attempt(self._reopen)

    def awaited(self) -> int:
        """How many results the joins at this inbox wait for, of those that may come before one is acknowledged."""
        awaited = sum(len(join.aggregate) for join in self.joins)
        return min(awaited, self._prefetch) if self._prefetch else awaited

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        """The first ``count`` results of a batch are the user's now."""
        raise NotImplementedError

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

    def _deliver(self, opening: Opening, deliveries: list[Delivery]) -> None:
        raise NotImplementedError

    def _acknowledge(self, opening: Opening, deliveries: Iterable[Delivery]) -> int:
        """Acknowledge deliveries: how many there were that had not been."""
        tags = opening.settle(deliveries)
        if tags and opening is self.opening:
            self.reader.link.attempt(lambda speak: opening.acknowledge(tags), reads=False)
        return len(tags)

    def _decode(self, opening: Opening, deliveries: list[Delivery]) -> tuple[list[Arrival], int]:
        """The results in deliveries, and how many deliveries held none."""
        arrivals, refused = self.reader.decoder.decode_all(deliveries)
        for delivery, exc in refused:
            self.reader.report_unreadable(delivery, opening.address_of(delivery).name, exc)
            task_id = delivery.correlation_id
            for join in self.joins:
                if task_id in join.aggregate:
                    join.unreadable[str(task_id)] = exc
        return arrivals, len(refused)

    def _offer(self, opening: Opening, arrivals: list[Arrival]) -> Sorted:
        """Offer arrivals to every join: the answer is that of the one who could use them most."""
        if len(self.joins) == 1:
            return self.joins[0].offer(arrivals, self, opening)
        # By their place, which tells arrivals apart that are equal.
        came: list[set[int]] = [set(), set(), set()]
        for join in self.joins:
            for places, sort in zip(came, join.offer(arrivals, self, opening)):
                places.update(map(id, sort))
        sorts: Sorted = ([], [], [], [])
        for arrival in arrivals:
            best = next((number for number, places in enumerate(came) if id(arrival) in places), 3)
            sorts[best].append(arrival)
        return sorts

    def _report_repeated(self, opening: Opening, delivery: Delivery, task_id: str) -> None:
        # The broker redelivers what was not acknowledged in time: nothing to tell anybody.
        if not delivery.redelivered:
            self.reader.reports.add(
                "repeated", opening.address_of(delivery).name, task_id, delivery.delivery_tag,
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
        alone: each queue is that of one task; otherwise they are those of one group, its results the last.
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
        #: For joins that come late: the last results that were handed over, and what ended joins have left.
        self._last: deque[Arrival] = deque(maxlen=REMEMBERED)
        self._left_over: list[Batch] = []
        #: Deliveries that no join will ever be handed.
        self._stuck = 0
        #: The latest state of each task that has one and no result.
        self._latest_state: dict[str, Delivery] = {}

    def open(self, speak: Dialect) -> None:
        if self.opening is None or self.opening.speak is not speak:
            self._left_over.clear()
            self._latest_state.clear()
            self._stuck = 0
        super().open(speak)

    def attach(self, join: Join) -> None:
        waiting = self._waiting()
        self.joins.append(join)
        join.offer(list(self._last), None, None)
        for batch in waiting:
            join.offer(batch.arrivals, self, batch.opening)

    def detach(self, join: Join) -> bool:
        """Whether that was the last join."""
        self.joins.remove(join)
        self._left_over += join.batches_of(self)
        if join.aggregate:
            self._emptied = False
        return not self.joins

    def peek(self, task_id: str) -> Meta | None:
        """What has come for a task and was not handed over yet."""
        for batch in self._waiting():
            for _, waiting_id, meta in batch.arrivals:
                if waiting_id == task_id:
                    return meta
        return None

    def held(self, address: Address) -> int:
        """How many messages have come from an address and were not acknowledged yet."""
        opening = self.opening
        if opening is None:
            return 0
        tags = {tag for tag, consumed in opening.addresses.items() if consumed == address}
        return sum(tag in tags for tag in opening.unacknowledged.values())

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        arrivals = batch.arrivals[:count]
        opening: Opening | None = batch.opening
        if not arrivals or opening is None:
            return
        self._last.extend([(None, task_id, meta) for _, task_id, meta in arrivals[-REMEMBERED:]])
        if not self.take:
            return
        if self._alone:
            self._finished += [opening.address_of(delivery) for delivery, _, _ in arrivals]
        taken = self._acknowledge(opening, map(MARK, arrivals))
        if not self._alone:
            self.reader.count_taken(self.addresses[-1], taken)

    def close(self, speak: Dialect) -> None:
        if self.opening is None:
            return
        over: list[Address] = []
        if self.take and self.reader.auto_delete:
            if self._alone:
                over = self._finished
            elif self._emptied and not self.opening.unacknowledged:
                over = self.addresses + self._leftovers
        if over:
            speak.delete(self.opening.channel, [address.name for address in over])
        self._leave()

    def _waiting(self) -> list[Batch]:
        """What has come and was not handed over yet."""
        return [*self._left_over, *(batch for join in self.joins for batch in join.batches_of(self))]

    def _deliver(self, opening: Opening, deliveries: list[Delivery]) -> None:
        arrivals, refused = self._decode(opening, deliveries)
        if self.take and any(map(KEPT, deliveries)):
            self.take = False
        ready, states_, repeated, foreign = self._offer(opening, arrivals)
        if states_ or self._latest_state:
            self._supersede(opening, ready, states_)
        for delivery, task_id, meta in repeated:
            if meta["status"] in states.READY_STATES:
                self._report_repeated(opening, delivery, task_id)
        if self.take and repeated:
            self._acknowledge(opening, map(MARK, repeated))
        for delivery, task_id, meta in foreign:
            self._emptied = False
            if self._alone:
                self.reader.reports.add(
                    "unknown", opening.address_of(delivery).name, task_id, delivery.delivery_tag,
                    f"nobody waits for this task ({meta['status']}); the message is left in its queue", 0,
                )  # fmt: skip
        self._stuck += refused + len(foreign)
        if self._prefetch and (not self.take or self._stuck > self._prefetch / 2):
            self.reader.link.attempt(self._unlimit)

    def _supersede(self, opening: Opening, ready: list[Arrival], states_: list[Arrival]) -> None:
        """Of a task's states that are not final, only the latest is kept."""
        over = [self._latest_state.pop(task_id, None) for _, task_id, _ in ready]
        for delivery, task_id, _ in states_:
            over.append(self._latest_state.get(task_id))
            self._latest_state[task_id] = delivery
        if self.take:
            self._acknowledge(opening, [delivery for delivery in over if delivery is not None])

    def _unlimit(self, speak: Dialect) -> None:
        """Messages that stay unacknowledged must not keep others from coming."""
        self._prefetch = 0
        if self.opening is not None:
            speak.unlimit(self.opening.channel, list(self.opening.addresses))
            for address in self.addresses:
                self._consume(self.opening, address)


class Mailbox(Inbox):
    """The reply queues of a client: all its results come here, whoever waits for them.

    Nobody else reads these queues, so what came is acknowledged at once and kept here until it is asked for.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader, [], exclusive=False, prefetch=0)
        self._expected: set[str] = set()
        self._arrived: dict[str, Meta] = {}
        # Of these only the newest are kept: see _trim.
        self._unclaimed: dict[str, Meta] = {}
        self._states: dict[str, Meta] = {}
        self._handed_over: dict[str, bool] = {}
        self._per_group: dict[str, int] = {}
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
        join.offer([(None, task_id, meta) for task_id, meta in there if meta is not None], self, None)

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
        return self._per_group.get(group_id, 0)

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        if not take:
            return
        ids = [task_id for _, task_id, _ in batch.arrivals[:count]]
        self._expected.difference_update(ids)
        for place in (self._arrived, self._unclaimed):
            if place:
                for task_id in ids:
                    place.pop(task_id, None)
        self._handed_over.update(dict.fromkeys(ids, True))
        self._trim()

    def _deliver(self, opening: Opening, deliveries: list[Delivery]) -> None:
        arrivals, _ = self._decode(opening, deliveries)
        news = []
        came, per_group = (self._arrived, self._unclaimed, self._handed_over), self._per_group
        for arrival in arrivals:
            delivery, task_id, meta = arrival
            if meta["status"] not in states.READY_STATES:
                self._states[task_id] = meta
            elif task_id in came[0] or task_id in came[1] or task_id in came[2]:
                self._report_repeated(opening, delivery, task_id)
                continue
            else:
                (self._arrived if task_id in self._expected else self._unclaimed)[task_id] = meta
                if self._states:
                    self._states.pop(task_id, None)
                if self.on_final is not None:
                    self._to_tell.append((task_id, meta))
                group_id = meta.get("group_id")
                if group_id:
                    per_group[group_id] = per_group.get(group_id, 0) + 1
            news.append(arrival)
        self._trim()
        if self.joins:
            self._offer(opening, news)
        self._acknowledge(opening, deliveries)

    def _trim(self) -> None:
        places: tuple[dict[str, Any], ...] = (self._unclaimed, self._states, self._handed_over, self._per_group)
        for place in places:
            for task_id in list(islice(place, max(0, len(place) - UNCLAIMED))):
                del place[task_id]
