"""``AMQPBackend`` member by member: the class of Celery 3.1 against a real RabbitMQ."""

from __future__ import annotations

import inspect
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from amqp.channel import Channel
from amqp.exceptions import PreconditionFailed
from backend_kit import (
    ENOUGH,
    Broker,
    group_of,
    in_another_process,
    request_of,
    store,
    store_group,
    success,
    takes,
)
from celery import Celery, states, uuid
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured, TaskRevokedError, TimeoutError
from celery.result import AsyncResult, GroupResult
from conftest import MakeApp
from kombu.common import maybe_declare
from kombu.exceptions import ContentDisallowed, OperationalError
from rabbitmq_node import Node

import fastres
from fastres import AMQPBackend, ResultTooLarge


@pytest.fixture(scope="module")
def broker(node: Node) -> Iterator[Broker]:
    broker = Broker(node.url)
    yield broker
    broker.close()


@pytest.fixture
def other(make_app: MakeApp) -> Celery:
    """An application that shares nothing with ``app`` but the broker: another process, as far as results go."""
    return make_app()


def in_thread(function: Any) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# -- the constructor


def test_signature() -> None:
    parameters = inspect.signature(AMQPBackend).parameters
    assert {name: one.default for name, one in parameters.items() if name not in ("app", "kwargs")} == {
        "connection": None,
        "exchange": None,
        "exchange_type": None,
        "persistent": None,
        "serializer": None,
        "auto_delete": True,
    }
    assert list(parameters)[:7] == [
        "app", "connection", "exchange", "exchange_type", "persistent", "serializer", "auto_delete",
    ]  # fmt: skip


@pytest.fixture
def make_backend(app: Celery) -> Iterator[Any]:
    made: list[AMQPBackend] = []

    def make(*args: Any, **kwargs: Any) -> AMQPBackend:
        made.append(AMQPBackend(app, *args, **kwargs))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def test_connection(make_app: MakeApp, node: Node, broker: Broker) -> None:
    """The broker of the results need not be that of the tasks."""
    task_id = uuid()
    app = make_app(broker="memory://")
    with kombu.Connection(node.url) as connection:
        backend = AMQPBackend(app, connection=connection)
        backend.store_result(task_id, 5, states.SUCCESS)
        assert broker.messages(backend.rkey(task_id)) == 1
        assert backend.wait_for(task_id, timeout=ENOUGH) == 5
        backend.close()


@pytest.mark.parametrize("kind", ["direct", "topic"])
@pytest.mark.parametrize("as_object", [False, True])
def test_exchange_and_exchange_type(make_backend: Any, broker: Broker, kind: str, as_object: bool) -> None:
    task_id, name = uuid(), f"results-{uuid()}"
    backend = make_backend(
        exchange=kombu.Exchange(name, type=kind) if as_object else name, exchange_type=None if as_object else kind
    )
    assert (backend.exchange.name, backend.exchange.type) == (name, kind)
    backend.store_result(task_id, "by exchange", states.SUCCESS)
    assert broker.look(backend.rkey(task_id)).delivery_info["exchange"] == name
    broker.channel().exchange_declare(name, type=kind, durable=True, auto_delete=False, passive=True)
    assert backend.get_task_meta(task_id)["result"] == "by exchange"
    assert backend.wait_for(task_id, timeout=ENOUGH, cache=False) == "by exchange"


@pytest.mark.parametrize("kind", ["fanout", "headers"])
def test_exchange_type_that_cannot_carry_results(app: Celery, kind: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"result_exchange_type='{kind}'"):
        AMQPBackend(app, exchange="results", exchange_type=kind)


@pytest.mark.parametrize(("persistent", "mode"), [(True, 2), (False, 1), (None, 2)])
def test_persistent(make_backend: Any, broker: Broker, persistent: bool | None, mode: int) -> None:
    task_id = uuid()
    backend = make_backend(persistent=persistent)
    assert backend.persistent is (mode == 2)
    backend.store_result(task_id, None, states.SUCCESS)
    assert broker.look(backend.rkey(task_id)).properties["delivery_mode"] == mode


def test_serializer(make_backend: Any, broker: Broker) -> None:
    task_id = uuid()
    backend = make_backend(serializer="yaml", accept=["yaml"])
    assert backend.serializer == "yaml"
    backend.store_result(task_id, {"a": 1}, states.SUCCESS)
    assert broker.look(backend.rkey(task_id)).properties["content_type"] == "application/x-yaml"
    assert backend.wait_for(task_id, timeout=ENOUGH) == {"a": 1}


@pytest.mark.parametrize("auto_delete", [True, False])
def test_auto_delete(make_backend: Any, broker: Broker, auto_delete: bool) -> None:
    task_id = uuid()
    backend = make_backend(auto_delete=auto_delete)
    backend.store_result(task_id, 1, states.SUCCESS)
    assert backend.wait_for(task_id, timeout=ENOUGH) == 1
    if auto_delete:
        broker.wait_until_gone(backend.rkey(task_id))
    else:
        assert broker.messages(backend.rkey(task_id)) == 0


def test_expires(make_backend: Any, broker: Broker) -> None:
    task_id = uuid()
    backend = make_backend(expires=120)
    backend.store_result(task_id, 1, states.SUCCESS)
    with pytest.raises(PreconditionFailed, match="120000"):
        broker.put(backend.rkey(task_id), {}, {"x-expires": 1, "x-max-length": 1})


def test_url(make_backend: Any, broker: Broker, node: Node, make_app: MakeApp) -> None:
    task_id = uuid()
    url = node.url.replace("amqp://", "fastres://")
    backend = AMQPBackend(make_app(broker="memory://"), url=url)
    backend.store_result(task_id, 1, states.SUCCESS)
    assert broker.messages(backend.rkey(task_id)) == 1
    backend.close()


# -- class attributes


def test_backlog_limit_exceeded() -> None:
    assert AMQPBackend.BacklogLimitExceeded is fastres.BacklogLimitExceeded
    assert issubclass(AMQPBackend.BacklogLimitExceeded, Exception)


def test_attributes(app: Celery) -> None:
    assert AMQPBackend.persistent is True
    assert AMQPBackend.supports_autoexpire is True
    assert AMQPBackend.supports_native_join is True
    assert app.backend.supports_native_join is True
    assert AMQPBackend.retry_policy == {
        "max_retries": 20, "interval_start": 0, "interval_step": 1, "interval_max": 1,
    }  # fmt: skip


def test_retry_policy(make_app: MakeApp) -> None:
    class Impatient(AMQPBackend):
        retry_policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}  # noqa: RUF012

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        app = make_app(broker=f"amqp://guest:guest@127.0.0.1:{nobody.getsockname()[1]}//")
        backend = Impatient(app)
        for operation in (
            lambda: backend.store_result(uuid(), 1, states.SUCCESS),
            lambda: backend.get_task_meta(uuid()),
        ):
            with pytest.raises(OperationalError, match=r"127\.0\.0\.1"):
                operation()
        backend.close()


def test_consumer_does_not_declare(app: Celery, broker: Broker) -> None:
    name = uuid()
    assert AMQPBackend.Consumer.auto_declare is False
    consumer = app.backend.Consumer(broker.channel(), [app.backend.Queue(name)])
    assert broker.state(name) is None
    consumer.declare()
    assert broker.messages(name) == 0
    broker.channel().queue_delete(name)


def test_consumer(app: Celery, broker: Broker) -> None:
    """What 3.1 documents of it: callbacks, add_queue, consuming_from, cancel_by_queue, recover, purge."""
    first, second = uuid(), uuid()
    for name in (first, second):
        broker.put(name, success(name, name), {"x-expires": 60_000})
    got: list[Any] = []
    queue = app.backend.Queue
    with broker.connection.channel() as channel:
        consumer = app.backend.Consumer(
            channel, [queue(first)], accept=["json"], callbacks=[lambda body, message: got.append((body, message))]
        )
        assert consumer.callbacks
        consumer.qos(prefetch_count=10)
        consumer.add_queue(queue(second))
        consumer.consume()
        assert consumer.consuming_from(first)
        while len(got) < 2:
            broker.connection.drain_events(timeout=ENOUGH)
        assert {body["result"] for body, _ in got} == {first, second}
        consumer.recover(requeue=True)
        while len(got) < 4:
            broker.connection.drain_events(timeout=ENOUGH)
        assert all(message.delivery_info["redelivered"] for _, message in got[2:])
        consumer.cancel_by_queue(first)
        assert not consumer.consuming_from(first)
        got[-1][1].ack()
        consumer.cancel()
    for name in (first, second):
        consumer = app.backend.Consumer(broker.channel(), [queue(name)])
        consumer.purge()
        assert broker.messages(name) == 0
        broker.channel().queue_delete(name)


def test_consumer_accepts_what_it_is_told_to(app: Celery, broker: Broker) -> None:
    name = uuid()
    broker.put(name, success(name), {"x-expires": 60_000})
    with broker.connection.channel() as channel:
        refused: list[Any] = []
        with app.backend.Consumer(
            channel,
            [app.backend.Queue(name)],
            accept=["yaml"],
            no_ack=True,
            callbacks=[lambda body, message: None],
            on_decode_error=lambda message, exc: refused.append(exc),
        ):
            while not refused:
                broker.connection.drain_events(timeout=ENOUGH)
        assert isinstance(refused[0], ContentDisallowed)
    broker.channel().queue_delete(name)


def test_queue_never_caches_its_declaration(app: Celery, broker: Broker) -> None:
    assert issubclass(AMQPBackend.Queue, kombu.Queue)
    queue = app.backend.Queue(uuid(), durable=True)
    assert queue.can_cache_declaration is False
    for _ in range(2):
        maybe_declare(queue, broker.channel())
        assert broker.messages(queue.name) == 0
        broker.channel().queue_delete(queue.name)


def test_exchange_and_producer(app: Celery, broker: Broker) -> None:
    exchange = app.backend.Exchange(f"x-{uuid()}", type="direct", durable=False, auto_delete=True)
    queue = app.backend.Queue(uuid(), exchange, routing_key="k")(broker.channel())
    queue.declare()
    producer = app.backend.Producer(broker.channel(), exchange, routing_key="k", serializer="json")
    producer.publish({"hello": "world"}, compression="gzip")
    message = queue.get(accept=["json"])
    assert message.payload == {"hello": "world"}
    message.ack()
    queue.delete()


# -- store_result


def test_store_result(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    value = {"sum": 3}
    assert app.backend.store_result(task_id, value, states.SUCCESS) is value
    message = broker.look(task_id.replace("-", ""))
    assert message.properties["content_type"] == "application/json"
    assert message.properties["content_encoding"] == "utf-8"
    assert message.properties["correlation_id"] == task_id
    assert message.delivery_info["exchange"] == ""
    meta = json.loads(message.body)
    assert meta.pop("date_done")
    assert meta == {
        "status": "SUCCESS", "result": {"sum": 3}, "traceback": None, "children": None, "task_id": task_id,
    }  # fmt: skip


def test_store_result_keeps_the_latest_state_of_a_task(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    for percent in range(20):
        store(app, task_id, {"percent": percent}, "PROGRESS")
    assert broker.messages(app.backend.rkey(task_id)) == 1
    assert json.loads(broker.look(app.backend.rkey(task_id)).body)["result"] == {"percent": 19}


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


def test_store_result_without_request_of_a_member_this_process_knows(app: Celery, broker: Broker) -> None:
    """``update_state(task_id=...)`` and ``mark_as_failure`` have no request."""
    group = group_of(app)
    app.backend.store_result(group.results[1].id, 1, states.SUCCESS)
    assert broker.messages(f"fastres.group.{group.id}") == 1


def test_store_result_of_what_cannot_be_serialized(app: Celery, broker: Broker) -> None:
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
    """Reader and writer disagree on ``result_expires``: a warning, and no result is lost."""
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
    group = group_of(app, 200)
    batches = [group.results[start::8] for start in range(8)]

    def write(batch: list[AsyncResult]) -> None:
        for member in batch:
            store(app, member.id, member.id, group=group.id, group_index=0)

    threads = [in_thread(lambda batch=batch: write(batch)) for batch in batches]
    for thread in threads:
        thread.join()
    assert broker.messages(f"fastres.group.{group.id}") == 200
    assert group.get(timeout=ENOUGH) == [member.id for member in group.results]


# -- destination_for, on_reply_declare, rkey, revive


def test_rkey(app: Celery, make_app: MakeApp) -> None:
    assert app.backend.rkey("0f8fad5b-d9cb-469f") == "0f8fad5bd9cb469f"
    shop = make_app(result_backend_transport_options={"namespace": "shop"})
    assert shop.backend.rkey("0f8fad5b-d9cb-469f") == "shop.0f8fad5bd9cb469f"


def test_destination_for(app: Celery, make_app: MakeApp) -> None:
    destination_for = app.backend.destination_for
    assert destination_for("a-b", None) == ("ab", "a-b")
    assert destination_for("a-b", Context({"id": "a-b"})) == ("ab", "a-b")
    assert destination_for("a-b", Context({"id": "a-b", "correlation_id": "c"})) == ("ab", "c")
    member = request_of("a-b", group="g", group_index=0)
    assert destination_for("a-b", member) == ("fastres.group.g", "a-b")
    # The body of a chord carries the group id of the header, of which it is no member.
    assert destination_for("a-b", request_of("a-b", group="g")) == ("ab", "a-b")
    single = make_app(result_backend_transport_options={"member_queues": True})
    assert single.backend.destination_for("a-b", member) == ("ab", "a-b")


def test_on_reply_declare(app: Celery, broker: Broker) -> None:
    task_id = uuid()
    (queue,) = app.backend.on_reply_declare(task_id)
    assert isinstance(queue, AMQPBackend.Queue)
    assert queue.name == app.backend.rkey(task_id)
    # As ``Producer.publish(declare=...)`` does: it is the queue that a result is then stored in.
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


# -- wait_for


@pytest.mark.usefixtures("both")
def test_wait_for(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(other, task_id, {"a": [1, None]})
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == {"a": [1, None]}
    broker.wait_until_gone(app.backend.rkey(task_id))


@pytest.mark.usefixtures("both")
def test_wait_for_what_comes_while_waiting(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    queue = app.backend.rkey(task_id)

    def work() -> None:
        broker.wait_for_consumer(queue)
        for state in ("STARTED", "PROGRESS"):
            store(other, task_id, None, state)
        store(other, task_id, "done")

    worker = in_thread(work)
    assert app.backend.wait_for(task_id) == "done"
    worker.join()


@pytest.mark.parametrize("timeout", [0, 0.15, 0.5, 1.2])
def test_wait_for_timeout(app: Celery, timeout: float) -> None:
    app.backend.get_task_meta(uuid())  # connects
    task_id = uuid()
    with takes(max(timeout, 0.05)), pytest.raises(TimeoutError, match=task_id):
        app.backend.wait_for(task_id, timeout=timeout)


def test_wait_for_timeout_with_states_coming(app: Celery, other: Celery, broker: Broker) -> None:
    """States that are not final do not put the end of the wait off."""
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


def test_wait_for_ends_with_what_on_interval_raises(app: Celery, broker: Broker) -> None:
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
    assert app.backend.wait_for(task_id, timeout=0) == 1
    with pytest.raises(TimeoutError):
        app.backend.wait_for(task_id, timeout=0, cache=False)


@pytest.mark.usefixtures("both")
def test_wait_for_without_taking(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    store(other, task_id, 1)
    for _ in range(2):
        assert app.backend.wait_for(task_id, timeout=ENOUGH, no_ack=False, cache=False) == 1
    assert other.backend.wait_for(task_id, timeout=ENOUGH) == 1
    broker.wait_until_gone(app.backend.rkey(task_id))


def test_wait_for_in_many_threads(app: Celery, other: Celery) -> None:
    """Different results and the same one, on one connection."""
    assert app.backend  # if the threads asked for it first, Celery would make one for each
    same, ids = uuid(), [uuid() for _ in range(8)]
    got: dict[int, Any] = {}

    def wait(number: int, task_id: str) -> None:
        got[number] = app.backend.wait_for(task_id, timeout=ENOUGH, cache=False, no_ack=False)

    threads = [in_thread(lambda n=n, one=one: wait(n, one)) for n, one in enumerate([*ids, same, same, same])]
    for number, task_id in enumerate(ids):
        store(other, task_id, number)
    store(other, same, "same")
    for thread in threads:
        thread.join()
    assert got == {**{n: n for n in range(8)}, 8: "same", 9: "same", 10: "same"}


def test_wait_for_the_same_result_in_threads_that_take_it(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    queue = app.backend.rkey(task_id)
    got: list[Any] = []
    threads = [in_thread(lambda: got.append(app.backend.wait_for(task_id, timeout=ENOUGH))) for _ in range(4)]
    broker.wait_for_consumer(queue)
    store(other, task_id, "for all")
    for thread in threads:
        thread.join()
    assert got == ["for all"] * 4
    broker.wait_until_gone(queue)


# -- consume


@pytest.mark.usefixtures("both")
def test_consume(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 7)
    meta = app.backend.consume(task_id, timeout=ENOUGH, no_ack=False)
    assert {key: meta[key] for key in success(task_id)} == success(task_id, 7)
    assert other.backend.consume(task_id, ENOUGH)["result"] == 7


def test_consume_gives_failures_as_they_are(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, ValueError("no"), states.FAILURE)
    meta = app.backend.consume(task_id, timeout=ENOUGH)
    assert (meta["status"], repr(meta["result"])) == ("FAILURE", "ValueError('no')")


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
        queue = app.backend.addresses.queue(app.backend.addresses.task(task_id))
        queue(connection.default_channel).declare()
        made = app.backend.Consumer(connection.default_channel, [queue], no_ack=True, accept=app.backend.accept)
        made.task_id = task_id
        with made:
            yield made


def test_drain_events(app: Celery, other: Celery, consumer: Any) -> None:
    calls: list[None] = []
    store(other, consumer.task_id, 1, "PROGRESS")
    store(other, consumer.task_id, "done")
    results = app.backend.drain_events(
        consumer.channel.connection.client, consumer, timeout=ENOUGH, on_interval=lambda: calls.append(None)
    )
    assert list(results) == [consumer.task_id]
    assert results[consumer.task_id]["result"] == "done"
    assert calls
    assert app.backend.wait_for(consumer.task_id, timeout=0) == "done"  # from the cache, as in 3.1


def test_drain_events_timeout(app: Celery, consumer: Any) -> None:
    with takes(0.3), pytest.raises(socket.timeout, match=r"0\.3"):
        app.backend.drain_events(consumer.channel.connection.client, consumer, timeout=0.3)


def test_drain_events_with_a_clock_and_a_wait_of_ones_own(app: Celery, consumer: Any) -> None:
    ticks = iter(range(100))
    waits: list[float] = []

    def wait(timeout: float) -> None:
        waits.append(timeout)
        raise socket.timeout

    with pytest.raises(socket.timeout):
        app.backend.drain_events(None, consumer, timeout=5, now=lambda: next(ticks), wait=wait)
    assert waits == [1.0] * 4


# -- get_many


def store_some(app: Celery, other: Celery, ids: list[str], kind: str, only: int | None = None) -> None:
    """Results of lone tasks, or of a group that both applications know."""
    fields: dict[str, Any] = {}
    if kind == "group":
        fields = {"group": uuid(), "group_index": 0}
        for made in (app, other):
            group = GroupResult(fields["group"], [made.AsyncResult(task_id) for task_id in ids])
            made.backend.save_group(group.id, group)
    for task_id in ids[:only]:
        store(other, task_id, **fields)


@pytest.mark.usefixtures("both")
def test_get_many(app: Celery, other: Celery, broker: Broker) -> None:
    ids = [uuid() for _ in range(20)]
    for number, task_id in enumerate(ids):
        store(other, task_id, number)
    got = dict(app.backend.get_many(ids, timeout=ENOUGH))
    assert {task_id: meta["result"] for task_id, meta in got.items()} == {one: n for n, one in enumerate(ids)}
    assert all(meta["status"] == "SUCCESS" and meta["task_id"] == task_id for task_id, meta in got.items())
    broker.wait_until_gone(*map(app.backend.rkey, ids))


def test_get_many_of_none(make_app: MakeApp) -> None:
    """Nothing to wait for takes no broker."""
    assert list(make_app(broker="amqp://127.0.0.1:1//").backend.get_many([], timeout=0)) == []


@pytest.mark.usefixtures("both")
def test_get_many_yields_as_they_come(app: Celery, other: Celery) -> None:
    ids = [uuid() for _ in range(3)]
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


@pytest.mark.parametrize("kind", ["lone", "group"])
def test_get_many_timeout(app: Celery, other: Celery, kind: str) -> None:
    ids = [uuid() for _ in range(3)]
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


def test_get_many_tells_states_of_group_members_too(app: Celery, other: Celery) -> None:
    group = group_of(app, 2)
    app.backend.save_group(group.id, group)
    for index, member in enumerate(group.results):
        store(other, member.id, None, "PROGRESS", group=group.id, group_index=index)
    store_group(other, group)
    seen: list[str] = []
    ids = [member.id for member in group.results]
    assert len(list(app.backend.get_many(ids, ENOUGH, on_message=lambda meta: seen.append(meta["status"])))) == 2
    assert sorted(seen) == ["PROGRESS", "PROGRESS", "SUCCESS", "SUCCESS"]


def test_get_many_getfields(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id)
    ((name, _),) = app.backend.get_many(
        [task_id], timeout=ENOUGH, getfields=lambda meta: (meta["status"], f"<{meta['task_id']}>")
    )
    assert name == f"<{task_id}>"


def test_get_many_now(app: Celery) -> None:
    """By this clock 100 seconds are over after two looks, of a second each at most."""
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
    ids = [uuid() for _ in range(5)]
    for task_id in ids:
        store(other, task_id, task_id)
    assert len(list(app.backend.get_many(ids, timeout=ENOUGH, no_ack=False))) == 5
    assert {meta["result"] for _, meta in other.backend.get_many(ids, timeout=ENOUGH)} == set(ids)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("kind", ["lone", "group"])
def test_get_many_closed_early_loses_nothing(app: Celery, other: Celery, kind: str) -> None:
    ids = [uuid() for _ in range(10)]
    store_some(app, other, ids, kind)
    results = app.backend.get_many(ids, timeout=ENOUGH)
    taken = [next(results)[0] for _ in range(3)]
    results.close()
    left = [task_id for task_id in ids if task_id not in taken]
    assert {task_id for task_id, _ in other.backend.get_many(left, timeout=ENOUGH)} == set(left)


def test_get_many_loses_nothing_when_a_callback_raises(app: Celery, other: Celery) -> None:
    ids = [uuid() for _ in range(4)]
    for task_id in ids:
        store(other, task_id)

    def on_message(meta: dict[str, Any]) -> None:
        raise LookupError(meta["task_id"])

    with pytest.raises(LookupError):
        list(app.backend.get_many(ids, timeout=ENOUGH, on_message=on_message))
    assert {task_id for task_id, _ in other.backend.get_many(ids, timeout=ENOUGH)} == set(ids)


def test_get_many_max_iterations(app: Celery, other: Celery) -> None:
    """What ``ResultSet._iter_meta`` asks with: one look, and nothing is taken."""
    ids = [uuid(), uuid()]
    store(other, ids[0])
    app.backend.get_task_meta(uuid())
    assert [task_id for task_id, _ in app.backend.get_many(ids, max_iterations=1)] in ([ids[0]], [])
    assert other.backend.wait_for(ids[0], timeout=ENOUGH) is None


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


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What AMQP clients of this process have waited for."""
    waits: list[Any] = []
    wait = Channel.wait

    def counted(self: Channel, *args: Any, **kwargs: Any) -> Any:
        waits.append(args)
        return wait(self, *args, **kwargs)

    monkeypatch.setattr(Channel, "wait", counted)
    return waits


def test_get_task_meta_is_one_round_trip(app: Celery, other: Celery, round_trips: list[Any]) -> None:
    result = app.AsyncResult(uuid())
    assert result.state == "PENDING"
    for percent in range(50):
        store(other, result.id, {"percent": percent}, "PROGRESS")
    for _ in range(3):
        round_trips.clear()
        assert (result.state, len(round_trips)) == ("PROGRESS", 1)


def test_get_task_meta_of_a_queue_somebody_else_declared(app: Celery, broker: Broker) -> None:
    """A history of states, as Celery 3.1 leaves it: the latest counts, and all of them stay."""
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
    broker.wait_until_gone(name)


POLL_TOGETHER = """
import json, multiprocessing, sys
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
            # What this process has seen of a task it would not unlearn.
            app.backend._peek.forget(task_id)
            state = app.backend.get_task_meta(task_id, cache=False)["status"]
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
    ids = [uuid() for _ in range(100)]
    for task_id in ids:
        store(app, task_id, 1)
    assert in_another_process(POLL_TOGETHER, node.url, *ids) == [[], []]


def test_get_task_meta_beside_a_wait_for_the_same_task(app: Celery, other: Celery, broker: Broker) -> None:
    """A thread that polls and a thread that waits, in one process."""
    task_id = uuid()
    got: list[Any] = []
    queue = app.backend.rkey(task_id)
    waiter = in_thread(lambda: got.append(app.backend.wait_for(task_id, timeout=ENOUGH)))
    broker.wait_for_consumer(queue)
    store(other, task_id, 1, "PROGRESS")
    end = time.monotonic() + ENOUGH
    while app.backend.get_task_meta(task_id)["status"] != "PROGRESS":
        assert time.monotonic() < end
    store(other, task_id, 2)
    waiter.join()
    assert got == [2]
    assert app.backend.get_task_meta(task_id)["status"] == "SUCCESS"


def test_task_result_exists(app: Celery, other: Celery) -> None:
    task_id = uuid()
    assert not app.backend.task_result_exists(task_id)
    assert not app.AsyncResult(task_id).exists()
    store(other, task_id, 1)
    assert app.backend.task_result_exists(task_id)
    assert app.AsyncResult(task_id).exists()


def test_reload_task_result(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(other, task_id, 1)
    assert app.backend.get_task_meta(task_id)["result"] == 1
    store(other, task_id, 2)
    assert app.backend.get_task_meta(task_id)["result"] == 1
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


def test_forget_what_was_never_there(app: Celery) -> None:
    app.backend.forget(uuid())


def test_forget_with_parents(app: Celery, other: Celery, broker: Broker) -> None:
    parent = app.AsyncResult(uuid())
    child = AsyncResult(uuid(), app=app, parent=parent)
    for result in (parent, child):
        store(other, result.id)
    child.forget()
    broker.wait_until_gone(app.backend.rkey(parent.id), app.backend.rkey(child.id))


# -- Celery's own way to wait


def test_then(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    result.then(called.append)
    store(other, result.id, 1)
    assert called == []
    assert result.get(timeout=ENOUGH) == 1
    assert called == [result]


def test_then_after_the_result_was_read(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    store(other, result.id, 1)
    result.get(timeout=ENOUGH)
    result.then(called.append)
    assert called == [result]


def test_then_fires_when_a_poll_sees_the_result(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    result.then(called.append)
    assert not result.ready()
    store(other, result.id, 1)
    assert result.ready()
    assert called == [result]


def test_then_of_every_result_object_of_a_task(app: Celery, other: Celery) -> None:
    """As in Celery 5: whoever reads the result, all that wait for it are told."""
    task_id, called = uuid(), []
    first, second = app.AsyncResult(task_id), app.AsyncResult(task_id)
    first.then(called.append)
    second.then(called.append)
    store(other, task_id, 1)
    assert app.AsyncResult(task_id).get(timeout=ENOUGH) == 1
    assert len(called) == 2


def test_add_and_remove_pending_result(app: Celery, other: Celery) -> None:
    result = app.AsyncResult(uuid())
    assert app.backend.add_pending_result(result) is result
    assert app.backend.add_pending_results([result], weak=True) == [result]
    assert app.backend.remove_pending_result(result) is result
    assert app.backend.remove_pending_result(result) is result
    assert app.backend.is_async
    store(other, result.id, 1)
    assert app.backend.wait_for_pending(result, timeout=ENOUGH) == 1


@pytest.mark.usefixtures("both")
def test_get(app: Celery, other: Celery) -> None:
    result, seen, calls = app.AsyncResult(uuid()), [], []
    store(other, result.id, 5, "PROGRESS")

    def on_message(meta: dict[str, Any]) -> None:
        seen.append(meta["status"])
        if len(seen) == 1:
            store(other, result.id, 6)

    assert result.get(timeout=ENOUGH, on_message=on_message, on_interval=lambda: calls.append(1)) == 6
    assert seen == ["PROGRESS", "SUCCESS"]
    assert calls
    assert result.get(timeout=0) == 6


def test_get_timeout(app: Celery) -> None:
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError):
        app.AsyncResult(uuid()).get(timeout=0.3)


def test_get_callback_and_propagate(app: Celery, other: Celery) -> None:
    good, bad, called = app.AsyncResult(uuid()), app.AsyncResult(uuid()), []
    store(other, good.id, 1)
    store(other, bad.id, ValueError("no"), states.FAILURE)
    assert good.get(timeout=ENOUGH, callback=lambda task_id, value: called.append((task_id, value))) == 1
    assert called == [(good.id, 1)]
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)
    assert isinstance(bad.get(timeout=ENOUGH, propagate=False), ValueError)


def test_get_of_a_failed_parent(app: Celery, other: Celery) -> None:
    """A chain whose first task failed: its last one never ends, and the wait does."""
    parent = app.AsyncResult(uuid())
    last = AsyncResult(uuid(), app=app, parent=parent)
    store(other, parent.id, ValueError("first"), states.FAILURE)
    with pytest.raises(ValueError, match="first"):
        last.get(timeout=ENOUGH)


def test_on_task_call(app: Celery, broker: Broker) -> None:
    """Sending a task declares nothing: its worker does, when there is something to store."""
    task_id = uuid()
    with app.producer_pool.acquire() as producer:
        assert app.backend.on_task_call(producer, task_id) == {}
    assert broker.state(app.backend.rkey(task_id)) is None


# -- the rest


def test_as_uri(make_app: MakeApp) -> None:
    url = "fastres://user:secret@127.0.0.1:5672/vhost"
    backend = make_app(backend=url).backend
    assert backend.as_uri() == "fastres://user:**@127.0.0.1:5672/vhost"
    assert backend.as_uri(include_password=True) == url
    assert make_app().backend.as_uri() == "fastres://"


def test_close_and_use_again(app: Celery, other: Celery) -> None:
    task_id = uuid()
    store(app, task_id, 1, "PROGRESS")
    assert app.backend.get_task_meta(task_id)["result"] == 1
    app.backend.close()
    assert app.backend.get_task_meta(task_id)["result"] == 1
    store(app, task_id, 2)
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == 2


def test_a_lone_result_leaves_no_queue(app: Celery, other: Celery, node: Node) -> None:
    before = set(node.queues())
    for number in range(5):
        result = app.AsyncResult(uuid())
        assert result.state == "PENDING"
        store(other, result.id, 1, "PROGRESS")
        assert result.state == "PROGRESS"
        store(other, result.id, number)
        assert result.get(timeout=ENOUGH) == number
    # Of results that were polled only, or waited for in vain, the queues stay until they expire.
    assert set(node.queues()) == before


def test_a_result_that_was_only_polled_leaves_no_queue_once_another_took_it(
    app: Celery, other: Celery, broker: Broker
) -> None:
    result = app.AsyncResult(uuid())
    store(other, result.id, 1)
    assert result.state == "SUCCESS"
    assert other.AsyncResult(result.id).get(timeout=ENOUGH) == 1
    broker.wait_until_gone(app.backend.rkey(result.id))
    assert result.get(timeout=ENOUGH) == 1
    assert broker.state(app.backend.rkey(result.id)) is None
