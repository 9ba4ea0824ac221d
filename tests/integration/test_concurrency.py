"""Threads, forks and greenlets: many waits at once, with one consuming connection per process."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from backend_kit import (
    QUORUM,
    Broker,
    group_of,
    held_by,
    ids_of,
    new_ids,
    page_ids,
    store,
    store_group,
    store_member,
    success,
    until,
)
from celery import Celery, uuid
from celery.exceptions import TimeoutError
from celery.result import AsyncResult
from kombu import Connection
from rabbitmq_node import Node
from workers import client

from fastres.amqp.rabbitmq import session_of

SECONDS = 20


@pytest.fixture(scope="module")
def node(own_node: Node) -> Node:
    """A broker without connections of other tests."""
    return own_node


@pytest.fixture
def app(node: Node) -> Iterator[Celery]:
    """The application that waits."""
    with client(node.url) as app:
        yield app


@pytest.fixture
def writer(make_app: Callable[..., Celery]) -> Celery:
    """The application that stores the results, like a worker."""
    app = make_app(result_backend_transport_options={"confirm": False})
    assert app.backend, "Celery makes one for each of the threads that come at once"
    return app


def connections(node: Node) -> int:
    return len(node.ctl("list_connections", "--no-table-headers", "pid").split())


def consumers(node: Node) -> int:
    return sum(map(int, node.ctl("list_queues", "--no-table-headers", "consumers").split()))


class Crowd:
    """Threads that each run a function; a context manager that waits for their end."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(function, *args, **kwargs)


def time_out(app: Celery, timeout: float, task_id: str | None = None) -> float:
    """The seconds that a wait for a missing result takes."""
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        app.AsyncResult(task_id or uuid()).get(timeout=timeout)
    return time.monotonic() - start


def overslept(seconds: float) -> float:
    """The delay of a sleep, which is due to a busy machine and not to the wait."""
    start = time.monotonic()
    longest = 0.0
    while (now := time.monotonic()) - start < seconds + 0.5:
        time.sleep(0.01)
        longest = max(longest, time.monotonic() - now - 0.01)
    return longest


# -- threads


def test_threads_wait_for_different_results_on_one_connection(app: Celery, writer: Celery, node: Node) -> None:
    task_ids = [task_id for _ in range(40) for task_id in page_ids(1)]
    store(writer, "open its connection", 0)
    before, consuming = connections(node), consumers(node)
    with Crowd(len(task_ids)) as crowd:
        waits = [crowd.send(app.AsyncResult(task_id).get, timeout=SECONDS) for task_id in task_ids]
        until(lambda: consumers(node) == consuming + len(task_ids))
        assert connections(node) == before + 1
        for number, task_id in enumerate(task_ids):
            store(writer, task_id, number)
        assert [wait.result() for wait in waits] == list(range(len(task_ids)))
        assert connections(node) == before + 1


def test_threads_wait_for_the_same_result(app: Celery, writer: Celery, broker: Broker) -> None:
    (task_id,) = page_ids(1)
    with Crowd(20) as crowd:
        waits = [crowd.send(app.AsyncResult(task_id).get, timeout=SECONDS) for _ in range(20)]
        broker.wait_for_consumer(app.backend.rkey(task_id))
        time.sleep(0.1)  # time for the others to wait too; late ones get the result as well
        store(writer, task_id, "for all")
        assert [wait.result() for wait in waits] == ["for all"] * 20


def test_threads_come_one_after_the_other_for_the_same_result(app: Celery, writer: Celery) -> None:
    """Some threads wait before the result arrives, some begin while it is handed over, some later."""
    (task_id,) = page_ids(1)
    with Crowd(20) as crowd:
        waits = []
        for number in range(20):
            waits.append(crowd.send(app.AsyncResult(task_id).get, timeout=SECONDS))
            if number == 10:
                store(writer, task_id, "for all")
            time.sleep(0.005)
        assert [wait.result() for wait in waits] == ["for all"] * 20


def test_threads_join_the_same_group(app: Celery, writer: Celery) -> None:
    held = group_of(app, 300)
    with Crowd(5) as crowd:
        joins = [crowd.send(held_by(app, held).get, timeout=SECONDS) for _ in range(5)]
        store_group(writer, held)
        for join in joins:
            assert join.result() == list(range(300))


def test_threads_join_groups_of_their_own(app: Celery, writer: Celery) -> None:
    groups = [group_of(app, 100) for _ in range(8)]
    with Crowd(8) as crowd:
        joins = [crowd.send(held.get, timeout=SECONDS) for held in groups]
        for number in range(100):
            for held in groups:
                store_member(writer, held, number, number)
        for join in joins:
            assert join.result() == list(range(100))


@pytest.mark.timing
def test_each_timeout_is_exact_while_others_wait(app: Celery, writer: Celery) -> None:
    timeouts = [0.5 + 0.15 * number for number in range(12)]
    stop = threading.Event()

    def traffic(task_ids: list[str]) -> list[Any]:
        return [app.AsyncResult(task_id).get(timeout=SECONDS) for task_id in task_ids]

    with Crowd(20) as crowd:
        busy = page_ids(40)
        others = [crowd.send(traffic, busy[start::4]) for start in range(4)]
        waits = [crowd.send(time_out, app, timeout) for timeout in timeouts]
        for task_id in busy:
            store(writer, task_id, task_id)
            stop.wait(0.04)
        slack = crowd.send(overslept, 2.0)
        took = [wait.result() for wait in waits]
        assert [other.result() for other in others] == [busy[start::4] for start in range(4)]
    late = sorted(seconds - timeout for timeout, seconds in zip(timeouts, took))
    assert late[0] >= -0.01
    # A thread may be delayed for longer than the probe was.
    assert late[len(late) // 2] <= 0.1 + slack.result(), late
    assert late[-1] <= 0.5 + slack.result(), late


@pytest.mark.timing
def test_a_timeout_is_exact_while_a_large_group_is_joined(app: Celery, writer: Celery) -> None:
    held = group_of(app, 3000)
    store_group(writer, held)
    with Crowd(2) as crowd:
        wait = crowd.send(time_out, app, 0.5)
        sleep = crowd.send(overslept, 0.5)
        assert held.get(timeout=SECONDS) == list(range(3000))
        # The join lets the waiting thread run only at intervals.
        assert 0.49 <= wait.result() <= 0.9 + sleep.result()


def test_states_are_polled_while_a_thread_waits(app: Celery, writer: Celery, broker: Broker) -> None:
    waited, polled = page_ids(2)
    with Crowd(1) as crowd:
        wait = crowd.send(app.AsyncResult(waited).get, timeout=SECONDS)
        broker.wait_for_consumer(app.backend.rkey(waited))
        start = time.monotonic()
        assert [app.AsyncResult(polled).state for _ in range(20)] == ["PENDING"] * 20
        # On a busy machine 2.8 s were seen; if polls waited for the waiting thread, they would take its timeout.
        assert time.monotonic() - start < 5
        store(writer, polled, 1)
        assert app.AsyncResult(polled).state == "SUCCESS"
        store(writer, waited, 2)
        assert wait.result() == 2


@pytest.mark.timing
def test_a_waiter_is_notified_at_once(app: Celery, writer: Celery, broker: Broker) -> None:
    """Also while another thread, which waits for another result, reads the socket."""
    first, second = page_ids(2)
    with Crowd(2) as crowd:
        long_wait = crowd.send(app.AsyncResult(first).get, timeout=SECONDS)
        broker.wait_for_consumer(app.backend.rkey(first))
        wait = crowd.send(app.AsyncResult(second).get, timeout=SECONDS)
        broker.wait_for_consumer(app.backend.rkey(second))
        start = time.monotonic()
        store(writer, second, "soon")
        assert wait.result() == "soon"
        assert time.monotonic() - start < 0.3
        store(writer, first, "late")
        assert long_wait.result() == "late"


def test_results_of_a_page_arrive_at_once_after_a_long_wait(app: Celery, writer: Celery, broker: Broker) -> None:
    """The time before the first result does not count as reading, after which another thread would read."""
    ids, seconds = page_ids(6), {}

    def wait(task_id: str) -> None:
        app.AsyncResult(task_id).get(timeout=SECONDS)
        seconds[task_id] = time.monotonic()

    with Crowd(len(ids)) as crowd:
        for task_id in ids:
            crowd.send(wait, task_id)
        broker.wait_for_consumer(app.backend.rkey(ids[0]))
        time.sleep(1.5)
        stored = {}
        for task_id in ids:
            store(writer, task_id, 1)
            stored[task_id] = time.monotonic()
            time.sleep(0.1)
    assert max(seconds[task_id] - stored[task_id] for task_id in ids) < 1


def test_many_threads_write_at_once(app: Celery, writer: Celery, node: Node) -> None:
    task_ids = page_ids(100)
    before = connections(node)
    with Crowd(30) as crowd:
        for done in [crowd.send(store, writer, task_id, task_id) for task_id in task_ids]:
            done.result()
    assert connections(node) - before <= 10, "broker_pool_limit"
    assert [app.AsyncResult(task_id).get(timeout=SECONDS) for task_id in task_ids] == task_ids


# -- forks


def in_fork(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child. Returns: its value, as JSON; raises the child's errors."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = {"value": function()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = json.loads(pipe.read() or '{"error": "the child died"}')
    os.waitpid(pid, 0)
    assert "error" not in answer, answer["error"]
    return answer["value"]


#: Whether threads run without Python's lock.
FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@FORKS
def test_a_forked_child_starts_clean(app: Celery, writer: Celery, node: Node) -> None:
    ours, theirs, late = page_ids(3)
    for task_id in (ours, theirs):
        store(writer, task_id, task_id)
    assert app.AsyncResult(ours).get(timeout=SECONDS) == ours
    before = connections(node)
    value, state, seen = in_fork(
        lambda: (
            app.AsyncResult(theirs).get(timeout=SECONDS),
            app.AsyncResult(late).state,
            connections(node),
        )
    )
    assert (value, state, seen) == (theirs, "PENDING", before + 2)
    store(writer, late, "late")
    assert app.AsyncResult(late).get(timeout=SECONDS) == "late", "the parent's connections still work"


@FORKS
def test_a_child_forked_in_the_middle_of_a_wait(app: Celery, writer: Celery, broker: Broker) -> None:
    waited, other = page_ids(2)
    store(writer, other, "for the child")
    with Crowd(2) as crowd:
        waits = [crowd.send(app.AsyncResult(waited).get, timeout=SECONDS) for _ in range(2)]
        broker.wait_for_consumer(app.backend.rkey(waited))
        assert in_fork(lambda: app.AsyncResult(other).get(timeout=SECONDS)) == "for the child"
        assert in_fork(lambda: time_out(app, 0.3, waited)) < 0.4 + 0.3
        store(writer, waited, "for the parent")
        assert [wait.result() for wait in waits] == ["for the parent"] * 2


@FORKS
def test_a_child_forked_in_the_middle_of_a_join(app: Celery, writer: Celery) -> None:
    held = group_of(app, 500)
    store_group(writer, held)
    pairs = held.iter_native(timeout=SECONDS)
    got = [next(pairs)[0] for _ in range(100)]
    (other,) = page_ids(1)
    store(writer, other, "for the child")
    assert in_fork(lambda: app.AsyncResult(other).get(timeout=SECONDS)) == "for the child"
    got += [task_id for task_id, _ in pairs]
    assert sorted(got) == sorted(ids_of(held))


@FORKS
def test_a_child_writes(app: Celery, writer: Celery) -> None:
    ours, theirs = page_ids(2)
    store(writer, ours, "parent's")
    in_fork(lambda: store(writer, theirs, "child's"))
    store(writer, ours, "parent's")
    assert app.AsyncResult(theirs).get(timeout=SECONDS) == "child's"
    assert app.AsyncResult(ours).get(timeout=SECONDS) == "parent's"


def do_everything(app: Celery, members: int = 3) -> None:
    """Store, look, wait, join, and store a part of a chord."""
    (lone,) = page_ids(1)
    store(app, lone, "lone")
    result = app.AsyncResult(lone)
    # Without confirms, a look over another connection may precede the broker's handling of it.
    until(lambda: result.state == "SUCCESS", SECONDS)
    assert result.get(timeout=SECONDS) == "lone"
    held = group_of(app, members)
    store_group(app, held)
    assert held.get(timeout=SECONDS) == list(range(members))
    (own,) = new_ids(1)
    assert app.AsyncResult(own).state == "PENDING"
    app.backend.reports.counts["tests"] += 1


@FORKS
@pytest.mark.skipif(FREE_THREADED, reason="such children hang in Python itself: docs/limits.md")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("confirm", [True, False], ids=["confirmed", "window"])
def test_children_forked_in_the_middle_of_everything(make_app: Callable[..., Celery], confirm: bool) -> None:
    """While many threads store, look, wait and join: a child is not blocked by locks that they hold."""
    app = make_app(result_backend_transport_options={"confirm": confirm})
    assert app.backend
    over = threading.Event()
    # Creating a quorum queue takes so long that with more of them the last wait would time out.
    count = 40 if QUORUM else 200

    def many_times() -> int:
        times = 0
        while not times or not over.is_set():
            do_everything(app)
            times += 1
        return times

    with Crowd(count) as crowd:
        try:
            threads = [crowd.send(many_times) for _ in range(count)]
            for _ in range(20):
                in_fork(lambda: do_everything(app))
        finally:
            over.set()
        assert all(thread.result() for thread in threads)


def read_and_tell(task_id: str, answers: Any) -> None:
    answers.put(AsyncResult(task_id).get(timeout=SECONDS))


@FORKS
def test_children_of_multiprocessing(app: Celery, writer: Celery, broker: Broker) -> None:
    task_ids = page_ids(4)
    (waited,) = page_ids(1)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with Crowd(1) as crowd:
        wait = crowd.send(app.AsyncResult(waited).get, timeout=SECONDS)
        broker.wait_for_consumer(app.backend.rkey(waited))
        children = [context.Process(target=read_and_tell, args=(task_id, answers)) for task_id in task_ids]
        for child in children:
            child.start()
        for task_id in task_ids:
            store(writer, task_id, task_id)
        assert sorted(answers.get() for _ in children) == sorted(task_ids)
        for child in children:
            child.join(SECONDS)
            assert child.exitcode == 0
        store(writer, waited, "for the parent")
        assert wait.result() == "for the parent"
    answers.close()


# -- channels


@pytest.mark.usefixtures("both")
def test_messages_of_a_closing_channel_go_to_no_other_wait(node: Node, broker: Broker) -> None:
    """While a channel is being closed, messages that were sent ahead still arrive on it."""
    busy, quiet = new_ids(2)
    broker.declare(busy)
    broker.fill(busy, [success(busy, number) for number in range(50_000)])
    broker.declare(quiet)
    got: dict[str, list[Any]] = {busy: [], quiet: []}
    with Connection(node.url) as connection:
        connection.connect()
        session = session_of(connection)
        channels = {}
        for name, deliveries in got.items():
            channels[name] = session.channel()
            session.consume(channels[name], name, name, deliveries.extend, lambda tag: None)
        session.leave(channels[busy], [busy], ())
        # The others were on their way, and were dropped.
        assert len(got[busy]) < 50_000
        assert not got[quiet]
        broker.put(quiet, success(quiet))
        session.drain(SECONDS)
        assert [delivery.consumer_tag for delivery in got[quiet]] == [quiet]
    broker.channel().queue_delete(busy)
    broker.channel().queue_delete(quiet)
