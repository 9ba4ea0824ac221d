"""The class of Celery 3.1 on a real RabbitMQ: its constructor, and its attributes: ``Consumer``, ``Queue`` ..."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from amqp.exceptions import PreconditionFailed
from backend_kit import ENOUGH, Broker, MakeApp, store, success, until
from celery import Celery, states, uuid
from celery.exceptions import ImproperlyConfigured
from kombu.common import maybe_declare
from kombu.exceptions import ContentDisallowed, OperationalError
from rabbitmq_node import Node

import fastres
from fastres import AMQPBackend

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
    """Results may be on another broker than tasks."""
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
def test_an_exchange_type_that_cannot_route_results(app: Celery, kind: str) -> None:
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
def test_auto_delete(make_app: MakeApp, broker: Broker, auto_delete: bool) -> None:
    task_id = uuid()
    app = make_app(result_backend_transport_options={"take": "always"})
    backend = AMQPBackend(app, auto_delete=auto_delete)
    backend.store_result(task_id, 1, states.SUCCESS)
    assert backend.wait_for(task_id, timeout=ENOUGH) == 1
    if auto_delete:
        broker.wait_until_gone(backend.rkey(task_id))
    else:
        assert broker.messages(backend.rkey(task_id)) == 0
    backend.close()


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
    """A subclass may override the attribute."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"amqp://guest:guest@127.0.0.1:{nobody.getsockname()[1]}//"
        backend = make_app(url, backend="backend_kit:Impatient+fastres://").backend
        for operation in (
            lambda: backend.store_result(uuid(), 1, states.SUCCESS),
            lambda: backend.get_task_meta(uuid()),
        ):
            with pytest.raises(OperationalError, match=r"127\.0\.0\.1"):
                operation()


def test_consumer_does_not_declare(app: Celery, broker: Broker) -> None:
    name = uuid()
    assert AMQPBackend.Consumer.auto_declare is False
    consumer = app.backend.Consumer(broker.channel(), [app.backend.Queue(name)])
    assert broker.state(name) is None
    consumer.declare()
    assert broker.messages(name) == 0
    broker.channel().queue_delete(name)


def test_consumer(app: Celery, broker: Broker) -> None:
    """The methods that 3.1 documents: callbacks, add_queue, consuming_from, cancel_by_queue, recover, purge."""
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


def test_consumer_honours_its_accept_argument(app: Celery, broker: Broker) -> None:
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
    message = until(lambda: queue.get(accept=["json"]))
    assert message.payload == {"hello": "world"}
    message.ack()
    queue.delete()


# -- other methods


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


def test_taking_a_lone_result_deletes_its_queue(make_app: MakeApp, other: Celery, node: Node) -> None:
    app = make_app(result_backend_transport_options={"take": "always"})
    before = set(node.queues())
    for number in range(5):
        result = app.AsyncResult(uuid())
        assert result.state == "PENDING"
        store(other, result.id, 1, "PROGRESS")
        assert result.state == "PROGRESS"
        store(other, result.id, number)
        assert result.get(timeout=ENOUGH) == number
    assert set(node.queues()) == before


def test_a_polled_result_leaves_no_queue_after_another_process_took_it(
    make_app: MakeApp, other: Celery, broker: Broker
) -> None:
    app = make_app(result_backend_transport_options={"take": "always"})
    result = other.AsyncResult(uuid())
    store(other, result.id, 1)
    assert result.state == "SUCCESS"
    assert app.AsyncResult(result.id).get(timeout=ENOUGH) == 1
    broker.wait_until_gone(app.backend.rkey(result.id))
    assert result.get(timeout=ENOUGH) == 1
    assert broker.state(app.backend.rkey(result.id)) is None
