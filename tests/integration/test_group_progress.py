"""``group_progress``: the number of results of a group that have arrived."""

from __future__ import annotations

import pytest
import wire
from amqp import spec
from backend_kit import ENOUGH, Broker, group_of, ids_of, on_classic_queues, queue_of, store_group, store_member
from celery import Celery, uuid
from proxy import Proxy
from rabbitmq_node import Node
from workers import client


@pytest.mark.usefixtures("both")
def test_group_progress(app: Celery, other: Celery) -> None:
    held = group_of(app, 5)
    assert app.backend.group_progress(held.id) == 0
    store_member(other, held, 0, None, "STARTED")
    assert app.backend.group_progress(held.id) == 0
    for index in range(5):
        store_member(other, held, index, index)
        assert app.backend.group_progress(held.id) == index + 1
        assert other.backend.group_progress(held.id) == index + 1


@on_classic_queues("are counted several times, as what comes back is counted late")
def test_group_progress_is_one_passive_declare(node: Node, other: Celery) -> None:
    held = group_of(other, 2)
    store_group(other, held)
    with Proxy(node.port) as proxy, client(proxy.url) as app:
        app.backend.group_progress(held.id)
        proxy.asked.clear()
        assert app.backend.group_progress(held.id) == 2
        assert wire.methods(proxy.asked) == [spec.Queue.Declare]
        # Behind the queue's name is the octet of flags, whose lowest bit means passive.
        flags = proxy.asked[proxy.asked.index(queue_of(held.id).encode()) + len(queue_of(held.id))]
        assert flags & 1


def test_group_progress_declares_nothing(app: Celery, broker: Broker) -> None:
    group_id = uuid()
    assert app.backend.group_progress(group_id) == 0
    assert broker.state(queue_of(group_id)) is None


def test_group_progress_during_and_after_a_join(app: Celery, other: Celery) -> None:
    """The number does not decrease: the join counts the results that it has taken."""
    held = group_of(app, 6)
    store_group(other, held)
    ids = ids_of(held)
    told = [app.backend.group_progress(held.id) for _ in app.backend.get_many(ids, timeout=ENOUGH)]
    assert told == [6] * 6
    assert app.backend.group_progress(held.id) == 6


def test_group_progress_after_a_join_that_nobody_watched(app: Celery, other: Celery) -> None:
    held = group_of(app, 4)
    store_group(other, held)
    held.get(timeout=ENOUGH)
    assert app.backend.group_progress(held.id) == 4
