"""Quorum queues: looks, requeues, joins and chords work as with classic queues."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    clear_cache,
    group_of,
    ids_of,
    in_thread,
    member_ids,
    new_ids,
    page_ids,
    queue_of,
    store,
    store_group,
    until,
)
from celery import Celery, chord, group, uuid
from celery.exceptions import ChordError, TimeoutError
from celery.result import GroupResult
from proj import add, echo, fail, progress, slow, tsum
from rabbitmq_node import Node
from workers import Worker, adds, sums

QUORUM = {"queue_type": "quorum"}


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return make_app(result_backend_transport_options=QUORUM)


@pytest.fixture
def other(make_app: MakeApp) -> Celery:
    return make_app(result_backend_transport_options=QUORUM)


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    options = {**QUORUM, "namespace": "quorum"}
    with Worker(node.url, concurrency=3, result_backend_transport_options=options) as worker:
        yield worker


def types(node: Node) -> dict[str, str]:
    """The type of every queue."""
    lines = node.ctl("list_queues", "--no-table-headers", "name", "type").splitlines()
    return {name: kind for name, _, kind in (line.partition("\t") for line in lines)}


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("kind", [page_ids, new_ids], ids=["page", "own"])
def test_a_result_is_there_after_a_thousand_looks(app: Celery, other: Celery, kind: Any) -> None:
    """RabbitMQ 4 drops a message at its 21st delivery, unless the queue's arguments forbid it."""
    (task_id,) = kind(1)
    store(other, task_id, "there")
    for _ in range(1000):
        clear_cache(app.backend, task_id)
        assert app.AsyncResult(task_id).state == "SUCCESS"
    for _ in range(30):
        clear_cache(app.backend, task_id)
        assert app.AsyncResult(task_id).get(timeout=ENOUGH) == "there"


def test_a_group_is_read_and_restored_often(app: Celery, other: Celery) -> None:
    held = group_of(app, 5)
    store_group(other, held)
    held.save()
    for _ in range(30):
        restored = GroupResult.restore(held.id, app=other)
        assert restored is not None
        assert ids_of(restored) == ids_of(held)
        assert dict(other.backend.get_many(ids_of(held), timeout=ENOUGH, no_ack=False)).keys() == set(ids_of(held))
    assert held.get(timeout=ENOUGH) == list(range(5))


def test_a_queue_is_deleted_when_its_results_were_taken(app: Celery, broker: Broker) -> None:
    held = group_of(app, 300)
    store_group(app, held)
    assert held.get(timeout=ENOUGH) == list(range(300))
    until(lambda: broker.state(queue_of(held.id)) is None)
    (task_id,) = new_ids(1)
    store(app, task_id, 1)
    app.AsyncResult(task_id).forget()
    until(lambda: broker.state(app.backend.rkey(task_id)) is None)


def test_several_read_one_queue(app: Celery, other: Celery) -> None:
    """Without exclusive consumers, two joins that begin at once share the results."""
    for _ in range(5):
        held = group_of(app, 20)
        store_group(app, held)
        got: list[Any] = []

        def join(by: Celery, held: GroupResult = held, got: list[Any] = got) -> None:
            # The second join waits for results that the first one takes.
            with contextlib.suppress(TimeoutError):
                for task_id, _ in by.backend.get_many(ids_of(held), timeout=3):
                    got.append(task_id)

        threads = [in_thread(join, by) for by in (app, other)]
        for thread in threads:
            thread.join(ENOUGH)
        assert set(got) == set(ids_of(held))


def test_the_latest_state_is_seen_although_queues_get_out_of_order(app: Celery, other: Celery) -> None:
    ids = [*new_ids(1), *page_ids(1)]
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for task_id in ids:
                other.AsyncResult(task_id)._get_task_meta()

    looking = in_thread(look)
    try:
        for number in range(30):
            for task_id in ids:
                store(app, task_id, {"step": number}, "PROGRESS")
            time.sleep(0.01)
    finally:
        over.set()
        looking.join()
    for task_id in ids:
        clear_cache(other.backend, task_id)
        meta = other.backend.get_task_meta(task_id)
        assert (meta["status"], meta["result"]) == ("PROGRESS", {"step": 29})
        assert set(meta) == {"status", "result", "traceback", "children", "date_done", "task_id"}


def test_with_a_worker(worker: Worker, node: Node) -> None:
    with worker.client() as app:
        assert add.delay(1, 2).get(timeout=ENOUGH) == 3
        assert group(adds(100)).apply_async().get(timeout=ENOUGH) == sums(100)
        result = chord(adds(60))(tsum.s())
        assert result.get(timeout=ENOUGH) == sum(sums(60))
        assert result.parent.get(timeout=ENOUGH) == sums(60)
        assert chord(adds(3))(group(tsum.s(), echo.s())).get(timeout=ENOUGH) == [6, [0, 2, 4]]
        failed = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s())
        with pytest.raises(ChordError):
            failed.get(timeout=ENOUGH, follow_parents=False)
        told: list[int] = []
        steps = progress.delay(4)
        steps.get(timeout=ENOUGH, on_message=lambda meta: told.append(meta["result"]))
        assert steps.state == "SUCCESS"
        names = types(node)
        ours = [name for name in names if name.startswith("quorum.")]
        assert ours
        assert {names[name] for name in ours} == {"quorum"}
        assert app.backend.group_progress(result.parent.id) in (0, 60)


def test_a_wait_begins_while_the_queue_is_created(worker: Worker) -> None:
    """RabbitMQ 4.3 answers requests to a quorum queue that is being created with an internal error."""
    with worker.client():
        for number in range(30):
            results = [slow.apply_async((0.0, number), task_id=uuid()) for _ in range(3)]
            assert [result.get(timeout=ENOUGH) for result in results] == [number] * 3


def test_chords_in_the_log_survive_their_joiners(node: Node, tmp_path: Any) -> None:
    """24 times, which is more than RabbitMQ 4's default delivery limit."""
    from chord_kit import Unrun, finish
    from workers import JoinerProcess, client

    options = {**QUORUM, "namespace": uuid()}
    with client(node.url, result_backend_transport_options=options) as app:
        broker = Broker(node.url)
        unrun = Unrun(app, broker)
        requests = unrun.begin(3)
        finish(unrun, requests[:2])
        for _ in range(24):
            joiner = JoinerProcess(node.url, result_backend_transport_options=options)
            with joiner:
                broker.wait_for_consumer(f"{options['namespace']}.chords.0")
                joiner.kill()
        with JoinerProcess(node.url, result_backend_transport_options=options):
            finish(unrun, requests[2:])
            assert unrun.wait(1) == [("body", [0, 1, 2])]
        broker.close()


@pytest.mark.parametrize("types", [("classic", "quorum"), ("quorum", "classic")], ids="-to-".join)
def test_the_type_is_changed_while_chords_are_open(node: Node, types: tuple[str, str]) -> None:
    from chord_kit import Unrun, finish
    from workers import JoinerProcess, client

    before, after = ({"queue_type": kind, "namespace": "changed" + types[0]} for kind in types)
    with (
        contextlib.closing(Broker(node.url)) as broker,
        client(node.url, result_backend_transport_options=before) as app,
        client(node.url, result_backend_transport_options=after) as changed,
    ):
        unrun = Unrun(app, broker)
        requests = unrun.begin(3)
        finish(unrun, requests[:2])
        with JoinerProcess(node.url, result_backend_transport_options=after):
            finish(Unrun(changed, broker), requests[2:])
            assert unrun.wait(1) == [("body", [0, 1, 2])]


def test_members_one_by_one_while_others_arrive(app: Celery, other: Celery) -> None:
    """Each member is read by itself, as a dashboard does, while others arrive."""
    group_id = uuid()
    ids = member_ids(group_id, 30)
    for number, task_id in enumerate(ids):
        store(other, task_id, number, group=group_id)
        assert app.AsyncResult(ids[number // 2]).state == "SUCCESS"
    assert [app.AsyncResult(task_id).get(timeout=ENOUGH) for task_id in ids[::7]] == list(range(30))[::7]


@pytest.mark.usefixtures("both")
def test_more_results_than_the_broker_sends_ahead_are_read_without_taking(app: Celery, other: Celery) -> None:
    """A quorum queue sends a consumer without prefetch limit 2,000 messages ahead of their acknowledgement."""
    held = group_of(app, 5000)
    store_group(other, held, range(5000))
    for _ in range(2):
        metas = dict(app.backend.get_many(ids_of(held), timeout=ENOUGH, no_ack=False))
        assert [metas[task_id]["result"] for task_id in ids_of(held)] == list(range(5000))


def test_more_results_than_the_largest_prefetch_are_read_without_taking(make_app: MakeApp, broker: Broker) -> None:
    """It takes more consumers: 65,535 is the largest prefetch of AMQP."""
    app = make_app(result_backend_transport_options=QUORUM)
    held = group_of(app, 70_000)
    store_group(make_app(result_backend_transport_options={**QUORUM, "confirm": False}), held, range(70_000))
    until(lambda: broker.messages(queue_of(held.id)) == 70_000, 60)
    assert len(dict(app.backend.get_many(ids_of(held), timeout=60, no_ack=False))) == 70_000


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("size", [131_072, 1_000_000])
def test_large_results(app: Celery, other: Celery, size: int) -> None:
    """They arrive while the session asks for the number of consumers."""
    task_ids = [*page_ids(2), *new_ids(2)]
    for task_id in task_ids:
        store(other, task_id, "x" * size)
    for task_id in task_ids:
        assert app.AsyncResult(task_id).get(timeout=ENOUGH) == "x" * size
