"""Policies that operators set for all queues: their effects on results and chords, as in docs/brokers.md."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import ENOUGH, Broker, MakeApp, group_of, held_by, store_group, store_member, until
from celery import chord, uuid
from celery.exceptions import TimeoutError
from chord_kit import Unrun, finish
from proj import gated, tsum
from rabbitmq_node import Node
from workers import Worker

import fastres

SetPolicy = Callable[..., None]


@pytest.fixture
def policy(own_node: Node) -> Iterator[SetPolicy]:
    """Sets a policy for all queues of fastres, until the end of the test."""

    def set_policy(**definition: Any) -> None:
        definition = {key.replace("_", "-"): value for key, value in definition.items()}
        own_node.ctl("set_policy", "all", "^fastres", json.dumps(definition), "--apply-to", "queues")

    yield set_policy
    own_node.ctl("clear_policy", "all")


@pytest.fixture(params=["classic", "quorum"])
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"queue_type": request.param, "namespace": f"fastres-{request.param}"}


def test_results_that_expire_by_policy(
    own_node: Node, make_app: MakeApp, policy: SetPolicy, options: dict[str, str]
) -> None:
    policy(message_ttl=300)
    app = make_app(own_node.url, result_backend_transport_options=options)
    held = group_of(app, 3)
    store_group(app, held)
    time.sleep(1)
    with pytest.raises(fastres.ResultsMissing, match=r"3 results are missing.*has nothing more"):
        held.get(timeout=1)


def test_the_oldest_results_are_dropped(
    own_node: Node, make_app: MakeApp, policy: SetPolicy, options: dict[str, str]
) -> None:
    policy(max_length=2)
    app = make_app(own_node.url, result_backend_transport_options=options)
    held = group_of(app, 5)
    store_group(app, held)
    with pytest.raises(fastres.ResultsMissing, match="results are missing"):
        held.get(timeout=1)


def test_a_full_queue_refuses_results(
    own_node: Node, make_app: MakeApp, policy: SetPolicy, options: dict[str, str]
) -> None:
    """Storing raises, stored results stay, and after they are taken there is room again."""
    policy(max_length=2, overflow="reject-publish")
    app = make_app(own_node.url, result_backend_transport_options=options)
    held = group_of(app, 30)
    stored = []

    def fill() -> None:
        for number in range(30):
            store_member(app, held, number, number)
            stored.append(number)

    with pytest.raises(fastres.MessageRefused, match=f"refused.*{held.id[:8]}.*reject-publish"):
        fill()
    # A quorum queue applies its limit a little late.
    assert len(stored) >= 2
    ids = [held.results[number].id for number in stored]
    assert len(dict(app.backend.get_many(ids, timeout=ENOUGH))) == len(stored)
    again = group_of(app, 2)
    store_group(app, again)
    assert again.get(timeout=ENOUGH) == [0, 1]


def test_queues_expire_by_policy(
    own_node: Node, make_app: MakeApp, policy: SetPolicy, options: dict[str, str]
) -> None:
    policy(expires=500)
    app = make_app(own_node.url, result_backend_transport_options=options)
    held = group_of(app, 3)
    store_group(app, held)
    assert held_by(app, held).get(timeout=ENOUGH) == [0, 1, 2]
    store_group(app, held)
    # A client's question would count as a use.
    until(lambda: app.backend.addresses.group(held.id).name not in own_node.queues(), 30, 1)
    # The connection that declared it notices when its message is returned.
    store_group(app, held)
    assert held.get(timeout=ENOUGH) == [0, 1, 2]


def test_refused_parts_are_logged_by_the_worker(
    own_node: Node, policy: SetPolicy, options: dict[str, str], tmp_path: Path
) -> None:
    policy(max_length=1, overflow="reject-publish")
    worker = Worker(own_node.url, pool="threads", result_backend_transport_options=options)
    with worker, worker.client():
        header = [gated.s(str(tmp_path / "gate"), number) for number in range(300)]
        try:
            result = chord(header)(tsum.s())
        except fastres.MessageRefused:
            return  # the sender gets the error, for the chord's size
        (tmp_path / "gate").touch()
        until(lambda: "MessageRefused" in worker.log(), ENOUGH)
        with pytest.raises(TimeoutError):
            result.get(timeout=1, follow_parents=False)


def test_dropped_events_of_the_log_leave_chords_open(own_node: Node, make_app: MakeApp, policy: SetPolicy) -> None:
    """Like any lost message: they expire, with a warning."""
    policy(max_length=3)
    options = {"namespace": f"fastres-{uuid()}", "keep_chord_results": False}
    app = make_app(own_node.url, result_backend_transport_options=options)
    broker = Broker(own_node.url)
    unrun = Unrun(app, broker)
    finish(unrun, unrun.begin(6))
    app.backend.joiner.start()
    try:
        until(lambda: (shard := app.backend.asker.status(ENOUGH)[0]).open and shard.open.count == 1)
        assert unrun.called() == []
    finally:
        app.backend.joiner.stop()
    broker.close()
