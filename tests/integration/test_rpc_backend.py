"""``RPCBackend`` member by member, beside Celery's own ``rpc://``: either reads what the other writes."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import ENOUGH, SOON, Broker, in_another_process, takes
from celery import Celery, group, states, uuid
from celery.app.task import Context
from celery.backends import rpc
from celery.exceptions import TimeoutError
from celery.result import AsyncResult, GroupResult
from conftest import MakeApp
from kombu.exceptions import ContentDisallowed
from rabbitmq_node import Node

from fastres import RPCBackend
from fastres.inboxes import UNCLAIMED


@pytest.fixture(scope="module")
def broker(node: Node) -> Iterator[Broker]:
    broker = Broker(node.url)
    yield broker
    broker.close()


@pytest.fixture
def client(make_app: MakeApp) -> Celery:
    return make_app(backend="fastres-rpc://")


@pytest.fixture
def worker(make_app: MakeApp) -> Celery:
    """An application that shares nothing with the client but the broker."""
    return make_app(backend="fastres-rpc://")


@pytest.fixture
def celery_rpc(make_app: MakeApp) -> Iterator[Celery]:
    """An application on Celery's own backend."""
    app = make_app(backend="rpc://")
    yield app
    if app.backend.result_consumer._consumer is not None:
        app.backend.result_consumer.stop()


def send(client: Celery, task_id: str | None = None) -> AsyncResult:
    """Send a task that no worker is there to run."""
    return client.send_task("nobody.runs.this", task_id=task_id, queue="nobody")


def send_group(client: Celery, count: int) -> GroupResult:
    @client.task(name="nobody.runs.this", shared=False)
    def task() -> None: ...

    return group([task.s() for _ in range(count)], app=client).apply_async(queue="nobody")


def reply(
    worker: Celery, client: Celery | str, task_id: str, result: Any = None, state: str = "SUCCESS", **fields: Any
) -> None:
    """Store a result as the worker of the task does."""
    reply_to = client if isinstance(client, str) else client.thread_oid
    request = Context({"id": task_id, "correlation_id": task_id, "reply_to": reply_to, **fields})
    worker.backend.store_result(task_id, result, state, request=request)


# -- the class


def test_attributes(client: Celery) -> None:
    assert isinstance(client.backend, RPCBackend)
    assert RPCBackend.persistent is rpc.RPCBackend.persistent is False
    assert client.backend.supports_native_join
    assert client.backend.supports_autoexpire
    assert client.backend.as_uri() == "fastres-rpc://"


def test_oid_and_binding(client: Celery) -> None:
    backend = client.backend
    assert backend.oid == client.thread_oid
    assert backend.binding.name == backend.binding.routing_key == backend.oid
    assert backend.binding.durable
    assert not backend.binding.auto_delete


def test_destination_for(client: Celery) -> None:
    request = Context({"id": "t", "reply_to": "mailbox", "correlation_id": "c"})
    assert client.backend.destination_for("t", request) == ("mailbox", "c")
    assert client.backend.destination_for("t", Context({"id": "t", "reply_to": "mailbox"})) == ("mailbox", "t")
    with pytest.raises(RuntimeError, match="task t"):
        client.backend.destination_for("t", None)


def test_on_reply_declare(client: Celery) -> None:
    """The reply queue is its client's to declare."""
    assert not client.backend.on_reply_declare("t")


def test_ensure_chords_allowed(client: Celery) -> None:
    with pytest.raises(NotImplementedError, match="chords"):
        client.backend.ensure_chords_allowed()


def test_on_task_call_declares_the_mailbox_before_the_task_is_sent(client: Celery, broker: Broker) -> None:
    assert broker.state(client.thread_oid) is None
    with client.producer_pool.acquire() as producer:
        client.backend.on_task_call(producer, uuid())
    assert broker.state(client.thread_oid).consumer_count == 1


# -- store_result


def test_store_result(client: Celery, worker: Celery, broker: Broker) -> None:
    task_id, mailbox = uuid(), uuid()
    broker.channel().queue_declare(mailbox, durable=True, auto_delete=False, arguments={"x-expires": 60_000})
    reply(worker, mailbox, task_id, {"a": 1})
    message = broker.look(mailbox)
    assert message.properties["correlation_id"] == task_id
    assert message.properties["delivery_mode"] == 1
    meta = json.loads(message.body)
    assert (meta["task_id"], meta["status"], meta["result"]) == (task_id, "SUCCESS", {"a": 1})


def test_store_result_for_nobody(worker: Celery, broker: Broker) -> None:
    """A task that was sent without a client to answer, and a client that is gone."""
    assert worker.backend.store_result("t", 5, states.SUCCESS, request=Context({"id": "t"})) == 5
    gone = uuid()
    reply(worker, gone, uuid())
    assert broker.state(gone) is None


# -- reading


@pytest.mark.usefixtures("both")
def test_get(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1, "PROGRESS")
    reply(worker, client, result.id, 2)
    seen: list[str] = []
    assert result.get(timeout=ENOUGH, on_message=lambda meta: seen.append(meta["status"])) == 2
    assert seen[-1] == "SUCCESS"
    assert result.get(timeout=0) == 2


@pytest.mark.usefixtures("both")
def test_many_results_in_any_order(client: Celery, worker: Celery, broker: Broker) -> None:
    results = [send(client) for _ in range(50)]
    for number, result in reversed(list(enumerate(results))):
        reply(worker, client, result.id, number)
    assert [result.get(timeout=ENOUGH) for result in results] == list(range(50))
    assert broker.messages(client.thread_oid) == 0


def test_a_result_that_comes_while_waiting(client: Celery, worker: Celery) -> None:
    result = send(client)
    calls: list[int] = []

    def on_interval() -> None:
        calls.append(1)
        if len(calls) == 1:
            reply(worker, client, result.id, "late")

    assert result.get(timeout=ENOUGH, on_interval=on_interval) == "late"


def test_failure(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, KeyError("lost"), states.FAILURE)
    with pytest.raises(KeyError, match="lost"):
        result.get(timeout=ENOUGH)


@pytest.mark.parametrize("timeout", [0.15, 0.5])
def test_timeout(client: Celery, timeout: float) -> None:
    result = send(client)
    for wait in (result.get, lambda timeout: client.backend.wait_for(result.id, timeout=timeout)):
        with takes(timeout), pytest.raises(TimeoutError, match=result.id):
            wait(timeout=timeout)


def test_wait_for_consume_and_get_many(client: Celery, worker: Celery) -> None:
    results = [send(client) for _ in range(4)]
    for number, result in enumerate(results):
        reply(worker, client, result.id, number)
    assert client.backend.wait_for(results[0].id, timeout=ENOUGH) == 0
    assert client.backend.consume(results[1].id, timeout=ENOUGH)["result"] == 1
    got = client.backend.get_many([one.id for one in results], timeout=ENOUGH)
    assert sorted(meta["result"] for _, meta in got) == [0, 1, 2, 3]


def test_no_ack_false_leaves_a_result_to_the_next_reader(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1)
    for _ in range(2):
        assert client.backend.wait_for(result.id, timeout=ENOUGH, no_ack=False, cache=False) == 1


@pytest.mark.usefixtures("both")
def test_get_task_meta(client: Celery, worker: Celery) -> None:
    result = send(client)
    assert result.state == "PENDING"
    for percent in range(5):
        reply(worker, client, result.id, {"percent": percent}, "PROGRESS")
    assert (result.state, result.info) == ("PROGRESS", {"percent": 4})
    reply(worker, client, result.id, "done")
    assert client.backend.poll(result.id)["result"] == "done"
    assert result.state == "SUCCESS"
    assert result.get(timeout=ENOUGH) == "done"


def test_a_poll_leaves_the_results_of_others(client: Celery, worker: Celery) -> None:
    first, second = send(client), send(client)
    reply(worker, client, first.id, 1)
    reply(worker, client, second.id, 2)
    assert second.state == "SUCCESS"
    assert (first.get(timeout=ENOUGH), second.get(timeout=ENOUGH)) == (1, 2)


def test_reload_task_result(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1, "PROGRESS")
    assert client.backend.get_task_meta(result.id)["result"] == 1
    reply(worker, client, result.id, 2)
    client.backend.reload_task_result(result.id)
    assert client.backend.get_task_meta(result.id)["result"] == 2


def test_states_are_seen_in_order_and_never_after_the_result(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 5)
    assert client.backend.get_task_meta(result.id)["status"] == "SUCCESS"
    reply(worker, client, result.id, None, "STARTED")
    assert client.backend.get_task_meta(result.id, cache=False)["status"] == "SUCCESS"


# -- groups


@pytest.mark.usefixtures("both")
def test_group(client: Celery, worker: Celery) -> None:
    held = send_group(client, 10)
    assert client.backend.group_progress(held.id) == 0
    for index, member in enumerate(held.results):
        reply(worker, client, member.id, None, "STARTED", group=held.id, group_index=index)
        assert client.backend.group_progress(held.id) == index
        reply(worker, client, member.id, index, group=held.id, group_index=index)
        assert client.backend.group_progress(held.id) == index + 1
    assert held.get(timeout=ENOUGH) == list(range(10))
    assert client.backend.group_progress(held.id) == 10


def test_nested_groups(client: Celery, worker: Celery) -> None:
    inner = GroupResult(uuid(), [send(client), send(client)], app=client)
    outer = GroupResult(uuid(), [send(client), inner], app=client)
    for value, result in zip("abc", [outer.results[0], *inner.results]):
        reply(worker, client, result.id, value)
    assert outer.get(timeout=ENOUGH) == ["a", ["b", "c"]]


def test_save_and_restore(client: Celery, worker: Celery) -> None:
    held = send_group(client, 3)
    held.save()
    assert GroupResult.restore(held.id, app=worker) == held
    restored = GroupResult.restore(held.id, app=client)
    for index, member in enumerate(held.results):
        reply(worker, client, member.id, index)
    assert restored.get(timeout=ENOUGH) == [0, 1, 2]
    held.delete()
    assert worker.backend.restore_group(held.id, cache=False) is None


def test_then(client: Celery, worker: Celery) -> None:
    result, called = send(client), []
    result.then(called.append)
    reply(worker, client, result.id, 1)
    assert result.get(timeout=ENOUGH) == 1
    assert called == [result]


def test_then_fires_while_another_result_is_waited_for(client: Celery, worker: Celery) -> None:
    """As on Celery's ``rpc``: all results come through one queue, and whoever reads it tells everybody."""
    first, second, called = send(client), send(client), []
    first.then(called.append)
    reply(worker, client, first.id, 1)
    reply(worker, client, second.id, 2)
    assert second.get(timeout=ENOUGH) == 2
    assert called == [first]


# -- forget, unclaimed, repeated


def test_forget(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1)
    assert result.state == "SUCCESS"
    result.forget()
    assert result.state == "PENDING"


def test_forget_before_the_result_comes(client: Celery, worker: Celery) -> None:
    result = send(client)
    result.forget()
    reply(worker, client, result.id, 1)
    other = send(client)
    reply(worker, client, other.id, 2)
    assert other.get(timeout=ENOUGH) == 2


def test_results_that_nobody_has_asked_for_yet(client: Celery, worker: Celery) -> None:
    """They come in between, and are there when somebody does: those that were sent here however many come."""
    results = [send(client) for _ in range(5)]
    for number, result in enumerate(results):
        reply(worker, client, result.id, number)
    last = send(client)
    reply(worker, client, last.id, "last")
    assert last.get(timeout=ENOUGH) == "last"
    ids = [result.id for result in results]
    del results, result
    assert [client.AsyncResult(task_id).get(timeout=ENOUGH) for task_id in ids] == list(range(5))


def test_unclaimed_results_have_a_limit_and_expected_ones_none(
    client: Celery, worker: Celery, broker: Broker
) -> None:
    expected = send(client)
    reply(worker, client, expected.id, "kept")
    stray = [uuid() for _ in range(UNCLAIMED + 10)]
    broker.fill(client.thread_oid, ({"task_id": one, "status": "SUCCESS", "result": 1} for one in stray))
    last = send(client)
    reply(worker, client, last.id, "last")
    assert last.get(timeout=ENOUGH) == "last"
    assert client.backend.get_task_meta(stray[0])["status"] == "PENDING"
    assert client.backend.get_task_meta(stray[-1])["status"] == "SUCCESS"
    assert expected.get(timeout=ENOUGH) == "kept"


def test_repeated_results(client: Celery, worker: Celery, reports: Any) -> None:
    """The first one counts, whether it was handed over or not; the others are reported."""
    handed, waiting = send(client), send(client)
    reply(worker, client, handed.id, "first")
    assert handed.get(timeout=ENOUGH) == "first"
    for value in ("second", "third"):
        reply(worker, client, handed.id, value)
    for value in ("first", "second"):
        reply(worker, client, waiting.id, value)
    assert waiting.get(timeout=ENOUGH) == "first"
    last = send(client)
    reply(worker, client, last.id)
    last.get(timeout=ENOUGH)
    repeated = [report for report in reports() if report.startswith("repeated")]
    assert len(repeated) == 2
    for result in (handed, waiting):
        assert any(result.id in report and client.thread_oid in report for report in repeated)


def test_a_task_that_is_sent_again_under_its_id(client: Celery, worker: Celery, reports: Any) -> None:
    """A retry by hand: the second result is no repetition."""
    task_id = uuid()
    for number in range(2):
        result = send(client, task_id)
        reply(worker, client, task_id, number)
        assert result.get(timeout=SOON) == number
    assert reports() == []


# -- threads


def test_threads_have_mailboxes_of_their_own_and_one_connection(
    client: Celery, worker: Celery, broker: Broker
) -> None:
    assert client.backend  # if the threads asked for it first, Celery would make one for each
    got: dict[str, list[Any]] = {}

    def work(name: str) -> None:
        results = [send(client) for _ in range(5)]
        for number, result in enumerate(results):
            reply(worker, client, result.id, (name, number))
        got[client.thread_oid] = [result.get(timeout=ENOUGH) for result in results]

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got.values()) == [[[name, number] for number in range(5)] for name in "abcd"]
    assert all(broker.messages(oid) == 0 for oid in got)


def test_a_thread_reads_what_another_one_has_sent(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(result.get(timeout=ENOUGH)))
    thread.start()
    thread.join()
    assert got == [1]


# -- beside Celery's own


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
def test_reads_what_celerys_workers_write(make_app: MakeApp, serializer: str) -> None:
    conf = {"result_serializer": serializer, "result_accept_content": [serializer], "result_extended": True}
    client, worker = make_app(backend="fastres-rpc://", **conf), make_app(backend="rpc://", **conf)
    good, bad = send(client), send(client)
    reply(worker, client, good.id, [1, {"a": None}], task="add", args=[1])
    reply(worker, client, bad.id, ValueError("no"), states.FAILURE)
    assert good.get(timeout=ENOUGH) == [1, {"a": None}]
    assert (good.name, good.args) == ("add", [1])
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)


@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
def test_celerys_clients_read_what_is_written(make_app: MakeApp, celery_rpc: Celery, serializer: str) -> None:
    celery_rpc.conf.update(result_serializer=serializer, result_accept_content=[serializer])
    worker = make_app(backend="fastres-rpc://", result_serializer=serializer, result_accept_content=[serializer])
    polled, good, bad = (send(celery_rpc) for _ in range(3))
    reply(worker, celery_rpc, polled.id, {"percent": 5}, "PROGRESS")
    assert (polled.state, polled.info) == ("PROGRESS", {"percent": 5})
    reply(worker, celery_rpc, polled.id, 1)
    reply(worker, celery_rpc, good.id, [1, {"a": None}])
    reply(worker, celery_rpc, bad.id, ValueError("no"), states.FAILURE)
    assert polled.get(timeout=ENOUGH) == 1
    assert good.get(timeout=ENOUGH) == [1, {"a": None}]
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)


@pytest.mark.parametrize("fields", [{}, {"group": "g", "group_index": 0}], ids=["lone", "member"])
def test_the_wire_format_is_celerys_own(
    worker: Celery, celery_rpc: Celery, broker: Broker, fields: dict[str, Any]
) -> None:
    """Same body, same properties."""
    written: list[Any] = []
    for app in (worker, celery_rpc):
        mailbox, task_id = uuid(), "0f8fad5b-d9cb-469f-a165-70867728950e"
        broker.channel().queue_declare(mailbox, durable=True, auto_delete=False, arguments={"x-expires": 60_000})
        reply(app, mailbox, task_id, {"a": [1]}, **fields)
        message = broker.look(mailbox)
        meta = json.loads(message.body)
        assert meta.pop("date_done")
        properties = {name: value for name, value in message.properties.items() if value}
        written.append((meta, properties, message.delivery_info["exchange"]))
    assert written[0] == written[1]


def test_a_client_that_is_rolled_over(make_app: MakeApp, celery_rpc: Celery, node: Node) -> None:
    """Celery's reply queue is transient and auto-delete: the same process declares its own only once."""
    result = send(celery_rpc)
    client = make_app(backend="fastres-rpc://")
    mine = send(client)
    reply(client, celery_rpc, result.id, "to the old one")
    reply(celery_rpc, client, mine.id, "to the new one")
    assert (result.get(timeout=ENOUGH), mine.get(timeout=ENOUGH)) == ("to the old one", "to the new one")


# -- the rest


def test_result_accept_content(make_app: MakeApp, client: Celery) -> None:
    worker = make_app(backend="fastres-rpc://", result_serializer="pickle", result_accept_content=["pickle"])
    result = send(client)
    reply(worker, client, result.id, 1)
    with pytest.raises(ContentDisallowed):
        result.get(timeout=ENOUGH)


@pytest.mark.usefixtures("both")
def test_result_compression(make_app: MakeApp, client: Celery) -> None:
    worker = make_app(backend="fastres-rpc://", result_compression="gzip")
    result = send(client)
    reply(worker, client, result.id, "x" * 10_000)
    assert result.state == "SUCCESS"
    assert result.get(timeout=ENOUGH) == "x" * 10_000


UNPICKLE = """
import json, pickle, sys
from celery import Celery

app = Celery(broker=sys.argv[1], backend="fastres-rpc://")
result = pickle.loads(bytes.fromhex(sys.argv[2]))
print(json.dumps([result.id, result.state, type(result.backend).__name__, result.backend is app.backend]))
app.backend.close()
"""


def test_pickled_result(client: Celery, worker: Celery, node: Node) -> None:
    """Another process can have the result's name, but not what is in this client's mailbox."""
    result = send(client)
    reply(worker, client, result.id, 1)
    got = in_another_process(UNPICKLE, node.url, pickle.dumps(result).hex())
    assert got == [result.id, "PENDING", "RPCBackend", True]
    assert result.get(timeout=ENOUGH) == 1


def test_after_the_connection_was_closed(client: Celery, worker: Celery) -> None:
    """The mailbox outlives it: what comes meanwhile is there."""
    result = send(client)
    client.backend.close()
    reply(worker, client, result.id, 1)
    client.backend.revive(None)
    assert result.get(timeout=ENOUGH) == 1
