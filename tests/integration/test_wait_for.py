"""``wait_for``, ``consume`` and ``drain_events``: waiting for one result."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import ENOUGH, Broker, MakeApp, in_thread, new_ids, page_ids, store, success, takes, until
from celery import Celery, states, uuid
from celery.exceptions import TaskRevokedError, TimeoutError

# -- wait_for


@pytest.mark.usefixtures("both")
def test_wait_for(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(other, task_id, {"a": [1, None]})
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == {"a": [1, None]}
    assert broker.messages(app.backend.rkey(task_id)) == 1


@pytest.mark.usefixtures("both")
def test_wait_for_a_result_that_arrives_meanwhile(app: Celery, other: Celery, broker: Broker) -> None:
    (task_id,) = page_ids(1)
    queue = app.backend.rkey(task_id)

    def work() -> None:
        broker.wait_for_consumer(queue)
        for state in ("STARTED", "PROGRESS"):
            store(other, task_id, None, state)
        store(other, task_id, "done")

    worker = in_thread(work)
    assert app.backend.wait_for(task_id) == "done"
    worker.join()


def test_wait_for_an_id_that_the_user_chose_declares_nothing(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = f"mine-{uuid()}"
    with pytest.raises(TimeoutError):
        app.backend.wait_for(task_id, timeout=0.3)
    assert broker.state(app.backend.rkey(task_id)) is None

    def work() -> None:
        time.sleep(0.3)
        store(other, task_id, "done")

    worker = in_thread(work)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "done"
    worker.join()


@pytest.mark.timing
@pytest.mark.parametrize("timeout", [0, 0.15, 0.5, 1.2])
def test_wait_for_timeout(app: Celery, timeout: float) -> None:
    app.backend.get_task_meta(uuid())  # connects
    task_id = uuid()
    with takes(max(timeout, 0.05)), pytest.raises(TimeoutError, match=task_id):
        app.backend.wait_for(task_id, timeout=timeout)


@pytest.mark.timing
def test_wait_for_timeout_with_states_coming(app: Celery, other: Celery, broker: Broker) -> None:
    """States that are not final do not extend the wait."""
    task_id, over = uuid(), threading.Event()

    def work() -> None:
        while not over.is_set():
            store(other, task_id, None, "PROGRESS")

    worker = in_thread(work)
    try:
        app.backend.get_task_meta(uuid())
        with takes(0.5), pytest.raises(TimeoutError):
            app.backend.wait_for(task_id, timeout=0.5)
    finally:
        over.set()
        worker.join()


def test_wait_for_calls_on_interval(app: Celery, other: Celery) -> None:
    task_id = uuid()
    calls: list[float] = []

    def on_interval() -> None:
        calls.append(time.monotonic())
        if len(calls) == 2:
            store(other, task_id, "stored by the second call")

    assert app.backend.wait_for(task_id, timeout=ENOUGH, on_interval=on_interval) == "stored by the second call"
    assert len(calls) >= 2


def test_wait_for_calls_on_interval_for_an_existing_result(app: Celery) -> None:
    """In it, ``AsyncResult.get`` finds the exception of a chord's failed header."""
    task_id = uuid()
    store(app, task_id, 1)
    calls: list[int] = []
    assert app.backend.wait_for(task_id, timeout=ENOUGH, on_interval=lambda: calls.append(1)) == 1
    assert calls


def test_wait_for_raises_the_exception_of_on_interval(app: Celery, broker: Broker) -> None:
    def on_interval() -> None:
        raise LookupError("enough")

    task_id = uuid()
    with pytest.raises(LookupError, match="enough"):
        app.backend.wait_for(task_id, timeout=ENOUGH, on_interval=on_interval)
    store(app, task_id, 1)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 1


@pytest.mark.usefixtures("both")
def test_wait_for_propagates(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, KeyError("lost"), states.FAILURE)
    with pytest.raises(KeyError, match="lost"):
        app.backend.wait_for(task_id, timeout=ENOUGH)
    kept = app.backend.wait_for(task_id, timeout=ENOUGH, propagate=False)
    assert repr(kept) == "KeyError('lost')"


def test_wait_for_a_revoked_task(app: Celery, other: Celery) -> None:
    task_id = uuid()
    other.backend.mark_as_revoked(task_id, "terminated")
    with pytest.raises(TaskRevokedError, match="terminated"):
        app.backend.wait_for(task_id, timeout=ENOUGH)


def test_wait_for_propagate_states(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, ValueError("no"), states.FAILURE)
    got = app.backend.wait_for(task_id, timeout=ENOUGH, PROPAGATE_STATES=frozenset())
    assert isinstance(got, ValueError)


def test_wait_for_ready_states(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, {"percent": 50}, "PROGRESS")
    ready = states.READY_STATES | {"PROGRESS"}
    assert app.backend.wait_for(task_id, timeout=ENOUGH, READY_STATES=ready) == {"percent": 50}


def test_wait_for_cache(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 1)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 1
    app.AsyncResult(task_id).forget()
    store(other, task_id, 2)
    assert other.backend.wait_for(task_id, timeout=ENOUGH, cache=False) == 2
    app.backend._cache[task_id] = {"status": "SUCCESS", "result": "cached"}
    assert app.backend.wait_for(task_id, timeout=0) == "cached"
    assert app.backend.wait_for(task_id, timeout=ENOUGH, cache=False) == 2


@pytest.mark.usefixtures("both")
def test_wait_for_without_taking(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(other, task_id, 1)
    for _ in range(2):
        assert app.backend.wait_for(task_id, timeout=ENOUGH, no_ack=False, cache=False) == 1
    assert other.backend.wait_for(task_id, timeout=ENOUGH) == 1
    assert broker.messages(app.backend.rkey(task_id)) == 1


def test_wait_for_in_many_threads(app: Celery, other: Celery) -> None:
    """Threads wait for different results and for the same one, on one connection."""
    assert app.backend  # if the threads asked for it first, Celery would make one for each
    same, ids = uuid(), new_ids(8)
    got: dict[int, Any] = {}

    def wait(number: int, task_id: str) -> None:
        got[number] = app.backend.wait_for(task_id, timeout=ENOUGH, cache=False, no_ack=False)

    threads = [in_thread(wait, *each) for each in enumerate([*ids, same, same, same])]
    for number, task_id in enumerate(ids):
        store(other, task_id, number)
    store(other, same, "same")
    for thread in threads:
        thread.join()
    assert got == {**{n: n for n in range(8)}, 8: "same", 9: "same", 10: "same"}


def test_wait_for_the_same_result_in_threads_that_take_it(
    make_app: MakeApp, other: Celery, broker: Broker
) -> None:
    app = make_app(result_backend_transport_options={"take": "always"})
    assert app.backend
    (task_id,) = page_ids(1)
    queue = app.backend.rkey(task_id)
    got: list[Any] = []
    threads = [in_thread(lambda: got.append(app.backend.wait_for(task_id, timeout=ENOUGH))) for _ in range(4)]
    broker.wait_for_consumer(queue)
    store(other, task_id, "for all")
    for thread in threads:
        thread.join()
    assert got == ["for all"] * 4
    until(lambda: broker.messages(queue) == 0)


# -- consume


@pytest.mark.usefixtures("both")
def test_consume(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 7)
    meta = app.backend.consume(task_id, timeout=ENOUGH, no_ack=False)
    assert {key: meta[key] for key in success(task_id)} == success(task_id, 7)
    assert other.backend.consume(task_id, ENOUGH)["result"] == 7


def test_consume_returns_failures(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, ValueError("no"), states.FAILURE)
    meta = app.backend.consume(task_id, timeout=ENOUGH)
    assert (meta["status"], repr(meta["result"])) == ("FAILURE", "ValueError('no')")


@pytest.mark.timing
def test_consume_timeout_and_on_interval(app: Celery) -> None:
    app.backend.get_task_meta(uuid())
    calls: list[None] = []
    with takes(0.3), pytest.raises(socket.timeout):
        app.backend.consume(uuid(), timeout=0.3, on_interval=lambda: calls.append(None))
    assert calls


# -- drain_events


@pytest.fixture
def consumer(app: Celery) -> Iterator[Any]:
    """A connection and a consumer on the queue of ``consumer.task_id``, as a user of 3.1 made them."""
    with app.connection_for_read() as connection:
        task_id = uuid()
        queue = app.backend.addresses.queue(app.backend.addresses.result(task_id))
        queue(connection.default_channel).declare()
        made = app.backend.Consumer(connection.default_channel, [queue], no_ack=True, accept=app.backend.accept)
        made.task_id = task_id
        with made:
            yield made


def test_drain_events(app: Celery, other: Celery, consumer: Any) -> None:
    calls: list[None] = []
    store(other, consumer.task_id, "done")
    results = app.backend.drain_events(
        consumer.channel.connection.client, consumer, timeout=ENOUGH, on_interval=lambda: calls.append(None)
    )
    assert list(results) == [consumer.task_id]
    assert results[consumer.task_id]["result"] == "done"
    assert calls
    assert app.backend.wait_for(consumer.task_id, timeout=0) == "done"  # from the cache, as in 3.1


@pytest.mark.timing
def test_drain_events_timeout(app: Celery, consumer: Any) -> None:
    with takes(0.3), pytest.raises(socket.timeout, match=r"0\.3"):
        app.backend.drain_events(consumer.channel.connection.client, consumer, timeout=0.3)


def test_drain_events_with_its_own_clock_and_wait(app: Celery, consumer: Any) -> None:
    ticks = iter(range(100))
    waits: list[float] = []

    def wait(timeout: float) -> None:
        waits.append(timeout)
        raise socket.timeout

    with pytest.raises(socket.timeout):
        app.backend.drain_events(None, consumer, timeout=5, now=lambda: next(ticks), wait=wait)
    assert waits == [1.0] * 4
