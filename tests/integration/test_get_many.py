"""``get_many``: many results in order of arrival."""

from __future__ import annotations

import time
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    Reports,
    group_of,
    ids_of,
    new_ids,
    on_classic_queues,
    store,
    store_group,
    store_member,
    success,
    takes,
    until,
)
from celery import Celery, uuid
from celery.exceptions import TimeoutError
from wire import BASIC_CONSUME, QUEUE_DECLARE, QUEUE_DELETE, methods


def store_some(app: Celery, other: Celery, ids: list[str], kind: str, only: int | None = None) -> None:
    """Store results of lone tasks, or of a group that both applications know."""
    fields: dict[str, Any] = {}
    if kind == "group":
        fields = {"group": uuid(), "group_index": 0}
        for made in (app, other):
            group_of(made, ids, fields["group"]).save()
    for task_id in ids[:only]:
        store(other, task_id, **fields)


@on_classic_queues("are asked whether they are empty before they are deleted")
@pytest.mark.timeout(120)
def test_the_queues_of_lone_tasks_are_asked_for_in_bulk(
    written: list[bytes], make_app: MakeApp, broker: Broker
) -> None:
    reader, writer = make_app(), make_app(result_backend_transport_options={"confirm": False})
    ids = new_ids(500)
    for task_id in ids:
        store(writer, task_id)
    assert len(list(reader.backend.get_many(ids[:1], timeout=ENOUGH))) == 1
    written.clear()
    assert len(list(reader.backend.get_many(ids[1:], timeout=ENOUGH))) == 499
    sent = methods(b"".join(written))
    for method in (QUEUE_DECLARE, BASIC_CONSUME):
        assert sent.count(method) == 499
    # One for the result, and one for the states before it.
    assert sent.count(QUEUE_DELETE) == 2 * 499
    # Each round trip has a write.
    assert len(written) < 30
    until(lambda: broker.state(reader.backend.rkey(ids[-1])) is None)


@pytest.mark.usefixtures("both")
def test_get_many(app: Celery, other: Celery, broker: Broker) -> None:
    ids = new_ids(20)
    for number, task_id in enumerate(ids):
        store(other, task_id, number)
    got = dict(app.backend.get_many(ids, timeout=ENOUGH))
    assert {task_id: meta["result"] for task_id, meta in got.items()} == {one: n for n, one in enumerate(ids)}
    assert all(meta["status"] == "SUCCESS" and meta["task_id"] == task_id for task_id, meta in got.items())
    broker.wait_until_gone(*map(app.backend.rkey, ids))


@pytest.mark.usefixtures("both")
def test_get_many_of_queues_of_which_one_has_other_arguments(
    app: Celery, other: Celery, broker: Broker, reports: Reports
) -> None:
    """The broker refuses its declaration; the others in the same write must still be declared."""
    ids = new_ids(250)
    broker.declare(app.backend.rkey(ids[120]), {"x-expires": 77_000})
    results = app.backend.get_many(ids, timeout=ENOUGH)
    store(other, ids[0], ids[0])
    assert next(results)[0] == ids[0]
    for task_id in ids[1:]:
        broker.put(app.backend.rkey(task_id), success(task_id, task_id))
    assert {task_id: meta["result"] for task_id, meta in results} == {one: one for one in ids[1:]}
    assert sum("is there with other arguments" in report for report in reports()) >= 1


@on_classic_queues("let several read")
def test_get_many_of_queues_of_which_one_is_consumed_exclusively(
    app: Celery, other: Celery, broker: Broker
) -> None:
    """Another program consumes a lone task's queue exclusively: the call waits for its end."""
    ids = new_ids(3)
    for task_id in ids:
        store(other, task_id, task_id)
    with broker.connection.channel() as channel:
        channel.basic_consume(app.backend.rkey(ids[1]), exclusive=True, callback=lambda message: None)
        with pytest.raises(TimeoutError, match="3 results are missing"):
            list(app.backend.get_many(ids, timeout=0.3))
    assert sorted(task_id for task_id, _ in app.backend.get_many(ids, timeout=ENOUGH)) == sorted(ids)


def test_get_many_of_none(make_app: MakeApp) -> None:
    """Without ids, no connection is opened."""
    assert list(make_app(broker="amqp://127.0.0.1:1//").backend.get_many([], timeout=0)) == []


@pytest.mark.usefixtures("both")
def test_get_many_yields_in_order_of_arrival(app: Celery, other: Celery) -> None:
    ids = new_ids(3)
    store(other, ids[1], 1)
    results = app.backend.get_many(iter(ids), timeout=ENOUGH)
    assert next(results)[0] == ids[1]
    store(other, ids[2], 2)
    assert next(results)[0] == ids[2]
    store(other, ids[0], 0)
    assert next(results)[0] == ids[0]
    assert next(results, None) is None


def test_get_many_of_one_id_twice(app: Celery, other: Celery) -> None:
    ids = [uuid(), uuid()]
    for task_id in ids:
        store(other, task_id)
    got = [task_id for task_id, _ in app.backend.get_many([*ids, *ids], timeout=ENOUGH)]
    assert sorted(got) == sorted(ids)


def test_get_many_from_the_cache(app: Celery, other: Celery) -> None:
    cached, fresh = uuid(), uuid()
    store(other, cached, 1)
    assert app.backend.wait_for(cached, timeout=ENOUGH) == 1
    store(other, fresh, 2)
    got = {task_id: meta["result"] for task_id, meta in app.backend.get_many([fresh, cached], timeout=ENOUGH)}
    assert got == {cached: 1, fresh: 2}


@pytest.mark.timing
@pytest.mark.parametrize("kind", ["lone", "group"])
def test_get_many_timeout(app: Celery, other: Celery, kind: str) -> None:
    ids = new_ids(3)
    store_some(app, other, ids, kind, only=1)
    app.backend.get_task_meta(uuid())
    got: list[Any] = []
    with takes(0.4), pytest.raises(TimeoutError, match="2 results are missing"):
        got.extend(app.backend.get_many(ids, timeout=0.4))
    assert [task_id for task_id, _ in got] == ids[:1]


def test_get_many_callbacks(app: Celery, other: Celery) -> None:
    ids, seen, calls = [uuid(), uuid()], [], []
    for task_id in ids:
        store(other, task_id, None, "PROGRESS")

    def on_message(meta: dict[str, Any]) -> None:
        seen.append((meta["task_id"], meta["status"]))
        if meta["status"] == "PROGRESS":
            store(other, meta["task_id"])

    results = app.backend.get_many(ids, timeout=ENOUGH, on_message=on_message, on_interval=lambda: calls.append(1))
    assert sorted(task_id for task_id, _ in results) == sorted(ids)
    assert sorted(seen) == sorted((one, state) for one in ids for state in ("PROGRESS", "SUCCESS"))
    assert calls


def test_get_many_calls_on_message_for_states_of_group_members_too(app: Celery, other: Celery) -> None:
    held = group_of(app, 2)
    held.save()
    for index in range(2):
        store_member(other, held, index, None, "PROGRESS")
    store_group(other, held)
    seen: list[str] = []
    assert (
        len(list(app.backend.get_many(ids_of(held), ENOUGH, on_message=lambda meta: seen.append(meta["status"]))))
        == 2
    )
    assert sorted(seen) == ["PROGRESS", "PROGRESS", "SUCCESS", "SUCCESS"]


def test_get_many_getfields(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id)
    ((name, _),) = app.backend.get_many(
        [task_id], timeout=ENOUGH, getfields=lambda meta: (meta["status"], f"<{meta['task_id']}>")
    )
    assert name == f"<{task_id}>"


def test_get_many_now(app: Celery) -> None:
    """By this clock, 100 seconds have passed after two looks of at most a second each."""
    ticks = iter(range(0, 1000, 60))
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        list(app.backend.get_many([uuid()], timeout=100, now=lambda: next(ticks)))
    assert time.monotonic() - start < 5


def test_get_many_ready_states(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 1, "PROGRESS")
    ((_, meta),) = app.backend.get_many([task_id], timeout=ENOUGH, READY_STATES=frozenset({"PROGRESS"}))
    assert meta["status"] == "PROGRESS"


@pytest.mark.usefixtures("both")
def test_get_many_without_taking(app: Celery, other: Celery) -> None:
    ids = new_ids(5)
    for task_id in ids:
        store(other, task_id, task_id)
    assert len(list(app.backend.get_many(ids, timeout=ENOUGH, no_ack=False))) == 5
    assert {meta["result"] for _, meta in other.backend.get_many(ids, timeout=ENOUGH)} == set(ids)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("kind", ["lone", "group"])
def test_get_many_closed_early_loses_nothing(app: Celery, other: Celery, kind: str) -> None:
    ids = new_ids(10)
    store_some(app, other, ids, kind)
    results = app.backend.get_many(ids, timeout=ENOUGH)
    taken = [next(results)[0] for _ in range(3)]
    results.close()
    left = [task_id for task_id in ids if task_id not in taken]
    assert {task_id for task_id, _ in other.backend.get_many(left, timeout=ENOUGH)} == set(left)


def test_get_many_loses_nothing_when_a_callback_raises(app: Celery, other: Celery) -> None:
    ids = new_ids(4)
    for task_id in ids:
        store(other, task_id)

    def on_message(meta: dict[str, Any]) -> None:
        raise LookupError(meta["task_id"])

    with pytest.raises(LookupError):
        list(app.backend.get_many(ids, timeout=ENOUGH, on_message=on_message))
    assert {task_id for task_id, _ in other.backend.get_many(ids, timeout=ENOUGH)} == set(ids)


def test_get_many_max_iterations(app: Celery, other: Celery) -> None:
    """As ``ResultSet._iter_meta`` calls it: one look, which takes nothing."""
    ids = [uuid(), uuid()]
    store(other, ids[0])
    app.backend.get_task_meta(uuid())
    assert [task_id for task_id, _ in app.backend.get_many(ids, max_iterations=1)] in ([ids[0]], [])
    assert other.backend.wait_for(ids[0], timeout=ENOUGH) is None
