"""Reading without taking: the state of a task, the results of a group's members one by one, saved groups.

A message that is looked at is out of its queue for a moment, and whoever looks in that moment sees nothing. So an
empty queue is looked at twice, the second time as a consumer, to whom the message comes when it is put back; and
what this process has seen of a task it does not unlearn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound
from celery import states
from kombu.utils.functional import LRUCache

from fastres.errors import BacklogLimitExceeded
from fastres.transport import Busy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres._protocols import Meta
    from fastres.addresses import Address, Addresses
    from fastres.join import Join, Reader
    from fastres.link import Link
    from fastres.transport import Dialect

__all__ = ("Peek",)

#: Queues that a connection remembers to have declared.
DECLARED = 10_000
#: Tasks and groups of which the last thing seen is remembered.
SEEN = 1000
SNAPSHOTS = 8
#: Seconds to wait for a message that may be out of its queue: when nobody else is there, and when somebody is.
GLANCE, LONG_GLANCE = 0.01, 0.1
#: A group's queue is read again after this many times the seconds it took the last time: polling every member of
#: a large group costs a bounded part of the time that passes.
REST = 4
#: Seconds to wait for another reader of a group's queue to be done.
TURN = 0.5


class Snapshot:
    """What a group's queue held when it was read."""

    def __init__(self) -> None:
        self.metas: dict[str, Meta] = {}
        self.finals = -1
        self.states = -1
        self.due = 0.0


class Peek:
    """Looks at queues through the link of a reader."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._link: Link = reader.link
        self._addresses: Addresses = reader.addresses
        self._speak: Dialect | None = None
        self._channel: Any = None
        self._declared = LRUCache(limit=DECLARED)
        self._seen = LRUCache(limit=SEEN)
        self._progress = LRUCache(limit=SEEN)
        self._snapshots = LRUCache(limit=SNAPSHOTS)

    # -- lone tasks

    def task(self, task_id: str, backlog_limit: int) -> Meta | None:
        """The latest state of a lone task, None when there is none.

        Raises:
            fastres.errors.BacklogLimitExceeded: the queue, which is not of fastres's making, has a longer history.
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: it cannot be read.
        """
        address = self._addresses.task(task_id)
        feed = self._reader.feed_of(address)
        if feed is not None:
            self._link.read(0, lambda: False, None)
            meta = feed.peek(task_id)
        else:
            meta = self._link.call(lambda speak: self._look(speak, address, task_id, backlog_limit))
        if meta is None:
            return self._seen.get(task_id)  # type: ignore[no-any-return]
        self._seen[task_id] = meta
        return meta

    def forget(self, task_id: str) -> None:
        self._seen.pop(task_id, None)

    def _look(self, speak: Dialect, address: Address, task_id: str, limit: int) -> Meta | None:
        channel = self._own_channel(speak)
        try:
            self._declare(speak, address)
            message, behind = speak.peek(channel, address.name)
        except NotFound:
            # It expired since it was declared.
            self._declared.pop(address.name, None)
            channel = self._own_channel(speak)
            self._declare(speak, address)
            message, behind = speak.peek(channel, address.name)
        if message is None:
            state = speak.inspect(address.name)
            others = state is not None and (state.messages or state.consumers)
            message = speak.glance(channel, address.name, LONG_GLANCE if others else GLANCE)
        if message is None:
            return None
        messages = [message]
        if behind:
            if behind >= limit:
                raise BacklogLimitExceeded(task_id)
            messages = speak.history(channel, address.name, behind + 1) or messages
        return self._latest(messages, address, task_id)

    def _latest(self, messages: list[Any], address: Address, task_id: str) -> Meta | None:
        latest = None
        for message in messages:
            try:
                meta = self._reader.decoder.decode(message)
            except Exception as exc:
                self._reader.report_unreadable(message, address.name, exc)
                if len(messages) == 1:
                    raise
                continue
            if meta["task_id"] != task_id:
                self._reader.reports.add(
                    "unknown", address.name, meta["task_id"], message.delivery_tag,
                    f"it stands in the queue of task {task_id}", 0,
                )  # fmt: skip
            elif latest is None or latest["status"] not in states.READY_STATES:
                latest = meta
        return latest

    def _own_channel(self, speak: Dialect) -> Any:
        if speak is not self._speak:
            self._speak, self._channel = speak, None
            self._declared.clear()
        if self._channel is None or not getattr(self._channel, "is_open", True):
            self._channel = speak.channel()
            speak.prefetch(self._channel, 1)
        return self._channel

    def _declare(self, speak: Dialect, address: Address) -> None:
        if address.name not in self._declared:
            speak.declare(self._addresses.queue(address))
            self._declared[address.name] = True

    # -- groups

    def member(self, group_id: str, task_id: str) -> Meta | None:
        """The latest state of a member of a group, None when there is none."""
        known: Snapshot | None = self._snapshots.get(group_id)
        meta = known.metas.get(task_id) if known is not None else None
        if meta is None or meta["status"] not in states.READY_STATES:
            meta = self.group(group_id, with_states=True).metas.get(task_id)
        return meta

    def offer(self, group_id: str, task_ids: Iterable[str], join: Join, with_states: bool) -> None:
        """Give a join what there is of some members of a group."""
        metas = self.group(group_id, with_states, join.deadline).metas
        with self._link.exclusively(join.deadline):
            for task_id in task_ids:
                if task_id in metas and task_id in join.aggregate:
                    join.offer([(None, task_id, metas[task_id])], None, None)

    def group(self, group_id: str, with_states: bool, deadline: float | None = None) -> Snapshot:
        """What the queue of a group holds, read again if it has changed.

        One round trip while it has not changed. A member's result may be seen late by four times the seconds
        that reading the queue takes.
        """
        snapshot: Snapshot = self._snapshots.get(group_id) or Snapshot()
        self._snapshots[group_id] = snapshot
        addresses = [self._addresses.group(group_id)]
        if with_states:
            addresses.append(self._addresses.states(group_id))
        if self._reader.feed_of(addresses[0]) is not None:
            # A join of this process is at it, and its results know.
            return snapshot
        self._link.call(lambda speak: self._refresh(speak, snapshot, addresses), deadline)
        return snapshot

    def _refresh(self, speak: Dialect, snapshot: Snapshot, addresses: list[Address]) -> None:
        finals = speak.declare(self._addresses.queue(addresses[0]))
        changed = finals.messages != snapshot.finals
        states_ = None
        if len(addresses) > 1:
            states_ = speak.declare(self._addresses.queue(addresses[1]))
            changed = changed or states_.messages != snapshot.states
        if not changed or time.monotonic() < snapshot.due:
            return
        start = time.monotonic()
        if states_ is not None and self._scan(speak, snapshot, addresses[1], states_.messages):
            snapshot.states = states_.messages
        if self._scan(speak, snapshot, addresses[0], finals.messages):
            snapshot.finals = finals.messages
        end = time.monotonic()
        snapshot.due = end + REST * (end - start)

    def _scan(self, speak: Dialect, snapshot: Snapshot, address: Address, count: int) -> bool:
        """Read ``count`` messages and put them back; False when somebody else is reading."""
        messages = self.read_all(speak, address, count)
        for message in messages or ():
            try:
                meta = self._reader.decoder.decode(message)
            except Exception as exc:
                self._reader.report_unreadable(message, address.name, exc)
                continue
            before = snapshot.metas.get(meta["task_id"])
            if before is None or before["status"] not in states.READY_STATES:
                snapshot.metas[meta["task_id"]] = meta
        return messages is not None

    def read_all(self, speak: Dialect, address: Address, count: int) -> list[Any] | None:
        """Up to ``count`` messages of a queue, put back where they were; None while another process reads it."""
        if not count:
            return []
        end = time.monotonic() + TURN
        while True:
            try:
                return speak.read_all(address.name, count)
            except Busy:
                if time.monotonic() > end:
                    return None
                time.sleep(TURN / 10)

    def progress(self, group_id: str) -> int:
        """How many results of a group have come: the messages in its queue."""
        address = self._addresses.group(group_id)
        state = self._link.call(lambda speak: speak.inspect(address.name))
        # What came over the connection before that answer is counted here.
        count = (state.messages if state is not None else 0) + self._reader.progress(address)
        # While somebody reads the queue its messages are out of it, but what has come does not go.
        snapshot: Snapshot = self._snapshots.get(group_id) or Snapshot()
        most: int = max(count, self._progress.get(group_id, 0), snapshot.finals)
        self._progress[group_id] = most
        return most
