"""Joiners end and connections are cut while errbacks run: each is called at least once, and delays no chord."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import Broker, until
from celery import Celery, uuid
from celery.app.task import Context
from celery.exceptions import ChordError
from chord_kit import Unrun, begun, finish, results_of, wait_for_joiners
from proj import OutOfStockError, noted_errback
from proxy import Proxy
from rabbitmq_node import Node
from workers import JoinerProcess, client, start_python

from fastres.chords.joiner import NOTIFIERS

LONG = 60


@pytest.fixture
def options() -> dict[str, Any]:
    return {"namespace": uuid(), "keep_chord_results": False}


@pytest.fixture
def app(node: Node, options: dict[str, Any]) -> Iterator[Celery]:
    with client(node.url, result_backend_transport_options=options) as app:
        yield app


@pytest.fixture
def unrun(app: Celery, broker: Broker) -> Unrun:
    return Unrun(app, broker)


@contextlib.contextmanager
def joining(
    app: Celery, node: Node, options: dict[str, Any], url: str | None = None, beside: int = 0
) -> Iterator[JoinerProcess]:
    """A joiner that consumes, or is the standby of another."""
    with JoinerProcess(url or node.url, result_backend_transport_options=options) as joiner:
        wait_for_joiners(app, node, beside + 1)
        yield joiner


def failing(unrun: Unrun, folder: Path) -> Context:
    """The request of the only task of a chord, which will fail."""
    (request,) = unrun.begin(1, "never", link_error=[noted_errback.s(folder=str(folder))])
    return request


def fail(app: Celery, request: Context) -> str:
    """Fail the task of a header. Returns: the id of its body."""
    app.backend.mark_as_failure(request.id, OutOfStockError("apples", 4), request=request)
    return str(request.chord.id)


def told(folder: Path) -> list[str]:
    """The ids of the bodies whose errbacks were called, one for each call."""
    path = folder / "noted"
    return path.read_text().split() if path.exists() else []


def has_failed(app: Celery, unrun: Unrun, body: str) -> None:
    with pytest.raises(ChordError, match="apples"):
        app.AsyncResult(body).get(timeout=LONG)
    until(lambda: (status := app.backend.asker.status(LONG)[0].open) is not None and not status.count)
    assert unrun.called() == []


#: Ends just before it commits that a chord's errbacks were called.
DIES = """
    import os, signal
    from fastres.chords.shard import Shard

    Shard._commit_bodies = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    app.backend.joiner.run()
"""


def test_a_joiner_is_killed_after_an_errback(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "gate").touch()
    body = fail(app, failing(unrun, tmp_path))
    process = start_python(DIES, app)
    try:
        _, err = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, err
    assert told(tmp_path) == [body]
    with joining(app, node, options):
        until(lambda: told(tmp_path) == [body] * 2, so="another joiner has told it")
        has_failed(app, unrun, body)


def test_a_joiner_is_killed_during_an_errback(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    with joining(app, node, options) as killed, joining(app, node, options, beside=1):
        body = fail(app, failing(unrun, tmp_path))
        until(lambda: told(tmp_path) == [body])
        assert not app.AsyncResult(body).ready()
        killed.kill()
        until(lambda: told(tmp_path) == [body] * 2, so="the other joiner tells it")
        (tmp_path / "gate").touch()
        has_failed(app, unrun, body)


def test_a_joiner_loses_its_shard_during_an_errback(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    with (
        Proxy(node.port) as proxy,
        joining(app, node, options, proxy.url) as cut,
        joining(app, node, options, beside=1),
    ):
        body = fail(app, failing(unrun, tmp_path))
        until(lambda: told(tmp_path) == [body])
        proxy.cut()
        until(lambda: told(tmp_path) == [body] * 2, so="the other joiner tells it")
        (tmp_path / "gate").touch()
        has_failed(app, unrun, body)
        wait_for_joiners(app, node, 2)
        assert "starts again" not in cut.log()


def test_a_joiner_reconnects_during_an_errback(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    """It remembers the errbacks that are running."""
    with Proxy(node.port) as proxy, joining(app, node, options, proxy.url) as cut:
        body = fail(app, failing(unrun, tmp_path))
        until(lambda: told(tmp_path) == [body])
        proxy.cut()
        until(lambda: "lost the broker" in cut.log())
        # When it answers, it has read the shard.
        until(lambda: (status := app.backend.asker.status(LONG)[0].open) is not None and status.count == 1)
        (tmp_path / "gate").touch()
        has_failed(app, unrun, body)
        assert told(tmp_path) == [body]


def test_a_chord_is_sent_again_after_another_joiner_called_its_errbacks(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    """As by a task that runs again, and succeeds this time: the errbacks were of the first run."""
    with Proxy(node.port) as proxy, joining(app, node, options, proxy.url):
        with joining(app, node, options, beside=1) as other:
            request = failing(unrun, tmp_path)
            body = fail(app, request)
            until(lambda: told(tmp_path) == [body])
            proxy.cut()
            until(lambda: told(tmp_path) == [body] * 2)
            (tmp_path / "gate").touch()
            has_failed(app, unrun, body)
            wait_for_joiners(app, node, 2)
            other.kill()
        app.backend.apply_chord((request.group, [app.AsyncResult(request.id)]), request.chord)
        app.backend.set_chord_size(request.group, 1)
        finish(unrun, [request])
        assert unrun.wait(1) == [("never", [0])]


def test_slow_errbacks_do_not_delay_chords(
    app: Celery, unrun: Unrun, node: Node, options: dict[str, Any], tmp_path: Path
) -> None:
    with joining(app, node, options):
        bodies = [fail(app, failing(unrun, tmp_path)) for _ in range(NOTIFIERS + 5)]
        until(lambda: len(told(tmp_path)) == NOTIFIERS)
        sizes = [3] * 10
        finish(unrun, begun(unrun, sizes))
        assert sorted(unrun.wait(len(sizes))) == results_of(sizes)
        assert len(told(tmp_path)) == NOTIFIERS, "no more at a time"
        (tmp_path / "gate").touch()
        for body in bodies:
            has_failed(app, unrun, body)
        assert Counter(told(tmp_path)) == Counter(bodies), "each was told once"
