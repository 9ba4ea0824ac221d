"""Cancelling groups and chords: none of their tasks starts any more, and all waits end at once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import Broker, MakeApp, group_of, in_thread, page_ids, queue_of, store, store_member, until
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, ImproperlyConfigured, TaskRevokedError
from proj import add, echo, gated, noted_errback, record, tsum
from rabbitmq_node import Node
from workers import Worker, adds, python

import fastres
from fastres import aio

SECONDS = 20


@pytest.fixture(scope="module", params=["threads", "prefork"])
def worker(request: pytest.FixtureRequest, node: Node) -> Iterator[Worker]:
    options = {"namespace": request.param}
    with Worker(node.url, pool=request.param, concurrency=2, result_backend_transport_options=options) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


def busy(gate: Path) -> list[Any]:
    """Tasks that occupy both processes of the worker until the gate is open."""
    return [gated.s(str(gate), "done")] * 2


def began(tmp_path: Path) -> list[Any]:
    file = tmp_path / "record"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def records(tmp_path: Path, count: int) -> list[Any]:
    return [record.si(number, str(tmp_path), "member") for number in range(count)]


def raises_revoked(result: Any) -> None:
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SECONDS)


def settle_down(app: Celery) -> None:
    """Wait until the worker has seen all earlier tasks."""
    assert add.delay(1, 1).get(timeout=SECONDS) == 2


def test_a_group(app: Celery, gate: Path, tmp_path: Path) -> None:
    sent = group([*busy(gate), *records(tmp_path, 60)]).apply_async()
    waiting = in_thread(raises_revoked, sent)
    other = f"AsyncResult({sent[30].id!r}).get(timeout=20)"
    time.sleep(0.5)
    fastres.cancel(sent)
    waiting.join(2)
    assert not waiting.is_alive()
    with pytest.raises(TaskRevokedError):
        app.AsyncResult(sent[40].id).get(timeout=2)
    code = f"""
        from celery.result import AsyncResult
        try:
            {other}
        except celery.exceptions.TaskRevokedError as exc:
            print("revoked", exc)
    """
    assert python(code, app) == "revoked cancelled"
    assert {result.state for result in sent} == {"REVOKED"}
    gate.touch()
    until(lambda: [app.AsyncResult(each.id).state for each in sent[:2]] == ["SUCCESS"] * 2)
    settle_down(app)
    assert began(tmp_path) == []
    # A second cancellation changes nothing, and results that arrived before stay.
    fastres.cancel(sent)
    assert [app.AsyncResult(each.id).get(timeout=SECONDS) for each in sent[:2]] == ["done"] * 2
    again = app.GroupResult(sent.id, [app.AsyncResult(each.id) for each in sent])
    values = again.get(timeout=SECONDS, propagate=False)
    assert values[:2] == ["done", "done"]
    assert {type(value) for value in values[2:]} == {TaskRevokedError}


def test_nothing_is_stored_for_each_task(app: Celery, broker: Broker, gate: Path, tmp_path: Path) -> None:
    sent = group([*busy(gate), *records(tmp_path, 100)]).apply_async()
    fastres.cancel(sent)
    gate.touch()
    settle_down(app)
    name = app.backend.addresses.group(sent.id).name
    # Two results, and the notice.
    until(lambda: broker.messages(name) == 3)
    assert began(tmp_path) == []


@pytest.mark.parametrize("count", [5, 80])
def test_a_chord(app: Celery, worker: Worker, gate: Path, tmp_path: Path, count: int) -> None:
    body = tsum.si([7]).on_error(noted_errback.s(str(tmp_path)))
    lone = [add.delay(1, 1) for _ in range(3)]
    sent = chord([*busy(gate), *records(tmp_path, count)])(body)
    after = [add.delay(2, 2) for _ in range(3)]
    fastres.cancel(sent)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=3)
    gate.touch()
    until(lambda: not any(shard.open and shard.open.count for shard in app.backend.asker.status(SECONDS)))
    noted = tmp_path / "noted"
    # Other tasks on their page are not touched.
    assert [result.get(timeout=SECONDS) for result in lone + after] == [2, 2, 2, 4, 4, 4]
    settle_down(app)
    assert began(tmp_path) == []
    assert noted.read_text().split() == [sent.id]
    assert "It was cancelled" in worker.log()
    # The joiner sets its state.
    assert app.AsyncResult(sent.id).state == "FAILURE"


def test_groups_chains_and_chords_in_a_group(app: Celery, gate: Path, tmp_path: Path) -> None:
    def some(count: int) -> list[Any]:
        return records(tmp_path, count)

    inner = chord(some(4), tsum.si([1]))
    members = [
        group(some(60)),
        chain(*some(3)),
        inner,
        group(chain(*some(2)), *some(2)),
        chain(echo.si(1), *some(1)),
    ]
    blocking = group(busy(gate)).apply_async()
    sent = group(members * 2).apply_async()
    fastres.cancel(sent)
    # The body of the inner chord has failed with a ChordError.
    with pytest.raises((TaskRevokedError, ChordError)):
        sent.get(timeout=3)
    gate.touch()
    assert blocking.get(timeout=SECONDS) == ["done", "done"]
    settle_down(app)
    assert began(tmp_path) == []


def test_a_chain_with_a_group_in_it(app: Celery, gate: Path, tmp_path: Path) -> None:
    blocking = group(busy(gate)).apply_async()
    sent = (echo.si(1) | group(records(tmp_path, 3)) | tsum.si([1]) | echo.s()).apply_async()
    fastres.cancel(sent)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=3)
    gate.touch()
    assert blocking.get(timeout=SECONDS) == ["done", "done"]
    settle_down(app)
    assert began(tmp_path) == []


def test_first_with_the_rest_revoked(app: Celery, gate: Path, tmp_path: Path) -> None:
    begun = group([add.s(1, 1), add.s(2, 2), *busy(gate), *records(tmp_path, 60)]).apply_async()
    assert sorted(fastres.join(begun, first=2, revoke=True, timeout=SECONDS)) == [2, 4]
    gate.touch()
    settle_down(app)
    assert began(tmp_path) == []
    assert begun[-1].state == "REVOKED"


@pytest.mark.parametrize("count", [5, 80])
def test_settle_with_the_rest_revoked(app: Celery, gate: Path, tmp_path: Path, count: int) -> None:
    header = [add.s(1, 1), add.s(2, 2), *busy(gate), *records(tmp_path, count)]
    sent = chord(header)(fastres.settle(tsum.s(), first=2, revoke=True))
    until(lambda: sent.parent[-1].state == "REVOKED" or count < 50)
    time.sleep(0.5)
    gate.touch()
    assert sent.get(timeout=SECONDS, follow_parents=False) == 6
    settle_down(app)
    assert began(tmp_path) == []
    until(lambda: sent.parent[-1].state == "REVOKED")


def test_in_an_event_loop(app: Celery, gate: Path, tmp_path: Path) -> None:
    sent = group([*busy(gate), *records(tmp_path, 60)]).apply_async()

    async def main() -> None:
        waiting = asyncio.ensure_future(aio.join(sent, timeout=SECONDS))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(fastres.cancel, sent)
        with pytest.raises(TaskRevokedError):
            await asyncio.wait_for(waiting, 2)

    asyncio.run(main())


def test_a_long_chain_before_a_group(app: Celery) -> None:
    before = None
    for task_id in page_ids(3000):
        before = app.AsyncResult(task_id, parent=before)
    held = group_of(app, 2)
    held.parent = before
    body = app.AsyncResult(*page_ids(1), parent=held)
    fastres.cancel(body)
    with pytest.raises(TaskRevokedError):
        body.get(timeout=2, follow_parents=False)


def test_a_chord_that_has_ended_is_not_changed(app: Celery) -> None:
    sent = chord(adds(10))(tsum.s())
    assert app.AsyncResult(sent.id).get(timeout=SECONDS) == 90
    fastres.cancel(sent)
    assert not any(shard.open and shard.open.count for shard in app.backend.asker.status(SECONDS))
    assert app.AsyncResult(sent.id).get(timeout=SECONDS) == 90


# -- without a worker


def test_every_wait_and_look_sees_the_cancellation(make_app: MakeApp, broker: Broker) -> None:
    app, other = make_app(), make_app()
    held = group_of(app, 500)
    for index in range(5):
        store_member(app, held, index, index)
    raised: list[float] = []

    def wait() -> None:
        raises_revoked(other.GroupResult(held.id, [other.AsyncResult(each.id) for each in held]))
        raised.append(time.monotonic())

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    start = time.monotonic()
    fastres.cancel(held)
    for thread in threads:
        thread.join(5)
    assert len(raised) == 2
    assert max(raised) - start < 2
    late = make_app()
    metas = late.backend.many_at_once([held[0].id, held[9].id])
    with metas:
        assert late.AsyncResult(held[9].id).state == "REVOKED"
    assert late.AsyncResult(held[8].id).state == "REVOKED"
    assert isinstance(late.AsyncResult(held[7].id).result, TaskRevokedError)
    with pytest.raises(TaskRevokedError):
        late.AsyncResult(held[6].id).get(timeout=2)
    # Earlier results were taken by the join, as without a cancellation.
    broker.channel().queue_delete(queue_of(held.id))


def test_only_the_members_of_a_small_group(make_app: MakeApp) -> None:
    app = make_app()
    ids = page_ids(6)
    first = app.GroupResult(ids[0], [app.AsyncResult(each) for each in ids[1:4]])
    fastres.cancel(first)
    states = [make_app().AsyncResult(each).state for each in ids[1:]]
    assert states == ["REVOKED"] * 3 + ["PENDING"] * 2
    with pytest.raises(fastres.ResultsMissing):
        app.AsyncResult(ids[4]).get(timeout=0.3)


def test_ids_that_the_user_chose(make_app: MakeApp, broker: Broker) -> None:
    app = make_app()
    names = [f"my-task-{number}-{time.time()}" for number in range(3)]
    held = app.GroupResult("my-group", [app.AsyncResult(name) for name in names])
    store(app, names[2], "why it failed", "FAILURE")
    fastres.cancel(held)
    assert [make_app().AsyncResult(name).state for name in names] == ["REVOKED", "REVOKED", "FAILURE"]
    for each in held:
        each.forget()


@pytest.mark.timing
def test_many_thousands_that_were_sent_in_bulk(make_app: MakeApp) -> None:
    app = make_app()
    queue = f"nobody-{time.time()}"
    with app.connection_for_write() as connection:
        sent = fastres.apply_many(add.s(), ((n, n) for n in range(20_000)), app=app, queue=queue)
        start = time.monotonic()
        fastres.cancel(sent)
        cancelled = time.monotonic()
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=SECONDS)
        assert cancelled - start < 2
        assert time.monotonic() - cancelled < 5
        connection.default_channel.queue_delete(queue)


def test_results_that_cannot_be_cancelled(make_app: MakeApp, node: Node) -> None:
    app = make_app()
    for wrong in (app.AsyncResult("one"), "an id", None, app.ResultSet([app.AsyncResult("one")])):
        with pytest.raises(TypeError, match=r"takes a GroupResult.*revoke"):
            fastres.cancel(wrong)
    mailbox = make_app(backend="fastres-rpc://")
    with pytest.raises(ImproperlyConfigured, match="needs result_backend fastres://"):
        fastres.cancel(mailbox.GroupResult("g", [mailbox.AsyncResult("one")]))
