"""The base of inboxes, which consume queues and offer results to the joins that wait for them."""

from __future__ import annotations

import socket
import time
from operator import itemgetter
from random import random
from typing import TYPE_CHECKING, Any

from kombu.utils.functional import LRUCache

from fastres.amqp.consumer import Consumer
from fastres.amqp.session import LARGEST_PREFETCH, Busy
from fastres.errors import AccessRefused, BrokerUnreachable, refusal
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres._protocols import Arrival, Decoder, Delivery, Sorted
    from fastres.addresses import Address, Addresses
    from fastres.amqp.connection import Link
    from fastres.amqp.session import QueueState, Session
    from fastres.logs import Reports
    from fastres.read.join import Batch, Join
    from fastres.read.look import Looks

__all__ = ("Context", "Inbox")

#: Seconds between two attempts to be the one reader of a queue.
ACCESS_INTERVAL = 0.1
#: Seconds between two attempts to consume after a refusal.
REFUSED_INTERVAL = 1.0
#: Seconds that the broker may take to open a consumer, while other threads wait for the connection; and until the next
#: attempt after a timeout, at first and at most.
OPEN_TIMEOUT, SUSPENSION, MAX_SUSPENSION = 6.0, 1.0, 20.0
#: The number of queues whose count of taken results is remembered.
REMEMBERED = 1000
#: The delivery of an arrival.
MARK = itemgetter(0)


class Context:
    """The objects that the inboxes of a process share.

    Args:
        link: the consuming connection.
        addresses: the backend's addresses.
        decoder: message to result.
        looks: reads without taking; is given the results that were seen.
        reports: where unusable messages are reported.
    """

    def __init__(self, link: Link, addresses: Addresses, decoder: Decoder, looks: Looks, reports: Reports) -> None:
        self.link = link
        self.addresses = addresses
        self.decoder = decoder
        self.looks = looks
        self.reports = reports
        #: How many results were taken, by queue of a group.
        self._taken = LRUCache(limit=REMEMBERED)
        self._tag = 0

    def next_tag(self) -> str:
        """A new consumer tag."""
        self._tag += 1
        return f"fastres-{self._tag}"

    def count_taken(self, address: Address, count: int) -> None:
        self._taken[address.name] = self.taken(address) + count

    def taken(self, address: Address) -> int:
        """How many results this process has taken out of a group's queue."""
        return int(self._taken.get(address.name, 0))


class Inbox:
    """Consumes some queues through the link of its process: the base of feeds and of reply inboxes."""

    def __init__(self, context: Context, addresses: list[Address], exclusive: bool, prefetch: int) -> None:
        self.context = context
        self.addresses = addresses
        self.joins: list[Join] = []
        self.consumer: Consumer | None = None
        #: When to :meth:`act`, on the monotonic clock.
        self.due: float | None = None
        #: Why the broker refused to open it; None: it is open, or there is no connection.
        self.refused: Exception | None = None
        #: When it may be opened again, on the monotonic clock, and the seconds of the next suspension.
        self._suspended_until = 0.0
        self._suspended = SUSPENSION
        self._exclusive = exclusive
        self._prefetch = prefetch

    def open(self, session: Session) -> None:
        """Subscribe. A refusal is not raised to the thread that uses the session, but kept in :attr:`refused`."""
        if self.consumer is not None and self.consumer.session is session:
            return
        now = time.monotonic()
        if now < self._suspended_until:
            self.due = self._suspended_until
            return
        before, self.refused = self.refused, None
        self.due = None
        try:
            with session.within(OPEN_TIMEOUT):
                self._open(session)
            self._suspended = SUSPENSION
        except (socket.timeout, BrokerUnreachable):
            # For up to a minute RabbitMQ does not reply if a queue's node does not respond. Other reads over this
            # connection must go on.
            consumer, self.consumer = self.consumer, None
            self._suspended_until = self.due = time.monotonic() + self._suspended
            self._suspended = min(2 * self._suspended, MAX_SUSPENSION)
            names = ", ".join(repr(address.name) for address in self.addresses[:3])
            self.refused = BrokerUnreachable(
                f"the broker {session.uri} has not answered for {time.monotonic() - now:.0f} seconds when asked "
                f"for queue {names}{', ...' if self.addresses[3:] else ''}: its node stands still, or is down"
            )
            session.give_up(None if consumer is None else consumer.channel)
            if type(before) is not BrokerUnreachable:
                logger.warning("Results are read later: %s", self.refused)
        except session.channel_errors as exc:
            self._leave()
            self.refused = refusal(exc, session.uri)
            self.due = time.monotonic() + REFUSED_INTERVAL
            if str(before) != str(self.refused):
                logger.warning("The broker lets no results be read, which is tried again: %s", self.refused)

    def _open(self, session: Session) -> None:
        try:
            if self._exclusive or not self._subscribe(self._begin(session, session.unopened_channel())):
                consumer = self._begin(session, session.channel())
                session.prefetch(consumer.channel, self._sent_ahead)
                self._found([self._consume(consumer, address) for address in self.addresses])
        except Busy as exc:
            # One reader at a time: if two shared the results, neither join would be complete.
            self._leave()
            self.refused = exc
            # With jitter, so that two readers do not stay in step.
            self.due = time.monotonic() + ACCESS_INTERVAL * (1 + random())
        else:
            # It may have been busy before.
            self.refused = None
            if self.consumer is not None:
                session.watch(self.consumer.channel, self.consumer.on_close)

    def check_access(self) -> None:
        """Raises: fastres.AccessRefused: the user may not read the queue."""
        if isinstance(self.refused, AccessRefused):
            raise self.refused

    def _begin(self, session: Session, channel: Any) -> Consumer:
        self.consumer = Consumer(session, channel)
        return self.consumer

    def _subscribe(self, consumer: Consumer) -> bool:
        """Consume from all addresses in one round trip; False: a queue prevents that."""
        queues = [self.context.addresses.queue(address) for address in self.addresses]
        tags = [self.context.next_tag() for _ in queues]
        consumer.addresses.update(zip(tags, self.addresses))
        answer = consumer.session.subscribe(
            consumer.channel, list(zip(queues, tags)), consumer.receive, consumer.on_cancel, self._sent_ahead
        )
        if answer is None:
            return False
        for address, state in zip(self.addresses, answer):
            self._check_consumers(consumer, address)
            # A feed that shares acknowledges nothing before it has read all messages.
            for _ in range(state.messages // LARGEST_PREFETCH if address.is_quorum else 0):
                self._consume(consumer, address)
        self._found(answer)
        return True

    @property
    def _sent_ahead(self) -> int:
        """The prefetch; 0: no limit."""
        if self._prefetch or not any(address.is_quorum for address in self.addresses):
            return self._prefetch
        # Without a limit RabbitMQ sends 2,000 messages of a quorum queue.
        return LARGEST_PREFETCH

    def _check_consumers(self, consumer: Consumer, address: Address) -> None:
        """Checks that RabbitMQ does not make when a quorum queue is consumed.

        Raises: Busy: the queue has two exclusive consumers, or none: RabbitMQ forgets consumers while another
            connection declares the queue.
        """
        if address.is_quorum:
            state = consumer.session.inspect(address.name)
            if state is None or not state.consumers or (self._exclusive and state.consumers > 1):
                raise Busy(address.name)

    def _found(self, states: list[QueueState]) -> None:
        """Called with the states of the queues when they are opened."""

    def act(self, session: Session) -> None:
        """Do work that is due: try again to become the only reader."""
        self.open(session)

    def is_catching_up(self) -> bool:
        """Whether more messages will arrive at once, for which joins are to wait."""
        return False

    def flush(self) -> None:
        """Process received deliveries."""
        if self.consumer is None:
            return
        received = self.consumer.take_received()
        if received:
            self._deliver(self.consumer, received)
        if self.consumer is not None and self.consumer.cancelled:
            self.context.link.attempt(self._reopen)

    def awaited(self) -> int:
        """The number of results that may arrive before the next acknowledgement and that joins wait for."""
        awaited = sum(len(join.aggregate) for join in self.joins)
        return min(awaited, self._prefetch) if self._prefetch else awaited

    def detach(self, join: Join) -> bool:
        """Remove a join. Returns: whether it was the last one, so that the inbox is to be closed."""
        if join in self.joins:
            self.joins.remove(join)
        return not self.joins

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        """Called when the first ``count`` results of a batch were handed to the user."""
        raise NotImplementedError

    def holds(self) -> bool:
        """Whether the inbox holds messages that other readers may want."""
        return False

    def give_back(self, session: Session) -> None:
        """Requeue held messages, and leave them to other readers for a while."""

    def close(self, session: Session) -> None:
        """Stop consuming."""
        self._leave()

    def _consume(self, consumer: Consumer, address: Address) -> QueueState:
        state = consumer.session.declare(self.context.addresses.queue(address))
        if self._exclusive and state.consumers:
            raise Busy(address.name)
        tag = self.context.next_tag()
        consumer.addresses[tag] = address
        consumer.session.consume(
            consumer.channel, address.name, tag, consumer.receive, consumer.on_cancel, self._exclusive
        )
        self._check_consumers(consumer, address)
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
        """Acknowledge deliveries. Returns: how many were not acknowledged before."""
        tags = consumer.settle(deliveries)
        if tags and consumer is self.consumer:
            self.context.link.attempt(lambda session: consumer.acknowledge(tags), reads=False)
        return len(tags)

    def _decode(self, consumer: Consumer, deliveries: list[Delivery]) -> tuple[list[Arrival], int]:
        """Returns: the results in deliveries, and the number of deliveries without a valid result."""
        arrivals, refused = self.context.decoder.decode_all(deliveries)
        for delivery, exc in refused:
            self.context.reports.unreadable(delivery, consumer.address_of(delivery).name, exc)
            task_id = delivery.correlation_id
            for join in self.joins:
                if task_id in join.aggregate:
                    join.unreadable[str(task_id)] = exc
        return arrivals, len(refused)

    def _offer(self, consumer: Consumer, arrivals: list[Arrival]) -> Sorted:
        """Offer arrivals to every join. Returns, by outcome, the best for each: ready, state, repeated, foreign."""
        if len(self.joins) == 1:
            return self.joins[0].offer(arrivals, self, consumer)
        # By identity: arrivals may be equal.
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
        # The broker redelivers messages that were not acknowledged in time: not worth a report.
        if not delivery.redelivered:
            self.context.reports.add(
                "repeated", consumer.address_of(delivery).name, task_id, delivery.delivery_tag,
                "this task's result came before; the first one counts", 0, recount=True,
            )  # fmt: skip
