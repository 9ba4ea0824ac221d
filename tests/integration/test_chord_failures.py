"""Chords that fail: their errbacks and errors, and that other chords go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import CELERY, until
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from proj import (
    OutOfStockError,
    add,
    chord_errback,
    collect,
    fail,
    gated,
    patient_errback,
    record,
    replaced_by_failure,
    retried_in_vain,
    tsum,
)
from rabbitmq_node import Node
from workers import Worker, adds, sums

SECONDS = 15


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(request: pytest.FixtureRequest, node: Node) -> Iterator[Worker]:
    options = {"namespace": f"failures-{request.param}"}
    with Worker(node.url, pool=request.param, concurrency=4, result_backend_transport_options=options) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def error_of(result: Any) -> ChordError:
    with pytest.raises(ChordError) as caught:
        result.get(timeout=SECONDS, follow_parents=False)
    return caught.value


def told(folder: Path, task_id: str) -> list[str]:
    """The arguments of a task's errback: its id, the error, the error's cause, the traceback."""
    path = folder / f"told-{task_id}"
    until(path.exists, SECONDS, so=f"the errback of {task_id}")
    return path.read_text().split("\n", 3)


# -- headers


def test_a_failed_task_fails_the_chord(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4), add.s(2, 2)])(tsum.s())
    failed = result.parent.results[1]
    assert str(error_of(result)) == f"Dependency {failed.id} raised OutOfStockError('apples', 4)"
    assert result.state == "FAILURE"
    assert "ChordError" in result.traceback
    assert result.parent.results[0].get(timeout=SECONDS) == 2
    with pytest.raises(OutOfStockError):
        failed.get(timeout=SECONDS)


def test_waiting_for_the_body_raises_what_the_task_raised(app: Celery) -> None:
    """As in Celery: a result looks at its parents first."""
    result = chord([fail.s("apples", 4), add.s(2, 2)])(tsum.s())
    with pytest.raises((ChordError, OutOfStockError), match="apples"):
        result.get(timeout=SECONDS)


def test_the_errback_of_the_body_is_told_once(app: Celery, tmp_path: Path) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s().on_error(chord_errback.s(folder=str(tmp_path))))
    message = f"Dependency {result.parent.results[1].id} raised OutOfStockError('apples', 4)"
    task_id, error, cause, _ = told(tmp_path, result.id)
    assert (task_id, error, cause) == (result.id, f"ChordError({message!r})", "OutOfStockError('apples', 4)")
    assert str(error_of(result)) == message
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header")
def test_the_errback_of_a_chord_is_its_bodys(app: Celery, tmp_path: Path) -> None:
    canvas = chord([add.s(1, 1), fail.s("apples", 4)], tsum.s())
    canvas.link_error(chord_errback.s(folder=str(tmp_path)))
    result = canvas.apply_async()
    assert told(tmp_path, result.id)[2] == "OutOfStockError('apples', 4)"
    error_of(result)
    assert len(list(tmp_path.iterdir())) == 1


def test_errbacks_of_the_header(worker: Worker, tmp_path: Path) -> None:
    with worker.client(task_allow_error_cb_on_chord_header=True):
        canvas = chord([add.s(1, 1), fail.s("apples", 4)], tsum.s())
        canvas.link_error(chord_errback.s(folder=str(tmp_path)))
        result = canvas.apply_async()
        failed = result.parent.results[1]
        assert told(tmp_path, failed.id)[1] == "OutOfStockError('apples', 4)"
        assert told(tmp_path, result.id)[2] == "OutOfStockError('apples', 4)"
        error_of(result)
        assert len(list(tmp_path.iterdir())) == 2


def test_an_errback_of_a_task_of_the_header(app: Celery, tmp_path: Path) -> None:
    failing = fail.s("apples", 4).on_error(chord_errback.s(folder=str(tmp_path)))
    result = chord([failing, add.s(1, 1)])(tsum.s())
    assert told(tmp_path, result.parent.results[0].id)[1:3] == ["OutOfStockError('apples', 4)", "None"]
    error_of(result)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_errback_that_takes_a_task_id_is_sent_as_a_task(app: Celery, tmp_path: Path) -> None:
    body = tsum.s().on_error(record.s(folder=str(tmp_path), name="told"))
    result = chord([add.s(1, 1), fail.s("apples", 4)])(body)
    until((tmp_path / "record").exists, SECONDS)
    until(lambda: (tmp_path / "record").read_text() == f'["told", "{result.id}"]\n')


def test_of_several_failures_the_first_in_the_header_is_told(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    header = [add.s(1, 1), gated.s(str(gate), 1) | fail.si("pears", 2), fail.s("apples", 4)]
    result = chord(header)(tsum.s())
    with pytest.raises(OutOfStockError):
        result.parent.results[2].get(timeout=SECONDS)
    gate.touch()
    assert str(error_of(result)).endswith("raised OutOfStockError('pears', 2)")


def test_all_of_a_header_fails(app: Celery, tmp_path: Path) -> None:
    result = chord([fail.s("apples", 4)] * 3)(tsum.s().on_error(chord_errback.s(folder=str(tmp_path))))
    assert str(error_of(result)).startswith(f"Dependency {result.parent.results[0].id} raised")
    told(tmp_path, result.id)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_header_whose_retries_are_in_vain(app: Celery) -> None:
    result = chord([add.s(1, 1), retried_in_vain.s("plums")])(tsum.s())
    assert "raised OutOfStockError('plums', 0)" in str(error_of(result))


def test_a_task_of_a_header_that_was_revoked(app: Celery) -> None:
    result = chord([add.s(1, 1), add.s(2, 2).set(countdown=1)])(tsum.s())
    result.parent.results[1].revoke()
    assert "TaskRevokedError('revoked')" in str(error_of(result))
    with pytest.raises(TaskRevokedError):
        result.parent.results[1].get(timeout=SECONDS)


def test_a_chain_in_a_header_that_fails_early(app: Celery) -> None:
    result = chord([add.s(1, 1), chain(fail.si("apples", 4), add.si(1, 1), add.s(1))])(tsum.s())
    assert "OutOfStockError('apples', 4)" in str(error_of(result))


def test_a_task_that_is_replaced_by_one_that_fails(app: Celery) -> None:
    result = chord([add.s(1, 1), replaced_by_failure.s("apples")])(tsum.s())
    assert "OutOfStockError('apples', 0)" in str(error_of(result))


def test_a_chord_in_a_header_that_fails(app: Celery, tmp_path: Path) -> None:
    """With Celery's Redis backend the outer chord never hears of it."""
    inner = chord([add.s(1, 1), fail.s("apples", 4)], tsum.s())
    result = chord([inner, add.s(2, 2)])(collect.s().on_error(chord_errback.s(folder=str(tmp_path))))
    message = str(error_of(result))
    assert message.startswith("Dependency ")
    assert "ChordError(" in message
    assert "OutOfStockError('apples', 4)" in message
    told(tmp_path, result.id)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_group_in_a_header_that_fails(app: Celery) -> None:
    header = [add.s(1, 1) | group(add.s(1), fail.si("apples", 4)), add.s(5, 5)]
    result = chord(header)(collect.s())
    assert "OutOfStockError('apples', 4)" in str(error_of(result))


# -- bodies


def test_a_body_that_fails_is_a_task_that_fails(app: Celery, tmp_path: Path) -> None:
    result = chord(adds(3))(fail.si("apples", 4).on_error(chord_errback.s(folder=str(tmp_path))))
    with pytest.raises(OutOfStockError):
        result.get(timeout=SECONDS)
    assert told(tmp_path, result.id)[1] == "OutOfStockError('apples', 4)"
    assert result.parent.get(timeout=SECONDS) == sums(3)


def test_a_chain_as_body_of_a_chord_that_fails(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s() | add.s(100) | add.s(1000))
    assert "OutOfStockError('apples', 4)" in str(error_of(result))


@pytest.mark.skipif(CELERY < (5, 6), reason="Celery 5.5 leaves all but one of them pending")
def test_a_group_as_body_of_a_chord_that_fails(app: Celery, tmp_path: Path) -> None:
    body = group(tsum.s(), collect.s())
    body.link_error(chord_errback.s(folder=str(tmp_path)))
    result = chord([add.s(1, 1), fail.s("apples", 4)])(body)
    for member in result:
        # Celery 5.7 tells the cause itself, 5.6 revokes them.
        with pytest.raises((ChordError, OutOfStockError, TaskRevokedError), match=r"apples|revoked"):
            member.get(timeout=SECONDS, follow_parents=False)


def test_what_follows_a_chord_that_fails(app: Celery) -> None:
    chained = chain(group(add.s(1, 1), fail.s("apples", 4)), tsum.s(), group(add.s(1), add.s(2)), tsum.s())
    assert "OutOfStockError('apples', 4)" in str(error_of(chained.apply_async()))


# -- nobody else is held up


def test_an_errback_that_takes_its_time(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow_one = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s().on_error(patient_errback.s(path=str(gate))))
    until((tmp_path / "gate-waiting").exists, SECONDS)
    begin = time.monotonic()
    for _ in range(3):
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6
    assert time.monotonic() - begin < SECONDS / 2
    gate.touch()
    error_of(slow_one)


def test_many_chords_that_fail(app: Celery, tmp_path: Path) -> None:
    errback = chord_errback.s(folder=str(tmp_path))
    failing = [chord([add.s(1, 1), fail.s("apples", n)])(tsum.s().on_error(errback)) for n in range(40)]
    fine = [chord(adds(3))(tsum.s()) for _ in range(5)]
    for number, result in enumerate(failing):
        assert str(error_of(result)).endswith(f"raised OutOfStockError('apples', {number})")
        told(tmp_path, result.id)
    assert [result.get(timeout=SECONDS) for result in fine] == [6] * 5
    assert len(list(tmp_path.iterdir())) == 40


def test_an_errback_that_raises(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(
        tsum.s().on_error(chord_errback.s(folder="/nowhere/at/all"))
    )
    assert "OutOfStockError('apples', 4)" in str(error_of(result))
    assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6


def test_a_body_that_nobody_knows(worker: Worker, app: Celery) -> None:
    unknown = app.signature("no.such.task")
    chord(adds(2))(unknown)
    until(lambda: "Received unregistered task of type 'no.such.task'" in worker.log(), SECONDS)
    assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6
