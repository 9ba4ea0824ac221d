"""``confirm`` off: messages are kept until the broker has confirmed them, and sent again if necessary."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import (
    CUT_GREETINGS,
    ENOUGH,
    Broker,
    MakeApp,
    Reports,
    group_of,
    held_by,
    member_ids,
    new_ids,
    queue_of,
    store,
    store_group,
    until,
)
from celery import Celery, chord, group, uuid
from proj import add, tsum
from proxy import Proxy
from rabbitmq_node import Node
from workers import Worker, client, python

import fastres

UNCONFIRMED = {"confirm": False}

pytestmark = CUT_GREETINGS


@pytest.fixture
def alive(own_node: Node) -> Node:
    return own_node.start()


@pytest.fixture
def own_broker(alive: Node) -> Iterator[Broker]:
    with contextlib.closing(Broker(alive.url)) as broker:
        yield broker


def come(app: Celery, task_ids: list[str]) -> list[Any]:
    """Their results, in order. A result may arrive twice if it was sent again over another connection."""
    metas = dict(app.backend.get_many(task_ids, timeout=ENOUGH))
    return [metas[task_id]["result"] for task_id in task_ids]


@pytest.mark.parametrize("window", [1, 10, 1000])
@pytest.mark.usefixtures("both")
def test_connections_that_break(
    node: Node, make_app: MakeApp, broker: Broker, window: int, caplog: pytest.LogCaptureFixture
) -> None:
    group_id = uuid()
    ids = member_ids(group_id, 5000)
    with Proxy(node.port) as proxy:
        app = make_app(proxy.url, result_backend_transport_options={**UNCONFIRMED, "confirm_window": window})
        stop = threading.Event()

        def cut() -> None:
            while not stop.wait(0.3):
                proxy.cut()

        cutting = threading.Thread(target=cut)
        cutting.start()
        for number, task_id in enumerate(ids):
            store(app, task_id, number, group=group_id)
        stop.set()
        cutting.join()
        app.backend.close()
    there = dict(make_app().backend.get_many(ids, timeout=ENOUGH))
    assert [there[task_id]["result"] for task_id in ids] == list(range(5000))


def test_messages_are_sent_again_without_another_publish(
    alive: Node, make_app: MakeApp, own_broker: Broker
) -> None:
    """Messages that were lost with a connection arrive nevertheless."""
    with Proxy(alive.port) as proxy:
        app = make_app(proxy.url, result_backend_transport_options=UNCONFIRMED)
        held = group_of(app, 100)
        store_group(app, held, range(1))
        proxy.stall()
        store_group(app, held, range(1, 100), start=1)
        time.sleep(0.1)
        proxy.cut()
        proxy.resume()
        until(lambda: (own_broker.messages(queue_of(held.id)) or 0) >= 100)
        assert held_by(make_app(alive.url), held).get(timeout=ENOUGH) == list(range(100))


def test_a_broker_that_stands_still_fills_the_window(alive: Node, make_app: MakeApp) -> None:
    options = {**UNCONFIRMED, "confirm_window": 10, "confirm_timeout": 1}
    app = make_app(alive.url, result_backend_transport_options=options)
    group_id = uuid()
    ids = member_ids(group_id, 100)
    store(app, ids[0], 0, group=group_id)
    pid = int(alive.ctl("eval", "os:getpid().").strip().strip('"'))
    os.kill(pid, signal.SIGSTOP)
    stored = [0]

    def store_all() -> None:
        for number, task_id in enumerate(ids[1:], 1):
            store(app, task_id, number, group=group_id)
            stored.append(number)

    try:
        with pytest.raises(fastres.BrokerUnreachable, match="stands still"):
            store_all()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert 10 <= len(stored) <= 11
    assert come(make_app(alive.url), ids[: len(stored)]) == stored


def test_a_queue_that_is_deleted_meanwhile(make_app: MakeApp, broker: Broker) -> None:
    app = make_app(result_backend_transport_options=UNCONFIRMED)
    held = group_of(app, 200)
    store_group(app, held, range(100))
    until(lambda: broker.messages(queue_of(held.id)) == 100)
    broker.channel().queue_delete(queue_of(held.id))
    store_group(app, held, range(100, 200), start=100)
    task_ids = [result.id for result in held.results[100:]]
    assert come(make_app(), task_ids) == list(range(100, 200))


def test_a_message_that_is_too_large(make_app: MakeApp, reports: Reports) -> None:
    """It is named; the others arrive."""
    with Node({"max_message_size": "100000"}) as node:
        app = make_app(node.url, result_backend_transport_options=UNCONFIRMED)
        held = group_of(app, 30)
        for index, member in enumerate(held.results):
            store(app, member.id, "x" * (200_000 if index == 10 else 10), group=held.id)
        others = [member.id for index, member in enumerate(held.results) if index != 10]
        assert len(list(make_app(node.url).backend.get_many(others, timeout=ENOUGH))) == 29
        (told,) = [report for report in reports() if "lost" in report]
        assert held.results[10].id in told
        assert "100000 bytes" in told


def test_a_missing_permission_is_logged(node: Node, make_app: MakeApp, reports: Reports) -> None:
    name = f"user-{uuid()}"
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, ".*", "^nothing$", ".*")
    app = make_app(node.url.replace("guest:guest", f"{name}:secret"), result_backend_transport_options=UNCONFIRMED)
    task_id = new_ids(1)[0]
    store(app, task_id, 1)
    (told,) = until(lambda: [report for report in reports() if "lost" in report])
    assert "set_permissions" in told
    node.ctl("delete_user", name)


ENDS = {
    "process": "fill(100)",
    "multiprocessing": "child = fork.Process(target=fill, args=(100,)); child.start(); child.join()",
    "close": "fill(100); app.backend.close(); os._exit(0)",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_process(node: Node, broker: Broker, end: str) -> None:
    group_id = uuid()
    code = f"""
        import multiprocessing, os
        from backend_kit import member_ids, store

        fork = multiprocessing.get_context("fork")

        def fill(count):
            for number, task_id in enumerate(member_ids({group_id!r}, count)):
                store(app, task_id, "x" * 10_000, group={group_id!r})

        {ENDS[end]}
    """
    with client(node.url, result_backend_transport_options=UNCONFIRMED) as app:
        assert "lost" not in python(code, app)
    assert broker.messages(queue_of(group_id)) == 100


def test_children_of_a_pool_that_end(node: Node) -> None:
    """Each child ends after one task."""
    conf = {"worker_max_tasks_per_child": 1, "result_backend_transport_options": UNCONFIRMED}
    with Worker(node.url, **conf) as worker, worker.client():
        assert group(add.s(number, 1) for number in range(20))().get(timeout=60) == list(range(1, 21))
        assert chord(add.s(number, 1) for number in range(20))(tsum.s()).get(timeout=60) == 210
