"""A join of a group holds a bounded part of it: its memory grows with the ids, not with the results."""

from __future__ import annotations

import itertools
import os
import resource
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import Broker, fill_group, group_of, ids_of
from celery import Celery
from rabbitmq_node import Node
from workers import client

#: Bytes that a join may need for each awaited result, besides the id.
PER_ID = 250
#: Bytes of a decoded result that is held until all in the queue were read.
HELD = 4_000
#: The size of a small decoded result: 16,000 of them would be 30 MB.
VALUE = "x" * 1000


@pytest.fixture
def app(node: Node) -> Iterator[Celery]:
    with client(node.url) as app:
        yield app


def sent(app: Celery, broker: Broker, count: int) -> list[str]:
    """The members of a group that this process has sent, with all results in the queue."""
    held = group_of(app, count)
    fill_group(app, broker, held, itertools.repeat(VALUE))
    return ids_of(held)


def peak(app: Celery, broker: Broker, count: int, **how: Any) -> int:
    """The peak of the memory of a join, in bytes."""
    task_ids = sent(app, broker, count)
    tracemalloc.start()
    try:
        assert sum(1 for _ in app.backend.get_many(task_ids, timeout=100, **how)) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("no_ack", [True, False])
def test_a_join_holds_a_bounded_part_of_a_group(app: Celery, broker: Broker, no_ack: bool) -> None:
    few, many = (4_000, 20_000) if no_ack else (2_000, 8_000)
    peak(app, broker, 100, no_ack=no_ack)
    grown = peak(app, broker, many, no_ack=no_ack) - peak(app, broker, few, no_ack=no_ack)
    if no_ack:
        assert grown < (many - few) * PER_ID
    else:
        # If they are not taken, all results are read and requeued before the first is returned.
        assert grown < (many - few) * HELD


def test_a_join_that_is_left_early_holds_nothing(app: Celery, broker: Broker) -> None:
    task_ids = sent(app, broker, 8_000)
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
def test_a_million(app: Celery, broker: Broker) -> None:
    count = 1_000_000
    task_ids = sent(app, broker, count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    assert sum(1 for _ in app.backend.get_many(task_ids, timeout=3000)) == count
    seconds = time.monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"{count / seconds:.0f} results/s, {grown / 1e6:.0f} MB")
    assert grown < count * PER_ID
