"""Chords with terms, joined by real workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import Broker, MakeApp, until
from celery import Celery, chain, chord, group, uuid
from celery.exceptions import ChordError, ImproperlyConfigured, TimeoutError
from chord_kit import Unrun, finish
from proj import OutOfStockError, add, broken, echo, fail, gated, noted_errback, shown, tsum
from rabbitmq_node import Node
from workers import JoinerProcess, Worker, adds

import fastres

SECONDS = 20
APPLES, PEARS = "OutOfStockError('apples', 4)", "OutOfStockError('pears', 0)"


@pytest.fixture(scope="module", params=["json", "pickle"])
def worker(request: pytest.FixtureRequest, node: Node) -> Iterator[Worker]:
    serializer = request.param
    with Worker(
        node.url, pool="threads", concurrency=4, task_serializer=serializer, result_serializer=serializer,
        accept_content=["json", "pickle"], result_backend_transport_options={"namespace": serializer},
    ) as worker:  # fmt: skip
        yield worker
        assert "celery.chord_unlock" not in worker.log()


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def value(result: Any) -> Any:
    # Otherwise Celery raises the header's exception.
    return result.get(timeout=SECONDS, follow_parents=False)


def test_values_and_exceptions_in_the_order_of_the_header(app: Celery) -> None:
    header = [add.s(1, 1), fail.s("apples", 4), echo.s("x"), fail.s("pears")]
    assert value(chord(header)(fastres.settle(shown.s()))) == ["2", APPLES, "'x'", PEARS]
    assert value(chord(adds(30))(fastres.settle(tsum.s()))) == sum(2 * n for n in range(30))
    assert value(chord([fail.s("apples", 4)] * 3)(fastres.settle(shown.s()))) == [APPLES] * 3


def test_groups_in_headers_and_bodies(app: Celery) -> None:
    nested = [add.s(1, 1), group(fail.s("apples", 4), echo.s(3)), chain(echo.s(1), add.s(2))]
    # The results of a group are, as without terms, not in a nested list.
    assert sorted(value(chord(nested)(fastres.settle(shown.s())))) == ["2", "3", "3", APPLES]
    both = chord([echo.s(1), fail.s("apples", 4)])(fastres.settle(group(shown.s(), shown.s())))
    assert [value(each) for each in both] == [["1", APPLES]] * 2
    chained = chord([echo.s(1), fail.s("apples", 4)], fastres.settle(shown.s())) | echo.s()
    assert value(chained.apply_async()) == ["1", APPLES]


def test_a_task_that_was_revoked(app: Celery) -> None:
    task_id = uuid()
    app.control.revoke(task_id)
    time.sleep(0.5)
    result = chord([echo.s(1), echo.s(2).set(task_id=task_id)])(fastres.settle(shown.s()))
    assert value(result) == ["1", "TaskRevokedError('revoked')"]


@pytest.mark.parametrize(("tolerate", "failures"), [(1, 1), (0.5, 2), (0, 0)])
def test_so_many_failures_are_tolerated(app: Celery, tolerate: float, failures: int, tmp_path: Any) -> None:
    def send(failing: int) -> Any:
        header = [fail.s("apples", 4)] * failing + [echo.s(1)] * (4 - failing)
        body = fastres.settle(shown.s(), tolerate=tolerate)
        return chord(header)(body.on_error(noted_errback.s(folder=str(tmp_path))))

    assert value(send(failures)) == [APPLES] * failures + ["1"] * (4 - failures)
    (tmp_path / "gate").touch()
    with pytest.raises(
        ChordError, match=rf"{failures + 1} of 4 tasks have failed, {failures} of them may; .*apples"
    ):
        value(send(failures + 1))
    until(lambda: (tmp_path / "noted").exists(), so="the errback was called")


def test_the_first_that_succeed_are_enough(app: Celery, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    header = [gated.s(str(gate), 0), echo.s(1), fail.s("apples", 4), echo.s(3)]
    result = chord(header)(fastres.settle(shown.s(), first=2))
    found = value(result)
    assert [each for each in found if each != APPLES] == ["1", "3"]
    gate.touch()
    # Late parts leave no open chord.
    assert result.parent.get(timeout=SECONDS, propagate=False)[0] == 0
    until(lambda: all(shard.open and not shard.open.count for shard in app.backend.asker.status(5)), SECONDS)


def test_too_few_succeed(app: Celery) -> None:
    result = chord([echo.s(1), fail.s("apples", 4)])(fastres.settle(shown.s(), first=2))
    with pytest.raises(ChordError, match=r"1 of 2 tasks have succeeded, 2 of them are to.*apples"):
        value(result)


def test_the_results_that_have_arrived_by_the_deadline(app: Celery, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    header = [echo.s(1), gated.s(str(gate), 2), fail.s("apples", 4)]
    start = time.monotonic()
    late = chord(header)(fastres.settle(shown.s(), deadline=3))
    in_time = chord(adds(3))(fastres.settle(shown.s(), deadline=60))
    first = chord(header)(fastres.settle(shown.s(), first=3, deadline=3))
    assert value(in_time) == ["0", "2", "4"]
    assert value(late) == value(first) == ["1", APPLES]
    assert time.monotonic() - start > 2.9
    gate.touch()


def test_by_reference(app: Celery) -> None:
    header = [add.s(1, 1), fail.s("apples", 4), echo.s("x").set(task_id=uuid()), echo.s(7)]
    result = chord(header)(fastres.lazy(fastres.settle(shown.s())))
    assert sorted(value(result)) == sorted(["2", APPLES, "'x'", "7"])
    with pytest.raises(ChordError, match="1 of 4 tasks have failed, 0 of them may"):
        value(chord(header)(fastres.settle(fastres.lazy(shown.s()), tolerate=0)))


def test_another_joiner_knows_the_terms(node: Node, broker: Broker, make_app: MakeApp) -> None:
    """They are in the log, also after its messages were merged with the parts."""
    options = {"namespace": uuid(), "keep_chord_results": False}
    app = make_app(result_backend_transport_options=options)
    unrun = Unrun(app, broker)
    body = fastres.settle(unrun.task.s(name="body").set(queue=unrun.bodies), first=1500, deadline=600)
    requests = unrun.begin(2000, body=body)
    finish(unrun, requests[:1200])
    for count in (1499, 1500):
        with JoinerProcess(node.url, result_backend_transport_options=options) as joiner:
            finish(unrun, requests[1200:count] if count < 1500 else requests[1499:1500])
            until(lambda: app.backend.asker.status(5)[0].open is not None, SECONDS, so=joiner.log())
            if count == 1499:
                until(lambda: app.backend.asker.status(5)[0].open.chords[0].parts == 1499, SECONDS)
                assert unrun.called() == []
            else:
                assert unrun.wait(1) == [("body", list(range(1500)))]


@pytest.mark.parametrize(
    "terms",
    [
        {"tolerate": -1},
        {"tolerate": 1.5},
        {"first": 0},
        {"first": 1.5},
        {"deadline": 0},
        {"deadline": float("nan")},
    ],
)
def test_invalid_terms(terms: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(terms))}="):
        fastres.settle(echo.s(), **terms)


def test_where_chords_are_joined_by_chord_unlock() -> None:
    app = Celery(broker="memory://", backend="fastres://", set_as_current=False)
    with pytest.raises(ImproperlyConfigured, match=r"settle.*needs a broker with single active consumers"):
        chord([echo.s(1)], app=app)(fastres.settle(echo.s()))
    app.backend.close()


# -- groups


def sent(app: Celery, *tasks: Any) -> Any:
    return group(*tasks).apply_async()


def test_a_group_is_settled(app: Celery) -> None:
    held = sent(app, echo.s(1), fail.s("apples", 4), echo.s(3))
    assert list(map(repr, fastres.join(held, settle=True, timeout=SECONDS))) == ["1", APPLES, "3"]
    assert fastres.join(sent(app, *adds(100)), timeout=SECONDS) == [2 * n for n in range(100)]
    with pytest.raises(OutOfStockError):
        fastres.join(sent(app, echo.s(1), fail.s("apples", 4)), timeout=SECONDS)
    assert fastres.join(sent(app), settle=True) == []


def test_a_group_that_may_fail_so_often(app: Celery) -> None:
    tasks = [echo.s(1), fail.s("apples", 4), fail.s("pears")]
    for tolerate in (2, 0.7):
        found = fastres.join(sent(app, *tasks), tolerate=tolerate, timeout=SECONDS)
        assert list(map(repr, found)) == ["1", APPLES, PEARS]
    for tolerate in (1, 0.5, 0):
        with pytest.raises(OutOfStockError):
            fastres.join(sent(app, *tasks), tolerate=tolerate, timeout=SECONDS)


def test_the_first_of_a_group(app: Celery, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    held = sent(app, gated.s(str(gate), 0), echo.s(1), fail.s("apples", 4), echo.s(3))
    assert fastres.join(held, first=2, timeout=SECONDS) == [1, 3]
    gate.touch()
    # Results that were not waited for are still in the queue.
    assert held.results[0].get(timeout=SECONDS) == 0
    with pytest.raises(OutOfStockError):
        fastres.join(sent(app, echo.s(1), fail.s("apples", 4)), first=2, timeout=SECONDS)


def test_a_group_until_its_deadline(app: Celery, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    held = sent(app, gated.s(str(gate), 0), echo.s(1))
    assert fastres.join(held, deadline=1) == [1]
    with pytest.raises(fastres.ResultsMissing):
        fastres.join(held, deadline=5, timeout=0.5)
    gate.touch()
    assert fastres.join(held, deadline=SECONDS) == [0, 1]


@pytest.mark.parametrize("terms", [{}, {"tolerate": 0}, {"first": 2}])
def test_a_timeout_error_of_a_task_does_not_end_the_wait(app: Celery, terms: Any) -> None:
    with pytest.raises(TimeoutError, match="theirs"):
        fastres.join(sent(app, echo.s(1), broken.s("celery")), deadline=SECONDS, **terms)


def test_groups_in_a_group(app: Celery) -> None:
    assert sorted(fastres.join(sent(app, echo.s(1), group(echo.s(2), echo.s(3))), timeout=SECONDS)) == [1, 2, 3]


def test_a_group_with_invalid_terms(app: Celery) -> None:
    with pytest.raises(ValueError, match="first=0"):
        fastres.join(sent(app, echo.s(1)), first=0)
