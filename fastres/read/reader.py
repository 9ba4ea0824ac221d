"""Reads results from their queues for the joins that wait for them, over any transport."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastres.errors import ResultsMissing
from fastres.logs import logger
from fastres.read.feed import Feed
from fastres.read.inbox import Context
from fastres.read.reply_inbox import ReplyInbox
from fastres.read.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fastres._protocols import Arrival, Decoder
    from fastres.addresses import Address, Addresses
    from fastres.amqp.connection import Link
    from fastres.errors import BrokerUnreachable
    from fastres.logs import Reports
    from fastres.read.join import Batch, Inbox, Join
    from fastres.read.look import Looks

__all__ = ("Reader",)

#: Seconds between two calls of the interval callback.
INTERVAL = 1.0
#: Seconds to wait for a valid result after an unreadable message of the same task.
LATE_RESULT = 0.1
#: How often messages are counted while the queue delivers.
COUNT_ATTEMPTS = 3


class Reader:
    """The inboxes of a process and the waits on them.

    Args:
        link: the consuming connection.
        addresses: the backend's addresses.
        decoder: message to result.
        looks: reads without taking, and takes single results.
        reports: where unusable messages are reported.
        prefetch: messages of a group that the broker sends ahead of their acknowledgement.
        auto_delete: delete a group's queue when all its results were taken.
    """

    def __init__(
        self,
        link: Link,
        addresses: Addresses,
        decoder: Decoder,
        looks: Looks,
        reports: Reports,
        prefetch: int,
        auto_delete: bool,
    ) -> None:
        self.link = link
        self._context = Context(link, addresses, decoder, looks, reports)
        self._looks = looks
        self._auto_delete = auto_delete
        self._prefetch = prefetch
        self.replies = ReplyInbox(self._context)
        self._feeds: dict[str, Feed] = {}

    def forget_all(self) -> None:
        """In a forked child: drop the parent's deliveries."""
        self.replies = ReplyInbox(self._context)
        self._feeds.clear()

    def feed_of(self, address: Address) -> Feed | None:
        """The feed that reads an address at present."""
        return self._feeds.get(address.name)

    def progress(self, address: Address, ready: Callable[[], int]) -> int:
        """How many results have come: those in the queue, and those that this process has received or taken.

        Args:
            ready: asks how many there are in the queue.
        """
        taken = self._received(address)
        for _ in range(COUNT_ATTEMPTS):
            count, before = ready(), taken
            feed = self._feeds.get(address.name)
            if feed is not None:
                # Messages that were delivered before the count may not have been read yet.
                self.link.attempt(partial(feed.read_deliveries, address))
            taken = self._received(address)
            if taken == before:
                break
        # During fast deliveries the count may be too low, and is never too high.
        return count + before

    def _received(self, address: Address) -> int:
        feed = self._feeds.get(address.name)
        return self._context.taken(address) + (feed.held(address) if feed is not None else 0)

    def tasks(self, join: Join, addresses: list[Address], take: bool, declares: bool) -> None:
        """Subscribe a join to the results of unrelated tasks.

        Args:
            declares: declare queues that do not exist.
        """
        self._attach(join, addresses, take=take, deletes=self._auto_delete, declares=declares)

    def group(self, join: Join, addresses: list[Address], leftovers: list[Address]) -> None:
        """Subscribe a join to a group, whose results it takes. Deletes ``leftovers`` when all were taken."""
        self._attach(
            join, addresses, take=True, exclusive=True, prefetch=self._prefetch, deletes=self._auto_delete,
            leftovers=leftovers,
        )  # fmt: skip

    def stream(self, address: Address, count: int) -> Iterator[Arrival]:
        """Take ``count`` results from the queue of a group, of any of its tasks.

        Raises: fastres.ResultsGone: the queue has fewer results.
        """
        return iter(Stream(self._context, address, count, self._prefetch))

    def reply(self, join: Join) -> None:
        """Subscribe a join to the reply queues."""
        with self.link.exclusively(join.deadline):
            self.replies.attach(join)
        join.inboxes.append(self.replies)

    def _attach(self, join: Join, addresses: list[Address], take: bool, **how: Any) -> None:
        with self.link.exclusively(join.deadline):
            for feed in dict.fromkeys(feed for address in addresses if (feed := self._feeds.get(address.name))):
                # Registered first: an interruption leaves the join with the inboxes that it must leave.
                join.inboxes.append(feed)
                feed.attach(join)
                if not take:
                    feed.share_from_now_on()
            own = [address for address in addresses if address.name not in self._feeds]
            if not own:
                return
            feed = Feed(self._context, own, take=take, **how)
            feed.joins.append(join)
            join.inboxes.append(feed)
            self._feeds.update((address.name, feed) for address in own)
            self.link.subscribe(feed, join.deadline)

    def leave(self, join: Join) -> None:
        """Unsubscribe a join. If this is interrupted, call :meth:`abandon`."""
        ended: list[Feed] = []

        def leave() -> None:
            for inbox in join.inboxes:
                if inbox.detach(join) and isinstance(inbox, Feed):
                    self._release(inbox)
                    # A wait that has ended at its timeout does not begin another one.
                    deadline = join.deadline if join.left() <= 0 else None
                    self.link.unsubscribe(inbox, inbox.close, deadline)
                    ended.append(inbox)

        def take() -> None:
            for feed in ended:
                for address, task_ids in feed.to_take().items():
                    self._take(address, task_ids)

        self.link.soon(leave, take)

    def abandon(self, join: Join) -> None:
        """After an interrupted :meth:`leave`: drop consumers that would hold messages of other waits."""
        left: list[Feed] = []
        for inbox in join.inboxes:
            if join in inbox.joins:
                inbox.joins.remove(join)
            if isinstance(inbox, Feed) and not inbox.joins:
                self._release(inbox)
                left.append(inbox)
        self.link.drop_with(left)

    def _take(self, address: Address, task_ids: set[str]) -> None:
        """Take handed-over results from a queue that other readers use too."""
        try:
            self._looks.take(address, task_ids, were_there=True)
        except Exception as exc:
            # The wait has its results. In the queue they expire.
            logger.warning(
                "Results that were read could not be taken out of queue %r, where they expire: %r",
                address.name,
                exc,
            )

    def _release(self, feed: Feed) -> None:
        for address in feed.addresses:
            if self._feeds.get(address.name) is feed:
                del self._feeds[address.name]

    def handed_over(self, join: Join, count: int, take: bool) -> None:
        """Note that the first ``count`` results of the current batch were handed to the user."""
        batch = join.in_hand
        if batch is None:
            return
        if count and batch.inbox is not None:
            tell = batch.inbox.handed_over
            self.link.soon(lambda: tell(batch, count, take))
        # Only now: until the inbox knows, a join that begins late finds the batch here.
        join.in_hand = batch._replace(arrivals=batch.arrivals[count:]) if count < len(batch.arrivals) else None

    def wait(
        self,
        join: Join,
        *,
        on_interval: Callable[[], Any] | None = None,
        rounds: int | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches of a join until all its results have arrived. The last one yielded is ``join.in_hand``.

        Args:
            on_interval: called about once a second, and after each batch.
            rounds: how often to read; None: until all results have arrived.

        Raises:
            fastres.ResultsMissing: not all results arrived before the timeout.
            fastres.AccessRefused: the user may not read the queue.
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: a missing result arrived, and cannot be
                read.
        """
        while True:
            complete = join.complete
            left = join.left()
            # Shared queues are read to their end before results are handed over, and requeued meanwhile.
            for inbox in join.inboxes:
                # Not at the timeout: the broker may not answer.
                if not complete and left > 0 and inbox.is_catching_up():
                    self._act(inbox, join)
            if complete or left <= 0 or not any(inbox.is_catching_up() for inbox in join.inboxes):
                while (batch := join.next_batch()) is not None:
                    if not join.alone:
                        self._give_back(join)
                    yield batch
                if complete:
                    return
                left = join.left()
            for inbox in join.inboxes:
                inbox.check_access()
            if left <= 0:
                raise self.timeout_error(join)
            # All others were handed over. A wait for a single result fails at once, not at its timeout.
            if len(join.unreadable) >= len(join.aggregate) and (join.timeout is None or join.alone):
                if join.checked_again:
                    self._raise_unreadable(join)
                join.checked_again = True
                left = min(left, LATE_RESULT)
            if rounds is not None:
                rounds -= 1
                if rounds < 0:
                    return
            self.look([join], min(INTERVAL, left), join.has_batches)
            self.replies.notify()
            if on_interval is not None:
                on_interval()

    def timeout_error(self, join: Join, unreachable: BrokerUnreachable | None = None) -> ResultsMissing:
        """The exception at the timeout of a join."""
        refused = [str(inbox.refused) for inbox in join.inboxes if inbox.refused is not None]
        if unreachable is not None:
            why = f"There was no connection: {unreachable}."
        elif refused:
            why = f"They cannot be read: {refused[0]}"
        else:
            why = f"The broker {self.link.uri} has nothing more of them."
        return join.timeout_error(why)

    def _give_back(self, join: Join) -> None:
        """Requeue held messages for other readers before the user's code runs, perhaps for long."""
        for inbox in join.inboxes:
            if inbox.holds():
                self.link.soon(partial(self.link.attempt, inbox.give_back))

    def look(self, joins: Collection[Join], seconds: float, done: Callable[[], bool]) -> None:
        """Read for joins, for at most ``timeout`` seconds, or let another thread read until ``done()``."""
        catching_up = False
        for join in joins:
            seconds = min(seconds, max(0.0, join.left()))
            for inbox in join.inboxes:
                self._act(inbox, join)
                due = inbox.due
                if due is not None:
                    seconds = min(seconds, max(0.0, due - time.monotonic()))
                catching_up = catching_up or inbox.is_catching_up()
        if catching_up and len(joins) == 1:
            (join,) = joins
            done = join.is_complete
        deadline = min((join.deadline for join in joins), default=None)
        self.link.read(seconds, done, deadline)

    def _act(self, inbox: Inbox, join: Join) -> None:
        """Have an inbox do the work that is due."""
        due = inbox.due
        if due is not None and due <= time.monotonic():
            self.link.call(inbox.act, join.deadline)

    @staticmethod
    def _raise_unreadable(join: Join) -> None:
        task_id, why = next(iter(join.unreadable.items()))
        if len(join.unreadable) == 1:
            raise why
        raise type(why)(f"{len(join.unreadable)} results cannot be read, the first of task {task_id}: {why}")
