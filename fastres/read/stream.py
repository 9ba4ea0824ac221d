"""Reads all results of a queue once, one by one, in constant memory."""

from __future__ import annotations

import time
from array import array
from collections import deque
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from zlib import crc32

from celery import states

from fastres._protocols import CANCELLED
from fastres.errors import ResultsGone
from fastres.read.inbox import ACCESS_INTERVAL, MARK, Inbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres._protocols import Arrival, Delivery
    from fastres.addresses import Address
    from fastres.amqp.consumer import Consumer
    from fastres.amqp.session import Session
    from fastres.read.inbox import Context

__all__ = ("Stream",)

#: Seconds without a message after which missing results are taken to be gone.
MAX_SILENCE = 10.0


class Stream(Inbox):
    """Takes the results of a group of which only the size is known. One reader at a time.

    Each is acknowledged when the next one is asked for, so that a process that ends loses none.

    Args:
        context: the objects that all inboxes of the process share.
        address: their queue.
        count: how many there are.
        prefetch: messages that the broker sends ahead.
    """

    def __init__(self, context: Context, address: Address, count: int, prefetch: int) -> None:
        super().__init__(context, [address], exclusive=True, prefetch=prefetch)
        self._count = count
        #: Deliveries that were not handed over, with their channel.
        self._batches: deque[tuple[Consumer, list[Arrival]]] = deque()
        #: For each place the CRC of the task id that was handed over for it, 0: none. After a reconnection some results
        #: arrive again.
        self._placed = array("I", bytes(array("I").itemsize * count))
        #: Ids without a place of their own: Celery 5.5 gives tasks of nested groups the places of others.
        self._unplaced: set[str] = set()
        self._at = 0.0

    def __iter__(self) -> Iterator[Arrival]:
        """Raises: fastres.ResultsGone: some of them are not there."""
        link, left = self.context.link, self._count
        self._at = time.monotonic()
        link.subscribe(self)
        try:
            while left > 0:
                while self._batches:
                    consumer, arrivals = self._batches.popleft()
                    fresh = [arrival for arrival in arrivals if self._is_new(arrival)]
                    left -= len(fresh)
                    yield from fresh
                    marks = list(map(MARK, arrivals))
                    link.soon(partial(self._acknowledge, consumer, marks))
                    self._at = time.monotonic()
                if left > 0:
                    self._read(left)
        finally:
            link.soon(lambda: link.unsubscribe(self, self.close))

    def awaited(self) -> int:
        return self._prefetch

    def _open(self, session: Session) -> None:
        self._batches.clear()
        super()._open(session)

    def _read(self, left: int) -> None:
        link = self.context.link
        if self.due is not None and self.due <= time.monotonic():
            link.call(self.open)
        self.check_access()
        link.read(ACCESS_INTERVAL if self.due is not None else 1.0, lambda: bool(self._batches), None)
        if not self._batches and time.monotonic() > self._at + MAX_SILENCE:
            raise ResultsGone(
                f"{left} of {self._count} results are not in queue {self.addresses[0].name!r}: they have expired "
                "(result_expires), were deleted, or were read before"
            )

    def _is_new(self, arrival: Arrival) -> bool:
        _, task_id, meta = arrival
        place = meta.get("group_index")
        if isinstance(place, int) and 0 <= place < self._count:
            checksum = crc32(task_id.encode("utf-8", "surrogatepass")) or 1
            if not self._placed[place]:
                self._placed[place] = checksum
                return True
            if self._placed[place] == checksum:
                return False
        known = task_id in self._unplaced
        self._unplaced.add(task_id)
        return not known

    def _deliver(self, consumer: Consumer, deliveries: list[Delivery]) -> None:
        arrivals, _ = self._decode(consumer, deliveries)
        finals = [
            arrival
            for arrival in arrivals
            if arrival[2]["status"] in states.READY_STATES and CANCELLED not in arrival[2]
        ]
        if finals:
            self._batches.append((consumer, finals))

    def close(self, session: Session) -> None:
        if self.consumer is not None:
            if not self.consumer.unacknowledged:
                session.delete(self.consumer.channel, self.addresses, list(self.consumer.addresses))
            self._leave()


def in_order(arrivals: Iterator[Any], place: Any) -> Iterator[Any]:
    """Yield items in the order of their places (0, 1, ...). Early items are held; items without place come last."""
    early: dict[int, Any] = {}
    unplaced: list[Any] = []
    turn = 0
    for arrival in arrivals:
        index = place(arrival)
        if not isinstance(index, int) or index < turn or index in early:
            unplaced.append(arrival)
            continue
        early[index] = arrival
        while turn in early:
            yield early.pop(turn)
            turn += 1
    yield from chain((early[index] for index in sorted(early)), unplaced)
