"""``get_task_meta``, ``poll``, ``reload_task_result`` and ``forget``: looking at results without waiting."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import wire
from amqp import spec
from backend_kit import (
    CELERY,
    ENOUGH,
    Broker,
    MakeApp,
    clear_cache,
    group_of,
    ids_of,
    in_another_process,
    in_thread,
    new_ids,
    page_ids,
    store,
    store_group,
    success,
    until,
)
from celery import Celery, uuid
from celery.result import AsyncResult
from proxy import Proxy
from rabbitmq_node import Node
from workers import client

from fastres import AMQPBackend

# -- get_task_meta, poll


@pytest.mark.usefixtures("both")
def test_get_task_meta(app: Celery, other: Celery) -> None:
    task_id = uuid()
    assert app.backend.get_task_meta(task_id) == {"status": "PENDING", "result": None}
    store(other, task_id, {"percent": 1}, "PROGRESS")
    assert app.backend.get_task_meta(task_id)["result"] == {"percent": 1}
    store(other, task_id, {"percent": 2}, "PROGRESS")
    assert app.backend.get_task_meta(task_id)["result"] == {"percent": 2}
    store(other, task_id, "done")
    for reader in (app, other, app):
        meta = reader.backend.get_task_meta(task_id)
        assert (meta["status"], meta["result"], meta["task_id"]) == ("SUCCESS", "done", task_id)
    assert app.AsyncResult(task_id).get(timeout=ENOUGH) == "done"


def test_poll_is_get_task_meta(app: Celery, other: Celery) -> None:
    assert AMQPBackend.poll is AMQPBackend.get_task_meta
    assert inspect.signature(AMQPBackend.poll).parameters["backlog_limit"].default == 1000
    task_id = uuid()
    store(other, task_id, 1)
    assert app.backend.poll(task_id, backlog_limit=1)["result"] == 1


def test_state_result_and_traceback_of_an_async_result(app: Celery, other: Celery) -> None:
    result = app.AsyncResult(uuid())
    assert (result.state, result.result, result.ready()) == ("PENDING", None, False)
    other.backend.mark_as_failure(result.id, ValueError("no"), traceback="the traceback")
    assert (result.state, repr(result.result), result.traceback) == (
        "FAILURE", "ValueError('no')", "the traceback",
    )  # fmt: skip
    assert result.failed()


def test_get_task_meta_is_one_round_trip(node: Node, other: Celery) -> None:
    ids = page_ids(3)
    store(other, ids[0], 1)
    with Proxy(node.port) as proxy, client(proxy.url) as app:
        assert app.AsyncResult(ids[0]).state == "SUCCESS"
        assert app.AsyncResult(ids[1]).state == "PENDING"
        for percent in range(50):
            store(other, ids[1], {"percent": percent}, "PROGRESS")
        assert app.AsyncResult(ids[1]).state == "PROGRESS"
        for state, task_id in (("PROGRESS", ids[1]), ("PENDING", ids[2]), ("PENDING", uuid())):
            clear_cache(app.backend, task_id)
            assert app.AsyncResult(task_id).state == state
            proxy.answered.clear()
            assert app.AsyncResult(task_id).state == state
            answers = wire.methods(proxy.answered)
            # One for the result, and one for the states.
            assert answers.count(spec.Queue.DeclareOk) + answers.count(spec.Channel.Close) == 2


def test_get_task_meta_declares_nothing(app: Celery, broker: Broker) -> None:
    for task_id in (*page_ids(1), *new_ids(1), "celery", "amq.x", ""):
        assert app.AsyncResult(task_id).state == "PENDING"
        assert broker.state(app.backend.rkey(task_id)) is None
        assert broker.state(app.backend.rkey(task_id) + ".states") is None


def test_get_task_meta_of_a_queue_somebody_else_declared(app: Celery, broker: Broker) -> None:
    """A history of states, as Celery 3.1 writes it: the latest counts, and all of them stay."""
    task_id, count = uuid(), 30
    name = app.backend.rkey(task_id)
    for number in range(count):
        meta = {"task_id": task_id, "status": "PROGRESS", "result": number}
        broker.put(name, meta, {"x-expires": 60_000}, correlation_id=task_id)
    assert app.backend.get_task_meta(task_id)["result"] == count - 1
    with pytest.raises(AMQPBackend.BacklogLimitExceeded, match=task_id):
        app.backend.get_task_meta(task_id, backlog_limit=count - 1)
    with pytest.raises(AMQPBackend.BacklogLimitExceeded):
        app.backend.poll(task_id, 1)
    assert app.backend.get_task_meta(task_id, backlog_limit=count)["result"] == count - 1
    broker.put(name, success(task_id, "done"), correlation_id=task_id)
    assert app.backend.get_task_meta(task_id)["result"] == "done"
    assert broker.messages(name) == count + 1
    assert app.backend.wait_for(task_id, timeout=ENOUGH, cache=False) == "done"


POLL_TOGETHER = """
import json, multiprocessing, sys
from backend_kit import clear_cache
from celery import Celery

broker, *ids = sys.argv[1:]
context = multiprocessing.get_context("fork")
together, told = context.Barrier(2), context.Queue()

def poll():
    app = Celery(broker=broker, backend="fastres://")
    unseen = []
    for task_id in ids:
        together.wait()
        for attempt in range(5):
            clear_cache(app.backend, task_id)
            state = app.backend.get_task_meta(task_id)["status"]
            if state != "SUCCESS":
                unseen.append([task_id, attempt, state])
    told.put(unseen)
    app.backend.close()

processes = [context.Process(target=poll) for _ in range(2)]
for process in processes:
    process.start()
print(json.dumps([told.get(timeout=50) for _ in processes]))
for process in processes:
    process.join()
"""


def test_get_task_meta_in_two_processes_at_once(app: Celery, node: Node) -> None:
    ids = new_ids(100)
    for task_id in ids:
        store(app, task_id, 1)
    assert in_another_process(POLL_TOGETHER, node.url, *ids) == [[], []]


def test_get_task_meta_beside_a_wait_for_the_same_task(app: Celery, other: Celery, broker: Broker) -> None:
    """A thread that polls and a thread that waits, in one process."""
    (task_id,) = page_ids(1)
    got: list[Any] = []
    queue = app.backend.rkey(task_id)
    waiter = in_thread(lambda: got.append(app.backend.wait_for(task_id, timeout=ENOUGH)))
    broker.wait_for_consumer(queue)
    store(other, task_id, 1, "PROGRESS")
    until(lambda: app.backend.get_task_meta(task_id)["status"] == "PROGRESS", pause=0)
    store(other, task_id, 2)
    waiter.join()
    assert got == [2]
    assert app.backend.get_task_meta(task_id)["status"] == "SUCCESS"


def test_task_result_exists(app: Celery, other: Celery) -> None:
    task_id = uuid()
    assert not app.backend.task_result_exists(task_id)
    store(other, task_id, 1)
    assert app.backend.task_result_exists(task_id)


@pytest.mark.skipif(CELERY < (5, 7), reason="AsyncResult.exists came with Celery 5.7")
def test_exists_of_a_result_object(app: Celery, other: Celery) -> None:
    task_id = uuid()
    assert not app.AsyncResult(task_id).exists()
    store(other, task_id, 1)
    assert app.AsyncResult(task_id).exists()


def test_reload_task_result(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 1)
    assert app.backend.get_task_meta(task_id)["result"] == 1
    other.AsyncResult(task_id).forget()
    store(other, task_id, 2)
    assert app.backend.get_task_meta(task_id)["result"] == 1
    clear_cache(app.backend, "what was seen of others")
    app.backend.reload_task_result(task_id)
    assert app.backend.get_task_meta(task_id)["result"] == 2


# -- forget


def test_forget(app: Celery, other: Celery, broker: Broker) -> None:
    result = app.AsyncResult(uuid())
    store(other, result.id, 1)
    assert result.state == "SUCCESS"
    result.forget()
    broker.wait_until_gone(app.backend.rkey(result.id))
    assert result.state == "PENDING"
    assert app.backend.get_task_meta(result.id)["status"] == "PENDING"


def test_forget_an_unknown_task(app: Celery) -> None:
    app.backend.forget(uuid())


def test_forget_with_parents(app: Celery, other: Celery, broker: Broker) -> None:
    parent = app.AsyncResult(uuid())
    child = AsyncResult(uuid(), app=app, parent=parent)
    for result in (parent, child):
        store(other, result.id)
    child.forget()
    broker.wait_until_gone(app.backend.rkey(parent.id), app.backend.rkey(child.id))


@pytest.mark.parametrize("options", [{}, {"confirm": False}])
def test_many_tasks_are_looked_at_and_stored_at_once(
    written: list[bytes], make_app: MakeApp, options: dict[str, Any]
) -> None:
    """As the remote control command ``revoke`` does for a group."""
    app, other = make_app(result_backend_transport_options=options), make_app()
    held = group_of(app, 300)
    pages, lone = page_ids(100), new_ids(3)
    ids = [*ids_of(held), *pages, *lone]
    store_group(other, held, range(50))
    for task_id in (pages[7], lone[1]):
        store(other, task_id, 1)
    store(other, pages[8], {}, "STARTED")
    assert app.backend.get_state(new_ids(1)[0]) == "PENDING"
    written.clear()
    with app.backend.many_at_once(ids):
        found = {task_id: app.backend.get_state(task_id) for task_id in ids}
        for task_id, state in found.items():
            if state == "PENDING":
                app.backend.mark_as_revoked(task_id, reason="revoked", store_result=True)
    assert len(written) < 30
    done = {*ids_of(held)[:50], pages[7], lone[1]}
    assert {task_id for task_id, state in found.items() if state == "SUCCESS"} == done
    assert found[pages[8]] == "STARTED"
    app.backend.close()
    for task_id in (ids_of(held)[0], ids_of(held)[50], ids_of(held)[-1], pages[0], pages[7], pages[8], *lone):
        state = "SUCCESS" if task_id in done else found[task_id].replace("PENDING", "REVOKED")
        assert other.backend.get_state(task_id) == state
