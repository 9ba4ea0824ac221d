"""Chords whose results are on another broker than tasks: messages lost on the way to either are sent again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import Broker, until
from celery import Celery, uuid
from chord_kit import Unrun, begun, finish, results_of
from proxy import Proxy
from rabbitmq_node import Node
from workers import JoinerProcess, client, start_python

LONG = 60
SIZES = [2, 3, 5]


@pytest.fixture
def options() -> dict[str, Any]:
    return {"namespace": uuid(), "keep_chord_results": False}


@pytest.fixture
def tasks(own_node: Node) -> Node:
    """The broker of tasks, started again if an earlier test has stopped it."""
    return own_node.start()


@pytest.fixture
def broker(tasks: Node) -> Iterator[Broker]:
    with contextlib.closing(Broker(tasks.url)) as broker:
        yield broker


@pytest.fixture
def results(node: Node) -> str:
    """The URL of the result backend."""
    return node.url.replace("amqp://", "fastres://")


@pytest.fixture
def proxy(tasks: Node) -> Iterator[Proxy]:
    """The proxy between the joiner and the broker of tasks."""
    with Proxy(tasks.port) as proxy:
        yield proxy


@pytest.fixture
def app(tasks: Node, results: str, options: dict[str, Any]) -> Iterator[Celery]:
    with client(tasks.url, results, result_backend_transport_options=options) as app:
        yield app


@pytest.fixture
def unrun(app: Celery, broker: Broker) -> Unrun:
    return Unrun(app, broker)


@pytest.fixture
def joiner(proxy: Proxy, results: str, options: dict[str, Any], unrun: Unrun) -> Iterator[JoinerProcess]:
    with JoinerProcess(proxy.url, results, result_backend_transport_options=options) as joiner:
        join_one(unrun)
        yield joiner


#: Gives up early if a broker does not answer.
IMPATIENT = """
    from fastres.chords import producer

    producer.CONFIRM_TIMEOUT = 1
    app.backend.joiner.run()
"""


@pytest.fixture
def impatient(proxy: Proxy, results: str, options: dict[str, Any], unrun: Unrun) -> Iterator[None]:
    """A joiner with a short timeout."""
    conf = {"broker_connection_timeout": 1, "result_backend_transport_options": options}
    with client(proxy.url, results, **conf) as app:
        process = start_python(IMPATIENT, app)
    try:
        join_one(unrun)
        yield
    finally:
        process.kill()
        print(*process.communicate())


def join_one(unrun: Unrun) -> None:
    """Join one chord, so that the joiner is connected to the broker of tasks."""
    finish(unrun, begun(unrun, [2]))
    assert unrun.wait(1, LONG) == results_of([2])


def nothing_is_left(app: Celery, unrun: Unrun) -> None:
    (shard,) = app.backend.asker.status(LONG)
    assert shard.open is not None
    assert shard.open.count == 0
    assert unrun.called() == [], "no body was sent twice"


def test_the_broker_of_tasks_cannot_be_reached_when_chords_become_complete(
    app: Celery, unrun: Unrun, joiner: JoinerProcess, proxy: Proxy
) -> None:
    proxy.refuse()
    finish(unrun, begun(unrun, SIZES))
    until(lambda: "lost the broker" in joiner.log(), LONG)
    assert unrun.called() == []
    proxy.refuse(False)
    assert sorted(unrun.wait(len(SIZES), LONG)) == results_of(SIZES)
    nothing_is_left(app, unrun)
    assert "raised" not in joiner.log()


def test_the_broker_of_tasks_is_down_when_a_chord_becomes_complete(
    app: Celery, unrun: Unrun, joiner: JoinerProcess, tasks: Node
) -> None:
    requests = begun(unrun, SIZES)
    finish(unrun, requests[:-1])
    assert sorted(unrun.wait(len(SIZES) - 1, LONG)) == results_of(SIZES)[:-1]
    # A queue may be lost in its first two seconds: see Node.
    time.sleep(2.5)
    tasks.kill()
    finish(unrun, requests[-1:])
    until(lambda: "lost the broker" in joiner.log(), LONG)
    tasks.start()
    unrun.reconnect()
    assert unrun.wait(1, LONG) == results_of(SIZES)[-1:]
    nothing_is_left(app, unrun)
    assert "raised" not in joiner.log()


@pytest.mark.usefixtures("impatient")
def test_a_body_that_is_lost_on_its_way(app: Celery, unrun: Unrun, proxy: Proxy) -> None:
    """The network accepts it and does not deliver it; its parts are acknowledged only after its confirm."""
    proxy.stall()
    accepted = proxy.accepted
    finish(unrun, begun(unrun, SIZES))
    until(lambda: proxy.accepted > accepted, LONG, so="the joiner gives its connection up")
    proxy.cut()
    proxy.resume()
    assert sorted(unrun.wait(len(SIZES), LONG)) == results_of(SIZES)
    nothing_is_left(app, unrun)
