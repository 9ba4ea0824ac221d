"""Looks: reading without taking. The state of a task, the progress of a group, saved groups; forgetting results.

A look is one round trip over a connection of the publisher, so that no look waits for another thread. It declares no
queue. The messages are missing from their queue between two frames that the broker handles. A reader that looks in
that moment, or while a wait holds the messages, sees too few of them; therefore a look repeats itself if a result is
missing from a queue that another reader may hold.
"""

from __future__ import annotations

import time
from functools import partial
from random import random
from typing import TYPE_CHECKING, Any

from celery import states
from kombu.utils.functional import LRUCache

from fastres import ids
from fastres._protocols import CANCELLED, SENT_AT
from fastres.errors import BacklogLimitExceeded
from fastres.read.join import cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from fastres._protocols import Decoder, Delivery, Meta
    from fastres.addresses import Address, Addresses
    from fastres.amqp.session import Browsed, QueueState
    from fastres.logs import Reports
    from fastres.write.publisher import Publisher

__all__ = ("Looks", "chosen")

#: The number of remembered snapshots of queues.
SNAPSHOTS = 16
#: Messages to request at the first look at a queue, and at a later look beyond the number it held before.
FIRST, EXTRA = 2, 2
#: Seconds before each look at a queue whose messages another reader may hold. Their sum exceeds ``feed.HOLD_TIME``.
PAUSES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03)
#: How often the messages of a quorum queue are counted.
COUNT_ATTEMPTS = 4
#: More of them for taking messages out of a quorum queue: on a busy node, requeued messages reappear late.
QUORUM_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
#: Seconds after the last of these looks in which a queue is read once only: a wait keeps holding its messages.
RETRY_PAUSE = 0.25
#: How many times an empty queue without consumers is read: another look may hold its messages.
EMPTY_READS = 4
#: A queue with more messages than ``LARGE`` is read again only after ``REREAD_FACTOR`` times the seconds that the last
#: read took, so that polling every member of a large group costs a bounded share of the time.
LARGE, REREAD_FACTOR = 200, 4
#: Queues that are read in one write, and the largest queue, in messages, that is read for the states of many tasks.
QUEUES, MAX_READ = 100, 20_000
#: Seconds for which a result stays known that was read together with another one.
KNOWN_FOR = 1.0
#: Seconds for which the snapshot of a queue is kept after the last look.
KEPT_FOR = 60.0
#: The number of groups whose progress is remembered, and of queues whose forgotten results are.
REMEMBERED = 1000


class Snapshot:
    """The content of a queue at the last look."""

    def __init__(self, address: Address) -> None:
        self.address = address
        #: The result, or the latest state, of each task.
        self.metas: dict[str, Meta] = {}
        #: Notices of cancellation.
        self.notices: list[Meta] = []
        #: Messages at the last look, None: there was no queue.
        self.count: int | None = None
        #: Messages that could not be read, by their task id.
        self.unreadable: dict[str | None, Exception] = {}
        #: When it was read, and when it may be read again, on the monotonic clock.
        self.read_at = 0.0
        self.reread_at = 0.0
        #: Until when it is read without another attempt, on the monotonic clock.
        self.no_retry_until = 0.0

    def expected_count(self) -> int:
        """The number of messages to request; 0 for a large queue, which is read only after its count has changed."""
        if self.count is None:
            return FIRST
        return 0 if self.count > LARGE else self.count + EXTRA

    def cancelled(self, task_id: str) -> Meta | None:
        """The meta of a cancelled task without a result; None: it was not cancelled."""
        found = (meta for notice in self.notices for _, meta in cancelled(notice, [task_id]))
        return next(found, None)


class Looks:
    """Reads queues without taking messages.

    Args:
        publisher: has the connections.
        addresses: the backend's addresses.
        decoder: message to result.
        reports: where unusable messages are reported.
        auto_delete: delete a queue when all its results were taken.
    """

    def __init__(
        self, publisher: Publisher, addresses: Addresses, decoder: Decoder, reports: Reports, auto_delete: bool
    ) -> None:
        self._publisher = publisher
        self._addresses = addresses
        self._decoder = decoder
        self._reports = reports
        self._auto_delete = auto_delete
        self.forget_all()

    def forget_all(self) -> None:
        """In a forked child: drop the parent's snapshots."""
        self._snapshots = LRUCache(limit=SNAPSHOTS)
        self._progress = LRUCache(limit=REMEMBERED)
        #: Results that are forgotten and not yet out of their queue, by its name.
        self._forgotten = LRUCache(limit=REMEMBERED)

    # -- a task

    def task(self, task_id: str, backlog_limit: int, waits_too: bool = False) -> Meta | None:
        """The result of a task, or else its latest state; None when there is neither.

        Args:
            waits_too: whether a wait of this process may hold the messages.

        Raises:
            fastres.errors.BacklogLimitExceeded: a task with a queue of its own has more results than that.
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: the result cannot be decoded.
            amqp.exceptions.AccessRefused: the user may not read the queue.
        """
        results = self._snapshot(self._addresses.result(task_id))
        states_ = self._snapshot(self._addresses.states(task_id))
        if task_id in self._forgotten.get(results.address.name, ()):
            return None
        known = results.metas.get(task_id)
        if known is not None and self._is_settled(known) and time.monotonic() < results.read_at + KNOWN_FOR:
            return known
        before = set(results.metas)
        for attempt, pause in enumerate(PAUSES):
            if pause:
                # With jitter, so that two looks do not stay in step.
                time.sleep(pause * (0.75 + random() / 2))
            state = self._refresh(results, states_)
            if task_id in results.metas or self._is_absent(results, state, before, attempt):
                known = None
                break
            if time.monotonic() < results.no_retry_until and not waits_too:
                break
            before = before or set(results.metas)
        else:
            results.no_retry_until = time.monotonic() + RETRY_PAUSE
        if results.count is not None and results.count > backlog_limit and ids.parse(task_id) is None:
            raise BacklogLimitExceeded(task_id)
        # A result that was read before still counts while another reader holds it.
        meta = results.metas.get(task_id) or known or results.cancelled(task_id) or states_.metas.get(task_id)
        if meta is None:
            for unreadable in (results.unreadable, states_.unreadable):
                if task_id in unreadable:
                    raise unreadable[task_id]
        if meta is not None and SENT_AT in meta:
            # A field of fastres, which orders the states of a quorum queue.
            return {key: value for key, value in meta.items() if key != SENT_AT}
        return meta

    def tasks(self, task_ids: Collection[str]) -> dict[str, Meta | None]:
        """The same as :meth:`task` for many tasks, with one look at each queue and no retry for held messages.

        Tasks whose queue has too many messages to read are left out.
        """
        queues: dict[str, list[str]] = {}
        for task_id in task_ids:
            for address in (self._addresses.result(task_id), self._addresses.states(task_id)):
                queues.setdefault(address.name, []).append(task_id)
        found: dict[str, Meta | None] = dict.fromkeys(task_ids)
        names = list(queues)
        for start in range(0, len(names), QUEUES):
            asked = [(name, FIRST) for name in names[start : start + QUEUES]]
            for (name, _), browsed in zip(asked, self._browse(asked)):
                if browsed is not None and len(browsed.deliveries) >= FIRST:
                    if browsed.state.messages > MAX_READ:
                        for task_id in queues[name]:
                            found.pop(task_id, None)
                        continue
                    browsed = self._browse_all(name, browsed.state.messages + EXTRA)
                arrivals, _ = self._decoder.decode_all([] if browsed is None else browsed.deliveries)
                notices_read = [meta for _, _, meta in arrivals if CANCELLED in meta]
                notices = {key: meta for notice in notices_read for key, meta in cancelled(notice, queues[name])}
                for task_id, meta in {**notices, **chosen(meta for _, _, meta in arrivals)}.items():
                    # Results come before states: see above.
                    if task_id in found and found[task_id] is None:
                        found[task_id] = {key: value for key, value in meta.items() if key != SENT_AT}
        return found

    @staticmethod
    def _is_settled(meta: Meta) -> bool:
        """Whether later results cannot replace this one: the first success counts."""
        return bool(meta["status"] == states.SUCCESS)

    @staticmethod
    def _is_absent(snapshot: Snapshot, state: QueueState | None, before: set[str], attempt: int) -> bool:
        """Whether a missing result does not exist, rather than being held by another reader for a moment."""
        if state is None or (snapshot.count or 0) > LARGE:
            return True
        if not snapshot.metas:
            # Messages that another reader requeues in a quorum queue are there a little later.
            last = len(PAUSES) if snapshot.address.is_quorum else EMPTY_READS
            return not state.consumers and attempt + 1 >= last
        # A reader that holds messages holds the first ones.
        return bool(before) and before.issubset(snapshot.metas)

    def remember(self, seen: Iterable[tuple[Address, Meta]]) -> None:
        """Add results that a wait has read to the snapshots."""
        by_address: dict[Address, list[Meta]] = {}
        for address, meta in seen:
            by_address.setdefault(address, []).append(meta)
        for address, metas in by_address.items():
            snapshot = self._snapshot(address)
            snapshot.metas.update({meta["task_id"]: meta for meta in metas if self._is_settled(meta)})
            snapshot.read_at = time.monotonic()

    def forget(self, task_id: str) -> None:
        """Delete the result and the states of a task.

        In a large queue, results are removed in bulk: once half of its results are forgotten, or when the queue may
        be read again.
        """
        for address in (self._addresses.result(task_id), self._addresses.states(task_id)):
            name = address.name
            (browsed,) = self._browse([(name, 0)])
            snapshot = self._snapshot(address)
            snapshot.metas.pop(task_id, None)
            if browsed is None:
                continue
            forgotten = self._forgotten.setdefault(name, set())
            forgotten.add(task_id)
            count = browsed.state.messages
            if count <= LARGE or 2 * len(forgotten) >= count or time.monotonic() >= snapshot.reread_at:
                start = time.monotonic()
                self.take(address, forgotten)
                self._forgotten.pop(name, None)
                end = time.monotonic()
                snapshot.reread_at = end + REREAD_FACTOR * (end - start)

    def take(self, address: Address, task_ids: Collection[str], were_there: bool = False) -> None:
        """Take the messages of some tasks out of their queue.

        An empty queue is deleted, unless tasks that are sent later will share it.

        Args:
            were_there: whether the messages were just requeued, and are there unless another reader has taken them.
        """
        missing, seen = set(task_ids), 0
        delete = self._auto_delete and not address.is_page

        def choose(deliveries: list[Delivery]) -> list[Any]:
            nonlocal seen
            seen = len(deliveries)
            arrivals, _ = self._decoder.decode_all(deliveries)
            chosen = [(delivery.delivery_tag, task_id) for delivery, task_id, _ in arrivals if task_id in task_ids]
            missing.difference_update(task_id for _, task_id in chosen)
            return [tag for tag, _ in chosen]

        def take(count: int, writer: Any) -> None:
            writer.connect().take(address, count, choose, delete)

        late = were_there and address.is_quorum
        pauses = (*PAUSES, *QUORUM_PAUSES) if late else PAUSES
        enough = len(pauses) if late else EMPTY_READS
        for attempt, pause in enumerate(pauses, 1):
            if pause:
                time.sleep(pause)
            (browsed,) = self._browse([(address.name, 0)])
            if browsed is None:
                return
            count = browsed.state.messages
            if count:
                self._publisher.run(partial(take, count + EXTRA))
            # With all that was asked for, there may be more: see _browse_all.
            more = count and seen >= count + EXTRA
            if not missing or (not more and not browsed.state.consumers and attempt >= enough):
                break
        if delete and address.of_task is not None:
            # States on the way to a result that is gone.
            name = self._addresses.states(address.of_task).name
            self._publisher.run(lambda writer: writer.connect().drop(name))

    def drop(self, task_id: str) -> None:
        """Drop the known results of a task, which may run again."""
        for address in (self._addresses.result(task_id), self._addresses.states(task_id)):
            snapshot = self._snapshots.get(address.name)
            if snapshot is not None:
                snapshot.metas.pop(task_id, None)

    # -- a group

    def progress(self, group_id: str, count_all: Callable[[Address, Callable[[], int]], int]) -> int:
        """How many results of a group have come.

        Args:
            count_all: adds the messages that this process holds to those in the queue: ``Reader.progress``.
        """
        address = self._addresses.group(group_id)
        kin = ids.parse(group_id)
        if kin is not None and kin.kind == ids.Kind.PAGE:
            # The header of a small chord shares its queue with other tasks, and its group id with the body.
            arrivals, _ = self._decoder.decode_all([found for found in self.read(address) if found.keep])
            count = len({task_id for _, task_id, meta in arrivals if meta.get("group_id") == group_id})
        else:
            count = count_all(address, partial(self._messages, address))
        # The count of a queue is too low while a reader holds messages; progress never decreases.
        highest: int = max(count, self._progress.get(group_id, 0))
        self._progress[group_id] = highest
        return highest

    def read(self, address: Address) -> list[Delivery]:
        """Read all messages of a queue and leave them there."""
        for pause in PAUSES:
            if pause:
                time.sleep(pause)
            browsed = self._browse_all(address.name, FIRST)
            if browsed is None:
                return []
            if browsed.deliveries:
                return browsed.deliveries
        return []

    # -- queues

    def _snapshot(self, address: Address) -> Snapshot:
        snapshot: Snapshot | None = self._snapshots.get(address.name)
        if snapshot is None:
            # The snapshot of a large group takes much memory: drop old ones.
            before = time.monotonic() - KEPT_FOR
            for name, other in list(self._snapshots.items()):
                if 0 < other.read_at < before:
                    self._snapshots.pop(name, None)
            snapshot = self._snapshots[address.name] = Snapshot(address)
        return snapshot

    def _browse(self, asked: Sequence[tuple[str, int]]) -> list[Browsed | None]:
        return self._publisher.run(lambda writer: writer.connect().browse(asked))

    def _messages(self, address: Address) -> int:
        highest = 0
        # Requeued messages of a quorum queue are counted a little later.
        for pause in PAUSES[:COUNT_ATTEMPTS] if address.is_quorum else PAUSES[:1]:
            time.sleep(pause)
            (browsed,) = self._browse([(address.name, 0)])
            highest = max(highest, 0 if browsed is None else browsed.state.messages)
        return highest

    def _browse_all(self, name: str, count: int) -> Browsed | None:
        """Read all messages of a queue, of which ``count`` are expected, and leave them there.

        The broker may count before it has requeued messages of the previous read. Only an answer with fewer messages
        than were requested is known to be complete.
        """
        while True:
            (browsed,) = self._browse([(name, count)])
            if browsed is None or len(browsed.deliveries) < count:
                return browsed
            count = max(2 * count, browsed.state.messages + EXTRA)

    def _refresh(self, *snapshots: Snapshot) -> QueueState | None:
        """Read changed queues again. Returns the state of the first queue; None: it does not exist."""
        asked = [(snapshot.address.name, snapshot.expected_count()) for snapshot in snapshots]
        start = time.monotonic()
        answers = self._browse(asked)
        for snapshot, (name, count), browsed in zip(snapshots, asked, answers):
            before, snapshot.count = snapshot.count, None if browsed is None else browsed.state.messages
            if browsed is not None and len(browsed.deliveries) >= count:
                # The queue may have more messages.
                waits = not self._has_changed(snapshot, before) or start < snapshot.reread_at
                if count == 0 and browsed.state.messages and waits:
                    snapshot.count = before
                    continue
                browsed = self._browse_all(name, max(count, browsed.state.messages) + EXTRA)
            deliveries = [] if browsed is None else browsed.deliveries
            if browsed is not None:
                snapshot.count = max(browsed.state.messages, len(deliveries))
            self._read(snapshot, deliveries)
            end = snapshot.read_at = time.monotonic()
            snapshot.reread_at = end + REREAD_FACTOR * (end - start)
        return None if answers[0] is None else answers[0].state

    @staticmethod
    def _has_changed(snapshot: Snapshot, before: int | None) -> bool:
        # A queue with a maximum length drops its oldest message, and changes without growing.
        full = snapshot.address.max_length
        return snapshot.count != before or (full is not None and (snapshot.count or 0) >= full)

    def _read(self, snapshot: Snapshot, deliveries: list[Delivery]) -> None:
        arrivals, refused = self._decoder.decode_all(deliveries)
        snapshot.unreadable = {delivery.correlation_id: exc for delivery, exc in refused}
        for delivery, exc in refused:
            self._reports.unreadable(delivery, snapshot.address.name, exc)
        for delivery, task_id, _ in arrivals:
            self._reports.foreign(delivery, snapshot.address, task_id)
        snapshot.metas = chosen(meta for _, _, meta in arrivals)
        snapshot.notices = [meta for _, _, meta in arrivals if CANCELLED in meta]


def chosen(metas: Iterable[Meta]) -> dict[str, Meta]:
    """The meta that counts for each task: the first success, otherwise the latest."""
    best: dict[str, Meta] = {}
    for meta in metas:
        before = best.get(meta["task_id"])
        if before is None or (
            before["status"] != states.SUCCESS and (meta.get(SENT_AT) or 0.0) >= (before.get(SENT_AT) or 0.0)
        ):
            best[meta["task_id"]] = meta
    return best
