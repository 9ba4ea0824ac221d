"""Messages that are not results: reported once with queue and task id, counted, and joins go on."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    SOON,
    Broker,
    MakeApp,
    Reports,
    group_of,
    ids_of,
    member_ids,
    new_ids,
    queue_of,
    send,
    store,
    store_group,
    store_member,
    success,
)
from celery import Celery, uuid
from celery.exceptions import SecurityError, TimeoutError
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed, DecodeError

from fastres import MalformedResult, OversizedResult

pytestmark = pytest.mark.usefixtures("both")

GZIP = {"compression": "application/x-gzip"}
#: body, properties, the counted kind, the exception of a lone wait
BAD: dict[str, tuple[bytes, dict[str, Any], str, type[Exception]]] = {
    "no JSON": (b"{not json", {}, "undecodable", DecodeError),
    "not UTF-8": (b'{"task_id": "\xff"}', {}, "undecodable", DecodeError),
    "empty": (b"", {}, "malformed", DecodeError),
    "content type not accepted": (
        b"\x80\x04N.", {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
        "disallowed", ContentDisallowed,
    ),
    "content type unknown": (b"{}", {"content_type": "application/x-other"}, "disallowed", ContentDisallowed),
    "a list": (b"[1]", {}, "malformed", MalformedResult),
    "no status": (b'{"result": 1}', {}, "malformed", MalformedResult),
    "no result": (b'{"status": "SUCCESS"}', {}, "malformed", MalformedResult),
    "not compressed": (b'{"status": "SUCCESS", "result": 1}', {"headers": GZIP}, "undecodable", DecodeError),
    "truncated": (
        zlib.compress(b'{"status": "SUCCESS", "result": 1}')[:-4], {"headers": GZIP}, "undecodable", DecodeError,
    ),
    "too large": (zlib.compress(b" " * 200_000), {"headers": GZIP}, "undecodable", OversizedResult),
    "compression unknown": (b"{}", {"headers": {"compression": "x/y"}}, "undecodable", DecodeError),
}  # fmt: skip

each_bad = pytest.mark.parametrize("name", BAD)


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return make_app(result_backend_transport_options={"max_unpacked_size": 100_000})


def put_bad(broker: Broker, queue: str, name: str, task_id: str) -> None:
    body, properties, _, _ = BAD[name]
    broker.put(queue, body, correlation_id=task_id, **properties)


def check_reports(reports: Reports, backend: Any, name: str, queue: str, task_id: str) -> None:
    """Check that there is one report, with queue and task id, and that it was counted once."""
    _, _, kind, _ = BAD[name]
    (report,) = reports()
    assert report.startswith(f"{kind} result")
    assert queue in report
    assert task_id in report
    assert backend.reports.counts == {kind: 1}


def lone_queue(app: Celery, task_id: str) -> str:
    """The queue of a lone task, declared."""
    store(app, task_id)
    name = str(app.backend.rkey(task_id))
    app.backend._publisher.run(lambda writer: writer.connect().purge(name))
    return name


# -- lone tasks


@each_bad
def test_lone(app: Celery, broker: Broker, reports: Reports, name: str) -> None:
    task_id = uuid()
    queue = lone_queue(app, task_id)
    put_bad(broker, queue, name, task_id)
    for _ in range(2):
        with pytest.raises(BAD[name][3]):
            app.backend.wait_for(task_id, timeout=ENOUGH)
        with pytest.raises(BAD[name][3]):
            app.backend.get_task_meta(task_id)
    check_reports(reports, app.backend, name, queue, task_id)
    assert broker.messages(queue) == 1


@pytest.mark.parametrize("name", ["no JSON", "content type not accepted", "no result", "truncated"])
def test_lone_among_others(app: Celery, other: Celery, broker: Broker, reports: Reports, name: str) -> None:
    """The others are returned; the bad message stays in the queue, and the error of the wait says why."""
    ids = new_ids(5)
    queue = lone_queue(app, ids[2])
    put_bad(broker, queue, name, ids[2])
    for task_id in (*ids[:2], *ids[3:]):
        store(other, task_id, task_id)
    kind = BAD[name][3]
    got: list[Any] = []
    with pytest.raises(TimeoutError, match=f"1 result is missing.*{ids[2]}.*{kind.__name__}"):
        got.extend(app.backend.get_many(ids, timeout=0.5))
    assert {task_id for task_id, _ in got} == {*ids} - {ids[2]}
    # Without a timeout, the wait ends when no readable result is left.
    with pytest.raises(kind):
        list(app.backend.get_many(ids))
    check_reports(reports, app.backend, name, queue, ids[2])
    assert broker.messages(queue) == 1


def test_lone_bad_message_that_is_replaced_by_a_result(app: Celery, other: Celery, broker: Broker) -> None:
    task_id = uuid()
    put_bad(broker, lone_queue(app, task_id), "no JSON", task_id)
    with pytest.raises(DecodeError):
        app.backend.wait_for(task_id, timeout=ENOUGH)
    store(other, task_id, "the retried task's")
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "the retried task's"


def test_lone_task_id_missing(app: Celery, broker: Broker, reports: Reports) -> None:
    """The correlation id is enough; without it, the result's task is unknown."""
    known, unknown = uuid(), uuid()
    broker.put(lone_queue(app, known), {"status": "SUCCESS", "result": 1}, correlation_id=known)
    assert app.backend.wait_for(known, timeout=ENOUGH) == 1
    queue = lone_queue(app, unknown)
    broker.put(queue, {"status": "SUCCESS", "result": 1})
    with pytest.raises((TimeoutError, MalformedResult)):
        app.backend.wait_for(unknown, timeout=0.3)
    (report,) = reports()
    assert report.startswith(f"malformed result in queue {queue!r}")
    assert broker.messages(queue) == 1


def test_lone_result_for_another_id(app: Celery, other: Celery, broker: Broker, reports: Reports) -> None:
    task_id, stranger = uuid(), uuid()
    queue = lone_queue(app, task_id)
    broker.put(queue, success(stranger, "not yours"), correlation_id=stranger)
    with pytest.raises(TimeoutError):
        app.backend.wait_for(task_id, timeout=0.2)
    assert app.backend.get_task_meta(task_id)["result"] != "not yours"
    (report,) = reports()
    assert report.startswith("unknown result")
    assert queue in report
    assert stranger in report
    assert app.backend.reports.counts["unknown"] == 1
    store(other, task_id, "yours")
    assert app.backend.wait_for(task_id, timeout=ENOUGH) == "yours"


FAILURES: dict[str, tuple[Any, type[Exception], str]] = {
    "not an exception": (
        {"exc_module": "os", "exc_type": "system", "exc_message": ["true"]},
        SecurityError, "Expected an exception",
    ),
    "no type": ({"exc_message": "why"}, ValueError, "must include"),
    "no mapping": (5, TypeError, "must be a dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_lone_failure_that_cannot_be_raised(app: Celery, broker: Broker, name: str) -> None:
    result, kind, message = FAILURES[name]
    task_id = uuid()
    queue = lone_queue(app, task_id)
    meta = {"task_id": task_id, "status": "FAILURE", "result": result, "traceback": None}
    broker.put(queue, meta, correlation_id=task_id)
    assert isinstance(app.backend.get_task_meta(task_id)["result"], kind)
    with pytest.raises(kind, match=message):
        app.backend.wait_for(task_id, timeout=ENOUGH)


# -- groups


@each_bad
def test_group(app: Celery, other: Celery, broker: Broker, reports: Reports, name: str) -> None:
    """The other members are joined; the bad message stays in the queue, as do results that were not returned."""
    held = group_of(app, 4)
    ids = ids_of(held)
    queue = queue_of(held.id)
    store_member(other, held, 0, 0)
    put_bad(broker, queue, name, ids[1])
    store_group(other, held, start=2)
    got: dict[str, Any] = {}
    with pytest.raises(BAD[name][3]):
        got.update((task_id, meta["result"]) for task_id, meta in app.backend.iter_native(held))
    for task_id, meta in app.backend.iter_native(GroupResult(held.id, held.results[2:], app=app), timeout=ENOUGH):
        got[task_id] = meta["result"]
    assert got.items() >= {ids[2]: 2, ids[3]: 3}.items()
    check_reports(reports, app.backend, name, queue, ids[1])
    assert broker.messages(queue) == 1
    # After a valid result for the same member, the group is complete.
    store_member(other, held, 1, 1)
    assert held.results[1].get(timeout=ENOUGH) == 1


@pytest.mark.parametrize("name", ["no JSON", "no status"])
def test_group_timeout_names_the_number_of_results(app: Celery, other: Celery, broker: Broker, name: str) -> None:
    held = group_of(app, 3)
    store_member(other, held, 0, 0)
    put_bad(broker, queue_of(held.id), name, held.results[1].id)
    kind = BAD[name][3].__name__
    with pytest.raises(TimeoutError, match=f"2 results are missing.*cannot be read.*{held.results[1].id}: {kind}"):
        held.get(timeout=0.3)


def test_group_bad_message_of_no_member(app: Celery, other: Celery, broker: Broker, reports: Reports) -> None:
    """It neither completes a wait nor disturbs one."""
    held = group_of(app, 3)
    for index in range(3):
        store_member(other, held, index, index)
        put_bad(broker, queue_of(held.id), "no JSON", uuid())
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    assert len(reports()) == app.backend.reports.counts["undecodable"] >= 2
    assert broker.messages(queue_of(held.id)) == 3


def test_group_duplicates(app: Celery, other: Celery, broker: Broker, reports: Reports) -> None:
    held = group_of(app, 3)
    queue = queue_of(held.id)
    for index in range(3):
        for value in (index, "again", "and again")[: 1 if index == 2 else 3]:
            store_member(other, held, index, value)
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    repeated = [report for report in reports() if report.startswith("repeated result")]
    assert len(repeated) == len(reports()) == 2
    for member in held.results[:2]:
        assert any(member.id in report and queue in report for report in repeated)
    broker.wait_until_gone(queue)


def test_group_result_for_an_unknown_id(app: Celery, other: Celery, broker: Broker) -> None:
    """The result of an unknown member is not lost."""
    held = group_of(app, 2)
    (added,) = member_ids(held.id, 1)
    store(other, added, "added while running", group=held.id, group_index=2)
    store_group(other, held)
    assert held.get(timeout=ENOUGH) == [0, 1]
    assert broker.messages(queue_of(held.id)) == 1
    assert group_of(other, [added], held.id).get(timeout=ENOUGH) == ["added while running"]


@pytest.mark.parametrize("name", FAILURES)
def test_group_failure_that_cannot_be_raised(app: Celery, other: Celery, broker: Broker, name: str) -> None:
    result, kind, _ = FAILURES[name]
    held = group_of(app, 3)
    for index in (0, 2):
        store_member(other, held, index, index)
    meta = {"task_id": held.results[1].id, "status": "FAILURE", "result": result, "traceback": None}
    broker.put(queue_of(held.id), meta, correlation_id=meta["task_id"])
    first, bad, last = held.get(timeout=ENOUGH, propagate=False)
    assert (first, type(bad), last) == (0, kind, 2)


@each_bad
def test_group_poll(app: Celery, other: Celery, broker: Broker, reports: Reports, name: str) -> None:
    held = group_of(app, 2)
    queue = queue_of(held.id)
    store_member(other, held, 1, 1)
    put_bad(broker, queue, name, held.results[0].id)
    for _ in range(2):
        assert held.results[1].state == "SUCCESS"
        with pytest.raises(BAD[name][3]):
            assert held.results[0].state
    check_reports(reports, app.backend, name, queue, held.results[0].id)
    assert broker.messages(queue) == 2


def test_saved_group(app: Celery, broker: Broker) -> None:
    """Other messages are not read as saved groups."""
    held = group_of(app, 1)
    held.save()
    queue = f"fastres.saved.{held.id}"
    broker.channel().queue_purge(queue)
    broker.put(queue, b"{not json")
    with pytest.raises(DecodeError):
        app.backend.restore_group(held.id, cache=False)
    broker.channel().queue_purge(queue)
    broker.put(queue, success(held.id, 5))
    with pytest.raises(DecodeError):
        app.backend.restore_group(held.id, cache=False)


# -- mailboxes


@pytest.fixture
def client(make_app: MakeApp) -> Celery:
    return make_app(backend="fastres-rpc://", result_backend_transport_options={"max_unpacked_size": 100_000})


@each_bad
def test_mailbox(client: Celery, broker: Broker, reports: Reports, name: str) -> None:
    """Bad messages are removed from the mailbox, which has no other reader; the others are read."""
    good, bad = send(client), send(client)
    mailbox = client.thread_oid
    put_bad(broker, mailbox, name, bad.id)
    broker.put(mailbox, success(good.id, 1), correlation_id=good.id)
    assert good.get(timeout=ENOUGH) == 1
    with pytest.raises(TimeoutError):
        bad.get(timeout=0.2)
    check_reports(reports, client.backend, name, mailbox, bad.id)
    assert broker.messages(mailbox) == 0
    broker.put(mailbox, success(bad.id, 2), correlation_id=bad.id)
    assert bad.get(timeout=ENOUGH) == 2


def test_mailbox_while_somebody_waits_for_it(client: Celery, broker: Broker, reports: Reports) -> None:
    """The wait ends at once, because no other result can arrive."""
    result = send(client)
    put_bad(broker, client.thread_oid, "content type not accepted", result.id)
    with pytest.raises(ContentDisallowed):
        result.get(timeout=SOON)
    assert len(reports()) == 1


@pytest.mark.parametrize("name", FAILURES)
def test_mailbox_failure_that_cannot_be_raised(client: Celery, broker: Broker, name: str) -> None:
    result, kind, message = FAILURES[name]
    sent = send(client)
    meta = {"task_id": sent.id, "status": "FAILURE", "result": result, "traceback": None}
    broker.put(client.thread_oid, json.dumps(meta).encode(), correlation_id=sent.id)
    with pytest.raises(kind, match=message):
        sent.get(timeout=ENOUGH)


def test_mailbox_result_for_an_unknown_id(client: Celery, broker: Broker) -> None:
    """It is kept for a later reader: another process may have sent the task."""
    sent, stranger = send(client), uuid()
    broker.put(client.thread_oid, success(stranger, "kept"), correlation_id=stranger)
    broker.put(client.thread_oid, success(sent.id, 1), correlation_id=sent.id)
    assert sent.get(timeout=ENOUGH) == 1
    assert client.AsyncResult(stranger).get(timeout=ENOUGH) == "kept"
