"""The layout of results over queues: where a result is stored, awaited, looked up and forgotten.

One class for each alias: ``SharedQueues`` of ``fastres://``, ``Mailbox`` of ``fastres-rpc://``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import states
from celery._state import get_current_task, task_join_will_block

from fastres import ids
from fastres.chords.log import shard_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fastres._protocols import Meta
    from fastres.addresses import Address, Addresses
    from fastres.options import Options
    from fastres.read.join import Join
    from fastres.read.look import Looks
    from fastres.read.reader import Reader
    from fastres.read.reply_inbox import ReplyInbox

__all__ = ("Layout", "Mailbox", "SharedQueues")


class SharedQueues:
    """The queue of a result is a function of the task's id, so that any process that has the id can read it.

    Args:
        app: the Celery application.
        addresses: the backend's addresses.
        reader: waits.
        looks: reads without taking.
        options: of the backend.
    """

    #: Whether the queues that results are sent to are this process's to declare.
    declares = True
    #: Whether chords are joined from a log.
    joins_chords = True

    def __init__(self, app: Any, addresses: Addresses, reader: Reader, looks: Looks, options: Options) -> None:
        self.app = app
        self.addresses = addresses
        self.reader = reader
        self.looks = looks
        self.options = options

    def sent(self, task_id: str) -> None:
        """A task is about to be sent by this process."""

    def unexpected(self, task_id: str) -> None:
        """No call expects the result of a task any more."""

    def destination(self, task_id: str, request: Any) -> tuple[str, str]:
        """Routing key and correlation id of a task's result."""
        return self.addresses.rkey(task_id), getattr(request, "correlation_id", None) or task_id

    def outbox(self, task_id: str, state: str, request: Any) -> Address | None:
        """The address for a state; None: it is not stored."""
        if not self.options.keep_chord_results and shard_of(getattr(request, "chord", None)) is not None:
            return None
        addresses = self.addresses
        return addresses.result(task_id) if state in states.READY_STATES else addresses.states(task_id)

    def queues(self, task_id: str) -> list[Any]:
        """The queues that are declared before a task's result is sent."""
        return [self.addresses.queue(self.addresses.result(task_id))]

    def takes(self, no_ack: bool, alone: bool = False) -> bool:
        """Whether a reader of several results, or of a lone result, takes them."""
        return no_ack and self.options.take in (("always",) if alone else ("joins", "always"))

    def open(self, join: Join, take: bool, with_states: bool) -> None:
        """Subscribe to wherever the results of a join come."""
        addresses, others = self.addresses, []
        for task_ids in addresses.by_result(join.aggregate.missing()).values():
            first = task_ids[0]
            results, states_ = addresses.result(first), addresses.states(first)
            # States are delivered before the result.
            consumed = [states_, results] if with_states else [results]
            kin = ids.parse(first)
            if take and kin is not None and kin.kind == ids.Kind.MEMBER and not join.alone:
                self.reader.group(join, consumed, [] if with_states else [states_])
            else:
                others += consumed
        if others:
            self.reader.tasks(join, others, take, declares=not (join.alone and others[0].of_task is not None))

    def look(self, task_id: str, backlog_limit: int) -> Meta | None:
        """Read the latest state of a task and leave it in its queue; None: there is none."""
        feed = self.reader.feed_of(self.addresses.result(task_id))
        # Messages that this process holds are not in their queue.
        held = None if feed is None else feed.peek(task_id)
        return held or self.looks.task(task_id, backlog_limit, waits_too=feed is not None)

    def look_at_all(self, task_ids: Collection[str]) -> dict[str, Meta | None]:
        """As :meth:`look` for many tasks, with few reads. Tasks of queues with many messages are left out."""
        return self.looks.tasks(task_ids)

    def progress(self, group_id: str) -> int:
        """The number of results of a group that have arrived."""
        return self.looks.progress(group_id, self.reader.progress)

    def forget(self, task_id: str) -> None:
        """Delete the result and the states of a task."""
        self.looks.forget(task_id)

    def forget_all(self) -> None:
        """In a forked child: drop the parent's deliveries and snapshots."""
        self.reader.forget_all()
        self.looks.forget_all()


class Mailbox:
    """Results are in the reply queue of the client that sent the task, and no other process can read them.

    Args: those of ``SharedQueues``.
    """

    declares = False
    joins_chords = False

    def __init__(self, app: Any, addresses: Addresses, reader: Reader, looks: Looks, options: Options) -> None:
        self.app = app
        self.addresses = addresses
        self.reader = reader
        #: Called with id and meta of each final result that comes.
        self.on_final: Callable[[str, Meta], object] | None = None

    @property
    def address(self) -> Address:
        """This thread's reply queue."""
        return self.addresses.mailbox(str(self.app.thread_oid))

    def sent(self, task_id: str) -> None:
        # A task that sends tasks does not wait for them.
        if not task_join_will_block():
            self._replies.expect(task_id)
            self._replies.add(self.address)

    def unexpected(self, task_id: str) -> None:
        self._replies.forget(task_id)

    def destination(self, task_id: str, request: Any) -> tuple[str, str]:
        """Reply queue and correlation id of a task's result.

        Raises:
            RuntimeError: the client that sent the task is unknown.
        """
        request = request or getattr(get_current_task(), "request", None)
        if request is None:
            raise RuntimeError(
                f"fastres-rpc: the request of task {task_id} says where its result goes; it is missing"
            )
        return request.reply_to, request.correlation_id or task_id

    def outbox(self, task_id: str, state: str, request: Any) -> Address | None:
        reply_to, _ = self.destination(task_id, request)
        return self.addresses.mailbox(reply_to) if reply_to else None

    def queues(self, task_id: str) -> list[Any]:
        # The client has declared its reply queue.
        return []

    def takes(self, no_ack: bool, alone: bool = False) -> bool:
        return no_ack

    def open(self, join: Join, take: bool, with_states: bool) -> None:
        self._replies.add(self.address, join.deadline)
        self.reader.reply(join)

    def look(self, task_id: str, backlog_limit: int) -> Meta | None:
        self._read()
        return self._replies.peek(task_id)

    def look_at_all(self, task_ids: Collection[str]) -> dict[str, Meta | None]:
        return {}

    def progress(self, group_id: str) -> int:
        """The number of results of a group that have arrived at this client."""
        self._read()
        return self._replies.in_group(group_id)

    def forget(self, task_id: str) -> None:
        self._replies.drop(task_id)

    def forget_all(self) -> None:
        self.reader.forget_all()

    @property
    def _replies(self) -> ReplyInbox:
        replies = self.reader.replies
        replies.on_final = self.on_final
        return replies

    def _read(self) -> None:
        """Read all results that have arrived until now."""
        address, link = self.address, self.reader.link
        self._replies.add(address)
        # A question to the broker: its reply arrives after all earlier deliveries.
        link.call(lambda session: session.inspect(address.name))
        link.read(0, lambda: False, None)


Layout = SharedQueues | Mailbox
