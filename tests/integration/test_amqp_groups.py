"""Groups on ``AMQPBackend``: one queue for all members, joined, saved, restored, counted and forgotten."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.channel import Channel
from backend_kit import (
    ENOUGH,
    SOON,
    Broker,
    group_of,
    in_another_process,
    request_of,
    store,
    store_group,
    success,
    takes,
)
from celery import Celery, group, states, uuid
from celery.exceptions import ChordError, TimeoutError
from celery.result import GroupResult, ResultSet
from conftest import MakeApp
from rabbitmq_node import Node


@pytest.fixture(scope="module")
def broker(node: Node) -> Iterator[Broker]:
    broker = Broker(node.url)
    yield broker
    broker.close()


@pytest.fixture
def other(make_app: MakeApp) -> Celery:
    """An application that shares nothing with ``app`` but the broker: another process, as far as results go."""
    return make_app()


def queue_of(group_id: str) -> str:
    return f"fastres.group.{group_id}"


def task_of(app: Celery) -> Any:
    """A task that no worker is there to run."""

    @app.task(name="nobody.runs.this", shared=False)
    def task() -> None: ...

    return task


def fill_group(app: Celery, broker: Broker, held: GroupResult) -> None:
    """Store a large group's results: the first as a worker does, the others as fast as the broker takes them."""
    store(app, held.results[0].id, 0, group=held.id, group_index=0)
    broker.fill(queue_of(held.id), (success(one.id, n) for n, one in enumerate(held.results) if n))


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
    new = {name: count for name, count in node.queues().items() if name not in before}
    assert new == {queue_of(held.id): 10_000}
    assert held.join_native(timeout=60) == list(range(10_000))
    broker.wait_until_gone(queue_of(held.id))
    assert set(node.queues()) <= before


def test_get_while_results_come(app: Celery, other: Celery) -> None:
    held = group_of(app, 20)
    members = iter(enumerate(held.results))

    def store_next() -> None:
        for index, member in members:
            store(other, member.id, index, group=held.id, group_index=index)
            if index % 5 == 4:
                break

    store_next()
    assert held.get(timeout=ENOUGH, on_interval=store_next) == list(range(20))


def test_get_timeout(app: Celery, other: Celery) -> None:
    """What came before the timeout is not lost: the next get has it."""
    held = group_of(app, 3)
    store(other, held.results[0].id, "a", group=held.id, group_index=0)
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError, match="2 results are missing"):
        held.get(timeout=0.3)
    for index in (1, 2):
        store(other, held.results[index].id, "bc"[index - 1], group=held.id, group_index=index)
    assert held.get(timeout=ENOUGH) == ["a", "b", "c"]


def test_get_propagates_and_loses_nothing(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    store_group(other, held, [1])
    store(other, held.results[1].id, ValueError("no"), states.FAILURE, group=held.id, group_index=1)
    store(other, held.results[2].id, 3, group=held.id, group_index=2)
    with pytest.raises(ValueError, match="no"):
        held.get(timeout=ENOUGH)
    one, error, three = held.get(timeout=ENOUGH, propagate=False)
    assert (one, repr(error), three) == (1, "ValueError('no')", 3)


@pytest.mark.usefixtures("both")
def test_get_without_taking(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 5)
    store_group(other, held)
    assert held.join_native(timeout=ENOUGH, no_ack=False) == [0, 1, 2, 3, 4]
    again = GroupResult(held.id, [other.AsyncResult(one.id) for one in held.results], app=other)
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
    """Taking one member leaves the others to whoever wants them."""
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
            store(other, member.id, "late", group=held.id, group_index=1)

    assert member.get(timeout=ENOUGH, on_interval=on_interval) == "late"


def test_a_member_timeout(app: Celery) -> None:
    held = group_of(app, 2)
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError):
        held.results[0].get(timeout=0.3)


def test_states_of_members(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 2)
    first, second = held.results
    assert (first.state, second.state) == ("PENDING", "PENDING")
    store(other, first.id, {"percent": 5}, "PROGRESS", group=held.id, group_index=0)
    assert (first.state, first.info) == ("PROGRESS", {"percent": 5})
    # States do not count as results.
    assert broker.messages(queue_of(held.id)) in (None, 0)
    store_group(other, held)
    # Polls of members may lag behind by a few times what reading the group's queue takes.
    end = time.monotonic() + SOON
    while not held.ready():
        assert time.monotonic() < end
    assert held.completed_count() == 2
    assert (first.state, second.state) == ("SUCCESS", "SUCCESS")


def test_member_queues(make_app: MakeApp, broker: Broker) -> None:
    """The option that makes a member's bare id an address, in a process that knows nothing of the group."""
    options = {"member_queues": True}
    writer, reader = (make_app(result_backend_transport_options=options) for _ in range(2))
    held = group_of(writer, 2)
    store_group(writer, held)
    assert reader.AsyncResult(held.results[1].id).get(timeout=ENOUGH) == 1
    assert broker.state(queue_of(held.id)) is None


def test_group_that_was_put_together_by_hand(app: Celery, other: Celery) -> None:
    """Tasks that were sent alone keep their own queues, here and where the group is restored."""
    results = [app.send_task("nobody.runs.this", queue="nobody") for _ in range(3)]
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
    """Its sender knows its members by their bare ids."""
    task = task_of(app)
    held = group([task.s() for _ in range(3)], app=app).apply_async(queue="nobody")
    ids = [one.id for one in held.results]
    store_group(other, held)
    assert sorted(meta["result"] for _, meta in app.backend.get_many(ids, timeout=ENOUGH)) == [0, 1, 2]
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
    assert all(one._cache is not None for one in held.results)
    assert held.get(timeout=0) == [0, 1, 2, 3, 4]


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
    store(other, outer.results[0].id, "first", group=outer.id, group_index=0)
    store(other, outer.results[3].id, "last", group=outer.id, group_index=3)
    store(other, middle.results[1].id, "m", group=middle.id, group_index=1)
    store_group(other, inner, ["i0", "i1"])
    store_group(other, innermost, ["deep"])
    got = dict(app.backend.iter_native(outer, timeout=ENOUGH))
    assert got[outer.results[0].id]["result"] == "first"
    assert [one.id for one in got[inner.id]] == [one.id for one in inner.results]
    assert outer.get(timeout=ENOUGH) == ["first", ["i0", "i1"], [["deep"], "m"], "last"]


def test_iter_native_timeout(app: Celery) -> None:
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError, match="4 results are missing"):
        list(app.backend.iter_native(group_of(app, 4), timeout=0.3))


# -- group_progress


@pytest.mark.usefixtures("both")
def test_group_progress(app: Celery, other: Celery) -> None:
    held = group_of(app, 5)
    assert app.backend.group_progress(held.id) == 0
    store(other, held.results[0].id, None, "STARTED", group=held.id, group_index=0)
    assert app.backend.group_progress(held.id) == 0
    for index, member in enumerate(held.results):
        store(other, member.id, index, group=held.id, group_index=index)
        assert app.backend.group_progress(held.id) == index + 1
        assert other.backend.group_progress(held.id) == index + 1


def test_group_progress_is_one_passive_declare(
    app: Celery, other: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = group_of(app, 2)
    store_group(other, held)
    app.backend.group_progress(held.id)
    declared: list[Any] = []
    declare = Channel.queue_declare

    def counted(self: Channel, *args: Any, **kwargs: Any) -> Any:
        declared.append((args, kwargs))
        return declare(self, *args, **kwargs)

    monkeypatch.setattr(Channel, "queue_declare", counted)
    assert app.backend.group_progress(held.id) == 2
    assert declared == [((queue_of(held.id),), {"passive": True})]


def test_group_progress_declares_nothing(app: Celery, broker: Broker) -> None:
    group_id = uuid()
    assert app.backend.group_progress(group_id) == 0
    assert broker.state(queue_of(group_id)) is None


def test_group_progress_during_and_after_a_join(app: Celery, other: Celery) -> None:
    """What has come does not go: the joiner counts what it has taken."""
    held = group_of(app, 6)
    store_group(other, held)
    ids = [one.id for one in held.results]
    told = [app.backend.group_progress(held.id) for _ in app.backend.get_many(ids, timeout=ENOUGH)]
    assert told == [6] * 6
    assert app.backend.group_progress(held.id) == 6


def test_group_progress_after_a_join_that_nobody_watched(app: Celery, other: Celery) -> None:
    held = group_of(app, 4)
    store_group(other, held)
    held.get(timeout=ENOUGH)
    assert app.backend.group_progress(held.id) == 4


# -- save_group, restore_group, delete_group, reload_group_result


@pytest.mark.usefixtures("both")
def test_save_and_restore(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    assert held.save() == held
    restored = GroupResult.restore(held.id, app=other)
    assert restored == held
    assert [one.id for one in restored.results] == [one.id for one in held.results]
    store_group(app, held)
    assert restored.get(timeout=ENOUGH) == [0, 1, 2]


RESTORE_AND_GET = """
import json, sys
from celery import Celery
from celery.result import GroupResult

app = Celery(broker=sys.argv[1], backend="fastres://")
held = GroupResult.restore(sys.argv[2], app=app)
print(json.dumps([held.id, held.get(timeout=20)]))
app.backend.close()
"""


def test_restore_in_another_process(app: Celery, node: Node) -> None:
    held = group_of(app, 10)
    held.save()
    store_group(app, held)
    assert in_another_process(RESTORE_AND_GET, node.url, held.id) == [held.id, list(range(10))]


def test_restore_what_was_never_saved(app: Celery) -> None:
    assert app.backend.restore_group(uuid()) is None
    assert GroupResult.restore(uuid(), app=app) is None


def test_restore_again_and_again(app: Celery, make_app: MakeApp) -> None:
    """Reading a saved group does not take it."""
    held = group_of(app, 2)
    held.save()
    for _ in range(3):
        assert GroupResult.restore(held.id, app=make_app()) == held


def test_save_again_replaces(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 2)
    held.save()
    held.add(app.AsyncResult(uuid()))
    held.save()
    assert broker.messages(f"fastres.saved.{held.id}") == 1
    assert len(GroupResult.restore(held.id, app=other)) == 3


def test_restore_group_cache_and_reload_group_result(app: Celery, other: Celery) -> None:
    held = group_of(app, 2)
    held.save()
    assert len(other.backend.restore_group(held.id)) == 2
    held.add(app.AsyncResult(uuid()))
    held.save()
    assert len(other.backend.restore_group(held.id)) == 2
    assert len(other.backend.restore_group(held.id, cache=False)) == 3
    other.backend.reload_group_result(held.id)
    assert len(other.backend.restore_group(held.id)) == 3


def test_delete_group(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 2)
    held.save()
    store_group(app, held)
    assert GroupResult.restore(held.id, app=other) is not None
    held.delete()
    assert app.backend.restore_group(held.id) is None
    assert broker.state(f"fastres.saved.{held.id}") is None
    other.backend.reload_group_result(held.id)
    assert other.backend.restore_group(held.id) is None
    # Its results are not deleted with it.
    assert held.get(timeout=ENOUGH) == [0, 1]


def test_delete_group_that_was_never_saved(app: Celery) -> None:
    app.backend.delete_group(uuid())


def test_save_nested_groups_and_parents(app: Celery, other: Celery) -> None:
    parent, inner = app.AsyncResult(uuid()), group_of(app, 2)
    held = GroupResult(uuid(), [app.AsyncResult(uuid()), inner], parent=parent, app=app)
    held.save()
    restored = GroupResult.restore(held.id, app=other)
    assert restored == held
    assert restored.parent.id == parent.id
    store(app, held.results[0].id, "a", group=held.id, group_index=0)
    store_group(app, inner, ["b", "c"])
    assert restored.get(timeout=ENOUGH) == ["a", ["b", "c"]]


def test_save_an_empty_group(app: Celery, other: Celery) -> None:
    held = GroupResult(uuid(), [], app=app)
    app.backend.save_group(held.id, held)
    restored = other.backend.restore_group(held.id)
    assert restored is not None
    assert (restored.id, restored.results) == (held.id, [])


def test_save_a_large_group(app: Celery, other: Celery, broker: Broker) -> None:
    """120,000 members take more than one message."""
    held = group_of(app, 120_000)
    held.save()
    assert broker.messages(f"fastres.saved.{held.id}") == 3
    restored = GroupResult.restore(held.id, app=other)
    assert [one.id for one in restored.results] == [one.id for one in held.results]
    held.delete()
    assert broker.state(f"fastres.saved.{held.id}") is None


@pytest.mark.parametrize("conf", [{"result_compression": "gzip"}, {"result_serializer": "pickle"}], ids=str)
def test_save_with_settings(make_app: MakeApp, conf: dict[str, Any]) -> None:
    writer, reader = (make_app(result_accept_content=["json", "pickle"], **conf) for _ in range(2))
    held = group_of(writer, 3)
    held.save()
    assert GroupResult.restore(held.id, app=reader) == held


# -- forget


def test_forget_members(app: Celery, other: Celery, broker: Broker) -> None:
    """The queue goes with the last one."""
    held = group_of(app, 3)
    store_group(other, held)
    for member in held.results[:2]:
        member.forget()
    assert broker.messages(queue_of(held.id)) == 3
    held.results[2].forget()
    broker.wait_until_gone(queue_of(held.id), f"fastres.states.{held.id}")


def test_forget_one_member(app: Celery, other: Celery) -> None:
    held = group_of(app, 2)
    store_group(other, held)
    held.results[0].forget()
    assert held.results[0].state == "PENDING"
    assert held.results[1].get(timeout=ENOUGH) == 1


def test_forget_group(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 3)
    store_group(other, held)
    held.forget()
    broker.wait_until_gone(queue_of(held.id))


def test_forget_after_a_join(app: Celery, other: Celery, broker: Broker) -> None:
    held = group_of(app, 3)
    store_group(other, held)
    held.get(timeout=ENOUGH)
    held.forget()
    broker.wait_until_gone(queue_of(held.id))


# -- pickled groups


UNPICKLE_AND_GET = """
import json, pickle, sys
from celery import Celery

app = Celery(broker=sys.argv[1], backend="fastres://")
held = pickle.loads(bytes.fromhex(sys.argv[2]))
print(json.dumps([held.id, held.get(timeout=20)]))
app.backend.close()
"""


def test_pickled_group_in_another_process(app: Celery, node: Node) -> None:
    held = group_of(app, 5)
    store_group(app, held)
    assert in_another_process(UNPICKLE_AND_GET, node.url, pickle.dumps(held).hex()) == [held.id, [0, 1, 2, 3, 4]]


# -- where the errors of chords go


def fail_chord(app: Celery, body: Any, message: str) -> None:
    try:
        raise ChordError(message)
    except ChordError as exc:
        app.backend.chord_error_from_stack(body, exc)


def test_chord_error_of_a_lone_body(app: Celery, broker: Broker) -> None:
    body = task_of(app).s().set(task_id=uuid())
    # The body of a chord carries the group id of its header.
    body.set(group_id=uuid())
    fail_chord(app, body, "part 3")
    assert json.loads(broker.look(app.backend.rkey(body.id)).body)["status"] == "FAILURE"
    with pytest.raises(ChordError, match="part 3"):
        app.AsyncResult(body.id).get(timeout=ENOUGH)


def test_chord_error_of_a_body_in_a_group(app: Celery, other: Celery, broker: Broker) -> None:
    """A group of chords: the errors of their bodies are results of the group's members."""
    task = task_of(app)
    held = group_of(other, 2)
    for index, member in enumerate(held.results):
        body = task.s().set(task_id=member.id, group_id=held.id, group_index=index)
        fail_chord(app, body, f"body {index}")
    assert broker.messages(queue_of(held.id)) == 2
    assert [str(one) for one in held.get(timeout=ENOUGH, propagate=False)] == ["body 0", "body 1"]


def test_chord_error_of_a_body_that_is_a_group(app: Celery, make_app: MakeApp, broker: Broker) -> None:
    task = task_of(app)
    body = group([task.s(), task.s()], app=app)
    frozen = body.freeze()
    fail_chord(app, body, "the header failed")
    # ... in its queue, for a client that holds the group's result.
    assert broker.messages(queue_of(frozen.id)) == 2
    client = make_app()
    held = GroupResult(frozen.id, [client.AsyncResult(one.id) for one in frozen.results], app=client)
    assert [type(one) for one in held.get(timeout=ENOUGH, propagate=False)] == [ChordError, ChordError]


def test_a_chords_part_stays_when_it_is_joined(app: Celery, other: Celery, broker: Broker) -> None:
    """Wanted by the join, and by users: ``chord_result.parent.get()``."""
    held = group_of(app, 3)
    body = {"task": "body", "options": {"task_id": uuid()}}
    for index, member in enumerate(held.results):
        request = request_of(member.id, group=held.id, group_index=index, chord=body)
        other.backend.store_result(member.id, index, states.SUCCESS, request=request)
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    assert broker.messages(queue_of(held.id)) == 3
    again = GroupResult(held.id, [other.AsyncResult(one.id) for one in held.results], app=other)
    assert again.get(timeout=ENOUGH) == [0, 1, 2]
