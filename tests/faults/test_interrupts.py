"""An operation interrupted at any point leaves no consumer, no unacknowledged message, and a working backend."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
from backend_kit import (
    CUT_GREETINGS,
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    member_ids,
    new_ids,
    page_ids,
    store,
    store_group,
    until,
)
from celery import uuid
from celery.exceptions import SoftTimeLimitExceeded
from proj import add, progress_without_end
from rabbitmq_node import Node
from workers import Worker

from fastres.ids import queue_name

pytestmark = CUT_GREETINGS


class Interrupted(BaseException):
    """Raised as by a signal handler, or by killing a greenlet."""


#: The functions in which a thread waits: for the broker, for another thread, for time to pass. An acquired lock stays
#: acquired.
WAITS = {"recv", "recv_into", "send", "sendall", "poll", "connect", "sleep", "select"}
LOCKS = {"acquire"}


class InterruptAt:
    """Raises in this thread, once, at the n-th point where it begins or ends a wait.

    Like a signal handler, or the killing of a greenlet.
    """

    def __init__(self, number: int) -> None:
        self.left = number
        self.where = ""

    def __enter__(self) -> InterruptAt:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name = getattr(argument, "__name__", "")
        if (event in ("c_call", "c_return") and name in WAITS) or (event == "c_call" and name in LOCKS):
            self.left -= 1
            if self.left == 0:
                self.where = f"{event} of {name}, {frame.f_code.co_filename}:{frame.f_lineno}"
                sys.setprofile(None)
                raise Interrupted(self.where)


def points_of(operation: Callable[[], Any]) -> int:
    """The number of points at which an operation can be interrupted."""
    counter = InterruptAt(-1)
    with counter:
        operation()
    return -1 - counter.left


def is_clean(broker: Broker, names: list[str], expected: int) -> bool:
    """Whether all messages are ready, without consumers."""
    states = [state for name in names if (state := broker.state(name)) is not None]
    return all(not state.consumer_count for state in states) and (
        sum(state.message_count for state in states) == expected
    )


def interrupt_everywhere(operation: Callable[[], Any], check: Callable[[str], None], most: int = 60) -> None:
    """Interrupt an operation at each of its points, or at ``most`` of them."""
    operation()
    count = points_of(operation)
    assert count
    hit = 0
    for point in sorted({max(1, round(number * count / most)) for number in range(1, most + 1)}):
        interrupt = InterruptAt(point)
        with contextlib.suppress(Interrupted), interrupt:
            operation()
        hit += bool(interrupt.where)
        check(interrupt.where)
    assert hit


@pytest.mark.parametrize("known", [True, False], ids=["ready", "pending"])
@pytest.mark.parametrize("kind", [page_ids, new_ids], ids=["page", "own"])
def test_looks(make_app: MakeApp, broker: Broker, known: bool, kind: Any) -> None:
    app, writer = make_app(), make_app()
    ids = kind(2)
    store(writer, ids[0], 1)
    if known:
        store(writer, ids[1], 2)
    names = [queue_name(task_id) for task_id in set(ids)]
    expected = len(ids) if known else 1

    def look() -> None:
        app.backend.layout.looks.forget_all()
        app.backend._cache.clear()
        assert app.AsyncResult(ids[1]).state == ("SUCCESS" if known else "PENDING")

    def check(where: str) -> None:
        queues = list(dict.fromkeys(names))
        until(lambda: is_clean(broker, queues, expected), 5, so=where)
        look()

    interrupt_everywhere(look, check)


@pytest.mark.parametrize("kind", [page_ids, new_ids], ids=["page", "own"])
def test_waits(make_app: MakeApp, broker: Broker, kind: Any) -> None:
    app, writer = make_app(), make_app()
    ids = kind(2)
    for task_id in ids:
        store(writer, task_id, 1)
    names = list(dict.fromkeys(queue_name(task_id) for task_id in ids))

    def wait() -> None:
        app.backend.layout.looks.forget_all()
        app.backend._cache.clear()
        assert app.AsyncResult(ids[1]).get(timeout=ENOUGH) == 1

    def check(where: str) -> None:
        until(lambda: is_clean(broker, names, 2), 5, so=where)
        assert not app.backend.layout.reader._feeds, where
        wait()

    interrupt_everywhere(wait, check)


def test_waits_for_missing_results(make_app: MakeApp, broker: Broker) -> None:
    app, writer = make_app(), make_app()
    ids = page_ids(2)
    store(writer, ids[0], 1)
    names = [queue_name(ids[0])]

    def wait() -> None:
        with contextlib.suppress(TimeoutError, Exception):
            app.AsyncResult(ids[1]).get(timeout=0.1)

    def check(where: str) -> None:
        until(lambda: is_clean(broker, names, 1), 5, so=where)
        assert app.AsyncResult(ids[0]).get(timeout=ENOUGH) == 1
        app.backend._cache.clear()

    interrupt_everywhere(wait, check, 30)


def test_joins(make_app: MakeApp, broker: Broker) -> None:
    """No result of a join is lost: those that were not returned are there for the next join."""
    app, writer = make_app(), make_app()
    for point in range(1, 60):
        held = group_of(app, 3)
        store_group(writer, held)
        got: list[Any] = []
        interrupt = InterruptAt(point)
        with contextlib.suppress(Interrupted), interrupt:
            for _, meta in app.backend.iter_native(held, timeout=ENOUGH):
                got.append(meta["result"])
        ids = [member.id for member in held.results]
        missing = [task_id for number, task_id in enumerate(ids) if number not in got]
        again = dict(app.backend.get_many(missing, timeout=ENOUGH))
        assert set(again) >= set(missing[1:]), interrupt.where
        assert not app.backend.layout.reader._feeds, interrupt.where


def test_stores(make_app: MakeApp, broker: Broker) -> None:
    """The next result is stored and read, whichever write was interrupted."""
    app, reader = make_app(), make_app()

    def write() -> None:
        (task_id,) = new_ids(1)
        store(app, task_id, 1)

    def check(where: str) -> None:
        (task_id,) = new_ids(1)
        store(app, task_id, 5)
        assert reader.AsyncResult(task_id).get(timeout=ENOUGH) == 5, where

    interrupt_everywhere(write, check, 40)


def test_many_interrupted_threads_leave_room_for_others(make_app: MakeApp) -> None:
    """Killed threads do not use up the process's shared connections."""
    app = make_app(broker_pool_limit=2)
    (task_id,) = page_ids(1)
    store(app, task_id, 1)

    def look() -> None:
        app.backend.layout.looks.forget_all()
        app.backend._cache.clear()
        assert app.AsyncResult(task_id).state == "SUCCESS"

    def interrupted(point: int) -> None:
        with contextlib.suppress(Interrupted), InterruptAt(point):
            look()

    for point in range(1, 40):
        thread = threading.Thread(target=interrupted, args=(point,))
        thread.start()
        thread.join()
    look()


# -- signals at random moments

#: The number of rounds of four operations, each interrupted by a timer.
ROUNDS = int(os.environ.get("FASTRES_SIGNALS", "400")) // 4


class Alarm(Exception):
    """Like ``SoftTimeLimitExceeded``: raised by a signal handler."""


@contextlib.contextmanager
def alarms(seed: int) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yields a function that runs an operation with a timer that fires meanwhile or soon after."""
    moments = random.Random(seed)
    # On a busy machine, connecting takes longer than this, and must succeed now and then.
    longest, interrupted = 0.006, 0

    def on_alarm(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                # Python would keep its import lock, and hang in other threads; kombu imports at each connection.
                signal.setitimer(signal.ITIMER_REAL, 0.0001)
                return
            frame = frame.f_back
        raise Alarm

    def do(operation: Callable[[], Any]) -> Any:
        nonlocal interrupted
        try:
            try:
                most = longest * 2 ** (interrupted // 10)
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, min(most, 1.0)))
                result = operation()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm:
            interrupted += 1
            return None
        interrupted = 0
        return result

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        yield do
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(180 + ROUNDS)
def test_signals_at_any_moment(make_app: MakeApp, broker: Broker) -> None:
    """Stores, looks, waits and joins lose nothing, hang nowhere, and leave no consumers."""
    app, other = make_app(), make_app()
    lone, pages = page_ids(40), set()
    for task_id in lone:
        store(other, task_id, task_id)
        pages.add(queue_name(task_id))
    with alarms(seed=9) as do:
        for number in range(ROUNDS):
            result = app.AsyncResult(lone[number % len(lone)])
            own = app.AsyncResult(new_ids(1)[0])
            held = group_of(app, 5)
            store_group(other, held)
            do(partial(store, app, own.id, "own"))
            do(partial(getattr, result, "state"))
            do(partial(result.get, timeout=5))
            do(partial(held.get, timeout=5))
            # The interrupted join continues with the returned results and those in the queue.
            assert held.get(timeout=ENOUGH) == list(range(5))
            store(app, own.id, "own")
            assert own.get(timeout=ENOUGH) == "own"
    for task_id in lone:
        assert app.AsyncResult(task_id).get(timeout=ENOUGH) == task_id
        assert other.AsyncResult(task_id).state == "SUCCESS"
    gc.collect()
    until(lambda: is_clean(broker, sorted(pages), len(lone)), ENOUGH)


def test_a_task_that_reports_progress_until_its_time_limit(node: Node) -> None:
    """Its process and its connections are used again."""
    with Worker(node.url, concurrency=1) as worker, worker.client():
        for _ in range(5):
            with pytest.raises(SoftTimeLimitExceeded):
                progress_without_end.delay().get(timeout=ENOUGH)
            assert add.delay(1, 2).get(timeout=ENOUGH) == 3


def test_a_wait_that_the_garbage_collector_ends(app: Any, broker: Broker) -> None:
    """In the middle of another thread's question: it must not take the answer."""
    held = group_of(app, 3)
    store_group(app, held)
    ids = [member.id for member in held.results]
    results = app.backend.get_many([*ids, *new_ids(1)], timeout=ENOUGH)
    next(results)

    def ask(session: Any) -> Any:
        results.close()
        return session.inspect(queue_name(ids[0]))

    assert app.backend._link.call(ask) is not None
    assert not app.backend.layout.reader._feeds
    assert len(list(app.backend.get_many(ids[1:], timeout=ENOUGH))) == 2


@pytest.mark.timeout(120)
def test_signals_while_results_are_stored_without_confirms(make_app: MakeApp) -> None:
    """Stored results are there, no matter what was interrupted before and after."""
    app = make_app(result_backend_transport_options={"confirm": False, "confirm_window": 20})
    ids = member_ids(uuid(), 4000)
    stored = []
    with alarms(seed=3) as do:
        for start in range(0, len(ids), 10):

            def some(start: int = start) -> None:
                for task_id in ids[start : start + 10]:
                    store(app, task_id, task_id)
                    stored.append(task_id)

            do(some)
    assert len(stored) > len(ids) / 10
    app.backend.close()
    there = make_app().backend.get_many(stored, timeout=ENOUGH)
    assert {meta["result"] for _, meta in there} == set(stored)
