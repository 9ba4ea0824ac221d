"""``AsyncResult`` on this backend: ``get``, ``then``, and the backend methods that Celery calls for them."""

from __future__ import annotations

from typing import Any

import pytest
from backend_kit import ENOUGH, Broker, store, takes
from celery import Celery, states, uuid
from celery.exceptions import TimeoutError
from celery.result import AsyncResult


def test_then(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    result.then(called.append)
    store(other, result.id, 1)
    assert called == []
    assert result.get(timeout=ENOUGH) == 1
    assert called == [result]


def test_then_after_the_result_was_read(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    store(other, result.id, 1)
    result.get(timeout=ENOUGH)
    result.then(called.append)
    assert called == [result]


def test_then_fires_when_a_poll_sees_the_result(app: Celery, other: Celery) -> None:
    result, called = app.AsyncResult(uuid()), []
    result.then(called.append)
    assert not result.ready()
    store(other, result.id, 1)
    assert result.ready()
    assert called == [result]


def test_then_of_every_result_object_of_a_task(app: Celery, other: Celery) -> None:
    """As in Celery 5: all waiting result objects are notified, whichever of them reads the result."""
    task_id, called = uuid(), []
    first, second = app.AsyncResult(task_id), app.AsyncResult(task_id)
    first.then(called.append)
    second.then(called.append)
    store(other, task_id, 1)
    assert app.AsyncResult(task_id).get(timeout=ENOUGH) == 1
    assert len(called) == 2


def test_add_and_remove_pending_result(app: Celery, other: Celery) -> None:
    result = app.AsyncResult(uuid())
    assert app.backend.add_pending_result(result) is result
    assert app.backend.add_pending_results([result], weak=True) == [result]
    assert app.backend.remove_pending_result(result) is result
    assert app.backend.remove_pending_result(result) is result
    assert app.backend.is_async
    store(other, result.id, 1)
    assert app.backend.wait_for_pending(result, timeout=ENOUGH) == 1


@pytest.mark.usefixtures("both")
def test_get(app: Celery, other: Celery) -> None:
    result, seen, calls = app.AsyncResult(uuid()), [], []
    store(other, result.id, 5, "PROGRESS")

    def on_message(meta: dict[str, Any]) -> None:
        seen.append(meta["status"])
        if len(seen) == 1:
            store(other, result.id, 6)

    assert result.get(timeout=ENOUGH, on_message=on_message, on_interval=lambda: calls.append(1)) == 6
    assert seen == ["PROGRESS", "SUCCESS"]
    assert calls
    assert result.get(timeout=0) == 6


@pytest.mark.timing
def test_get_timeout(app: Celery) -> None:
    app.backend.get_task_meta(uuid())
    with takes(0.3), pytest.raises(TimeoutError):
        app.AsyncResult(uuid()).get(timeout=0.3)


def test_get_callback_and_propagate(app: Celery, other: Celery) -> None:
    good, bad, called = app.AsyncResult(uuid()), app.AsyncResult(uuid()), []
    store(other, good.id, 1)
    store(other, bad.id, ValueError("no"), states.FAILURE)
    assert good.get(timeout=ENOUGH, callback=lambda task_id, value: called.append((task_id, value))) == 1
    assert called == [(good.id, 1)]
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)
    assert isinstance(bad.get(timeout=ENOUGH, propagate=False), ValueError)


def test_get_of_a_failed_parent(app: Celery, other: Celery) -> None:
    """A chain whose first task failed: its last task never ends, but the wait does."""
    parent = app.AsyncResult(uuid())
    last = AsyncResult(uuid(), app=app, parent=parent)
    store(other, parent.id, ValueError("first"), states.FAILURE)
    with pytest.raises(ValueError, match="first"):
        last.get(timeout=ENOUGH)


def test_on_task_call(app: Celery, broker: Broker) -> None:
    """Sending a task declares no queue: its worker does, when it stores a result."""
    task_id = uuid()
    with app.producer_pool.acquire() as producer:
        assert app.backend.on_task_call(producer, task_id) == {}
    assert broker.state(app.backend.rkey(task_id)) is None
