"""The inbox of a client's reply queues, for ``fastres-rpc://``."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from celery import states

from fastres.read.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastres._protocols import Delivery, Meta
    from fastres.addresses import Address
    from fastres.amqp.consumer import Consumer
    from fastres.amqp.session import Session
    from fastres.read.inbox import Context
    from fastres.read.join import Batch, Join

__all__ = ("ReplyInbox",)

#: The number of kept final results that no call has asked for.
UNCLAIMED = 8192


class ReplyInbox(Inbox):
    """Consumes the reply queues of a client, for all its results.

    No other process reads these queues. Results are acknowledged at once, and kept here until a call asks for them.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context, [], exclusive=False, prefetch=0)
        self._expected: set[str] = set()
        self._arrived: dict[str, Meta] = {}
        # Of these only the newest are kept: see _trim.
        self._unclaimed: dict[str, Meta] = {}
        self._states: dict[str, Meta] = {}
        self._handed_over: dict[str, bool] = {}
        self._per_group: dict[str, int] = {}
        self._subscribed = False
        #: Called with the id and the meta of each final result, in a waiting thread.
        self.on_final: Callable[[str, Meta], object] | None = None
        self._to_notify: deque[tuple[str, Meta]] = deque()

    def notify(self) -> None:
        """Call ``on_final`` for new results."""
        while self._to_notify and self.on_final is not None:
            self.on_final(*self._to_notify.popleft())

    def add(self, address: Address, deadline: float | None = None) -> None:
        """Receive at this address too, from now on."""

        link = self.context.link

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
        """Keep the result of a sent task until a call asks for it, regardless of how many others arrive."""
        self._expected.add(task_id)
        self._handed_over.pop(task_id, None)

    def forget(self, task_id: str) -> None:
        """Forget an expected result."""
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

    def detach(self, join: Join) -> bool:
        super().detach(join)
        # Results arrive whether a call waits or not.
        return False

    def peek(self, task_id: str) -> Meta | None:
        """The latest meta of a task that was not taken."""
        for place in (self._arrived, self._unclaimed, self._states):
            meta: Meta | None = place.get(task_id)
            if meta is not None:
                return meta
        return None

    def in_group(self, group_id: str) -> int:
        """The number of final results of a group that have arrived."""
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
        new = []
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
                    self._to_notify.append((task_id, meta))
                group_id = meta.get("group_id")
                if group_id:
                    per_group[group_id] = per_group.get(group_id, 0) + 1
            new.append(arrival)
        self._trim()
        if self.joins:
            self._offer(consumer, new)
        self._acknowledge(consumer, deliveries)

    def _trim(self) -> None:
        places: tuple[dict[str, Any], ...] = (self._unclaimed, self._states, self._handed_over, self._per_group)
        for place in places:
            for task_id in list(islice(place, max(0, len(place) - UNCLAIMED))):
                del place[task_id]
