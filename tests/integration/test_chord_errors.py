"""The queues of the errors of chords, and of the results of their parts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from backend_kit import CELERY, ENOUGH, Broker, MakeApp, group_of, held_by, nobodys_task, queue_of, store
from celery import Celery, group, uuid
from celery.exceptions import ChordError


def fail_chord(app: Celery, body: Any, message: str) -> None:
    try:
        raise ChordError(message)
    except ChordError as exc:
        app.backend.chord_error_from_stack(body, exc)


def test_chord_error_of_a_lone_body(app: Celery, broker: Broker) -> None:
    body = nobodys_task(app).s().set(task_id=uuid())
    # The body of a chord carries the group id of its header.
    body.set(group_id=uuid())
    fail_chord(app, body, "part 3")
    assert json.loads(broker.look(app.backend.rkey(body.id)).body)["status"] == "FAILURE"
    with pytest.raises(ChordError, match="part 3"):
        app.AsyncResult(body.id).get(timeout=ENOUGH)


def test_chord_error_of_a_body_in_a_group(app: Celery, other: Celery, broker: Broker) -> None:
    """A group of chords: the errors of their bodies are results of the group's members."""
    task = nobodys_task(app)
    held = group_of(other, 2)
    for index, member in enumerate(held.results):
        body = task.s().set(task_id=member.id, group_id=held.id, group_index=index)
        fail_chord(app, body, f"body {index}")
    assert broker.messages(queue_of(held.id)) == 2
    assert [str(one) for one in held.get(timeout=ENOUGH, propagate=False)] == ["body 0", "body 1"]


@pytest.mark.skipif(CELERY < (5, 6), reason="Celery 5.5 tells nobody of a failed header when the body is a group")
def test_chord_error_of_a_body_that_is_a_group(app: Celery, make_app: MakeApp, broker: Broker) -> None:
    assert app.backend
    task = nobodys_task(app)
    body = group([task.s(), task.s()], app=app)
    frozen = body.freeze()
    fail_chord(app, body, "the header failed")
    # They are in the group's queue, for a client that has the group's result.
    assert broker.messages(queue_of(frozen.id)) == 2
    held = held_by(make_app(), frozen)
    assert [type(one) for one in held.get(timeout=ENOUGH, propagate=False)] == [ChordError, ChordError]


def test_a_chords_part_stays_when_it_is_joined(app: Celery, other: Celery, broker: Broker) -> None:
    """The join reads it, and so may users: ``chord_result.parent.get()``."""
    held = group_of(app, 3)
    body = {"task": "body", "options": {"task_id": uuid()}}
    for index, member in enumerate(held.results):
        store(other, member.id, index, group=held.id, group_index=index, chord=body)
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    assert broker.messages(queue_of(held.id)) == 3
    assert held_by(other, held).get(timeout=ENOUGH) == [0, 1, 2]
