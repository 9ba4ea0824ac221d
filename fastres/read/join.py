"""Joins: waits for some results."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from celery import states

from fastres._impl import Aggregate
from fastres._protocols import CANCELLED, SENT_AT
from fastres.errors import ResultsMissing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres._protocols import Aggregate as AggregateProtocol
    from fastres._protocols import Arrival, Meta, Sorted
    from fastres.amqp.consumer import Consumer
    from fastres.amqp.session import Session

__all__ = ("CACHED", "Batch", "Inbox", "Join", "cancelled", "sent_at")

#: The number of read results that can be asked for again: Celery 3.1's default for result_cache_max.
CACHED = 100
#: Seconds: even with a timeout of 0, the broker has time to answer once.
LEAST_TIMEOUT = 0.05


def sent_at(arrival: Arrival) -> float:
    """When a state was published, if its meta has the time."""
    return arrival[2].get(SENT_AT) or 0.0


def cancelled(notice: Meta, awaited: Iterable[str]) -> Iterator[tuple[str, Meta]]:
    """The metas that a notice of cancellation gives to tasks whose results would be in its queue."""
    about = notice[CANCELLED]
    known = None if about is True else frozenset(about)
    meta = {key: value for key, value in notice.items() if key != CANCELLED}
    for task_id in awaited:
        if known is None or task_id in known:
            yield task_id, {**meta, "task_id": task_id}


class Inbox(Protocol):
    """The interface of inboxes that joins use."""

    joins: list[Join]
    #: When to :meth:`act`, on the monotonic clock; None: not before messages arrive.
    due: float | None
    #: Why the broker refused to open it; None: it is open, or there is no connection.
    refused: Exception | None

    def act(self, session: Session) -> None:
        """Do work that is due."""

    def check_access(self) -> None:
        """Raises: fastres.AccessRefused: the user may not read the queue."""

    def is_catching_up(self) -> bool:
        """Whether more messages will arrive at once, for which joins are to wait."""

    def holds(self) -> bool:
        """Whether the inbox holds messages that other readers may want."""

    def give_back(self, session: Session) -> None:
        """Requeue held messages, and leave them to other readers for a while."""

    def handed_over(self, batch: Batch, count: int, take: bool) -> None:
        """Called when the first ``count`` results of a batch were handed to the user."""

    def detach(self, join: Join) -> bool:
        """Remove a join. Returns: whether it was the last one, so that the inbox is to be closed."""

    def close(self, session: Session) -> None:
        """Stop consuming."""


class Batch(NamedTuple):
    """Results that arrived together for a join."""

    #: The inbox that is notified when they were handed over; None: they were read by a look, or arrived again.
    inbox: Inbox | None
    consumer: Consumer | None
    arrivals: list[Arrival]
    #: Whether these are results, not states on the way there.
    final: bool


class Join:
    """A wait for some results: the missing ones, and those that have arrived but were not handed over yet.

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
        self._total = len(self.aggregate)
        self.alone = self._total == 1
        #: Whether its results may be kept to be asked for again.
        self.few = self._total <= CACHED
        #: Whether all results have arrived.
        self.complete = False
        #: Batches that have arrived, and the batch that is being handed over.
        self.batches: deque[Batch] = deque()
        self.in_hand: Batch | None = None
        #: The errors of unreadable messages, by task id.
        self.unreadable: dict[str, Exception] = {}
        #: Whether the join has waited for valid results after unreadable ones.
        self.checked_again = False

    def offer(self, arrivals: list[Arrival], inbox: Inbox | None, consumer: Consumer | None) -> Sorted:
        """Accept the results that this join waits for. Returns: that of ``Aggregate.feed``."""
        sorts = self.aggregate.feed(arrivals)
        ready, states_, _, _ = sorts
        if self.unreadable:
            for _, task_id, _ in ready:
                self.unreadable.pop(task_id, None)
        # A state is reported before the final result of the same batch, as it was published before.
        if states_:
            self.batches.append(Batch(inbox, consumer, states_, False))
        if ready:
            self.batches.append(Batch(inbox, consumer, ready, True))
        # Set last: a thread that sees it finds all results in the batches.
        self.complete = not self.aggregate
        return sorts

    def has_batches(self) -> bool:
        return bool(self.batches)

    def is_complete(self) -> bool:
        return self.complete

    def next_batch(self) -> Batch | None:
        if not self.batches:
            return None
        # In this order: a join of another thread may search both places for it.
        self.in_hand = self.batches[0]
        return self.batches.popleft()

    def batches_of(self, inbox: Inbox) -> list[Batch]:
        """Batches of an inbox that were not handed over yet."""
        batches = [*([self.in_hand] if self.in_hand is not None else []), *self.batches.copy()]
        return [batch for batch in batches if batch.inbox is inbox]

    def left(self) -> float:
        """Seconds until the timeout."""
        return self._end - self._now()

    @property
    def deadline(self) -> float:
        """The timeout on the monotonic clock."""
        return time.monotonic() + self.left()

    def timeout_error(self, why: str) -> ResultsMissing:
        """The exception at the timeout.

        Args:
            why: a sentence about the broker.
        """
        missing = self.aggregate.missing()
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        of_all = f" of {self._total}" if len(missing) < self._total else ""
        results = "1 result is" if len(missing) == 1 else f"{len(missing)} results are"
        text = f"The operation timed out: {results} missing{of_all} ({shown})."
        for task_id, exc in list(self.unreadable.items())[:1]:
            of_them = "it" if len(missing) == 1 else f"{len(self.unreadable)} of them"
            text += f" For {of_them} something came that cannot be read, for task {task_id}: "
            text += f"{type(exc).__name__}: {exc}."
        return ResultsMissing(f"{text} {why}")
