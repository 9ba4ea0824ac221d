"""Workers with other settings, and with a broker that refuses large results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_kit import until
from celery import group
from proj import add, big, gated
from rabbitmq_node import Node
from workers import Worker, adds, sums

import fastres

SECONDS = 15


@pytest.fixture
def tracking(node: Node) -> Iterator[Worker]:
    with Worker(node.url, concurrency=8, task_track_started=True, result_extended=True) as worker:
        yield worker


def test_states_before_the_result_do_not_count_as_progress(tracking: Worker, tmp_path: Path) -> None:
    """With task_track_started, every member sends two messages; progress counts only results."""
    gate = tmp_path / "gate"
    with tracking.client() as app:
        result = group([*adds(10), *(gated.s(str(gate), number) for number in range(3))]).apply_async()
        until(lambda: [member.state for member in result] == ["SUCCESS"] * 10 + ["STARTED"] * 3, SECONDS)
        assert (result.completed_count(), app.backend.group_progress(result.id)) == (10, 10)
        gate.touch()
        until(lambda: app.backend.group_progress(result.id) == 13)
        assert result.get(timeout=SECONDS) == [*sums(10), 0, 1, 2]
        assert app.backend.group_progress(result.id) == 13, "what has come does not go when it is taken"


def test_the_states_of_a_lone_task(tracking: Worker) -> None:
    with tracking.client():
        lone = add.delay(1, 2)
        seen: list[str] = []
        assert lone.get(timeout=SECONDS, on_message=lambda meta: seen.append(meta["status"])) == 3
        assert seen in (["STARTED", "SUCCESS"], ["SUCCESS"]), "the queue keeps the latest state"
        assert (lone.name, lone.args, lone.queue) == ("proj.add", [1, 2], tracking.conf["task_default_queue"])


def test_a_result_over_the_brokers_limit_fails_the_task() -> None:
    limit = {"max_message_size": "200000"}
    with Node(config=limit) as small, Worker(small.url) as worker, worker.client():
        assert add.delay(1, 2).get(timeout=SECONDS) == 3
        connections = small.ctl("list_connections", "--no-table-headers", "pid")
        lone, (member, small_member) = big.delay(300_000), group(big.s(300_000), big.s(10)).apply_async()
        for result in (lone, member):
            with pytest.raises(fastres.ResultTooLarge, match=r"200000 bytes.*max_message_size"):
                result.get(timeout=SECONDS)
            assert result.state == "FAILURE"
        assert small_member.get(timeout=SECONDS) == "x" * 10
        assert add.delay(1, 2).get(timeout=SECONDS) == 3
        after = small.ctl("list_connections", "--no-table-headers", "pid")
        assert set(connections.split()) <= set(after.split()), "no connection was lost"
