"""``save_group``, ``restore_group``, ``delete_group``, ``reload_group_result``: kept, pickled, forgotten."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    ids_of,
    in_another_process,
    queue_of,
    store_group,
    store_member,
)
from celery import Celery, uuid
from celery.result import GroupResult
from rabbitmq_node import Node

# -- save_group, restore_group, delete_group, reload_group_result


@pytest.mark.usefixtures("both")
def test_save_and_restore(app: Celery, other: Celery) -> None:
    held = group_of(app, 3)
    assert held.save() == held
    restored = GroupResult.restore(held.id, app=other)
    assert restored == held
    assert ids_of(restored) == ids_of(held)
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
    """Restoring a saved group does not remove it."""
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
    store_member(app, held, 0, "a")
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
    assert ids_of(restored) == ids_of(held)
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
    assert other.AsyncResult(held.results[0].id).state == "PENDING"
    assert broker.messages(queue_of(held.id)) == 1
    held.results[2].forget()
    broker.wait_until_gone(queue_of(held.id))


@pytest.mark.timeout(60)
def test_forget_many_members(app: Celery, other: Celery, broker: Broker) -> None:
    """Their queue is not read once for each member."""
    held = group_of(app, 1000)
    store_group(other, held)
    for member in held.results[:900]:
        member.forget()
        assert member.state == "PENDING"
    assert held.results[950].state == "SUCCESS"
    for member in held.results[900:]:
        member.forget()
    broker.wait_until_gone(queue_of(held.id))


def test_a_look_has_put_back_what_it_read(app: Celery, other: Celery) -> None:
    """A later look, over another connection, reads all of the results again."""
    held = group_of(app, 150)
    store_group(other, held)
    members, backends = {member.id for member in held}, (app.backend, other.backend)
    for turn in range(100):
        looks = backends[turn % 2].layout.looks
        (browsed,) = looks._browse([(queue_of(held.id), 200)])
        assert browsed is not None
        assert {delivery.correlation_id for delivery in browsed.deliveries} == members


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
