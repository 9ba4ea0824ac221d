"""Any process finds a result by its id: the same scripts on Redis and on fastres, with real workers."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from backend_kit import CELERY, until
from celery import Celery, chord, group, states
from celery.contrib.abortable import AbortableAsyncResult
from celery.exceptions import ChordError, NotRegistered, TaskRevokedError, TimeoutError
from celery.result import AsyncResult, GroupResult
from kombu import Exchange, Queue
from kombu.utils.uuid import uuid
from proj import OutOfStockError, add, dies_afterwards, dies_with_its_worker, echo, fail, gated, slow, tsum
from rabbitmq_node import Node, Redis
from workers import Worker, adds, python, start_python, sums

import fastres

if find_spec("celery_batches"):
    from proj import doubled

SECONDS = 20
#: Tasks that are revoked while they wait.
REVOKED = 1_000

#: Celery's Redis backend runs in this process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=["redis", "fastres"])
def worker(request: pytest.FixtureRequest, node: Node, redis: Redis) -> Iterator[Worker]:
    with Worker(node.url, backend="fastres://" if request.param == "fastres" else redis.url) as worker:
        yield worker
        # Collect what Celery's Redis backend leaves open, so that other modules see no warnings.
        gc.collect()


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app
        if not isinstance(app.backend, fastres.AMQPBackend):
            app.backend.result_consumer.stop()
            app.backend.client.connection_pool.disconnect()


def elsewhere(app: Celery, code: str, *args: Any) -> Any:
    """The output, which is JSON, of a process that has only the arguments."""
    return json.loads(python(f"import json\nargs = json.loads({json.dumps(args)!r})\n{code}", app))


# -- a member, without its group


def test_members_by_their_ids_in_another_process(app: Celery) -> None:
    sent = group(adds(20)).apply_async()
    ids = [member.id for member in sent.results]
    code = "print(json.dumps([AsyncResult(id, app=app).get(timeout=15) for id in args[0]]))"
    assert elsewhere(app, "from celery.result import AsyncResult\n" + code, ids) == sums(20)
    assert sent.get(timeout=SECONDS) == sums(20)


@pytest.mark.parametrize("make", ["chain", "chord header", "chord body", "group in a chain", "nested chord"])
def test_any_part_of_a_canvas_by_its_id(app: Celery, make: str) -> None:
    expected: dict[str, Any] = {}
    if make == "chain":
        sent = group(add.s(1, 1) | add.s(5), add.s(2, 2) | add.s(5)).apply_async()
        for member, value in zip(sent.results, (2, 4)):
            expected[member.id], expected[member.parent.id] = value + 5, value
    elif make in ("chord header", "chord body"):
        sent = chord(adds(4))(tsum.s())
        expected[sent.id] = sum(sums(4))
        expected.update(zip([part.id for part in sent.parent.results], sums(4)))
    elif make == "group in a chain":
        sent = (add.s(1, 1) | group(add.s(1), add.s(2))).apply_async()
        expected[sent.parent.id] = 2
        expected.update(zip([member.id for member in sent.results], (3, 4)))
    else:
        sent = group(chord(adds(2), tsum.s()), add.s(1, 1)).apply_async()
        expected.update(zip([member.id for member in sent.results], (sum(sums(2)), 2)))
    code = "print(json.dumps([app.AsyncResult(id).get(timeout=15) for id in args[0]]))"
    assert elsewhere(app, code, list(expected)) == list(expected.values())


def test_three_processes_poll_a_member(app: Celery, tmp_path: Any) -> None:
    """As several processes of a web application do, none of which has sent the group."""
    gate = tmp_path / "gate"
    sent = group([gated.s(str(gate), 7), add.s(1, 1)]).apply_async()
    code = """
        import json, os, time
        seen, end = [], time.monotonic() + 20
        while (not seen or seen[-1] != "SUCCESS") and time.monotonic() < end:
            state = app.AsyncResult(%r).state
            if not seen or seen[-1] != state:
                seen.append(state)
                open(%r + str(os.getpid()), "w").close()
            time.sleep(0.02)
        for _ in range(20):
            seen.append(app.AsyncResult(%r).state)
        print(json.dumps(seen))
    """
    ours = sent.results[0].id
    pollers = [start_python(code % (ours, str(tmp_path / "looked-"), ours), app) for _ in range(3)]
    until(lambda: len(list(tmp_path.glob("looked-*"))) == 3)
    gate.touch()
    for poller in pollers:
        out, err = poller.communicate(timeout=60)
        assert poller.returncode == 0, err
        seen = json.loads(out)
        assert seen == ["PENDING", *["SUCCESS"] * 21], seen


def test_a_group_result_after_a_fork(app: Celery) -> None:
    sent = group(adds(10)).apply_async()
    until(sent.ready, SECONDS)
    again = GroupResult(sent.id, [app.AsyncResult(member.id) for member in sent.results], app=app)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = [again.ready(), again.completed_count(), again.successful(), again.results[3].get(timeout=5)]
        except BaseException as exc:
            answer = [repr(exc)]
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 65536)) == [True, 10, True, 6]
    os.close(read)
    os.close(write)
    assert again.get(timeout=SECONDS) == sums(10)


# -- storing without a request


def test_members_that_no_worker_has_registered(app: Celery) -> None:
    unknown = app.signature("proj.nobody_has_this")
    with pytest.raises(NotRegistered):
        group([*adds(2), unknown]).apply_async().get(timeout=SECONDS)
    result = chord([add.s(1, 1), unknown.clone()])(tsum.s())
    with pytest.raises((ChordError, NotRegistered)):
        result.get(timeout=SECONDS)
    with pytest.raises(NotRegistered):
        unknown.clone().apply_async().get(timeout=SECONDS)


def test_members_that_are_revoked_while_they_wait(app: Celery, node: Node) -> None:
    before = len(node.queues())
    sent = group([slow.s(2)] * 2 + [slow.s(0) for _ in range(REVOKED)]).apply_async()
    sent.revoke()
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=SECONDS)
    # The group's queue; the reply queue of a pidbox may exist for a moment.
    assert len(node.queues()) <= before + 3


@pytest.mark.skipif(CELERY < (5, 7), reason="this Celery stores that the worker was lost")
def test_a_worker_that_is_lost_after_a_success(app: Celery, worker: Worker, tmp_path: Path) -> None:
    result = dies_afterwards.delay(str(tmp_path / "runs"))
    # The worker looks for the result in its main process.
    until(lambda: f"{result.id}] succeeded before the worker was lost" in worker.log(), SECONDS)
    assert result.get(timeout=SECONDS) == 1
    assert elsewhere(app, "r = app.AsyncResult(args[0]); print(json.dumps([r.state, r.result]))", result.id) == [
        states.SUCCESS, 1,
    ]  # fmt: skip


def test_a_success_that_is_delivered_again(worker: Worker, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    own = Worker(worker.broker, worker.backend, worker_deduplicate_successful_tasks=True)
    with own, own.client():
        result = dies_with_its_worker.delay(str(runs))
        until(lambda: not own.running(), SECONDS)
        own.stop()
        own.start()
        assert group(adds(10)).apply_async().get(timeout=SECONDS) == sums(10)
        until(lambda: "already completed successfully" in own.log(), SECONDS)
        assert result.get(timeout=SECONDS) == 1
        assert runs.read_text() == "ran\n"


@pytest.mark.skipif(
    not find_spec("celery_batches"), reason="celery-batches is not installed: Celery 5.7 is too new"
)
def test_batches(app: Celery) -> None:
    """Requests of batches have no group."""
    assert group(doubled.s(number) for number in range(12)).apply_async().get(timeout=SECONDS) == sums(12)
    results = [doubled.delay(number) for number in range(3)]
    assert [result.get(timeout=SECONDS) for result in results] == sums(3)


def test_results_that_are_stored_by_hand(app: Celery) -> None:
    """A webhook completes a task with its id and without a request."""
    ids = [signature.freeze().id for signature in adds(3)]
    sent = GroupResult(uuid(), [app.AsyncResult(id) for id in ids], app=app)
    app.backend.mark_as_done(ids[0], "done")
    app.backend.store_result(ids[1], "stored", states.SUCCESS)
    elsewhere(app, "app.backend.mark_as_done(args[0], 'webhook'); print(1)", ids[2])
    assert sent.get(timeout=SECONDS) == ["done", "stored", "webhook"]


def test_members_of_a_sent_group_that_are_stored_by_hand(app: Celery) -> None:
    sent = group([echo.s(n).set(queue="nobody-consumes-this") for n in range(3)]).apply_async()
    for number, member in enumerate(sent.results):
        elsewhere(app, "app.backend.mark_as_done(args[0], args[1]); print(1)", member.id, number)
    assert sent.get(timeout=SECONDS) == [0, 1, 2]
    failed = group([echo.s(n).set(queue="nobody-consumes-this") for n in range(2)]).apply_async()
    app.backend.mark_as_failure(failed.results[1].id, KeyError("by hand"))
    with pytest.raises(KeyError, match="by hand"):
        failed.get(timeout=SECONDS)


def test_a_request_without_group_fields(app: Celery) -> None:
    """celery-batches stores results with requests that have little more than an id."""
    from types import SimpleNamespace

    sent = group([echo.s(n).set(queue="nobody-consumes-this") for n in range(3)]).apply_async()
    for number, member in enumerate(sent.results):
        request = SimpleNamespace(
            id=member.id, correlation_id=member.id, chord=None, delivery_info={}, errbacks=None, reply_to=None,
            hostname=None, name="echo", args=[], kwargs={}, ignore_result=False,
        )  # fmt: skip
        app.backend.mark_as_done(member.id, number, request=request)
    assert sent.get(timeout=SECONDS) == [0, 1, 2]


def test_states_of_another_task(app: Celery) -> None:
    """A member reports the progress of its parent."""
    parent = uuid()
    app.backend.store_result(parent, {"done": 1}, "PROGRESS")
    assert elsewhere(app, "r = app.AsyncResult(args[0]); print(json.dumps([r.state, r.info]))", parent) == [
        "PROGRESS", {"done": 1},
    ]  # fmt: skip
    app.backend.store_result(parent, {"done": 2}, "PROGRESS")
    assert app.AsyncResult(parent).info == {"done": 2}


def test_abort_while_somebody_waits(app: Celery) -> None:
    sent = echo.apply_async((1,), queue="nobody-consumes-this")
    waiting = start_python(
        f"""
        try:
            app.AsyncResult({sent.id!r}).get(timeout=2)
        except Exception as exc:
            from celery.exceptions import TimeoutError
            print(isinstance(exc, TimeoutError))
        """,
        app,
    )
    time.sleep(1.0)
    AbortableAsyncResult(sent.id, app=app).abort()
    until(lambda: AbortableAsyncResult(sent.id, app=app).is_aborted(), 3)
    assert AsyncResult(sent.id, app=app).state == "ABORTED"
    assert waiting.communicate(timeout=30)[0].strip() == "True"


# -- groups that are put together by hand


def test_tasks_that_are_sent_into_a_group_one_by_one(app: Celery) -> None:
    group_id = uuid()
    sent = [add.apply_async((n, n), group_id=group_id) for n in range(5)]
    ids = [result.id for result in sent]
    code = """
from celery.result import GroupResult
print(json.dumps(GroupResult(args[0], [app.AsyncResult(id) for id in args[1]], app=app).get(timeout=15)))
"""
    assert elsewhere(app, code, group_id, ids) == sums(5)


def test_a_group_result_of_lone_tasks(app: Celery) -> None:
    sent = [add.delay(n, n) for n in range(60)]
    ids = [result.id for result in sent]
    code = """
from celery.result import GroupResult
print(json.dumps(GroupResult("x", [app.AsyncResult(id) for id in args[0]], app=app).get(timeout=15)))
"""
    assert elsewhere(app, code, ids[:50]) == sums(50)
    assert [result.get(timeout=SECONDS) for result in sent[50:]] == sums(10, 50)


def test_a_chord_of_a_group_of_chains(app: Celery) -> None:
    sent = chord(group(add.s(1, 1) | add.s(1), add.s(2, 2)))(tsum.s())
    assert sent.get(timeout=SECONDS) == 7
    code = "print(json.dumps([app.AsyncResult(id).get(timeout=15) for id in args[0]]))"
    assert elsewhere(app, code, [part.id for part in sent.parent.results]) == [3, 4]


def test_the_exception_of_a_failed_header_is_raised(app: Celery) -> None:
    """A wait for the body reads the results of its parents, which are in the same queue."""
    for size in range(8):
        result = chord([fail.si("apples"), *adds(size)])(tsum.s())
        # With Redis on a busy machine, the body may have failed before the wait looks at its parents.
        with pytest.raises((OutOfStockError, ChordError) if "redis" in app.backend.as_uri() else OutOfStockError):
            result.get(timeout=SECONDS)


def test_a_member_and_its_group_at_the_same_time(app: Celery, tmp_path: Any) -> None:
    """One process waits for a member while another polls the other members."""
    gate = tmp_path / "gate"
    sent = group([gated.s(str(gate), 5), add.s(1, 1), add.s(2, 2)]).apply_async()
    waiting = start_python(f"print(app.AsyncResult({sent.results[0].id!r}).get(timeout=20))", app)
    until(lambda: sent.results[1].state == "SUCCESS", SECONDS)
    until(lambda: sent.completed_count() == 2, SECONDS)
    gate.touch()
    assert waiting.communicate(timeout=30)[0].strip() == "5"
    assert sent.get(timeout=SECONDS) == [5, 2, 4]


# -- the same id again


def test_the_same_id_again_at_once(app: Celery) -> None:
    for number in range(10):
        task_id = f"again-{uuid()}"
        assert add.apply_async((number, 1), task_id=task_id).get(timeout=SECONDS) == number + 1
        for _ in range(3):
            # The first success is kept.
            assert add.apply_async((number, 2), task_id=task_id).get(timeout=SECONDS) == number + 1


def test_a_success_is_not_overwritten(app: Celery) -> None:
    """Celery runs a task again if its worker is lost after it has stored the result."""
    for task_id in (uuid(), add.s(1, 1).freeze().id):
        app.backend.mark_as_done(task_id, "first")
        assert elsewhere(app, "print(json.dumps(app.AsyncResult(args[0]).state))", task_id) == "SUCCESS"
        app.backend.mark_as_failure(task_id, RuntimeError("lost"))
        code = "r = app.AsyncResult(args[0]); print(json.dumps([r.state, r.get(timeout=5)]))"
        assert elsewhere(app, code, task_id) == ["SUCCESS", "first"]


def test_a_failure_is_replaced_by_a_later_result(app: Celery) -> None:
    for task_id in (uuid(), add.s(1, 1).freeze().id):
        app.backend.mark_as_failure(task_id, RuntimeError("first"))
        assert elsewhere(app, "print(json.dumps(app.AsyncResult(args[0]).state))", task_id) == "FAILURE"
        app.backend.mark_as_done(task_id, "second")
        code = "r = app.AsyncResult(args[0]); print(json.dumps([r.state, r.get(timeout=5)]))"
        assert elsewhere(app, code, task_id) == ["SUCCESS", "second"]


# -- any string is an id

ODD = [
    "---", "amq.x", "a\nb", "a\rb", "\0", "\u00fc", "a/b/../c", "job-1-11", "job-11-1", "", "#.*", "x" * 250,
    "celery-task-meta-", " ",
]  # fmt: skip


def test_results_of_odd_ids(app: Celery) -> None:
    prefix = uuid()
    ids = (
        [f"{prefix}{odd}" for odd in ODD]
        + [f"{odd}{prefix}" for odd in ODD if odd.strip()]
        + ["x" * 10_000 + prefix]
    )
    for number, task_id in enumerate(ids):
        app.backend.store_result(task_id, number, states.SUCCESS)
    code = "print(json.dumps([app.AsyncResult(id).get(timeout=5) for id in args[0]]))"
    assert elsewhere(app, code, ids) == list(range(len(ids)))
    code = "print(json.dumps([app.AsyncResult(id).state for id in args[0]]))"
    assert elsewhere(app, code, ids) == ["SUCCESS"] * len(ids)
    for task_id in ids:
        app.AsyncResult(task_id).forget()
    assert elsewhere(app, code, ids) == ["PENDING"] * len(ids)


def test_an_id_that_is_the_name_of_a_queue(app: Celery) -> None:
    """The id may come from a URL; the queue is not of fastres."""
    name = f"orders-{uuid()}"
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(name, durable=True, auto_delete=False, arguments={"x-expires": 60_000})
        app.send_task("proj.add", (1, 1), queue=Queue(name, Exchange(""), routing_key=name, no_declare=True))
        until(lambda: channel.queue_declare(name, passive=True).message_count == 1, SECONDS)
        result = app.AsyncResult(name)
        assert result.state == "PENDING"
        with pytest.raises(TimeoutError):
            result.get(timeout=0.2)
        result.forget()
        # The queue is unchanged, with its arguments and messages.
        declared = channel.queue_declare(name, durable=True, auto_delete=False, arguments={"x-expires": 60_000})
        assert declared.message_count == 1
        channel.queue_delete(name)


def test_groups_of_odd_ids(app: Celery) -> None:
    for odd in ("---", "amq.x", "a\nb", "x" * 245, "\u00fc" * 150, "job-1-11"):
        sent = group(adds(3)).apply_async(task_id=f"{odd}{uuid()}")
        sent.save()
        again = GroupResult.restore(sent.id, app=app)
        assert again is not None
        assert again.get(timeout=SECONDS) == sums(3)
        again.delete()
        assert GroupResult.restore(sent.id, app=app) is None
