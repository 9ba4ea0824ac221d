"""Helpers of chord tests: events, a model of the log in a broker, and a joiner that can be ended at any commit."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import kombu
from amqp.exceptions import ChannelError
from backend_kit import Broker, nobodys_task, request_of, until
from celery import Celery, chord, uuid
from celery.app.task import Context
from rabbitmq_node import Node

from fastres._impl import Delivery
from fastres.addresses import Address
from fastres.amqp.publishing import Publishing
from fastres.chords.events import (
    WITH_TERMS,
    Event,
    Part,
    Plan,
    Terms,
    pack_part,
    pack_plan,
    write_event,
)
from fastres.chords.reducer import MAX_MERGED, Chord
from fastres.chords.shard import Shard
from fastres.counts import Counts

PLAN = pack_plan(Plan("application/json", "utf-8", b'"the body"'))


def delivery(tag: int, body: bytes) -> Any:
    return Delivery(1, "joiner", tag, False, body)


def result(task_id: str) -> bytes:
    """The packed part of a task."""
    return pack_part(Part(None, "SUCCESS", "application/json", "utf-8", json.dumps(f"of {task_id}").encode()))


def size_event(chord_id: str, size: int, at: float | None = None, terms: Terms | None = None) -> bytes:
    version = 1 if terms is None else WITH_TERMS
    event = Event(chord_id, at=at or time.time(), size=size, plan=len(PLAN), terms=terms, version=version)
    return write_event(event, PLAN)


def part_event(chord_id: str, task_id: str, packed: bytes | None = None, at: float | None = None) -> bytes:
    packed = result(task_id) if packed is None else packed
    return write_event(Event(chord_id, at=at or time.time(), part=task_id), parts=[packed])


def added_event(chord_id: str, task_id: str) -> bytes:
    return write_event(Event(chord_id, at=time.time(), added=[task_id]))


#: Whether the bodies' queues are classic.
BODIES_COME_ONCE = os.environ.get("FASTRES_TEST_DEFAULT_QUEUES") != "quorum"


class Unrun:
    """Chords that are really sent; no worker reads the queues of their headers and bodies.

    The test acts as the workers, and counts the sent bodies with their arguments.
    """

    def __init__(self, app: Celery, broker: Broker) -> None:
        self._app = app
        self._broker = broker
        self.task = nobodys_task(app)
        self._seen: set[Any] = set()
        name = uuid()
        self.header, self.bodies = f"header-{name}", f"bodies-{name}"
        for queue in (self.header, self.bodies):
            broker.channel().queue_declare(queue, durable=True, auto_delete=False)

    def send(self, count: int, name: Any = "body", **options: Any) -> Any:
        """Send a chord of so many tasks, whose body has ``name``. Returns: the body's result."""
        body = self.task.s(name=name).set(**{"queue": self.bodies, **options})
        return chord([self.task.s().set(queue=self.header) for _ in range(count)], app=self._app)(body)

    def begin(self, count: int, name: Any = "body", body: Any = None, **options: Any) -> list[Context]:
        """As send(), without sending the header's tasks. Returns: their requests."""
        body = body or self.task.s(name=name).set(**{"queue": self.bodies, **options})
        group_id, task_ids = uuid(), [uuid() for _ in range(count)]
        body.freeze(group_id=group_id)
        self._app.backend.apply_chord((group_id, [self._app.AsyncResult(each) for each in task_ids]), body)
        self._app.backend.set_chord_size(group_id, count)
        return [
            request_of(task_id, group=group_id, group_index=index, chord=body, root_id=task_id)
            for index, task_id in enumerate(task_ids)
        ]

    def requests(self, count: int) -> list[Context]:
        """The requests of the next header tasks, as in a worker, in the order in which they were sent."""
        return list(self._take(self.header, count))

    def _take(self, queue: str, count: int) -> Iterator[Context]:
        for _ in range(count):
            message = until(lambda: self._broker.channel().basic_get(queue, no_ack=True), so=f"a task in {queue}")
            headers = message.headers
            embedded = json.loads(message.body)[2]
            yield Context({**headers, "correlation_id": headers["id"], "chord": embedded["chord"]})

    def reconnect(self) -> None:
        """Open a new connection, after the broker was down."""
        until(lambda: self._broker.connection.ensure_connection(max_retries=3))
        self._broker.connection.collect()

    def part(self, request: Context, result: Any, app: Celery | None = None) -> None:
        """A task of a header has returned."""
        (app or self._app).backend.mark_as_done(request.id, result, request=request)

    def _has_bodies(self, count: int) -> Callable[[], bool]:
        return lambda: (self._broker.messages(self.bodies) or 0) >= count

    def called(self) -> list[tuple[Any, Any]]:
        """The names and arguments of the bodies that were sent since the last call."""
        found = []
        # If its queue is not classic, a body may be sent twice when its joiner ends: see docs/chords.md.
        seen: set[Any] = set() if BODIES_COME_ONCE else self._seen
        while (message := self._broker.channel().basic_get(self.bodies, no_ack=True)) is not None:
            (values,), kwargs, _ = kombu.serialization.loads(
                message.body, message.content_type, message.content_encoding
            )
            body = message.headers["id"], repr(kwargs["name"])
            if body not in seen:
                # Otherwise each is sent once, and all are counted.
                seen.update([] if BODIES_COME_ONCE else [body])
                found.append((kwargs["name"], values))
        return found

    def wait(self, count: int, timeout: float = 20.0) -> list[tuple[Any, Any]]:
        """As called(), once there are so many; AssertionError if there are more, or too few for too long."""
        found: list[tuple[Any, Any]] = []
        end = time.monotonic() + timeout
        while len(found) < count:
            enough = count - len(found) if BODIES_COME_ONCE else 1
            until(self._has_bodies(enough), end - time.monotonic(), so=f"{count} bodies, not {len(found)}")
            found += self.called()
        assert len(found) == count, found
        return found


def wait_for_joiners(app: Celery, node: Node, count: int) -> None:
    """Wait until so many joiners consume the first shard; a quorum queue tells clients only of the active one."""
    name = app.backend.addresses.chords(0).name

    def consumers() -> int:
        return node.ctl("list_consumers", "--no-table-headers", "queue_name").splitlines().count(name)

    until(lambda: consumers() == count, so=f"{count} joiners of {name}")


def finish(unrun: Unrun, requests: Iterable[Context], results: Iterable[Any] | None = None) -> None:
    """Store the results of header tasks; the default results are their places."""
    for request, result in zip(requests, results or iter(range(1_000_000))):
        unrun.part(request, request.group_index if results is None else result)


def begun(unrun: Unrun, sizes: list[int]) -> list[Context]:
    """Begin chords of these sizes, named by their numbers. Returns: the requests of all their tasks."""
    return [request for number, size in enumerate(sizes) for request in unrun.begin(size, number)]


def results_of(sizes: list[int]) -> list[tuple[int, list[int]]]:
    """The arguments of the bodies of chords of these sizes."""
    return [(number, list(range(size))) for number, size in enumerate(sizes)]


def results(*task_ids: str) -> dict[str, bytes]:
    return {task_id: result(task_id) for task_id in task_ids}


class Log:
    """A model of a shard's queue: removes acknowledged messages, and delivers others again, at their places."""

    def __init__(self) -> None:
        self._published = 0
        self._delivered = 0
        #: By their place in the queue.
        self.ready: dict[int, bytes] = {}
        #: By delivery tag: the place, and the message.
        self.unacknowledged: dict[int, tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self.ready) + len(self.unacknowledged)

    def publish(self, body: bytes) -> None:
        self._published += 1
        self.ready[self._published] = body

    def bodies(self) -> list[bytes]:
        """All messages, delivered or not."""
        return [*self.ready.values(), *(body for _, body in self.unacknowledged.values())]

    def deliver(self, count: int) -> list[Any]:
        """The next so many messages."""
        deliveries = []
        for place in sorted(self.ready)[:count]:
            self._delivered += 1
            body = self.ready.pop(place)
            self.unacknowledged[self._delivered] = place, body
            deliveries.append(delivery(self._delivered, body))
        return deliveries

    def acknowledge(self, tags: Any) -> None:
        for tag in tags:
            # The broker refuses a second acknowledgement.
            del self.unacknowledged[tag]

    def give_back(self) -> None:
        """The consumer has ended: deliver its messages again."""
        self.ready.update(self.unacknowledged.values())
        self.unacknowledged.clear()


class Lost(Exception):
    """The connection broke in a commit."""


class Lab:
    """A shard's joiner on a queue in memory: it can end at any commit, and another one continues.

    Implements the methods of the joiner and of the session that ``Shard`` calls.
    """

    one_by_one = False
    firing: list[Chord]
    largest = MAX_MERGED
    lost = (Lost,)
    channel_errors = (ChannelError,)
    since = 0.0

    def __init__(self, acknowledges_first: bool = False) -> None:
        #: As LavinMQ: a commit that is False has acknowledged but published nothing.
        self.acknowledges_first = acknowledges_first
        self.log = Log()
        #: The parts of each firing of each chord, and the reason if it was fired as failed.
        self.fired: list[tuple[str, dict[str, bytes]]] = []
        self.failed: dict[str, str] = {}
        #: Outcomes of the next commits and waits for confirms: None succeeds, False is not carried out, True is
        #: carried out but its answer is lost.
        self.commits: list[bool | None] = []
        self.ends = 0
        #: Whether the log refuses publishings.
        self.is_full = False
        self.addresses = SimpleNamespace(
            chords=lambda number: Address(f"log.{number}", is_log=True),
            refused=lambda: Address("refused"),
            queue=lambda address: address,
        )
        self.reported: list[tuple[Any, ...]] = []
        reports = SimpleNamespace(add=lambda *report: self.reported.append(report))
        self.backend = SimpleNamespace(reports=reports, counts=Counts())
        self._posted: list[Publishing] = []
        self._tags: list[int] = []
        self.shard = self._start()

    def _start(self) -> Shard:
        self.firing = []
        self.refused_by: set[Any] = set()
        return Shard(self, self, 0)  # type: ignore[arg-type]

    def step(self, count: int) -> None:
        """Read at most so many messages and handle them."""
        self._step(lambda: self._receiver(self.log.deliver(self._room(count))))

    def maintain(self, renewal: float = 0.0, expires: float | None = None) -> None:
        self._step(lambda: self.shard.maintain(renewal, expires))

    def _step(self, action: Any) -> None:
        try:
            action()
            self.shard.work()
            if self.shard.wanted_prefetch is not None:
                self.shard.leave()
                self.log.give_back()
                self.shard = Shard(self, self, 0, self.shard.wanted_prefetch)  # type: ignore[arg-type]
        except Lost:
            self.end()

    def leave_shard(self) -> None:
        """The joiner hands the shard over to another one."""
        self._step(self._leave_shard)

    def _leave_shard(self) -> None:
        self.shard.leave()
        self.end()

    def end(self) -> None:
        """The joiner ends, and another one begins."""
        self.ends += 1
        self._posted, self._tags = [], []
        self.log.give_back()
        self.shard = self._start()

    def finish(self) -> None:
        """Read until the log is empty."""
        self.commits = []
        for _ in range(1000):
            if not self.log.ready and not self.shard.received:
                return
            self.step(10)
        raise AssertionError(f"it never ends: {self.log.ready}")

    def _room(self, count: int) -> int:
        return min(count, self._prefetch - len(self.log.unacknowledged)) if self._prefetch else count

    # -- the joiner

    def is_postponed(self, chord: Chord) -> bool:
        return False

    def reply_timeout(self, chords: list[Chord]) -> float:
        return 1.0

    def notified(self, chord: Chord) -> bool | None:
        return False

    def call(self, chord: Chord) -> list[Publishing]:
        self.failed[chord.id] = chord.failed
        return [Publishing(SimpleNamespace(body=b"", of=(chord.id, dict(chord.parts))), "", "bodies")]

    def forget(self, chord: Chord) -> None:
        pass

    def put_back(self, name: str, bodies: list[bytes]) -> None:
        for body in bodies:
            self.log.publish(body)

    def retry_unrouted(self, chord: Chord) -> bool:
        return True

    # -- the broker

    def within(self, seconds: float) -> Any:
        return contextlib.nullcontext()

    def channel(self) -> Any:
        return SimpleNamespace(tx_select=lambda: None, events=defaultdict(set))

    def prefetch(self, channel: Any, count: int) -> None:
        self._prefetch = count

    def declare(self, queue: Any) -> None:
        pass

    def has_other_arguments(self, name: str) -> bool:
        return False

    def consume(self, channel: Any, name: str, tag: str, receiver: Any, on_cancel: Any) -> None:
        self._receiver = receiver

    def hand_back(self) -> None:
        pass

    def leave(self, channel: Any, tags: Any, unacknowledged: Any) -> None:
        assert set(unacknowledged) == set(self.log.unacknowledged)

    def post(self, channel: Any, message: Any, exchange: str, routing_key: str) -> None:
        self._posted.append(Publishing(message, exchange, routing_key))

    def post_confirmed(self, publishings: list[Publishing]) -> tuple[list[Publishing], list[Publishing]]:
        how = self.commits.pop(0) if self.commits else None
        if self.is_full:
            return [], publishings
        if how is not False:
            self._take(publishings)
        if how is not None:
            raise Lost
        return [], []

    def _take(self, publishings: list[Publishing]) -> None:
        for publishing in publishings:
            if publishing.routing_key == "bodies":
                self.fired.append(publishing.message.of)
            elif publishing.routing_key.startswith("log."):
                self.log.publish(publishing.message.body)

    def acknowledge(self, channel: Any, tags: Any, all_up_to: int | None) -> None:
        self._tags += tags
        if all_up_to is not None:
            self._tags += [tag for tag in self.log.unacknowledged if tag <= all_up_to and tag not in tags]

    def commit(self, channel: Any) -> None:
        how = self.commits.pop(0) if self.commits else None
        posted, self._posted, tags, self._tags = self._posted, [], self._tags, []
        if how is not False or self.acknowledges_first:
            self.log.acknowledge(tags)
        if how is not False:
            self._take(posted)
        if how is not None:
            raise Lost
