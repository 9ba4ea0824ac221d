"""Consumers of the queues of tasks and groups, for as long as a join waits for their results."""

from __future__ import annotations

import time
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING

from celery import states

from fastres._protocols import CANCELLED
from fastres.amqp.session import LARGEST_PREFETCH
from fastres.read.inbox import MARK, Inbox
from fastres.read.join import cancelled, sent_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastres._protocols import Arrival, Delivery, Meta
    from fastres.addresses import Address
    from fastres.amqp.consumer import Consumer
    from fastres.amqp.session import QueueState, Session
    from fastres.read.inbox import Context
    from fastres.read.join import Batch, Join

__all__ = ("Feed",)

#: Seconds without deliveries after which the connection is read before the next acknowledgement.
POLL_AFTER = 1.0
#: Seconds for which shared results are held, and pauses before they are read again: the shortest, the factor to
#: the time that reading took, and the longest.
HOLD_TIME, SHORTEST_PAUSE, PAUSE_FACTOR, LONGEST_PAUSE = 0.05, 0.05, 2, 2.0
#: Seconds that a broker may pause while a feed that shares reads its queues to their end, and the number of queues,
#: the last ones, that it asks about then. A busy broker pauses for longer than ``HOLD_TIME``; a feed that requeued its
#: messages would have to begin again.
LONGEST_STALL, FEW_QUEUES = 2.0, 2
#: Seconds between two checks for a missing queue, at first and at most.
SHORTEST_ABSENCE, LONGEST_ABSENCE = 0.005, 0.1
#: The number of handed-over results that a feed keeps for joins that begin late. More of them would push the next
#: results out of the processor's cache.
REMEMBERED = 250
#: Whether a delivery is to stay in its queue.
KEPT = attrgetter("keep")


class Feed(Inbox):
    """Consumes the results of tasks for as long as a join waits for them.

    It begins by taking results: messages are acknowledged after they were handed over, so that a broken connection
    loses none. When a message for another reader arrives, or if nothing is to be taken, the feed *shares* the queues:
    it holds all deliveries for a moment, in which more may arrive, requeues them, and reads again after a pause for
    other readers. No reader waits for a result longer than ``HOLD_TIME`` and the time that reading the queue takes.

    Args:
        context: the objects that all inboxes of the process share.
        addresses: the queues of results, or with ``with_states`` of states and then of results.
        take: acknowledge handed-over results. If False, requeue all.
        exclusive: one reader at a time takes: others wait for their turn.
        prefetch: messages that the broker sends ahead, 0: all it has.
        deletes: delete the queue of a task when its result was taken, and the queue of a group when all were.
        leftovers: queues to delete with the others.
        declares: declare queues that do not exist. False for the queue of a single task, whose id may be invented.
    """

    def __init__(
        self,
        context: Context,
        addresses: list[Address],
        *,
        take: bool,
        exclusive: bool = False,
        prefetch: int = 0,
        deletes: bool = False,
        leftovers: Sequence[Address] = (),
        declares: bool = True,
    ) -> None:
        super().__init__(context, addresses, exclusive and take, prefetch if take else 0)
        self._prefetch_to_take = self._prefetch
        #: Whether other readers may want the messages.
        self.shares = not take
        self._declares = declares
        self._absence = SHORTEST_ABSENCE
        self._deletes = deletes
        self._leftovers = leftovers
        self._emptied = True
        #: For joins that begin late: the last results, and the results that ended joins have left.
        self._last: deque[Arrival] = deque(maxlen=REMEMBERED)
        self._left_over: list[Batch] = []
        #: The number of deliveries that are never handed to a join.
        self._undeliverable = 0
        #: The latest state of each task that has one and no result.
        self._latest_state: dict[str, Delivery] = {}
        #: While sharing: reported states; the number of messages that were in the queues when they were opened and
        #: have not arrived yet; when the first held message arrived, and when the last.
        self._reported: set[int] = set()
        self._backlog = 0
        self._catching_up = False
        self._reading_since: float | None = None
        self._last_arrival = 0.0
        #: Queues of single tasks whose results were taken.
        self._finished: list[Address] = []
        #: Results that were handed over and are to be taken out of their queues, by queue.
        self._to_take: dict[Address, set[str]] = {}

    def _open(self, session: Session) -> None:
        self._left_over.clear()
        self._latest_state.clear()
        self._undeliverable = 0
        self._backlog = 0
        if not self._declares and not any(session.browse([(address.name, 0) for address in self.addresses])):
            self.due = time.monotonic() + self._absence
            self._absence = min(2 * self._absence, LONGEST_ABSENCE)
            return
        super()._open(session)
        if self.consumer is None and self._exclusive:
            # Another reader waits for some of the results, or takes all. In the first case, the queue can be shared.
            self._share()
            super()._open(session)
            if self.consumer is None:
                self._exclusive, self.shares, self._prefetch = True, False, self._prefetch_to_take
        self._last_arrival = time.monotonic()
        # Waiting for the first message does not count as reading.
        self._reading_since = self._last_arrival if self._backlog else None
        self._catching_up = self.shares and self.consumer is not None and self._backlog > 0
        if self._catching_up:
            self.due = self._last_arrival + HOLD_TIME

    def act(self, session: Session) -> None:
        if self.due is None or time.monotonic() < self.due:
            return
        if self.consumer is None or self.consumer.session is not session:
            self.open(session)
        elif self._is_sending(session, self.consumer):
            self.due = time.monotonic() + HOLD_TIME
        elif self.consumer.unacknowledged:
            self.give_back(session)
        else:
            self.due = None

    def is_catching_up(self) -> bool:
        """Whether messages that were in the queues at the start have not arrived yet."""
        return self._catching_up and self.consumer is not None

    def _is_sending(self, session: Session, consumer: Consumer) -> bool:
        """Whether the broker still sends messages that were in the queues at the start."""
        was_catching_up, self._catching_up = self._catching_up, False
        if not was_catching_up or time.monotonic() > self._last_arrival + LONGEST_STALL:
            return False
        before = len(consumer.unacknowledged)
        for address in self.addresses[-FEW_QUEUES:]:
            # The answer arrives after messages that are on the way.
            state = session.inspect(address.name)
            if state is not None and state.messages:
                self._catching_up = True
                tags = sum(consumed == address for consumed in consumer.addresses.values())
                if address.is_quorum and self.held(address) >= LARGEST_PREFETCH * tags:
                    self._consume(consumer, address)
        self._catching_up = self._catching_up or len(consumer.unacknowledged) > before
        return self._catching_up

    def give_back(self, session: Session) -> None:
        reading_time = 0.0 if self._reading_since is None else max(0.0, self._last_arrival - self._reading_since)
        self._leave()
        self.due = time.monotonic() + max(SHORTEST_PAUSE, min(reading_time * PAUSE_FACTOR, LONGEST_PAUSE))

    def holds(self) -> bool:
        return self.shares and self.consumer is not None and bool(self.consumer.unacknowledged)

    def attach(self, join: Join) -> None:
        waiting = self._waiting()
        self.joins.append(join)
        join.offer(list(self._last), None, None)
        for batch in waiting:
            join.offer(batch.arrivals, self, batch.consumer)
        if self.holds() and join.aggregate:
            # Its result may be held without being among the remembered results.
            self.due = time.monotonic()

    def share_from_now_on(self) -> None:
        """Share the queues from now on: a new join takes nothing."""
        if not self.shares:
            self._share()
            self.due = time.monotonic()

    def detach(self, join: Join) -> bool:
        over = super().detach(join)
        if not self.shares:
            self._left_over += join.batches_of(self)
        if join.aggregate:
            self._emptied = False
        return over

    def peek(self, task_id: str) -> Meta | None:
        """The result of a task that has arrived and was not handed over yet."""
        for batch in self._waiting():
            for _, waiting_id, meta in batch.arrivals:
                if waiting_id == task_id:
                    return meta
        return None

    def held(self, address: Address) -> int:
        """The number of unacknowledged messages from an address."""
        consumer = self.consumer
        if consumer is None:
            return 0
        tags = {tag for tag, consumed in consumer.addresses.items() if consumed == address}
        return sum(tag in tags for tag in consumer.unacknowledged.values())

    def read_deliveries(self, address: Address, session: Session) -> None:
        """Read all deliveries until now: the reply to a question on the consumers' channel arrives after them."""
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
        if time.monotonic() > self._last_arrival + POLL_AFTER:
            # The broker may have closed the channel because of its consumer_timeout.
            self.context.link.attempt(lambda session: session.poll())
        if not self.shares and consumer is self.consumer and not consumer.cancelled:
            places = map(consumer.address_of, map(MARK, arrivals))
            self._finished += [address for address in places if address.of_task is not None]
            taken = self._acknowledge(consumer, map(MARK, arrivals))
            self.context.count_taken(self.addresses[-1], taken)
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
            full = [self.context.addresses.states(address.of_task) for address in over if address.of_task]
        if over:
            session.delete(self.consumer.channel, over, list(self.consumer.addresses), full)
        self._leave()

    def to_take(self) -> dict[Address, set[str]]:
        """The results that are to be taken out of their queues after the end."""
        return self._to_take

    def _waiting(self) -> list[Batch]:
        """Batches that have arrived and were not handed over yet."""
        return [*self._left_over, *(batch for join in self.joins for batch in join.batches_of(self))]

    def _share(self) -> None:
        self.shares = True
        self._exclusive = False
        self._prefetch = 0
        self._backlog = 0
        self._catching_up = False

    def _found(self, states: list[QueueState]) -> None:
        self._backlog += sum(state.messages for state in states)

    def _deliver(self, consumer: Consumer, deliveries: list[Delivery]) -> None:
        arrivals, refused = self._decode(consumer, deliveries)
        if self.shares:
            self._offer_shared(consumer, arrivals, len(deliveries))
            return
        self._last_arrival = time.monotonic()
        ready, states_, repeated, foreign = self._offer(consumer, arrivals)
        if states_ or self._latest_state:
            self._drop_old_states(consumer, ready, states_)
        for delivery, task_id, meta in repeated:
            if meta["status"] in states.READY_STATES:
                self._report_repeated(consumer, delivery, task_id)
        if repeated:
            self._acknowledge(consumer, map(MARK, repeated))
        if foreign or any(map(KEPT, deliveries)):
            self._emptied = False
            self._remember(consumer, [*ready, *foreign])
            self.share_from_now_on()
            self._offer_cancelled(consumer, arrivals)
            return
        self._undeliverable += refused
        if self._prefetch and self._undeliverable > self._prefetch / 2:
            self.context.link.attempt(self._unlimit)

    def _offer_shared(self, consumer: Consumer, arrivals: list[Arrival], count: int) -> None:
        """Offer messages that other readers may want too."""
        self._backlog = max(0, self._backlog - count)
        self._catching_up = self._backlog > 0
        self._last_arrival = time.monotonic()
        if self._reading_since is None:
            self._reading_since = self._last_arrival
        self.due = self._last_arrival + HOLD_TIME if self._backlog or self.due is None else self.due
        finals: dict[str, Arrival] = {}
        new: list[Arrival] = []
        for arrival in arrivals:
            delivery, task_id, meta = arrival
            if meta["status"] in states.READY_STATES:
                before = finals.get(task_id)
                # Of several results the first success counts, otherwise the latest.
                if before is None or before[2]["status"] != states.SUCCESS:
                    finals[task_id] = arrival
            else:
                # Equal updates that were read before are reported once.
                update = hash((task_id, bytes(delivery.body)))
                if not (delivery.redelivered and update in self._reported):
                    new.append(arrival)
                self._reported.add(update)
        new.sort(key=sent_at)
        new += finals.values()
        ready, _, _, foreign = self._offer(consumer, new)
        self._remember(consumer, [*ready, *foreign])
        self._offer_cancelled(consumer, arrivals)

    def _offer_cancelled(self, consumer: Consumer, arrivals: list[Arrival]) -> None:
        """Notify joins of cancelled tasks that have no result."""
        for delivery, _, meta in arrivals:
            if delivery.keep and CANCELLED in meta:
                for join in self.joins:
                    of_queue = self.context.addresses.by_result(join.aggregate.missing())
                    awaited = of_queue.get(consumer.address_of(delivery).name, [])
                    join.offer(
                        [(CANCELLED, task_id, notice) for task_id, notice in cancelled(meta, awaited)], None, None
                    )

    def _remember(self, consumer: Consumer, arrivals: list[Arrival]) -> None:
        """For joins that come late, and for looks."""
        for delivery, task_id, _ in arrivals:
            self.context.reports.foreign(delivery, consumer.address_of(delivery), task_id)
        finals = [arrival for arrival in arrivals[-REMEMBERED:] if arrival[2]["status"] in states.READY_STATES]
        if finals:
            self._last.extend([(None, task_id, meta) for _, task_id, meta in finals])
            self.context.looks.remember([(consumer.address_of(delivery), meta) for delivery, _, meta in finals])

    def _drop_old_states(self, consumer: Consumer, ready: list[Arrival], states_: list[Arrival]) -> None:
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
            session.unlimit(self.consumer.channel, list(self.consumer.addresses), self._sent_ahead)
            for address in self.addresses:
                self._consume(self.consumer, address)
