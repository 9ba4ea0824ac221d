"""The broker goes and comes back, connections break, queues vanish: waits end with every result, or in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable
from uuid import uuid4

import amqp
import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import TimeoutError
from celery.result import GroupResult
from kombu.exceptions import OperationalError
from proxy import Proxy
from rabbitmq_node import Node
from workers import client, start_python, until

import fastres

SECONDS = 60

Start = Callable[..., "Future[Any]"]


@pytest.fixture(scope="module")
def broker() -> Iterator[Node]:
    """A broker to mistreat."""
    with Node() as node:
        yield node


@pytest.fixture
def alive(broker: Node) -> Node:
    """The same, running, whatever the last test has done with it."""
    if not broker.running():
        broker.start()
    return broker


@pytest.fixture
def writer(alive: Node) -> Iterator[Celery]:
    with client(alive.url) as app:
        yield app


@pytest.fixture
def reader(alive: Node, writer: Celery) -> Iterator[Celery]:
    with client(alive.url) as app:
        yield app


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a function in a thread."""
    with ThreadPoolExecutor(20) as pool:
        yield pool.submit


def store(writer: Celery, task_id: str, value: Any, group_id: str | None = None) -> None:
    """As a worker does; with a group id, as the result of one of its members."""
    member = {"group": group_id, "group_index": 0} if group_id else {}
    request = Context(id=task_id, correlation_id=task_id, children=[], **member)
    writer.backend.store_result(task_id, value, "SUCCESS", request=request)


def new_group(app: Celery, count: int) -> GroupResult:
    return GroupResult(str(uuid4()), [app.AsyncResult(str(uuid4())) for _ in range(count)], app=app)


def store_members(writer: Celery, result: GroupResult, start: int = 0, end: int | None = None) -> None:
    for number, member in list(enumerate(result.results))[start:end]:
        store(writer, member.id, number, result.id)


def delete_queue(node: Node, name: str) -> bool:
    """Delete a queue with all that is in it; False when it is not there."""
    with amqp.Connection(f"127.0.0.1:{node.port}") as connection:
        try:
            connection.channel().queue_declare(name, passive=True)
        except amqp.NotFound:
            return False
        connection.channel().queue_delete(name)
        return True


class Joined:
    """A join in a thread: what came, in order, how often."""

    def __init__(self, result: GroupResult, start: Start, **how: Any) -> None:
        self.result = result
        self.ids: list[str] = []
        self.values: dict[str, Any] = {}
        self._how = {"timeout": SECONDS, **how}
        self._thread = start(self._run)

    def _run(self) -> None:
        for task_id, meta in self.result.backend.get_many([member.id for member in self.result], **self._how):
            self.values[task_id] = meta["result"]
            self.ids.append(task_id)

    def has(self, count: int) -> None:
        until(lambda: len(self.ids) >= count or self._thread.done(), SECONDS)
        assert len(self.ids) >= count or self._thread.result()

    def is_whole(self) -> None:
        """It ended with every result, each of them once."""
        self._thread.result(SECONDS)
        wanted = {member.id: number for number, member in enumerate(self.result)}
        assert self.values == wanted
        assert len(self.ids) == len(wanted), "each result once"


def ends_in_time(wait: Callable[[], Any], timeout: float) -> str:
    """The message of the exception that a wait ends with, at its timeout."""
    begin = time.monotonic()
    with pytest.raises((TimeoutError, OperationalError)) as caught:
        wait()
    assert timeout - 0.05 <= time.monotonic() - begin <= timeout + 0.5
    return str(caught.value)


# -- the broker


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_the_broker_goes_and_comes_while_a_join_waits(
    alive: Node, reader: Celery, writer: Celery, start: Start, end: str
) -> None:
    result = new_group(reader, 200)
    store_members(writer, result, 0, 100)
    lone = reader.AsyncResult(str(uuid4()))
    early = reader.AsyncResult(str(uuid4()))
    store(writer, early.id, "before")
    joined, waits = Joined(result, start), [start(lone.get, timeout=SECONDS) for _ in range(2)]
    joined.has(100)
    if end == "restart":
        alive.restart()
    else:
        alive.kill()
        alive.start()
    store_members(writer, result, 100)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert [wait.result(SECONDS) for wait in waits] == ["after"] * 2
    assert early.get(timeout=SECONDS) == "before"


def test_a_result_is_stored_when_the_broker_is_back(
    alive: Node, reader: Celery, writer: Celery, start: Start
) -> None:
    store(writer, str(uuid4()), "connected")
    alive.kill()
    result = new_group(reader, 3)
    lone = reader.AsyncResult(str(uuid4()))
    stores = [start(store_members, writer, result), start(store, writer, lone.id, "stored")]
    time.sleep(1)
    assert not any(stored.done() for stored in stores)
    alive.start()
    for stored in stores:
        stored.result(SECONDS)
    assert result.get(timeout=SECONDS) == [0, 1, 2]
    assert lone.get(timeout=SECONDS) == "stored"


def test_a_result_is_not_stored_for_ever(alive: Node, monkeypatch: pytest.MonkeyPatch, writer: Celery) -> None:
    policy = {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1}
    monkeypatch.setattr(fastres.AMQPBackend, "retry_policy", policy)
    alive.kill()
    begin = time.monotonic()
    with pytest.raises(OperationalError, match=r"cannot write to .*amqp://guest:\*\*@127.0.0.1"):
        store(writer, str(uuid4()), "nowhere")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "never connected"])
def test_a_wait_ends_at_its_timeout_while_the_broker_is_away(alive: Node, reader: Celery, connected: bool) -> None:
    if connected:
        assert reader.AsyncResult(str(uuid4())).state == "PENDING"
    alive.kill()
    lone, result = reader.AsyncResult(str(uuid4())), new_group(reader, 3)
    assert ends_in_time(lambda: lone.get(timeout=1), 1)
    assert ends_in_time(lambda: result.get(timeout=1), 1)
    assert ends_in_time(lambda: list(reader.backend.get_many([lone.id], timeout=1)), 1)
    assert ends_in_time(lambda: reader.backend.wait_for(lone.id, timeout=1), 1)


def test_timeouts_are_kept_while_another_thread_seeks_the_broker(
    alive: Node, reader: Celery, start: Start
) -> None:
    """Whoever waits for longer holds nobody up."""
    patient = start(reader.AsyncResult(str(uuid4())).get, timeout=8)
    wait = reader.AsyncResult(str(uuid4()))
    until(lambda: reader.backend._link._subscribers)
    started = start(ends_in_time, lambda: wait.get(timeout=2), 2)
    time.sleep(0.5)
    alive.kill()
    try:
        # One began before the broker went away, two when it was gone.
        late = [start(ends_in_time, lambda: reader.AsyncResult(str(uuid4())).get(timeout=1), 1) for _ in range(2)]
        for each in [started, *late]:
            each.result(SECONDS)
    finally:
        with pytest.raises((TimeoutError, OperationalError)):
            patient.result(SECONDS)


# -- connections


def test_connections_are_cut_in_the_middle_of_a_join(alive: Node, writer: Celery, start: Start) -> None:
    with Proxy(alive.port, cuts=(200_000, 5_000, 150_000, 300_000, 1)) as proxy, client(proxy.url) as reader:
        result = new_group(reader, 3000)
        store_members(writer, result)
        joined = Joined(result, start)
        joined.is_whole()
        assert proxy.cut_count == 5
        assert proxy.accepted == 6


def test_connections_are_cut_at_many_places(alive: Node, writer: Celery, start: Start) -> None:
    with Proxy(alive.port, cuts=tuple(range(600, 20_000, 1301))) as proxy, client(proxy.url) as reader:
        result = new_group(reader, 500)
        store_members(writer, result)
        joined = Joined(result, start)
        joined.is_whole()
        assert proxy.cut_count == len(range(600, 20_000, 1301))


def test_connections_are_cut_at_any_time(alive: Node, writer: Celery, start: Start) -> None:
    """While results come, while none come, and several waits are on the same connection."""
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        groups = [new_group(reader, 100) for _ in range(4)]
        lone = [reader.AsyncResult(str(uuid4())) for _ in range(4)]
        joins = [Joined(result, start) for result in groups]
        waits = [start(result.get, timeout=SECONDS) for result in lone]
        for number in range(0, 100, 10):
            for result in groups:
                store_members(writer, result, number, number + 10)
            proxy.cut()
        for result in lone:
            store(writer, result.id, result.id)
        for joined in joins:
            joined.is_whole()
        assert [wait.result(SECONDS) for wait in waits] == [result.id for result in lone]


def test_a_writer_whose_connection_is_cut_writes_again(alive: Node, reader: Celery) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as writer:
        result = new_group(reader, 60)
        for number in range(0, 60, 10):
            store_members(writer, result, number, number + 10)
            proxy.cut()
        assert result.get(timeout=SECONDS) == list(range(60))


def test_rabbitmqctl_closes_all_connections(alive: Node, reader: Celery, writer: Celery, start: Start) -> None:
    result, lone = new_group(reader, 100), reader.AsyncResult(str(uuid4()))
    joined, wait = Joined(result, start), start(lone.get, timeout=SECONDS)
    store_members(writer, result, 0, 50)
    joined.has(50)
    alive.ctl("close_all_connections", "because of a test")
    store_members(writer, result, 50)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert wait.result(SECONDS) == "after"


def test_polls_go_on_after_a_cut(alive: Node, writer: Celery) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        lone, result = reader.AsyncResult(str(uuid4())), new_group(reader, 3)
        assert (lone.state, result.completed_count()) == ("PENDING", 0)
        proxy.cut()
        assert (lone.state, result.completed_count()) == ("PENDING", 0)
        store(writer, lone.id, 1)
        store_members(writer, result)
        proxy.cut()
        assert (lone.state, reader.backend.group_progress(result.id)) == ("SUCCESS", 3)
        assert result.completed_count() == 3


@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "never connected"])
def test_a_wait_ends_at_its_timeout_while_the_network_says_nothing(alive: Node, connected: bool) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        try:
            if connected:
                assert reader.AsyncResult(str(uuid4())).state == "PENDING"
            proxy.stall()
            threading.Timer(6, proxy.resume).start()  # a wait that hangs ends then, late
            result = reader.AsyncResult(str(uuid4()))
            assert ends_in_time(lambda: result.get(timeout=1), 1)
        finally:
            proxy.resume()


def test_a_wait_that_subscribed_ends_at_its_timeout_when_the_network_stalls(alive: Node, start: Start) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        result = reader.AsyncResult(str(uuid4()))
        wait = start(ends_in_time, lambda: result.get(timeout=2), 2)
        until(lambda: reader.backend._link._subscribers)
        time.sleep(0.3)
        proxy.stall()
        threading.Timer(6, proxy.resume).start()  # a wait that hangs ends then, late
        wait.result(SECONDS)


# -- queues


@pytest.mark.parametrize("first", ["reader", "writer"])
def test_reader_and_writer_disagree_on_arguments(
    alive: Node, writer: Celery, reports: Callable[[], list[str]], first: str
) -> None:
    with client(alive.url, result_expires=4321) as reader:
        lone, result = reader.AsyncResult(str(uuid4())), new_group(reader, 20)
        if first == "reader":
            assert (lone.state, result.completed_count()) == ("PENDING", 0)
        store(writer, lone.id, "read")
        store_members(writer, result)
        assert lone.state == "SUCCESS"
        assert lone.get(timeout=SECONDS) == "read"
        assert result.get(timeout=SECONDS) == list(range(20))
    told = [line for line in reports() if "result_expires" in line]
    assert len([line for line in told if result.id in line]) == 1, told
    assert len([line for line in told if lone.id.replace("-", "") in line]) == 1, told


def test_disagreement_does_not_end_other_waits(alive: Node, writer: Celery, start: Start) -> None:
    with client(alive.url, result_expires=4321) as reader:
        waiting, foreign = reader.AsyncResult(str(uuid4())), reader.AsyncResult(str(uuid4()))
        store(writer, foreign.id, "foreign")
        wait = start(waiting.get, timeout=SECONDS)
        until(lambda: reader.backend._link._subscribers)
        assert foreign.get(timeout=SECONDS) == "foreign"
        store(writer, waiting.id, "waited")
        assert wait.result(SECONDS) == "waited"


def test_a_queue_is_deleted_under_its_consumer(alive: Node, reader: Celery, writer: Celery, start: Start) -> None:
    result, lone = new_group(reader, 40), reader.AsyncResult(str(uuid4()))
    store_members(writer, result, 0, 20)
    joined, wait = Joined(result, start), start(lone.get, timeout=SECONDS)
    joined.has(20)
    for name in (f"fastres.group.{result.id}", reader.backend.rkey(lone.id)):
        until(lambda name=name: delete_queue(alive, name))
    store_members(writer, result, 20)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert wait.result(SECONDS) == "after"


@pytest.mark.parametrize("confirm", [True, False])
def test_a_queue_is_deleted_between_two_results(alive: Node, reader: Celery, confirm: bool) -> None:
    with client(alive.url, result_backend_transport_options={"confirm": confirm}) as writer:
        result = new_group(reader, 2)
        store_members(writer, result, 0, 1)
        until(lambda: delete_queue(alive, f"fastres.group.{result.id}"))
        if not confirm:
            # Without confirms the broker cannot give it back: only a reader's declaration brings the queue.
            assert reader.backend.group_progress(result.id) == 0
            assert result.completed_count() == 0
        store_members(writer, result, 1, 2)
        assert result.results[1].get(timeout=SECONDS) == 1


# -- readers


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_reader_is_killed_in_the_middle_of_a_group(
    reader: Celery, writer: Celery, start: Start, no_ack: bool
) -> None:
    result = new_group(reader, 500)
    store_members(writer, result)
    result.save()
    code = f"""
        import time
        from celery.result import GroupResult
        restored = GroupResult.restore({result.id!r})
        for number, (task_id, meta) in enumerate(restored.iter_native(timeout=30, no_ack={no_ack})):
            print(task_id, flush=True)
            if number == 100:
                time.sleep(60)
    """
    process = start_python(code, reader)
    try:
        assert process.stdout
        handed_over = {process.stdout.readline().strip() for _ in range(101)}
    finally:
        process.kill()
        process.communicate()
    assert len(handed_over - {""}) == 101
    there = {task_id: number for number, task_id in enumerate(member.id for member in result)}
    if no_ack:
        # What it was not given to do something with is not lost.
        there = {task_id: number for task_id, number in there.items() if task_id not in handed_over}
    read = reader.backend.get_many(list(there), timeout=20)
    assert {task_id: meta["result"] for task_id, meta in read} == there
