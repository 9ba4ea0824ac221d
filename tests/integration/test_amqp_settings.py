"""Celery's result settings on ``AMQPBackend``, and round trips of values, exceptions and pickled objects."""

from __future__ import annotations

import contextlib
import datetime
import json
import pickle
from typing import Any

import pytest
from amqp.exceptions import PreconditionFailed
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    in_another_process,
    member_ids,
    new_ids,
    on_classic_queues,
    page_ids,
    queue_of,
    request_of,
    store,
    takes,
    until,
)
from celery import Celery, states, uuid
from celery.exceptions import ImproperlyConfigured, TimeoutError
from celery.result import AsyncResult, result_from_tuple
from kombu.exceptions import ContentDisallowed
from rabbitmq_node import Node
from workers import client

import fastres


class Refused(Exception):
    """A user's exception with its own arguments."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code, why)
        self.code = code


# -- result_serializer, result_accept_content

CONTENT_TYPES = {
    "json": "application/json",
    "msgpack": "application/x-msgpack",
    "pickle": "application/x-python-serialize",
    "yaml": "application/x-yaml",
}


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("serializer", CONTENT_TYPES)
def test_result_serializer(make_app: MakeApp, broker: Broker, serializer: str) -> None:
    writer, reader = (make_app(result_serializer=serializer, result_accept_content=[serializer]) for _ in range(2))
    value = {"n": 1, "f": 1.5, "list": [None, True, "é"], "deep": {"a": {"b": []}}}
    task_id = uuid()
    store(writer, task_id, value)
    assert broker.look(reader.backend.rkey(task_id)).properties["content_type"] == CONTENT_TYPES[serializer]
    assert reader.backend.get_task_meta(task_id)["result"] == value
    assert reader.backend.wait_for(task_id, timeout=ENOUGH, cache=False) == value


@pytest.mark.parametrize("serializer", CONTENT_TYPES)
def test_result_serializer_of_a_failure(make_app: MakeApp, serializer: str) -> None:
    writer, reader = (make_app(result_serializer=serializer, result_accept_content=[serializer]) for _ in range(2))
    task_id = uuid()
    request = request_of(task_id)
    writer.backend.mark_as_failure(task_id, Refused(4, "no"), traceback="the traceback", request=request)
    result = reader.AsyncResult(task_id)
    with pytest.raises(Refused) as raised:
        result.get(timeout=ENOUGH)
    assert (raised.value.code, raised.value.args) == (4, (4, "no"))
    assert result.traceback == "the traceback"


@pytest.mark.usefixtures("both")
def test_readers_use_the_content_type(make_app: MakeApp) -> None:
    """The writer changes to another serializer."""
    reader = make_app(result_accept_content=list(CONTENT_TYPES))
    for serializer in CONTENT_TYPES:
        task_id = uuid()
        store(make_app(result_serializer=serializer, result_accept_content=[serializer]), task_id, serializer)
        assert reader.backend.wait_for(task_id, timeout=ENOUGH) == serializer


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("setting", ["result_accept_content", "accept_content"])
def test_result_accept_content(make_app: MakeApp, broker: Broker, setting: str) -> None:
    writer = make_app(result_serializer="pickle", result_accept_content=["pickle"])
    reader = make_app(**{setting: ["json"]})
    task_id = uuid()
    store(writer, task_id, 1)
    with pytest.raises(ContentDisallowed):
        reader.backend.get_task_meta(task_id)
    with pytest.raises(ContentDisallowed):
        reader.backend.wait_for(task_id, timeout=ENOUGH)
    # It stays for readers that accept it.
    assert writer.backend.wait_for(task_id, timeout=ENOUGH) == 1


def test_result_accept_content_precedes_accept_content(make_app: MakeApp) -> None:
    app = make_app(result_serializer="yaml", accept_content=["json"], result_accept_content=["yaml"])
    task_id = uuid()
    store(app, task_id, 1)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 1


# -- result_compression


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("method", ["gzip", "zlib", "bzip2", "lzma"])
def test_result_compression(make_app: MakeApp, broker: Broker, method: str, serializer: str) -> None:
    conf = {"result_serializer": serializer, "result_accept_content": [serializer]}
    writer, reader = make_app(result_compression=method, **conf), make_app(**conf)
    task_id, value = uuid(), "x" * 50_000
    store(writer, task_id, value)
    message = broker.look(reader.backend.rkey(task_id))
    assert len(message.body) < 1000
    assert message.properties["application_headers"]["compression"].startswith("application/x-")
    assert reader.backend.get_task_meta(task_id)["result"] == value
    assert reader.AsyncResult(task_id).get(timeout=ENOUGH) == value


def test_result_compression_that_does_not_exist(make_app: MakeApp) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"(?s)'zip'.*gzip"):
        _ = make_app(result_compression="zip").backend


@pytest.mark.usefixtures("both")
def test_max_unpacked_size(make_app: MakeApp, broker: Broker) -> None:
    options = {"max_unpacked_size": 10_000}
    writer, reader = make_app(result_compression="gzip"), make_app(result_backend_transport_options=options)
    small, large = uuid(), uuid()
    store(writer, small, "x" * 5_000)
    store(writer, large, "x" * 50_000)
    assert reader.backend.wait_for(small, timeout=ENOUGH) == "x" * 5_000
    for read in (reader.backend.get_task_meta, lambda one: reader.backend.wait_for(one, timeout=ENOUGH)):
        with pytest.raises(fastres.OversizedResult):
            read(large)
    assert writer.backend.wait_for(large, timeout=ENOUGH) == "x" * 50_000


# -- result_expires


@pytest.mark.parametrize(
    ("expires", "arguments"),
    [
        (3600, {"x-expires": 3_600_000, "x-message-ttl": 3_600_000}),
        (90.5, {"x-expires": 90_500, "x-message-ttl": 90_500}),
        (datetime.timedelta(hours=2), {"x-expires": 7_200_000, "x-message-ttl": 7_200_000}),
        (None, {}),
        (10**9, {"x-expires": 2**32 - 1, "x-message-ttl": 2**32 - 1}),
    ],
    ids=str,
)
@on_classic_queues("have more arguments")
def test_result_expires(make_app: MakeApp, broker: Broker, expires: Any, arguments: dict[str, Any]) -> None:
    app, task_id = make_app(result_expires=expires), uuid()
    arguments = {"x-queue-type": "classic", **arguments}
    store(app, task_id, 1)
    name = app.backend.rkey(task_id)
    with broker.connection.channel() as channel:
        declared = channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        assert declared.message_count == 1
    with pytest.raises(PreconditionFailed), broker.connection.channel() as channel:
        channel.queue_declare(name, durable=True, auto_delete=False, arguments={**arguments, "x-expires": 1234})
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 1


def test_expired(make_app: MakeApp, node: Node) -> None:
    """The queue is deleted with its result; afterwards the task looks pending."""
    app, task_id, group_id = make_app(result_expires=datetime.timedelta(seconds=0.5)), uuid(), uuid()
    store(app, task_id, 1)
    store(app, uuid(), 1, group=group_id, group_index=0)
    mine = {app.backend.rkey(task_id), queue_of(group_id)}
    # Asking for a queue's state may count as its use; listing queues does not.
    until(lambda: not mine & node.queues().keys())
    assert app.backend.get_task_meta(task_id)["status"] == "PENDING"
    store(app, task_id, "again")
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "again"


@pytest.mark.parametrize(
    ("expires", "failure_expires", "gone", "kept"),
    [(3600, 0.5, "FAILURE", "SUCCESS"), (0.5, 3600, "SUCCESS", "FAILURE"), (0.5, 0, "SUCCESS", "FAILURE")],
)
@pytest.mark.parametrize("id_of", [page_ids, lambda count: member_ids(uuid(), count), new_ids])
def test_result_failure_expires(
    make_app: MakeApp, broker: Broker, expires: float, failure_expires: float, gone: str, kept: str, id_of: Any
) -> None:
    """Results of failed tasks have their own expiry, longer or shorter, in every kind of queue."""
    conf = {"result_expires": expires, "result_failure_expires": failure_expires}
    app, reader = make_app(**conf), make_app(**conf)
    results = dict(zip((gone, kept), id_of(2)))
    for state, task_id in results.items():
        store(app, task_id, KeyError(state) if state == "FAILURE" else 1, state)
    assert reader.backend.get_task_meta(results[gone])["status"] == gone
    shared = len({*map(app.backend.rkey, results.values())}) == 1
    until(lambda: broker.messages(app.backend.rkey(results[gone])) == shared)
    assert make_app(**conf).backend.get_task_meta(results[gone])["status"] == "PENDING"
    assert make_app(**conf).backend.get_task_meta(results[kept])["status"] == kept


def test_result_failure_expires_unset(make_app: MakeApp, broker: Broker) -> None:
    """As for any result: messages have no expiration."""
    app = make_app(result_expires=3600)
    for state in ("SUCCESS", "FAILURE"):
        store(app, task_id := uuid(), None, state)
        assert "expiration" not in broker.look(app.backend.rkey(task_id)).properties


# -- result_persistent, result_exchange, result_exchange_type


@pytest.mark.parametrize(("persistent", "mode"), [(True, 2), (False, 1), (None, 2)])
def test_result_persistent(make_app: MakeApp, broker: Broker, persistent: bool | None, mode: int) -> None:
    app, lone, group_id = make_app(result_persistent=persistent), uuid(), uuid()
    store(app, lone, 1)
    store(app, member_ids(group_id, 1)[0], 1)
    for name in (app.backend.rkey(lone), queue_of(group_id)):
        assert broker.look(name).properties["delivery_mode"] == mode
        # The queue outlives its connection in any case.
        broker.channel().queue_declare(name, passive=True, durable=True)


@pytest.mark.parametrize("kind", ["direct", "topic"])
def test_result_exchange(make_app: MakeApp, broker: Broker, kind: str) -> None:
    conf = {"result_exchange": f"results.{kind}", "result_exchange_type": kind}
    writer, reader = make_app(**conf), make_app(**conf)
    lone, group_id = uuid(), uuid()
    (member,) = member_ids(group_id, 1)
    # The reader comes first, and sees no state.
    assert reader.backend.get_task_meta(lone)["status"] == "PENDING"
    store(writer, lone, "lone")
    store(writer, member, "member", group=group_id, group_index=0)
    for name in (writer.backend.rkey(lone), queue_of(group_id)):
        assert broker.look(name).delivery_info["exchange"] == f"results.{kind}"
    assert reader.backend.get_task_meta(lone)["result"] == "lone"
    assert reader.backend.wait_for(lone, timeout=ENOUGH, cache=False) == "lone"
    assert reader.backend.group_progress(group_id) == 1


def test_result_exchange_of_celerys_default_is_the_default_exchange(make_app: MakeApp, broker: Broker) -> None:
    app, task_id = make_app(), uuid()
    assert app.conf.result_exchange == "celeryresults"
    store(app, task_id, 1)
    assert broker.look(app.backend.rkey(task_id)).delivery_info["exchange"] == ""


@pytest.mark.parametrize("kind", ["fanout", "headers"])
def test_a_result_exchange_type_that_cannot_route_results(make_app: MakeApp, kind: str) -> None:
    app = make_app(result_exchange="results", result_exchange_type=kind)
    with pytest.raises(ImproperlyConfigured, match=f"result_exchange_type='{kind}'"):
        _ = app.backend


# -- namespaces


def test_applications_that_share_a_virtual_host(make_app: MakeApp) -> None:
    shop, bank = (make_app(result_backend_transport_options={"namespace": name}) for name in ("shop", "bank"))
    task_id, group_id = uuid(), uuid()
    for app in (shop, bank):
        store(app, task_id, app.backend.options.namespace)
        store(app, member_ids(group_id, 1)[0], 1)
    for app in (shop, bank):
        assert app.backend.group_progress(group_id) == 1
        assert app.backend.wait_for(task_id, timeout=ENOUGH) == app.backend.options.namespace


# -- fields of results


def test_result_extended(make_app: MakeApp) -> None:
    writer, reader, task_id = make_app(result_extended=True), make_app(), uuid()
    store(
        writer, task_id, 3, task="add", args=[1, 2], kwargs={"z": 0}, hostname="w@h", retries=1,
        delivery_info={"routing_key": "fast"},
    )  # fmt: skip
    result = reader.AsyncResult(task_id)
    assert result.get(timeout=ENOUGH) == 3
    assert (result.name, result.args, result.kwargs) == ("add", [1, 2], {"z": 0})
    assert (result.worker, result.retries, result.queue) == ("w@h", 1, "fast")


def test_date_done(app: Celery, make_app: MakeApp) -> None:
    before = app.now()
    result = make_app().AsyncResult(uuid())
    store(app, result.id, 1)
    assert result.get(timeout=ENOUGH) == 1
    assert isinstance(result.date_done, datetime.datetime)
    assert before <= result.date_done <= app.now()


def test_children(app: Celery, make_app: MakeApp) -> None:
    reader, task_id, child = make_app(), uuid(), app.AsyncResult(uuid())
    request = request_of(task_id)
    request.children.append(child)
    app.backend.store_result(task_id, 1, states.SUCCESS, request=request)
    store(app, child.id, 2)
    result = reader.AsyncResult(task_id)
    assert result.get(timeout=ENOUGH) == 1
    assert result.children == [reader.AsyncResult(child.id)]
    assert [value for _, value in result.collect(timeout=ENOUGH)] == [1, 2]


def test_a_result_in_a_result(app: Celery, make_app: MakeApp) -> None:
    task_id, inner = uuid(), app.AsyncResult(uuid())
    app.backend.mark_as_done(task_id, app.backend.prepare_value(inner), request=request_of(task_id))
    assert make_app().AsyncResult(task_id).get(timeout=ENOUGH) == [[inner.id, None], None]


@pytest.mark.timing
def test_custom_states(app: Celery, make_app: MakeApp) -> None:
    """A poll sees states of ``update_state``, and waits go on."""
    result = make_app().AsyncResult(uuid())
    for done in range(3):
        app.backend.store_result(result.id, {"done": done}, "COUNTING", request=request_of(result.id))
        assert (result.state, result.info) == ("COUNTING", {"done": done})
    with takes(0.2), pytest.raises(TimeoutError):
        result.get(timeout=0.2)
    store(app, result.id, 3)
    assert result.get(timeout=ENOUGH) == 3


@pytest.mark.parametrize(
    ("state", "error"),
    [("RETRY", Refused(1, "again")), ("FAILURE", KeyError("k")), ("FAILURE", Refused(2, "never"))],
    ids=str,
)
def test_exceptions_come_back_as_the_same_type(
    app: Celery, make_app: MakeApp, state: str, error: Exception
) -> None:
    result = make_app().AsyncResult(uuid())
    app.backend.store_result(result.id, error, state, traceback="tb", request=request_of(result.id))
    assert result.state == state
    assert type(result.result) is type(error)
    assert (result.result.args, result.traceback) == (error.args, "tb")


def test_exceptions_of_modules_that_are_not_loaded(app: Celery, broker: Broker) -> None:
    result = app.AsyncResult(uuid())
    failure = {"exc_type": "Gone", "exc_message": ["why"], "exc_module": "no.such.module"}
    broker.put(
        app.backend.rkey(result.id),
        {"task_id": result.id, "status": "FAILURE", "result": failure},
        {"x-expires": 60_000},
    )
    with pytest.raises(Exception, match="why") as raised:
        result.get(timeout=ENOUGH)
    assert type(raised.value).__name__ == "Gone"


# -- pickling


def test_pickled_backend(node: Node) -> None:
    """Unpickled in an application with this backend, it is the application's own: results share its connection."""
    with client(node.url) as app:
        assert pickle.loads(pickle.dumps(app.backend)) is app.backend


UNPICKLE_BACKEND = """
import json, pickle, sys
from celery import Celery

app = Celery(broker="memory://", backend="rpc://")
backend = pickle.loads(bytes.fromhex(sys.argv[1]))
print(json.dumps([
    type(backend).__module__, backend.persistent, backend.serializer, backend.exchange.name, backend.exchange.type,
    backend.expires, backend.auto_delete, backend.wait_for(sys.argv[2], timeout=20),
]))
backend.close()
"""


def test_pickled_backend_in_another_process(app: Celery, node: Node) -> None:
    """With another backend, the constructor's arguments are pickled too."""
    backend = fastres.AMQPBackend(
        app, exchange="pickled", exchange_type="topic", persistent=False, serializer="yaml", accept=["yaml"],
        auto_delete=False, expires=77, url=node.url.replace("amqp:", "fastres:"),
    )  # fmt: skip
    task_id = uuid()
    with contextlib.closing(backend):
        backend.store_result(task_id, "read from it", states.SUCCESS)
        got = in_another_process(UNPICKLE_BACKEND, pickle.dumps(backend).hex(), task_id)
    assert got == ["fastres.backend", False, "yaml", "pickled", "topic", 77, False, "read from it"]


UNPICKLE_RESULT = """
import json, pickle, sys
from celery import Celery

app = Celery(broker=sys.argv[1], backend="fastres://")
results = [pickle.loads(bytes.fromhex(one)) for one in sys.argv[2:]]
print(json.dumps([
    [result.id, result.state, result.parent and result.parent.id, result.get(timeout=20)] for result in results
]))
assert all(result.backend is app.backend for result in results)
app.backend.close()
"""


def test_pickled_result_in_another_process(app: Celery, node: Node) -> None:
    parent = app.AsyncResult(uuid())
    result = AsyncResult(uuid(), app=app, parent=parent)
    for number, one in enumerate((parent, result)):
        store(app, one.id, number)
    pickled = [pickle.dumps(one).hex() for one in (parent, result)]
    assert in_another_process(UNPICKLE_RESULT, node.url, *pickled) == [
        [parent.id, "SUCCESS", None, 0],
        [result.id, "SUCCESS", parent.id, 1],
    ]


def test_result_as_tuple(app: Celery, make_app: MakeApp) -> None:
    """The form of results inside messages."""
    result = app.AsyncResult(uuid())
    store(app, result.id, 1)
    again = result_from_tuple(json.loads(json.dumps(result.as_tuple())), make_app())
    assert again.get(timeout=ENOUGH) == 1
