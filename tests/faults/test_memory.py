"""The joiner of a group holds a bounded part of it: what it needs grows with the ids, not with the results."""

from __future__ import annotations

import json
import os
import resource
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import amqp
import pytest
from celery import Celery
from celery.app.task import Context
from rabbitmq_node import Node
from workers import client

#: Bytes that a join may need per result that it waits for, besides the id: to know that it waits for it.
PER_ID = 250
#: As large as a small result becomes: held, 16,000 of them would be 30 MB.
VALUE = "x" * 1000


@pytest.fixture
def app(node: Node) -> Iterator[Celery]:
    with client(node.url) as app:
        yield app


def write(app: Celery, node: Node, count: int) -> tuple[str, list[str]]:
    """A group's results, as the workers' backend writes them, but faster."""
    group_id, task_ids = str(uuid4()), [str(uuid4()) for _ in range(count)]
    request = Context(id=task_ids[0], correlation_id=task_ids[0], group=group_id, group_index=0, children=[])
    app.backend.store_result(task_ids[0], VALUE, "SUCCESS", request=request)
    meta = {"status": "SUCCESS", "result": VALUE, "traceback": None, "children": [], "group_id": group_id}
    with amqp.Connection(f"127.0.0.1:{node.port}") as connection:
        channel = connection.channel()
        for task_id in task_ids[1:]:
            message = amqp.Message(
                json.dumps({**meta, "task_id": task_id}),
                content_type="application/json",
                content_encoding="utf-8",
                correlation_id=task_id,
            )
            channel.basic_publish(message, routing_key=f"fastres.group.{group_id}")
        channel.close()
    return group_id, task_ids


def know(app: Celery, group_id: str, task_ids: list[str]) -> None:
    """As after sending the group."""
    app.backend._know(app.GroupResult(group_id, [app.AsyncResult(task_id) for task_id in task_ids]))


def peak(app: Celery, node: Node, count: int, **how: Any) -> int:
    """How many bytes more than before a join has held at most."""
    group_id, task_ids = write(app, node, count)
    know(app, group_id, task_ids)
    tracemalloc.start()
    try:
        assert sum(1 for _ in app.backend.get_many(task_ids, timeout=100, **how)) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("no_ack", [True, False])
def test_a_join_holds_a_bounded_part_of_a_group(app: Celery, node: Node, no_ack: bool) -> None:
    few, many = (4_000, 20_000) if no_ack else (2_000, 8_000)
    peak(app, node, 100, no_ack=no_ack)
    grown = peak(app, node, many, no_ack=no_ack) - peak(app, node, few, no_ack=no_ack)
    if no_ack:
        assert grown < (many - few) * PER_ID
    else:
        # What is not taken stays unacknowledged: its delivery tag is remembered too.
        assert grown < (many - few) * 2 * PER_ID


def test_a_join_that_is_left_early_holds_nothing(app: Celery, node: Node) -> None:
    group_id, task_ids = write(app, node, 8_000)
    know(app, group_id, task_ids)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pairs = app.backend.get_many(task_ids, timeout=60)
        for _ in range(10):
            next(pairs)
        pairs.close()
        del pairs
        assert tracemalloc.get_traced_memory()[0] - before < 2_000_000
    finally:
        tracemalloc.stop()
    rest = app.backend.get_many(task_ids[10:], timeout=20, no_ack=False)
    assert sum(1 for _ in rest) >= 7_990 - 1


@pytest.mark.skipif(not os.environ.get("FASTRES_MILLION"), reason="takes minutes: FASTRES_MILLION=1 asks for it")
@pytest.mark.timeout(3600)
def test_a_million(app: Celery, node: Node) -> None:
    count = 1_000_000
    group_id, task_ids = write(app, node, count)
    know(app, group_id, task_ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    assert sum(1 for _ in app.backend.get_many(task_ids, timeout=3000)) == count
    seconds = time.monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"{count / seconds:.0f} results/s, {grown / 1e6:.0f} MB")
    assert grown < count * PER_ID
