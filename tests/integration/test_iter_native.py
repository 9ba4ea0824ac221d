"""``iter_native`` and ``GroupResult.get``: joining a group, whose members share one queue."""

from __future__ import annotations

from typing import Any

import pytest
from backend_kit import (
    COUNTED,
    ENOUGH,
    SOON,
    Broker,
    MakeApp,
    fill_group,
    group_of,
    held_by,
    ids_of,
    queue_of,
    send,
    send_group,
    settled,
    store,
    store_group,
    store_member,
    takes,
    until,
)
from celery import Celery, states, uuid
from celery.exceptions import TimeoutError
from celery.result import GroupResult, ResultSet
from rabbitmq_node import Node

# -- joining


@pytest.mark.usefixtures("both")
def test_get(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 50)
    store_group(other, held)
    assert held.get(timeout=ENOUGH) == list(range(50))
    assert held.successful()
    broker.wait_until_gone(queue_of(held.id), f"fastres.states.{held.id}")


def test_ten_thousand_members_are_one_queue(app: Celery, other: Celery, broker: Broker, node: Node) -> None:
    before = set(node.queues())
    held = group_of(app, 10_000)
    fill_group(other, broker, held)
    new = settled(lambda: {name: count for name, count in node.queues().items() if name not in before}, COUNTED)
    assert new == {queue_of(held.id): 10_000}
    assert held.join_native(timeout=60) == list(range(10_000))
    broker.wait_until_gone(queue_of(held.id))
    assert set(node.queues()) <= before


def test_get_while_results_come(app: Celery, other: Celery) -> None:
    held = group_of(app, 20)
    starts = iter(range(0, 20, 5))

    def store_next() -> None:
        for start in starts:
            store_group(other, held, range(start, start + 5), start)
            break

    store_next()
    assert held.get(timeout=ENOUGH, on_interval=store_next) == list(range(20))


@pytest.mark.timing
def test_get_timeout(app: Celery, other: Celery) -> None:
    """Results that arrived before the timeout are not lost: the next get returns them."""
    held = group_of(app, 3)
    store_member(other, held, 0, "a")
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError, match="2 results are missing"):
        held.get(timeout=0.3)
    for index in (1, 2):
        store_member(other, held, index, "bc"[index - 1])
    assert held.get(timeout=ENOUGH) == ["a", "b", "c"]


def test_get_propagates_and_loses_nothing(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    store_member(other, held, 0, 1)
    store_member(other, held, 1, ValueError("no"), states.FAILURE)
    store_member(other, held, 2, 3)
    with pytest.raises(ValueError, match="no"):
        held.get(timeout=ENOUGH)
    one, error, three = held.get(timeout=ENOUGH, propagate=False)
    assert (one, repr(error), three) == (1, "ValueError('no')", 3)


@pytest.mark.usefixtures("both")
def test_get_without_taking(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 5)
    store_group(other, held)
    assert held.join_native(timeout=ENOUGH, no_ack=False) == [0, 1, 2, 3, 4]
    again = held_by(other, held)
    assert broker.messages(queue_of(held.id)) == 5
    assert again.get(timeout=ENOUGH) == [0, 1, 2, 3, 4]
    broker.wait_until_gone(queue_of(held.id))


def test_get_with_callback_and_on_message(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    store_group(other, held)
    called: dict[str, Any] = {}
    seen: list[str] = []
    held.get(timeout=ENOUGH, callback=called.__setitem__, on_message=lambda meta: seen.append(meta["task_id"]))
    assert called == {one.id: n for n, one in enumerate(held.results)}
    assert sorted(seen) == sorted(called)


def test_members_one_by_one(app: Celery, other: Celery) -> None:
    """Taking one member's result leaves the others in the queue."""
    held = group_of(app, 4)
    store_group(other, held)
    assert [held.results[n].get(timeout=ENOUGH) for n in (2, 0)] == [2, 0]
    assert held.results[1].state == "SUCCESS"
    assert held.get(timeout=ENOUGH) == [0, 1, 2, 3]


def test_a_member_that_is_waited_for(app: Celery, other: Celery) -> None:
    held = group_of(app, 2)
    member = held.results[1]

    def on_interval() -> None:
        if not member.ready():
            store_member(other, held, 1, "late")

    assert member.get(timeout=ENOUGH, on_interval=on_interval) == "late"


@pytest.mark.timing
def test_a_member_timeout(app: Celery) -> None:
    held = group_of(app, 2)
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError):
        held.results[0].get(timeout=0.3)


def test_states_of_members(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 2)
    first, second = held.results
    assert (first.state, second.state) == ("PENDING", "PENDING")
    store_member(other, held, 0, {"percent": 5}, "PROGRESS")
    assert (first.state, first.info) == ("PROGRESS", {"percent": 5})
    # States do not count as results.
    assert broker.messages(queue_of(held.id)) in (None, 0)
    store_group(other, held)
    # Polls of members may be late by a few times the duration of a read of the group's queue.
    until(held.ready, SOON)
    assert held.completed_count() == 2
    assert (first.state, second.state) == ("SUCCESS", "SUCCESS")


def test_members_with_ids_of_celery(make_app: MakeApp, broker: Broker) -> None:
    """Each has its own queue, as in Celery 3.1; a join takes them and deletes the queues."""
    options = {"task_ids": "celery"}
    writer, reader = (make_app(result_backend_transport_options=options) for _ in range(2))
    held = group_of(writer, [uuid(), uuid()])
    store_group(writer, held)
    assert reader.AsyncResult(held.results[1].id).get(timeout=ENOUGH) == 1
    assert broker.state(queue_of(held.id)) is None
    assert held.get(timeout=ENOUGH) == [0, 1]
    broker.wait_until_gone(*(writer.backend.rkey(member.id) for member in held.results))


def test_group_that_was_put_together_by_hand(app: Celery, other: Celery) -> None:
    """Tasks that were sent alone keep their own queues, here and in a restored group."""
    results = [send(app) for _ in range(3)]
    held = GroupResult(uuid(), results, app=app)
    held.save()
    for number, result in enumerate(results):
        store(other, result.id, number)
    assert held.results[1].state == "SUCCESS"
    assert GroupResult.restore(held.id, app=other).get(timeout=ENOUGH, no_ack=False) == [0, 1, 2]
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    held.delete()


def test_result_set(app: Celery, other: Celery) -> None:
    results = ResultSet([app.AsyncResult(uuid()) for _ in range(3)], app=app)
    for number, result in enumerate(results):
        store(other, result.id, number)
    assert results.get(timeout=ENOUGH) == [0, 1, 2]


def test_group_that_this_process_sent(app: Celery, other: Celery, broker: Broker) -> None:
    """The sender finds its members by their ids."""
    held = send_group(app, 3)
    store_group(other, held)
    results = app.backend.get_many(ids_of(held), timeout=ENOUGH)
    assert sorted(meta["result"] for _, meta in results) == [0, 1, 2]
    broker.wait_until_gone(queue_of(held.id))


def test_then_of_a_group(app: Celery, other: Celery) -> None:
    held, called = group_of(app, 3), []
    held.then(called.append)
    store_group(other, held)
    assert called == []
    held.get(timeout=ENOUGH)
    assert called == [held]


# -- iter_native


@pytest.mark.usefixtures("both")
def test_iter_native(app: Celery, other: Celery) -> None:
    held = group_of(app, 5)
    store_group(other, held)
    got = dict(held.iter_native(timeout=ENOUGH))
    assert [got[one.id]["result"] for one in held.results] == [0, 1, 2, 3, 4]
    assert len(got) == 5
    assert held.get(timeout=0) == [0, 1, 2, 3, 4], "each member has its result"


def test_iter_native_of_nothing(app: Celery) -> None:
    assert list(GroupResult(uuid(), [], app=app).iter_native(timeout=0)) == []


def test_iter_native_with_cached_members(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    store_group(other, held)
    assert held.results[1].get(timeout=ENOUGH) == 1
    got = [(task_id, meta["result"]) for task_id, meta in app.backend.iter_native(held, timeout=ENOUGH)]
    assert got[0] == (held.results[1].id, 1)
    assert sorted(result for _, result in got) == [0, 1, 2]


def test_iter_native_with_one_task_twice(app: Celery, other: Celery) -> None:
    task_id = uuid()
    held = GroupResult(uuid(), [app.AsyncResult(task_id), app.AsyncResult(task_id)], app=app)
    store(other, task_id, 7, group=held.id, group_index=0)
    got = list(app.backend.iter_native(held, timeout=ENOUGH))
    assert {one for one, _ in got} == {task_id}
    assert [one.result for one in held.results] == [7, 7]


def test_iter_native_with_nested_groups(app: Celery, other: Celery) -> None:
    inner = group_of(app, 2)
    innermost = group_of(app, 1)
    middle = GroupResult(uuid(), [innermost, app.AsyncResult(uuid())], app=app)
    outer = GroupResult(uuid(), [app.AsyncResult(uuid()), inner, middle, app.AsyncResult(uuid())], app=app)
    store_member(other, outer, 0, "first")
    store_member(other, outer, 3, "last")
    store_member(other, middle, 1, "m")
    store_group(other, inner, ["i0", "i1"])
    store_group(other, innermost, ["deep"])
    got = dict(app.backend.iter_native(outer, timeout=ENOUGH))
    assert got[outer.results[0].id]["result"] == "first"
    assert [one.id for one in got[inner.id]] == ids_of(inner)
    assert outer.get(timeout=ENOUGH) == ["first", ["i0", "i1"], [["deep"], "m"], "last"]


@pytest.mark.timing
def test_iter_native_timeout(app: Celery) -> None:
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError, match="4 results are missing"):
        list(app.backend.iter_native(group_of(app, 4), timeout=0.3))
