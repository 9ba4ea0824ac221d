"""``store_result`` and its destination: ``destination_for``, ``on_reply_declare``, ``rkey``, ``revive``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    in_thread,
    member_ids,
    on_classic_queues,
    queue_of,
    request_of,
    store,
    store_member,
    success,
    until,
)
from celery import Celery, states, uuid
from celery.app.task import Context
from rabbitmq_node import Node
from wire import BASIC_PUBLISH, QUEUE_DECLARE, kinds, methods

from fastres import AMQPBackend, ResultTooLarge

# -- store_result


def test_store_result(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    value = {"sum": 3}
    assert app.backend.store_result(task_id, value, states.SUCCESS) is value
    message = broker.look(f"fastres.task.{task_id}")
    assert message.properties["content_type"] == "application/json"
    assert message.properties["content_encoding"] == "utf-8"
    assert message.properties["correlation_id"] == task_id
    assert message.delivery_info["exchange"] == ""
    meta = json.loads(message.body)
    assert meta.pop("date_done")
    assert meta == {
        "status": "SUCCESS", "result": {"sum": 3}, "traceback": None, "children": None, "task_id": task_id,
    }  # fmt: skip


@on_classic_queues("keep several states, as looks change their order")
def test_store_result_keeps_the_latest_state_of_a_task(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    for percent in range(20):
        store(app, task_id, {"percent": percent}, "PROGRESS")
    states_ = app.backend.rkey(task_id) + ".states"
    assert broker.messages(states_) == 1
    assert json.loads(broker.look(states_).body)["result"] == {"percent": 19}
    assert broker.state(app.backend.rkey(task_id)) is None


@pytest.mark.parametrize("confirm", [True, False])
@pytest.mark.usefixtures("both")
def test_a_result_is_one_write(written: list[bytes], make_app: MakeApp, broker: Broker, confirm: bool) -> None:
    app = make_app(result_backend_transport_options={"confirm": confirm})
    group_id = uuid()
    # The connection and its channel.
    store(app, uuid())
    first, second = member_ids(group_id, 2)
    for declared, task_id in ((False, uuid()), (False, first), (True, second)):
        written.clear()
        store(app, task_id, "value")
        (frames,) = written
        assert kinds(frames) == ([1, 2, 3] if declared else [1, 1, 2, 3])
        assert methods(frames) == [*([] if declared else [QUEUE_DECLARE]), BASIC_PUBLISH]
    until(lambda: broker.messages(queue_of(group_id)) == 2)


def test_store_result_with_traceback_and_request(app: Celery) -> None:
    task_id, child = uuid(), app.AsyncResult(uuid())
    request = request_of(task_id, parent_id="p", root_id="r", args=[1], task="t", retries=2)
    request.children.append(child)
    app.backend.store_result(task_id, ValueError("no"), states.FAILURE, traceback="the traceback", request=request)
    meta = app.backend.get_task_meta(task_id)
    assert meta["traceback"] == "the traceback"
    assert meta["children"] == [[[child.id, None], None]]
    assert meta["parent_id"] == "p"
    assert repr(meta["result"]) == "ValueError('no')"


def test_store_result_of_a_member_without_a_request(app: Celery, broker: Broker) -> None:
    """``update_state(task_id=...)`` and ``mark_as_failure`` have no request."""
    held = group_of(app)
    app.backend.store_result(held.results[1].id, 1, states.SUCCESS)
    assert broker.messages(queue_of(held.id)) == 1


def test_store_result_of_a_value_that_cannot_be_serialized(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    with pytest.raises(kombu.exceptions.EncodeError):
        app.backend.store_result(task_id, object(), states.SUCCESS)
    assert broker.state(app.backend.rkey(task_id)) is None
    store(app, task_id, "the next one is stored")
    assert app.backend.get_task_meta(task_id)["result"] == "the next one is stored"


def test_store_result_after_its_queue_was_deleted(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(app, task_id, 1, "PROGRESS")
    broker.channel().queue_delete(app.backend.rkey(task_id))
    store(app, task_id, 2)
    assert app.backend.get_task_meta(task_id)["result"] == 2


def test_store_result_into_a_queue_with_other_arguments(
    app: Celery, broker: Broker, reports: Any, make_app: MakeApp
) -> None:
    """Reader and writer have different ``result_expires``: it logs a warning, and no result is lost."""
    task_id = uuid()
    broker.put(app.backend.rkey(task_id), success("earlier"), {"x-expires": 77_000, "x-max-length": 1})
    store(make_app(result_expires=60), task_id, "kept")
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "kept"
    assert all("other arguments" in report for report in reports())
    assert 1 <= len(reports()) <= 2


@pytest.fixture(scope="module")
def small_node() -> Iterator[Node]:
    with Node({"max_message_size": "2000000"}) as node:
        yield node


@pytest.mark.parametrize("confirm", [True, False])
def test_store_result_over_the_brokers_limit(small_node: Node, make_app: MakeApp, confirm: bool) -> None:
    app = make_app(small_node.url, result_backend_transport_options={"confirm": confirm})
    task_id = uuid()
    store(app, task_id, "before", "PROGRESS")
    with pytest.raises(ResultTooLarge, match=rf"{task_id}.*limit of 2000000 bytes"):
        store(app, task_id, "x" * 3_000_000)
    store(app, task_id, "the connection lives on")
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "the connection lives on"


@pytest.mark.parametrize("size", [0, 1, 131_072, 1_048_576, 5_000_000])
def test_store_result_of_any_size(app: Celery, size: int) -> None:
    task_id = uuid()
    store(app, task_id, "x" * size)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "x" * size


def test_store_result_from_many_threads(app: Celery, broker: Broker) -> None:
    assert app.backend  # if the threads asked for it first, Celery would make one for each
    held = group_of(app, 200)

    def write(indexes: range) -> None:
        for index in indexes:
            store_member(app, held, index, index)

    threads = [in_thread(write, range(start, 200, 8)) for start in range(8)]
    for thread in threads:
        thread.join()
    assert broker.messages(queue_of(held.id)) == 200
    assert held.get(timeout=ENOUGH) == list(range(200))


# -- destination_for, on_reply_declare, rkey, revive


def test_rkey(app: Celery, make_app: MakeApp) -> None:
    assert app.backend.rkey("0f8fad5b-d9cb-469f") == "fastres.task.0f8fad5b-d9cb-469f"
    member = member_ids("0f8fad5b-d9cb-469f-a165-70867728950e", 1)[0]
    assert app.backend.rkey(member) == "fastres.0f8fad5bd9cb69f"
    shop = make_app(result_backend_transport_options={"namespace": "shop"})
    assert shop.backend.rkey("0f8fad5b-d9cb-469f") == "shop.task.0f8fad5b-d9cb-469f"
    assert shop.backend.rkey(member) == "shop.0f8fad5bd9cb69f"


def test_destination_for(app: Celery) -> None:
    """The id determines it, not the request."""
    destination_for = app.backend.destination_for
    assert destination_for("a-b", None) == ("fastres.task.a-b", "a-b")
    assert destination_for("a-b", Context({"id": "a-b"})) == ("fastres.task.a-b", "a-b")
    assert destination_for("a-b", Context({"id": "a-b", "correlation_id": "c"})) == ("fastres.task.a-b", "c")
    assert destination_for("a-b", request_of("a-b", group="g", group_index=0)) == ("fastres.task.a-b", "a-b")
    (member,) = member_ids("g", 1)
    assert destination_for(member, None) == (queue_of("g"), member)


def test_on_reply_declare(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    (queue,) = app.backend.on_reply_declare(task_id)
    assert isinstance(queue, AMQPBackend.Queue)
    assert queue.name == app.backend.rkey(task_id)
    # As ``Producer.publish(declare=...)`` does: it declares the queue of the result.
    queue(broker.channel()).declare()
    store(app, task_id, 1)
    assert broker.messages(queue.name) == 1


def test_revive(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(app, task_id, 1, "PROGRESS")
    assert app.backend.get_task_meta(task_id)["status"] == "PROGRESS"
    app.backend.revive(broker.channel())
    store(app, task_id, 2)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 2
