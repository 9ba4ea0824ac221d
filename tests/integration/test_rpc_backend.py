"""``RPCBackend`` member by member."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    SOON,
    Broker,
    MakeApp,
    in_another_process,
    in_thread,
    new_ids,
    reply,
    send,
    send_group,
    success,
    takes,
)
from celery import Celery, states, uuid
from celery.app.task import Context
from celery.backends import rpc
from celery.exceptions import TimeoutError
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed
from rabbitmq_node import Node

from fastres import RPCBackend
from fastres.read.reply_inbox import UNCLAIMED


@pytest.fixture
def client(make_app: MakeApp) -> Celery:
    return make_app(backend="fastres-rpc://")


@pytest.fixture
def worker(make_app: MakeApp) -> Celery:
    """An application that shares only the broker with the client."""
    return make_app(backend="fastres-rpc://")


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
    """Only the client declares its reply queue."""
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
    broker.declare(mailbox)
    reply(worker, mailbox, task_id, {"a": 1})
    message = broker.look(mailbox)
    assert message.properties["correlation_id"] == task_id
    assert message.properties["delivery_mode"] == 1
    meta = json.loads(message.body)
    assert (meta["task_id"], meta["status"], meta["result"]) == (task_id, "SUCCESS", {"a": 1})


def test_store_result_for_nobody(worker: Celery, broker: Broker) -> None:
    """A task without a reply queue, and one whose client has ended."""
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


@pytest.mark.timing
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
    """As on Celery's ``rpc``: all results share one queue, and any reader notifies all waiters."""
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


def test_forget_before_the_result_arrives(client: Celery, worker: Celery) -> None:
    result = send(client)
    result.forget()
    reply(worker, client, result.id, 1)
    other = send(client)
    reply(worker, client, other.id, 2)
    assert other.get(timeout=ENOUGH) == 2


def test_results_that_were_not_awaited_yet(client: Celery, worker: Celery) -> None:
    """They arrive in between and are kept for later calls, without a limit for tasks that were sent here."""
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
    stray = new_ids(UNCLAIMED + 10)
    broker.fill(client.thread_oid, (success(one, 1) for one in stray))
    last = send(client)
    reply(worker, client, last.id, "last")
    assert last.get(timeout=ENOUGH) == "last"
    assert client.backend.get_task_meta(stray[0])["status"] == "PENDING"
    assert client.backend.get_task_meta(stray[-1])["status"] == "SUCCESS"
    assert expected.get(timeout=ENOUGH) == "kept"


def test_repeated_results(client: Celery, worker: Celery, reports: Any) -> None:
    """The first one counts, returned or not; the others are reported."""
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
    """A manual retry: the second result is not a repetition."""
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

    threads = [in_thread(work, name) for name in "abcd"]
    for thread in threads:
        thread.join()
    assert sorted(got.values()) == [[[name, number] for number in range(5)] for name in "abcd"]
    assert all(broker.messages(oid) == 0 for oid in got)


def test_a_thread_reads_what_another_one_has_sent(client: Celery, worker: Celery) -> None:
    result = send(client)
    reply(worker, client, result.id, 1)
    got: list[Any] = []
    in_thread(lambda: got.append(result.get(timeout=ENOUGH))).join()
    assert got == [1]


# -- settings, pickling, closing


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
    """Another process can have the result object, but not read this client's mailbox."""
    result = send(client)
    reply(worker, client, result.id, 1)
    got = in_another_process(UNPICKLE, node.url, pickle.dumps(result).hex())
    assert got == [result.id, "PENDING", "RPCBackend", True]
    assert result.get(timeout=ENOUGH) == 1


def test_after_the_connection_was_closed(client: Celery, worker: Celery) -> None:
    """The mailbox outlives the connection: results that arrive meanwhile are kept."""
    result = send(client)
    client.backend.close()
    reply(worker, client, result.id, 1)
    client.backend.revive(None)
    assert result.get(timeout=ENOUGH) == 1
