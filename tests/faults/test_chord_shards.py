"""Shards are shared among joiners that start and end: every chord is joined once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import Broker, on_classic_queues, until
from celery import Celery, uuid
from celery.app.task import Context
from chord_kit import Unrun, begun, finish, results_of
from rabbitmq_node import Node
from workers import client, start_python

LONG = 60
SHARDS = 3
SIZES = [3] * 40


@pytest.fixture
def app(node: Node) -> Iterator[Celery]:
    options = {"namespace": uuid(), "keep_chord_results": False, "chord_shards": SHARDS}
    with client(node.url, result_backend_transport_options=options) as app:
        yield app


@pytest.fixture
def unrun(app: Celery, broker: Broker) -> Unrun:
    return Unrun(app, broker)


#: Shares the shards at short intervals.
JOINER = """
    from fastres.chords import joiner

    joiner.SHARE_INTERVAL = 0.5
    app.backend.joiner.run()
"""


@contextlib.contextmanager
def joining(app: Celery) -> Iterator[Any]:
    """A joiner in another process, which consumes or stands by at each shard."""
    before = joiners(app)
    process = start_python(JOINER, app)
    try:
        until(lambda: joiners(app) == [count + 1 for count in before], LONG)
        yield process
    finally:
        process.kill()
        # pytest shows printed output if a test fails.
        print(*process.communicate())


def readers(app: Celery, node: Node) -> dict[str, str]:
    """The connections that read the shards."""
    rows = node.ctl("list_channels", "--no-table-headers", "pid", "connection").splitlines()
    connections = dict(row.split("\t") for row in rows)
    names = [app.backend.addresses.chords(number).name for number in range(SHARDS)]
    rows = node.ctl("list_consumers", "--no-table-headers", "queue_name", "channel_pid", "active").splitlines()
    consumers = [row.split("\t") for row in rows]
    # A channel may have been closed between the two lists.
    return {
        name: connections.get(channel, "")
        for name, channel, active in consumers
        if name in names and active == "true"
    }


def joiners(app: Celery) -> list[int]:
    """The number of joiners that read a shard or stand by, by shard."""
    return [shard.joiners for shard in app.backend.asker.status(0)]


def open_chords(app: Celery) -> list[int]:
    """The number of open chords, by shard."""
    return [shard.open.count if shard.open else 0 for shard in app.backend.asker.status(LONG)]


def nth(requests: list[Context], index: int) -> list[Context]:
    """The requests of the task at this place of each header."""
    return [request for request in requests if request.group_index == index]


@on_classic_queues("tell a client of the consumer that reads only")
def test_shards_are_shared_out(app: Celery, unrun: Unrun, node: Node) -> None:
    requests = begun(unrun, SIZES)
    with joining(app), contextlib.ExitStack() as stack:
        finish(unrun, nth(requests, 0))
        until(lambda: sum(open_chords(app)) == len(SIZES), LONG)
        assert all(open_chords(app)), "all shards are used"
        leaving, _ = (stack.enter_context(joining(app)) for _ in range(2))
        finish(unrun, nth(requests, 1))
        until(lambda: len(set(readers(app, node).values())) == SHARDS, LONG, so="each joiner reads a shard")
        shared = readers(app, node)
        until(lambda: joiners(app) == [SHARDS] * SHARDS, LONG, so="the others stand by")
        assert sum(open_chords(app)) == len(SIZES)
        assert readers(app, node) == shared, "nobody leaves the only one it has"
        assert unrun.called() == []
        leaving.kill()
        until(lambda: joiners(app) == [SHARDS - 1] * SHARDS, LONG)
        finish(unrun, nth(requests, 2))
        assert sorted(unrun.wait(len(SIZES), LONG)) == results_of(SIZES)
        left = readers(app, node)
        assert (len(left), len(set(left.values()))) == (SHARDS, SHARDS - 1)
        assert open_chords(app) == [0] * SHARDS
        assert unrun.called() == []
