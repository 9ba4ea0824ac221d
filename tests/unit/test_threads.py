"""Threads that share a compiled object: no call sees an unfinished change of another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wire
from amqp.exceptions import FrameSyntaxError

from fastres import _impl
from fastres._protocols import ID

pytestmark = pytest.mark.skipif(
    sys.gettrace() is not None, reason="a tracer is called after every line, and lets other threads in"
)

C = _impl.load("c")
THREADS = 4
ROUNDS = 300


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """The interpreter switches threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], None]) -> None:
    """Run each of these in a thread, started together; raises the exception of a thread that failed."""
    begin = threading.Barrier(len(works))
    raised: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        begin.wait()
        try:
            work()
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_whole_deliveries_fed_by_several_threads() -> None:
    frames = C["frames"].Frames(131_072)
    frames.own(1)
    bodies = [b"%d" % number * 50 for number in range(8)]
    # A delivery that is fed in two parts takes another path than one that is fed at once.
    stream = b"".join(b"".join(wire.delivery(1, body, tag=f"t{body[0]}", part=30 + body[0])) for body in bodies)
    came: list[Any] = []

    def feed() -> None:
        for _ in range(ROUNDS):
            deliveries, others = frames.feed(stream)
            assert not others
            came.append([delivery.body for delivery in deliveries])

    def others() -> None:
        for _ in range(ROUNDS):
            frames.own(2)
            assert frames.unused() == b""
            frames.disown(2)

    at_once(*[feed] * THREADS, others)
    assert came == [bodies] * (THREADS * ROUNDS)
    assert frames.consumed == sum(len(wire.delivery(1, body, part=30 + body[0])) for body in bodies) * len(came)


def test_pieces_fed_by_several_threads_are_refused_at_worst() -> None:
    """Threads that feed one stream without an order garble it: only memory safety is promised."""
    stream = b"".join(wire.delivery(1, b"x" * 400, part=90)) + b"".join(wire.delivery(1, b"y" * 40))
    frames = C["frames"].Frames(131_072)

    def feed(size: int) -> None:
        frames.own(1)
        for _ in range(ROUNDS):
            for start in range(0, len(stream), size):
                try:
                    frames.feed(stream[start : start + size])
                except FrameSyntaxError:
                    frames.unused()
            frames.disown(1)
            frames.own(1)

    at_once(*[lambda size=size: feed(size) for size in (7, 50, 64, 333)])  # type: ignore[misc]


def test_every_id_is_ready_once_whoever_feeds_it() -> None:
    task_ids = [f"task-{number}" for number in range(ROUNDS * 10)]
    aggregate = C["aggregate"].Aggregate(task_ids, {"SUCCESS"})
    arrivals = [(None, task_id, {"status": "SUCCESS"}) for task_id in task_ids]
    ready: list[Any] = []
    repeated: list[Any] = []

    def feed() -> None:
        for start in range(0, len(arrivals), 7):
            sorts = aggregate.feed(arrivals[start : start + 7])
            ready.extend(sorts[0])
            repeated.extend(sorts[2])

    def look() -> None:
        left = len(aggregate)
        while left:
            assert len(aggregate.missing()) <= left
            assert "never awaited" not in aggregate
            assert len(aggregate) <= left
            left = len(aggregate)

    at_once(*[feed] * THREADS, look)
    assert sorted(task_id for _, task_id, _ in ready) == sorted(task_ids)
    assert len(repeated) == len(task_ids) * (THREADS - 1)
    assert aggregate.missing() == []


def test_every_message_is_taken_once_whoever_adds_it() -> None:
    template = C["publications"].MessageTemplate(1, 131_072, "", "queue", False, [b"<", b">"], bytes([ID]), 0)
    taken: list[bytes] = []
    added = [f"{number:036}".encode() for number in range(ROUNDS * THREADS)]

    def add(mine: list[bytes]) -> None:
        for id_ in mine:
            template.add(id_, 0, b"", b"body of " + id_)
            if id_[-1:] in b"05":
                taken.append(template.take())

    at_once(*[lambda start=start: add(added[start::THREADS]) for start in range(THREADS)])  # type: ignore[misc]
    taken.append(template.take())
    assert len(template) == 0
    frames = b"".join(taken)
    assert sorted(part[:36] for part in frames.split(b"body of ")[1:]) == added
