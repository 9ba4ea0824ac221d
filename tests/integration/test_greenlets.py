"""Waits in gevent's and eventlet's greenlets, and workers with these pools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from backend_kit import Broker, group_of, ids_of, page_ids, store, store_group
from celery import Celery, group
from proj import slow
from rabbitmq_node import Node
from workers import Worker, client, python, start_python

SECONDS = 20


@pytest.fixture
def app(node: Node) -> Iterator[Celery]:
    """The application that waits."""
    with client(node.url) as app:
        yield app


@pytest.fixture
def writer(make_app: Callable[..., Celery]) -> Celery:
    """The application that stores the results, like a worker."""
    return make_app(result_backend_transport_options={"confirm": False})


PATCH = {
    "gevent": "import gevent; from gevent import monkey; monkey.patch_all(); from gevent import spawn, sleep",
    "eventlet": "import eventlet; eventlet.monkey_patch(); from eventlet import spawn, sleep",
}
TICKER = """
import time
gaps = []
def tick():
    last = time.monotonic()
    while True:
        sleep(0.01)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
spawn(tick)
"""
JOIN = {"gevent": "get", "eventlet": "wait"}


@pytest.mark.timing
@pytest.mark.parametrize("hub", ["gevent", "eventlet"])
def test_waits_do_not_block_the_hub(app: Celery, writer: Celery, broker: Broker, hub: str) -> None:
    connected, *task_ids = page_ids(51)
    code = f"""
        ids = {task_ids!r}
        waits = [spawn(lambda i=i: app.AsyncResult(i).get(timeout=20)) for i in ids]
        app.AsyncResult({connected!r}).get(timeout=20)
        del gaps[:]
        print("waiting", flush=True)
        assert [wait.{JOIN[hub]}() for wait in waits] == ids
        print(max(gaps), len(gaps))
    """
    process = start_python(code, app, PATCH[hub] + TICKER)
    try:
        broker.wait_for_consumer(*map(app.backend.rkey, task_ids))
        store(writer, connected, 1)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "waiting", process.stderr and process.stderr.read()
        time.sleep(1)  # time for the ticker
        for task_id in task_ids:
            store(writer, task_id, task_id)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    longest, ticks = out.split()
    assert int(ticks) > 30
    assert float(longest) < 0.25, "the ticker stood still"


@pytest.mark.timing
@pytest.mark.parametrize("hub", ["gevent", "eventlet"])
def test_greenlets_join_groups_and_time_out(app: Celery, writer: Celery, hub: str) -> None:
    groups = {}
    for held in (group_of(app, 50) for _ in range(5)):
        store_group(writer, held)
        groups[held.id] = ids_of(held)
    code = f"""
        from celery.result import GroupResult
        from celery.exceptions import TimeoutError
        groups = {groups!r}
        def join(group_id):
            return GroupResult(group_id, [app.AsyncResult(i) for i in groups[group_id]], app=app).get(timeout=20)
        def time_out(seconds):
            start = time.monotonic()
            try:
                app.AsyncResult("nothing-" + str(seconds)).get(timeout=seconds)
            except TimeoutError:
                return time.monotonic() - start - seconds
        late = [spawn(time_out, seconds) for seconds in (0.5, 1.0, 1.5)]
        joins = [spawn(join, group_id) for group_id in groups]
        print(all(greenlet.{JOIN[hub]}() == list(range(50)) for greenlet in joins),
              max(greenlet.{JOIN[hub]}() for greenlet in late), max(gaps))
    """
    all_there, late, longest = python(code, app, before=PATCH[hub] + TICKER).split()
    assert all_there == "True"
    assert float(late) < 0.1 + float(longest)
    assert float(longest) < 1


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_worker_of_greenlets(node: Node, pool: str) -> None:
    with Worker(node.url, pool=pool, concurrency=50) as worker, worker.client():
        start = time.monotonic()
        result = group(slow.s(1.0, number) for number in range(50)).apply_async()
        assert result.get(timeout=SECONDS) == list(range(50))
        assert time.monotonic() - start < 10, "they ran at the same time"
