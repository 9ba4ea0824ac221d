"""The progress of groups and chords: in code, on the command line, with a bar."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import group_of, store_group, until
from celery import Celery, chord, group, uuid
from proj import OutOfStockError, add, fail, gated, shown, tsum
from rabbitmq_node import Node
from workers import TESTS, Worker, adds, environment

import fastres

SECONDS = 20


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    with Worker(
        node.url, pool="threads", concurrency=4, result_backend_transport_options={"namespace": uuid()}
    ) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def command(worker: Worker, *arguments: str) -> Any:
    return {
        "args": [sys.executable, "-m", "celery", "-A", "proj", "fastres", *arguments],
        "env": {**os.environ, **environment(worker.broker, worker.backend, **worker.conf)},
        "cwd": TESTS,
    }


def test_chords(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    header = [*adds(6), fail.s("apples", 4), gated.s(str(gate), 1)]
    result = chord(header)(fastres.settle(shown.s()))
    until(lambda: fastres.progress(result).ready == 7, SECONDS)
    found = fastres.progress(result)
    assert found == fastres.Progress(7, 8, 6, 1, 0, is_open=True)
    assert fastres.progress(result.parent.id, app=app) == found
    # A second call counts the parts that have arrived since.
    assert fastres.progress(result) == found
    gate.touch()
    result.get(timeout=SECONDS, follow_parents=False)
    assert fastres.progress(result) == fastres.Progress(8, 8)


def test_groups(app: Celery) -> None:
    held = group_of(app, 10)
    assert fastres.progress(held) == fastres.Progress(0, 10)
    store_group(app, held, range(4))
    assert fastres.progress(held) == fastres.Progress(4, 10)
    assert fastres.progress(held.id, app=app) == fastres.Progress(4, None)
    assert fastres.progress(uuid(), app=app) == fastres.Progress(0, None)
    lone = add.delay(1, 1)
    lone.get(timeout=SECONDS)
    assert fastres.progress(lone) == fastres.Progress(1, 1, 1, 0, 0)


def test_track(app: Celery) -> None:
    sent = group(adds(30)).apply_async()
    assert sorted(fastres.track(sent, timeout=SECONDS, label="adding")) == [2 * number for number in range(30)]
    failing = [add.s(1, 1), fail.s("apples", 4)]
    with pytest.raises(OutOfStockError):
        list(fastres.track(group(failing).apply_async(), timeout=SECONDS))
    values = list(fastres.track(group(failing).apply_async(), timeout=SECONDS, propagate=False))
    assert sorted(type(value).__name__ for value in values) == ["OutOfStockError", "int"]
    assert list(fastres.track(app.GroupResult(uuid(), []))) == []
    with pytest.raises(fastres.ResultsMissing):
        list(fastres.track(group_of(app), timeout=0.3))


def test_watch_a_chord(app: Celery, worker: Worker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = chord([*adds(5), fail.s("apples", 4), gated.s(str(gate), 1)])(tsum.s())
    until(lambda: fastres.progress(result).ready == 6, SECONDS)
    how = command(worker, "watch", result.parent.id, "--json", "--interval", "0.1")
    with subprocess.Popen(**how, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert {key: first[key] for key in ("id", "ready", "total", "failed", "complete")} == {
            "id": result.parent.id, "ready": 6, "total": 7, "failed": 1, "complete": False,
        }  # fmt: skip
        gate.touch()
        *_, last = map(json.loads, process.stdout)
    assert process.returncode == 0
    assert (last["ready"], last["total"], last["complete"]) == (7, 7, True)


def test_watch_a_group_on_a_terminal(app: Celery, worker: Worker) -> None:
    held = group_of(app, 10)
    store_group(app, held, range(10))
    main, end = pty.openpty()
    how = command(worker, "watch", held.id, "--total", "10")
    with subprocess.Popen(**how, stdout=end, stderr=end) as process:
        os.close(end)
        shown = b""
        while True:
            try:
                shown += os.read(main, 1024)
            except OSError:
                break
    os.close(main)
    assert process.returncode == 0
    assert "[##############################] 10 of 10 (100%), complete" in shown.decode()


def test_errors_of_watch_are_one_line(worker: Worker) -> None:
    how = command(worker, "watch", "x", "--interval", "0")
    assert subprocess.run(**how, capture_output=True, timeout=SECONDS).returncode == 2
    how = command(worker, "watch", "x")
    how["env"].update(environment("amqp://guest:guest@127.0.0.1:1//", **worker.conf))
    ran = subprocess.run(**how, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(("Error: cannot reach", "Error: cannot write to"))
    assert "Traceback" not in ran.stderr
