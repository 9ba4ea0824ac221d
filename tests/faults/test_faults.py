"""The broker stops and starts, connections break, queues vanish: waits end with every result, or at their timeout."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from backend_kit import (
    QUORUM,
    Broker,
    fill_group,
    group_of,
    held_by,
    ids_of,
    page_ids,
    queue_of,
    store,
    store_group,
    store_member,
    takes,
    until,
)
from celery import Celery, uuid
from celery.exceptions import TimeoutError
from celery.result import GroupResult
from kombu.exceptions import OperationalError
from proxy import Proxy
from rabbitmq_node import Node
from workers import client, start_python

import fastres

SECONDS = 60

Start = Callable[..., "Future[Any]"]


@pytest.fixture
def alive(own_node: Node) -> Node:
    """A broker that tests stop and kill, started again if an earlier test has stopped it."""
    return own_node.start()


@pytest.fixture
def broker(alive: Node) -> Iterator[Broker]:
    with contextlib.closing(Broker(alive.url)) as broker:
        yield broker


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


class Joined:
    """A join in a thread, which records the results in order."""

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
        """Check that it ended with every result, each once."""
        self._thread.result(SECONDS)
        wanted = {task_id: number for number, task_id in enumerate(ids_of(self.result))}
        assert self.values == wanted
        assert len(self.ids) == len(wanted), "each result once"


def ends_in_time(wait: Callable[..., Any], timeout: float) -> None:
    """Check that a wait ends at its timeout, with the reason."""
    with takes(timeout, late=0.5), pytest.raises((TimeoutError, OperationalError), match=r"\w"):
        wait(timeout=timeout)


# -- the broker


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_the_broker_is_stopped_and_started_while_a_join_waits(
    alive: Node, reader: Celery, writer: Celery, start: Start, end: str
) -> None:
    result = group_of(reader, 200)
    store_group(writer, result, range(100))
    lone = reader.AsyncResult(*page_ids(1))
    early = reader.AsyncResult(*page_ids(1))
    store(writer, early.id, "before")
    joined, waits = Joined(result, start), [start(lone.get, timeout=SECONDS) for _ in range(2)]
    joined.has(100)
    if end == "restart":
        alive.restart()
    else:
        if QUORUM:
            # A quorum queue that was made just before the kill may never have a leader again.
            time.sleep(3)
        alive.kill()
        alive.start()
    store_group(writer, result, start=100)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert [wait.result(SECONDS) for wait in waits] == ["after"] * 2
    assert early.get(timeout=SECONDS) == "before"


def test_a_result_is_stored_when_the_broker_is_back(
    alive: Node, reader: Celery, writer: Celery, start: Start
) -> None:
    store(writer, uuid(), "connected")
    alive.kill()
    result = group_of(reader, 3)
    lone = reader.AsyncResult(*page_ids(1))
    stores = [start(store_group, writer, result), start(store, writer, lone.id, "stored")]
    time.sleep(1)  # there is no sign that they are still trying
    assert not any(stored.done() for stored in stores)
    alive.start()
    for stored in stores:
        stored.result(SECONDS)
    assert result.get(timeout=SECONDS) == [0, 1, 2]
    assert lone.get(timeout=SECONDS) == "stored"


def test_a_result_is_not_stored_for_ever(alive: Node) -> None:
    alive.kill()
    with client(alive.url, "backend_kit:Impatient+fastres://") as writer:
        begin = time.monotonic()
        with pytest.raises(OperationalError, match=r"cannot write to .*amqp://guest:\*\*@127.0.0.1"):
            store(writer, uuid(), "nowhere")
        assert time.monotonic() - begin < 5


@pytest.mark.timing
@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "never connected"])
def test_a_wait_ends_at_its_timeout_while_the_broker_is_down(alive: Node, reader: Celery, connected: bool) -> None:
    if connected:
        assert reader.AsyncResult(*page_ids(1)).state == "PENDING"
    alive.kill()
    lone, result = reader.AsyncResult(*page_ids(1)), group_of(reader, 3)
    ends_in_time(lone.get, 1)
    ends_in_time(result.get, 1)
    ends_in_time(lambda timeout: list(reader.backend.get_many([lone.id], timeout=timeout)), 1)
    ends_in_time(lambda timeout: reader.backend.wait_for(lone.id, timeout=timeout), 1)


@pytest.mark.timing
def test_timeouts_are_kept_while_another_thread_reconnects(
    alive: Node, reader: Celery, broker: Broker, start: Start
) -> None:
    """A thread with a longer timeout does not delay others."""
    patient = start(reader.AsyncResult(*page_ids(1)).get, timeout=8)
    early = reader.AsyncResult(*page_ids(1))
    started = start(ends_in_time, early.get, 2)
    broker.wait_for_consumer(reader.backend.rkey(early.id))
    alive.kill()
    try:
        # One wait began before the broker was killed, two after that.
        late = [start(ends_in_time, reader.AsyncResult(*page_ids(1)).get, 1) for _ in range(2)]
        for each in [started, *late]:
            each.result(SECONDS)
    finally:
        with pytest.raises((TimeoutError, OperationalError)):
            patient.result(SECONDS)


# -- connections


def test_connections_are_cut_in_the_middle_of_a_join(alive: Node, writer: Celery, start: Start) -> None:
    with Proxy(alive.port, cuts=(200_000, 5_000, 150_000, 300_000, 1)) as proxy, client(proxy.url) as reader:
        result = group_of(reader, 3000)
        store_group(writer, result)
        joined = Joined(result, start)
        joined.is_whole()
        assert proxy.cut_count == 5
        assert proxy.accepted == 6


def test_connections_are_cut_at_many_places(alive: Node, writer: Celery, start: Start) -> None:
    with Proxy(alive.port, cuts=tuple(range(600, 20_000, 1301))) as proxy, client(proxy.url) as reader:
        result = group_of(reader, 500)
        store_group(writer, result)
        joined = Joined(result, start)
        joined.is_whole()
        assert proxy.cut_count == len(range(600, 20_000, 1301))


def test_connections_are_cut_at_any_time(alive: Node, writer: Celery, start: Start) -> None:
    """While results arrive, while none arrive, and with several waits on the same connection."""
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        groups = [group_of(reader, 100) for _ in range(4)]
        lone = [reader.AsyncResult(*page_ids(1)) for _ in range(4)]
        joins = [Joined(result, start) for result in groups]
        waits = [start(result.get, timeout=SECONDS) for result in lone]
        for number in range(0, 100, 10):
            for result in groups:
                store_group(writer, result, range(number, number + 10), number)
            proxy.cut()
        for result in lone:
            store(writer, result.id, result.id)
        for joined in joins:
            joined.is_whole()
        assert [wait.result(SECONDS) for wait in waits] == [result.id for result in lone]


def test_a_writer_sends_again_after_its_connection_is_cut(alive: Node, reader: Celery) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as writer:
        result = group_of(reader, 60)
        for number in range(0, 60, 10):
            store_group(writer, result, range(number, number + 10), number)
            proxy.cut()
        assert result.get(timeout=SECONDS) == list(range(60))


def test_rabbitmqctl_closes_all_connections(alive: Node, reader: Celery, writer: Celery, start: Start) -> None:
    result, lone = group_of(reader, 100), reader.AsyncResult(*page_ids(1))
    joined, wait = Joined(result, start), start(lone.get, timeout=SECONDS)
    store_group(writer, result, range(50))
    joined.has(50)
    alive.ctl("close_all_connections", "because of a test")
    store_group(writer, result, start=50)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert wait.result(SECONDS) == "after"


def test_polls_go_on_after_a_cut(alive: Node, writer: Celery) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        lone, result = reader.AsyncResult(*page_ids(1)), group_of(reader, 3)
        assert (lone.state, result.completed_count()) == ("PENDING", 0)
        proxy.cut()
        assert (lone.state, result.completed_count()) == ("PENDING", 0)
        store(writer, lone.id, 1)
        store_group(writer, result)
        proxy.cut()
        assert (lone.state, reader.backend.group_progress(result.id)) == ("SUCCESS", 3)
        assert result.completed_count() == 3


def test_a_join_without_taking_goes_on_over_a_network_that_pauses(
    alive: Node, writer: Celery, broker: Broker, start: Start
) -> None:
    """A join that requeued all results at each pause would never read the last ones."""
    count = 20_000
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        held = group_of(reader, count)
        fill_group(writer, broker, held)
        over = threading.Event()

        def pause_often() -> None:
            while not over.wait(0.004):
                proxy.stall()
                time.sleep(0.12)
                proxy.resume()

        pauses = start(pause_often)
        try:
            metas = dict(reader.backend.get_many(ids_of(held), timeout=SECONDS, no_ack=False))
        finally:
            over.set()
        pauses.result(SECONDS)
        assert [metas[task_id]["result"] for task_id in ids_of(held)] == list(range(count))


@pytest.mark.timing
@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "never connected"])
def test_a_wait_ends_at_its_timeout_while_the_network_stalls(alive: Node, connected: bool) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        try:
            if connected:
                assert reader.AsyncResult(*page_ids(1)).state == "PENDING"
            proxy.stall()
            threading.Timer(6, proxy.resume).start()  # a wait that hangs ends then, too late
            ends_in_time(reader.AsyncResult(*page_ids(1)).get, 1)
        finally:
            proxy.resume()


@pytest.mark.timing
def test_a_wait_that_subscribed_ends_at_its_timeout_when_the_network_stalls(
    alive: Node, broker: Broker, start: Start
) -> None:
    with Proxy(alive.port) as proxy, client(proxy.url) as reader:
        result = reader.AsyncResult(*page_ids(1))
        wait = start(ends_in_time, result.get, 2)
        broker.wait_for_consumer(reader.backend.rkey(result.id))
        if QUORUM:
            # It asks the broker once more when it starts to consume.
            time.sleep(0.3)
        proxy.stall()
        threading.Timer(6, proxy.resume).start()  # a wait that hangs ends then, too late
        wait.result(SECONDS)


def test_heartbeats_do_not_extend_a_timeout(alive: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would restart the timeout of a socket."""
    monkeypatch.setattr("fastres.amqp.browse.REPLY_TIMEOUT", 1.0)
    options = {"confirm_timeout": 1, "retry_policy": {"max_retries": 0}}
    with Proxy(alive.port) as proxy, client(proxy.url, result_backend_transport_options=options) as app:
        lone = app.AsyncResult(*page_ids(1))
        store(app, lone.id, 1)
        assert lone.state == "SUCCESS"
        for call in (
            lambda: store(app, *page_ids(1), 2),
            lambda: app.AsyncResult(*page_ids(1)).state,
        ):
            # Over an existing connection.
            app.AsyncResult(*page_ids(1)).ready()
            proxy.stall(heartbeats=True)
            start = time.monotonic()
            try:
                with pytest.raises(fastres.BrokerUnreachable):
                    call()
                assert time.monotonic() - start < 5
            finally:
                proxy.resume()
        store(app, lone.id, 1)


# -- queues


@pytest.mark.parametrize("first", ["reader", "writer"])
def test_reader_and_writer_have_different_arguments(
    alive: Node, writer: Celery, reports: Callable[[], list[str]], first: str
) -> None:
    with client(alive.url, result_expires=4321) as reader:
        lone, result = reader.AsyncResult(*page_ids(1)), group_of(reader, 20)
        if first == "reader":
            assert (lone.state, result.completed_count()) == ("PENDING", 0)
        store(writer, lone.id, "read")
        store_group(writer, result)
        assert lone.state == "SUCCESS"
        assert lone.get(timeout=SECONDS) == "read"
        assert result.get(timeout=SECONDS) == list(range(20))
    told = [line for line in reports() if "result_expires" in line]
    assert len([line for line in told if repr(queue_of(result.id)) in line]) == 1, told


def test_different_arguments_do_not_end_other_waits(
    alive: Node, writer: Celery, broker: Broker, start: Start
) -> None:
    with client(alive.url, result_expires=4321) as reader:
        waiting, foreign = reader.AsyncResult(*page_ids(1)), reader.AsyncResult(*page_ids(1))
        store(writer, foreign.id, "foreign")
        wait = start(waiting.get, timeout=SECONDS)
        broker.wait_for_consumer(reader.backend.rkey(waiting.id))
        assert foreign.get(timeout=SECONDS) == "foreign"
        store(writer, waiting.id, "waited")
        assert wait.result(SECONDS) == "waited"


def test_a_queue_is_deleted_under_its_consumer(
    reader: Celery, writer: Celery, broker: Broker, start: Start
) -> None:
    result, lone = group_of(reader, 40), reader.AsyncResult(*page_ids(1))
    store_group(writer, result, range(20))
    joined, wait = Joined(result, start), start(lone.get, timeout=SECONDS)
    joined.has(20)
    for name in (queue_of(result.id), reader.backend.rkey(lone.id)):
        broker.wait_for_consumer(name)
        broker.channel().queue_delete(name)
    store_group(writer, result, start=20)
    store(writer, lone.id, "after")
    joined.is_whole()
    assert wait.result(SECONDS) == "after"


@pytest.mark.parametrize("confirm", [True, False])
def test_a_queue_is_deleted_between_two_results(
    alive: Node, reader: Celery, broker: Broker, confirm: bool
) -> None:
    with client(alive.url, result_backend_transport_options={"confirm": confirm}) as writer:
        result = group_of(reader, 2)
        store_group(writer, result, range(1))
        until(lambda: broker.state(queue_of(result.id)), so="the first result's queue")
        broker.channel().queue_delete(queue_of(result.id))
        store_member(writer, result, 1, 1)
        assert result.results[1].get(timeout=SECONDS) == 1


# -- readers


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_reader_is_killed_in_the_middle_of_a_group(
    reader: Celery, writer: Celery, start: Start, no_ack: bool
) -> None:
    result = group_of(reader, 500)
    store_group(writer, result)
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
    there = {task_id: number for number, task_id in enumerate(ids_of(result))}
    if no_ack:
        # Results that it did not return are not lost.
        there = {task_id: number for task_id, number in there.items() if task_id not in handed_over}
    read = reader.backend.get_many(list(there), timeout=20)
    assert {task_id: meta["result"] for task_id, meta in read} == there


@pytest.mark.usefixtures("both")
def test_the_host_of_a_reader_is_lost(alive: Node, writer: Celery, broker: Broker) -> None:
    """Its connection stays open and silent: the broker delivers its messages to the next reader."""
    with Proxy(alive.port) as proxy, client(proxy.url, broker_heartbeat=2) as gone, client(alive.url) as reader:
        held = group_of(writer, 3)
        store_group(writer, held, range(2))
        lost = threading.Thread(target=lambda: list(gone.backend.get_many(ids_of(held))), daemon=True)
        lost.start()
        until(lambda: broker.state(queue_of(held.id)).message_count == 0)
        # The broker keeps it as long as it sends heartbeats.
        time.sleep(8)
        assert broker.state(queue_of(held.id)).consumer_count == 1
        proxy.stall()
        store_group(writer, held, range(2, 3), start=2)
        # The first two were returned before.
        assert held_by(reader, held).results[2].get(timeout=30) == 2
        until(lambda: broker.state(queue_of(held.id)).consumer_count == 0)
        proxy.resume()
        lost.join(1)
