"""What a process consumes from: queues of tasks and groups while a join waits for them, and its mailbox."""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from celery import states

from fastres.amqp.consumer import Consumer
from fastres.amqp.session import Busy
from fastres.errors import AccessRefused, refusal
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fastres._protocols import Arrival, Delivery, Meta, Sorted
    from fastres.addresses import Address
    from fastres.amqp.session import QueueState, Session
    from fastres.read.join import Batch, Join
    from fastres.read.reader import Reader

__all__ = ("Feed", "Inbox", "Mailbox")

#: Seconds between two attempts to be the one reader of a queue.
TURN = 0.1
#: Seconds since something came after which the broker is listened to before anything is acknowledged.
HEED = 1.0
#: Seconds between two attempts to read what the broker has refused.
REFUSED = 1.0
#: Seconds for which a result is held that others may want too, and until what was given back is read again: at
#: least, and this many times the seconds that reading took, and at most.
HOLD, PAUSE, REST, LONGEST_PAUSE = 0.05, 0.05, 2, 2.0
#: Seconds between two looks for a queue that is not there: at first, and at most.
SHORTEST_ABSENCE, LONGEST_ABSENCE = 0.005, 0.1
#: Results that were handed over and are kept for joins that come late, in each feed: few, because while thousands
#: rush by, each that is kept pushes out of the processor's cache what the next one needs.
REMEMBERED = 250
#: Whether a delivery is to stay in its queue.
KEPT = attrgetter("keep")
#: What a result came with.
MARK = itemgetter(0)
#: Final results that came to the mailbox and nobody has asked for yet.
UNCLAIMED = 8192


class Inbox:
    """Consumes from some addresses through the link of a reader: what feeds and mailboxes have in common."""

    def __init__(self, reader: Reader, addresses: list[Address], exclusive: bool, prefetch: int) -> None:
        self.reader = reader
        self.addresses = addresses
        self.joins: list[Join] = []
        self.consumer: Consumer | None = None
        #: When to :meth:`act`, on the monotonic clock.
        self.due: float | None = None
        #: Why it is not open, None: it is, or there is no connection.
        self.refused: Exception | None = None
        self._exclusive = exclusive
        self._prefetch = prefetch

    def open(self, session: Session) -> None:
        """Subscribe. What the broker refuses is no error of who uses the session just now: see :attr:`refused`."""
        if self.consumer is not None and self.consumer.session is session:
            return
        before, self.refused = self.refused, None
        self.due = None
        try:
            self._open(session)
        except session.channel_errors as exc:
            self._leave()
            self.refused = refusal(exc, session.uri)
            self.due = time.monotonic() + REFUSED
            if str(before) != str(self.refused):
                logger.warning("The broker lets no results be read, which is tried again: %s", self.refused)

    def _open(self, session: Session) -> None:
        try:
            if self._exclusive or not self._subscribe(self._begin(session, session.unopened_channel())):
                consumer = self._begin(session, session.channel())
                session.prefetch(consumer.channel, self._prefetch)
                self._found([self._consume(consumer, address) for address in self.addresses])
        except Busy as exc:
            # One reader at a time: results shared out between two would complete neither's join.
            self._leave()
            self.refused = exc
            self.due = time.monotonic() + TURN
        else:
            # Once more, if it was busy before.
            self.refused = None
            if self.consumer is not None:
                session.watch(self.consumer.channel, self.consumer.on_close)

    def check_access(self) -> None:
        """Raises: fastres.AccessRefused: the broker does not let us read, and will not when it is asked again."""
        if isinstance(self.refused, AccessRefused):
            raise self.refused

    def _begin(self, session: Session, channel: Any) -> Consumer:
        self.consumer = Consumer(session, channel)
        return self.consumer

    def _subscribe(self, consumer: Consumer) -> bool:
        """Consume from all addresses at once, if they let us."""
        queues = [self.reader.addresses.queue(address) for address in self.addresses]
        tags = [self.reader.next_tag() for _ in queues]
        consumer.addresses.update(zip(tags, self.addresses))
        answer = consumer.session.subscribe(
            consumer.channel, list(zip(queues, tags)), consumer.receive, consumer.on_cancel
        )
        if answer is None:
            return False
        self._found(answer)
        return True

    def _found(self, states: list[QueueState]) -> None:
        """Called with what was in the queues when they were opened."""

    def act(self, session: Session) -> None:
        """Do what is due: try again to be the one reader."""
        self.open(session)

    def is_catching_up(self) -> bool:
        """Whether more will come at once, before which nobody is to be told of what has come."""
        return False

    def flush(self) -> None:
        """Hand on what was received."""
        if self.consumer is None:
            return
        received = self.consumer.take_received()
        if received:
            self._deliver(self.consumer, received)
        if self.consumer is not None and self.consumer.cancelled:
            self.reader.link.attempt(self._reopen)

    def awaited(self) -> int:
        """How many results the joins at this inbox wait for, of those that may come before one is acknowledged."""
        awaited = sum(len(join.aggregate) for join in self.joins)
        return min(awaited, self._prefetch) if self._prefetch else awaited

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        """The first ``count`` results of a batch are the user's now."""
        raise NotImplementedError

    def _consume(self, consumer: Consumer, address: Address) -> QueueState:
        state = consumer.session.declare(self.reader.addresses.queue(address))
        if self._exclusive and state.consumers:
            raise Busy(address.name)
        tag = self.reader.next_tag()
        consumer.addresses[tag] = address
        consumer.session.consume(
            consumer.channel, address.name, tag, consumer.receive, consumer.on_cancel, self._exclusive
        )
        return state

    def _reopen(self, session: Session) -> None:
        self._leave()
        self.open(session)

    def _leave(self) -> None:
        consumer, self.consumer = self.consumer, None
        if consumer is not None:
            consumer.session.leave(consumer.channel, list(consumer.addresses), list(consumer.unacknowledged))

    def _deliver(self, consumer: Consumer, deliveries: list[Delivery]) -> None:
        raise NotImplementedError

    def _acknowledge(self, consumer: Consumer, deliveries: Iterable[Delivery]) -> int:
        """Acknowledge deliveries: how many there were that had not been."""
        tags = consumer.settle(deliveries)
        if tags and consumer is self.consumer:
            self.reader.link.attempt(lambda session: consumer.acknowledge(tags), reads=False)
        return len(tags)

    def _decode(self, consumer: Consumer, deliveries: list[Delivery]) -> tuple[list[Arrival], int]:
        """The results in deliveries, and how many deliveries held none."""
        arrivals, refused = self.reader.decoder.decode_all(deliveries)
        for delivery, exc in refused:
            self.reader.reports.unreadable(delivery, consumer.address_of(delivery).name, exc)
            task_id = delivery.correlation_id
            for join in self.joins:
                if task_id in join.aggregate:
                    join.unreadable[str(task_id)] = exc
        return arrivals, len(refused)

    def _offer(self, consumer: Consumer, arrivals: list[Arrival]) -> Sorted:
        """Offer arrivals to every join: the answer is that of the one who could use them most."""
        if len(self.joins) == 1:
            return self.joins[0].offer(arrivals, self, consumer)
        # By their place, which tells arrivals apart that are equal.
        came: list[set[int]] = [set(), set(), set()]
        for join in self.joins:
            for places, sort in zip(came, join.offer(arrivals, self, consumer)):
                places.update(map(id, sort))
        sorts: Sorted = ([], [], [], [])
        for arrival in arrivals:
            best = next((number for number, places in enumerate(came) if id(arrival) in places), 3)
            sorts[best].append(arrival)
        return sorts

    def _report_repeated(self, consumer: Consumer, delivery: Delivery, task_id: str) -> None:
        # The broker redelivers what was not acknowledged in time: nothing to tell anybody.
        if not delivery.redelivered:
            self.reader.reports.add(
                "repeated", consumer.address_of(delivery).name, task_id, delivery.delivery_tag,
                "this task's result came before; the first one counts", 0, recount=True,
            )  # fmt: skip


class Feed(Inbox):
    """Results of tasks, for as long as a join waits for them.

    It begins by taking what comes: messages are acknowledged when they have been handed over, so that a lost
    connection loses none. With the first message that somebody else may want, or if nothing is to be taken, it
    *shares* the queues: what has come is held for a moment, in which more may come, and given back, whoever it was
    for; after a pause for the others it is read again. Nobody is kept from a result for longer than ``HOLD`` and
    the time that reading the queue takes.

    Args:
        reader: whose link it consumes through.
        addresses: the queues of results, or with ``with_states`` of states and then of results.
        take: acknowledge what is handed over; otherwise everything goes back.
        exclusive: one reader at a time takes: others wait for their turn.
        prefetch: messages that the broker sends ahead, 0: all it has.
        deletes: whether a queue is deleted when its result was taken, a group's when all that came was.
        leftovers: queues to delete with the others.
        declares: whether the queues are made if they are not there. To that of a single task nobody may ever
            write: its id may be anybody's invention.
    """

    def __init__(
        self,
        reader: Reader,
        addresses: list[Address],
        *,
        take: bool,
        exclusive: bool = False,
        prefetch: int = 0,
        deletes: bool = False,
        leftovers: Sequence[Address] = (),
        declares: bool = True,
    ) -> None:
        super().__init__(reader, addresses, exclusive and take, prefetch if take else 0)
        self._prefetch_to_take = self._prefetch
        #: Whether others may want what comes.
        self.shares = not take
        self._declares = declares
        self._absence = SHORTEST_ABSENCE
        self._deletes = deletes
        self._leftovers = leftovers
        self._emptied = True
        #: For joins that come late: the last results that came or were handed over, and what ended joins left.
        self._last: deque[Arrival] = deque(maxlen=REMEMBERED)
        self._left_over: list[Batch] = []
        #: Deliveries that no join will ever be handed.
        self._stuck = 0
        #: The latest state of each task that has one and no result.
        self._latest_state: dict[str, Delivery] = {}
        #: While sharing: states that were told, when the queues were opened, how many messages they had then, when
        #: the last came, and whether all of them have come.
        self._told: set[int] = set()
        self._opened = 0.0
        self._backlog = 0
        self._came = 0.0
        #: Queues of single tasks whose result was taken.
        self._finished: list[Address] = []
        #: Results that were handed over and are to be taken out of their queues, by queue.
        self._to_take: dict[Address, set[str]] = {}

    def _open(self, session: Session) -> None:
        self._left_over.clear()
        self._latest_state.clear()
        self._stuck = 0
        self._backlog = 0
        if not self._declares and not any(session.browse([(address.name, 0) for address in self.addresses])):
            self.due = time.monotonic() + self._absence
            self._absence = min(2 * self._absence, LONGEST_ABSENCE)
            return
        super()._open(session)
        if self.consumer is None and self._exclusive:
            # Somebody waits for a part of it, or takes it: next to the former it can be read.
            self._share()
            super()._open(session)
            if self.consumer is None:
                self._exclusive, self.shares, self._prefetch = True, False, self._prefetch_to_take
        self._opened = self._came = time.monotonic()
        if self.shares and self.consumer is not None and self._backlog:
            self.due = self._opened + HOLD

    def act(self, session: Session) -> None:
        if self.due is None or time.monotonic() < self.due:
            return
        if self.consumer is None or self.consumer.session is not session:
            self.open(session)
        elif self.consumer.unacknowledged:
            self.give_back(session)
        else:
            self.due = None

    def is_catching_up(self) -> bool:
        """Whether messages are still to come that were in the queues before."""
        return self.shares and self._backlog > 0 and time.monotonic() < self._came + HOLD

    def give_back(self, session: Session) -> None:
        """Leave what has come to others for a while."""
        took = max(0.0, self._came - self._opened)
        self._leave()
        self.due = time.monotonic() + max(PAUSE, min(took * REST, LONGEST_PAUSE))

    def holds(self) -> bool:
        """Whether others may be waiting for what this one has."""
        return self.shares and self.consumer is not None and bool(self.consumer.unacknowledged)

    def attach(self, join: Join) -> None:
        waiting = self._waiting()
        self.joins.append(join)
        join.offer(list(self._last), None, None)
        for batch in waiting:
            join.offer(batch.arrivals, self, batch.consumer)
        if self.holds() and join.aggregate:
            # It may be among what is held and not remembered.
            self.due = time.monotonic()

    def share_from_now_on(self) -> None:
        """A join has come that takes nothing."""
        if not self.shares:
            self._share()
            self.due = time.monotonic()

    def detach(self, join: Join) -> bool:
        """Whether that was the last join."""
        if join in self.joins:
            self.joins.remove(join)
        if not self.shares:
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
        consumer = self.consumer
        if consumer is None:
            return 0
        tags = {tag for tag, consumed in consumer.addresses.items() if consumed == address}
        return sum(tag in tags for tag in consumer.unacknowledged.values())

    def read_deliveries(self, address: Address, session: Session) -> None:
        """Read what the broker has delivered until now: on the consumers' channel its answer comes after them."""
        if self.consumer is not None and self.consumer.session is session:
            self.consumer.channel.queue_declare(address.name, passive=True)

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        arrivals = batch.arrivals[:count]
        consumer: Consumer | None = batch.consumer
        if not arrivals or consumer is None:
            return
        self._last.extend([(None, task_id, meta) for _, task_id, meta in arrivals[-REMEMBERED:]])
        if not take:
            return
        if time.monotonic() > self._came + HEED:
            # The broker may have closed the channel over what was held for so long.
            self.reader.link.attempt(lambda session: session.heed())
        if not self.shares and consumer is self.consumer and not consumer.cancelled:
            places = map(consumer.address_of, map(MARK, arrivals))
            self._finished += [address for address in places if address.of_task is not None]
            taken = self._acknowledge(consumer, map(MARK, arrivals))
            self.reader.count_taken(self.addresses[-1], taken)
            return
        for delivery, task_id, _ in arrivals:
            if not delivery.keep:
                self._to_take.setdefault(consumer.address_of(delivery), set()).add(task_id)

    def close(self, session: Session) -> None:
        if self.consumer is None:
            return
        over: list[Address] = []
        full: list[Address] = []
        if self._deletes and self._exclusive and self._emptied and not self.consumer.unacknowledged:
            over = [*reversed(self.addresses), *self._leftovers]
        elif self._deletes:
            over = self._finished
            # States on the way to a result that is gone.
            full = [self.reader.addresses.states(address.of_task) for address in over if address.of_task]
        if over:
            names = [address.name for address in over]
            tags = list(self.consumer.addresses)
            session.delete(self.consumer.channel, names, tags, [address.name for address in full])
        self._leave()

    def to_take(self) -> dict[Address, set[str]]:
        """The results that are to be taken out of their queues after the end."""
        return self._to_take

    def _waiting(self) -> list[Batch]:
        """What has come and was not handed over yet."""
        return [*self._left_over, *(batch for join in self.joins for batch in join.batches_of(self))]

    def _share(self) -> None:
        self.shares = True
        self._exclusive = False
        self._prefetch = 0
        self._backlog = 0

    def _found(self, states: list[QueueState]) -> None:
        self._backlog += sum(state.messages for state in states)

    def _deliver(self, consumer: Consumer, deliveries: list[Delivery]) -> None:
        arrivals, refused = self._decode(consumer, deliveries)
        if self.shares:
            self._pass_by(consumer, arrivals, len(deliveries))
            return
        self._came = time.monotonic()
        ready, states_, repeated, foreign = self._offer(consumer, arrivals)
        if states_ or self._latest_state:
            self._supersede(consumer, ready, states_)
        for delivery, task_id, meta in repeated:
            if meta["status"] in states.READY_STATES:
                self._report_repeated(consumer, delivery, task_id)
        if repeated:
            self._acknowledge(consumer, map(MARK, repeated))
        if foreign or any(map(KEPT, deliveries)):
            self._emptied = False
            self._remember(consumer, [*ready, *foreign])
            self.share_from_now_on()
            return
        self._stuck += refused
        if self._prefetch and self._stuck > self._prefetch / 2:
            self.reader.link.attempt(self._unlimit)

    def _pass_by(self, consumer: Consumer, arrivals: list[Arrival], count: int) -> None:
        """Offer what others may want too."""
        self._backlog = max(0, self._backlog - count)
        self._came = time.monotonic()
        self.due = self._came + HOLD if self._backlog or self.due is None else self.due
        finals: dict[str, Arrival] = {}
        news: list[Arrival] = []
        for arrival in arrivals:
            delivery, task_id, meta = arrival
            if meta["status"] in states.READY_STATES:
                before = finals.get(task_id)
                # Of several results the first success counts, otherwise the latest.
                if before is None or before[2]["status"] != states.SUCCESS:
                    finals[task_id] = arrival
            else:
                # Two updates that say the same are told once if they were read before.
                told = hash((task_id, bytes(delivery.body)))
                if not (delivery.redelivered and told in self._told):
                    news.append(arrival)
                self._told.add(told)
        news += finals.values()
        ready, _, _, foreign = self._offer(consumer, news)
        self._remember(consumer, [*ready, *foreign])

    def _remember(self, consumer: Consumer, arrivals: list[Arrival]) -> None:
        """For joins that come late, and for looks."""
        for delivery, task_id, _ in arrivals:
            self.reader.reports.stranger(delivery, consumer.address_of(delivery), task_id)
        finals = [arrival for arrival in arrivals[-REMEMBERED:] if arrival[2]["status"] in states.READY_STATES]
        if finals:
            self._last.extend([(None, task_id, meta) for _, task_id, meta in finals])
            self.reader.see([(consumer.address_of(delivery), meta) for delivery, _, meta in finals])

    def _supersede(self, consumer: Consumer, ready: list[Arrival], states_: list[Arrival]) -> None:
        """Of a task's states that are not final, only the latest is kept."""
        over = [self._latest_state.pop(task_id, None) for _, task_id, _ in ready]
        for delivery, task_id, _ in states_:
            over.append(self._latest_state.get(task_id))
            self._latest_state[task_id] = delivery
        self._acknowledge(consumer, [delivery for delivery in over if delivery is not None])

    def _unlimit(self, session: Session) -> None:
        """Messages that stay unacknowledged must not keep others from coming."""
        self._prefetch = 0
        if self.consumer is not None:
            session.unlimit(self.consumer.channel, list(self.consumer.addresses))
            for address in self.addresses:
                self._consume(self.consumer, address)


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

        def add(session: Session) -> None:
            if address not in self.addresses:
                if self.consumer is not None:
                    self._consume(self.consumer, address)
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
        if join in self.joins:
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

    def _deliver(self, consumer: Consumer, deliveries: list[Delivery]) -> None:
        arrivals, _ = self._decode(consumer, deliveries)
        news = []
        came, per_group = (self._arrived, self._unclaimed, self._handed_over), self._per_group
        for arrival in arrivals:
            delivery, task_id, meta = arrival
            if meta["status"] not in states.READY_STATES:
                self._states[task_id] = meta
            elif task_id in came[0] or task_id in came[1] or task_id in came[2]:
                self._report_repeated(consumer, delivery, task_id)
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
            self._offer(consumer, news)
        self._acknowledge(consumer, deliveries)

    def _trim(self) -> None:
        places: tuple[dict[str, Any], ...] = (self._unclaimed, self._states, self._handed_over, self._per_group)
        for place in places:
            for task_id in list(islice(place, max(0, len(place) - UNCLAIMED))):
                del place[task_id]
