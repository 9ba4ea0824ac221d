"""Whole applications: real workers of each pool, with results in a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from backend_kit import queue_of, until
from celery import Celery, chain, chord, group, states
from celery.exceptions import ChordError, TaskRevokedError, TimeoutError
from celery.result import AsyncResult, GroupResult
from proj import (
    OutOfStockError,
    add,
    collect,
    dies_once,
    echo,
    errback,
    fail,
    fail_with_key,
    gated,
    ids,
    launch,
    launch_and_wait,
    progress,
    replaced,
    replaced_by_chain,
    replaced_by_group,
    retried,
    retried_in_vain,
    silent,
    slow,
    stamps,
    tsum,
)
from rabbitmq_node import Node
from workers import Worker, adds, python, sums

SECONDS = 15


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def worker(request: pytest.FixtureRequest, node: Node) -> Iterator[Worker]:
    with Worker(node.url, pool=request.param) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


# -- lone tasks


def test_a_lone_task(app: Celery) -> None:
    result = add.delay(2, 3)
    assert result.get(timeout=SECONDS) == 5
    assert (result.state, result.successful(), result.failed(), result.ready()) == ("SUCCESS", True, False, True)
    assert result.date_done is not None


def test_a_lone_task_is_polled_without_taking_its_result(app: Celery) -> None:
    result = add.delay(2, 3)
    until(result.ready, SECONDS)
    assert result.state == "SUCCESS"
    assert AsyncResult(result.id).result == 5
    assert python(f"print(app.AsyncResult({result.id!r}).get(timeout=10))", app) == "5"


def test_many_lone_tasks_in_any_order(app: Celery) -> None:
    results = [add.delay(number, number) for number in range(50)]
    assert [result.get(timeout=SECONDS) for result in reversed(results)] == sums(50)[::-1]


@pytest.mark.parametrize("value", [None, "text ü", 2**70, 1.5, [1, [2]], {"key": {"deep": [True, None]}}, ""])
def test_values_are_returned_unchanged(app: Celery, value: Any) -> None:
    assert echo.delay(value).get(timeout=SECONDS) == value


def test_a_failure_is_the_same_exception_with_its_traceback(app: Celery) -> None:
    result = fail.delay("apples", left=3)
    with pytest.raises(OutOfStockError) as caught:
        result.get(timeout=SECONDS)
    assert (caught.value.args, caught.value.item, caught.value.left) == (("apples", 3), "apples", 3)
    assert result.state == "FAILURE"
    assert result.failed()
    assert "raise OutOfStockError(item, left)" in result.traceback
    assert isinstance(result.get(propagate=False), OutOfStockError)
    with pytest.raises(KeyError, match="colour"):
        fail_with_key.delay("colour").get(timeout=SECONDS)


def test_errbacks_know_which_task_failed(app: Celery, tmp_path: Path) -> None:
    result = fail.apply_async(("pears", 1), link_error=errback.s(folder=str(tmp_path)))
    with pytest.raises(OutOfStockError):
        result.get(timeout=SECONDS)
    told = tmp_path / "told"
    until(lambda: told.exists() and told.read_text(), SECONDS)
    assert told.read_text() == f"{result.id} OutOfStockError('pears', 1)"


def test_retries(app: Celery) -> None:
    assert retried.delay(3).get(timeout=SECONDS) == 4
    result = retried_in_vain.delay("plums")
    with pytest.raises(OutOfStockError, match="plums"):
        result.get(timeout=SECONDS)


def test_progress_is_passed_to_on_message_and_polled(app: Celery, tmp_path: Path) -> None:
    result = progress.delay(5)
    seen: list[tuple[str, Any]] = []
    assert result.get(timeout=SECONDS, on_message=lambda meta: seen.append((meta["status"], meta["result"]))) == 5
    assert seen[-1] == ("SUCCESS", 5)
    steps = [info["step"] for state, info in seen[:-1] if state == "PROGRESS"]
    assert steps == sorted(set(steps)), "every state once, in order"

    polled = progress.delay(1, pause=1.0)
    until(lambda: polled.state == "PROGRESS", SECONDS)
    assert polled.info == {"step": 0, "of": 1}
    assert polled.get(timeout=SECONDS) == 1


def test_revoked_before_it_starts(app: Celery) -> None:
    result = add.apply_async((1, 1), countdown=1)
    result.revoke()
    with pytest.raises(TaskRevokedError, match="revoked"):
        result.get(timeout=SECONDS)
    assert result.state == "REVOKED"
    assert add.delay(1, 2).get(timeout=SECONDS) == 3


def test_a_revoked_member_ends_the_join_of_its_group(app: Celery) -> None:
    result = group(add.s(1, 1), add.s(2, 2).set(countdown=1), add.s(3, 3)).apply_async()
    result.results[1].revoke()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=SECONDS)
    values = result.get(timeout=SECONDS, propagate=False)
    assert values[::2] == [2, 6]
    assert isinstance(values[1], TaskRevokedError)


def test_ignored_results_leave_nothing_at_the_broker(worker: Worker, app: Celery, node: Node) -> None:
    ignored = [silent.delay(1), add.apply_async((1, 2), ignore_result=True)]
    in_group = group(add.s(1, 1), add.s(2, 2)).apply_async(ignore_result=True)
    assert add.delay(1, 2).get(timeout=SECONDS) == 3
    assert [result.get(timeout=SECONDS) for result in ignored] == [None, None]
    ids = [result.id for result in (*ignored, *in_group)]
    until(lambda: all(f"[{task_id}] succeeded" in worker.log() for task_id in ids), SECONDS)
    queues = node.queues()
    assert queue_of(in_group.id) not in queues
    # The result that was not ignored, on the same page.
    assert sum(queues.get(app.backend.rkey(result.id), 0) for result in ignored[:1]) <= 1
    assert [result.state for result in ignored] == ["PENDING", "PENDING"]


# -- groups


def test_a_group(app: Celery) -> None:
    result = group(adds(20)).apply_async()
    assert result.get(timeout=SECONDS) == sums(20)
    assert result.get(timeout=SECONDS) == sums(20), "and again"
    assert (result.completed_count(), result.ready(), result.successful()) == (20, True, True)


def test_a_group_of_one(app: Celery) -> None:
    assert group([add.s(1, 1)]).apply_async().get(timeout=SECONDS) == [2]


def test_a_group_of_2000(worker: Worker, app: Celery) -> None:
    count = 2000 if worker.pool == "prefork" else 200
    result = group(adds(count)).apply_async()
    assert result.get(timeout=60) == sums(count)


@pytest.mark.parametrize("how", ["join", "join_native", "iterate", "iter_native", "members", "get_leaf"])
def test_ways_to_read_a_group(app: Celery, how: str) -> None:
    result = group(adds(10)).apply_async()
    if how == "join":
        assert result.join(timeout=SECONDS) == sums(10)
    elif how == "join_native":
        assert result.join_native(timeout=SECONDS) == sums(10)
    elif how == "iterate":
        assert [member.get(timeout=SECONDS) for member in result] == sums(10)
    elif how == "iter_native":
        metas = dict(result.iter_native(timeout=SECONDS))
        assert [metas[member.id]["result"] for member in result] == sums(10)
    elif how == "members":
        assert [member.get(timeout=SECONDS) for member in reversed(result.results)] == sums(10)[::-1]
    else:
        assert [leaf[1] for member in result for leaf in member.collect(timeout=SECONDS)] == sums(10)
    assert result.get(timeout=SECONDS) == sums(10), "all are still to be had together"


def test_a_callback_gets_each_member(app: Celery) -> None:
    result = group(adds(10)).apply_async()
    got: dict[str, int] = {}
    result.get(timeout=SECONDS, callback=got.__setitem__)
    assert [got[member.id] for member in result] == sums(10)


def test_a_groups_progress_is_polled(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = group([*adds(5), gated.s(str(gate), "last")]).apply_async()
    until(lambda: result.completed_count() == 5, SECONDS, 0.1)
    assert app.backend.group_progress(result.id) == 5
    assert (result.ready(), result.waiting(), result.successful(), result.failed()) == (False, True, False, False)
    assert [member.state for member in result][:5] == ["SUCCESS"] * 5
    gate.touch()
    until(result.ready, SECONDS, 0.1)
    assert (result.completed_count(), app.backend.group_progress(result.id)) == (6, 6)
    assert result.successful()
    assert result.get(timeout=SECONDS) == [*sums(5), "last"]


def test_a_group_with_a_failure(app: Celery) -> None:
    result = group([*adds(3), fail.s("apples", 1), *adds(3)]).apply_async()
    with pytest.raises(OutOfStockError, match="apples"):
        result.get(timeout=SECONDS)
    values = result.get(timeout=SECONDS, propagate=False)
    assert values[:3] + values[4:] == sums(3) * 2
    assert isinstance(values[3], OutOfStockError)
    assert (result.failed(), result.successful(), result.ready()) == (True, False, True)


def test_a_saved_group_is_read_by_another_process(app: Celery) -> None:
    result = group(adds(10)).apply_async()
    result.save()
    code = f"""
        from celery.result import GroupResult
        restored = GroupResult.restore({result.id!r})
        print(restored.id, restored.get(timeout=20), restored.completed_count())
    """
    assert python(code, app) == f"{result.id} {sums(10)} 10"
    result.delete()
    assert GroupResult.restore(result.id) is None


def test_members_of_a_restored_group_one_by_one(app: Celery) -> None:
    result = group(adds(5)).apply_async()
    result.save()
    restored = GroupResult.restore(result.id)
    assert restored is not None
    assert [member.get(timeout=SECONDS) for member in restored] == sums(5)
    assert result.get(timeout=SECONDS) == sums(5)
    result.delete()


def test_nested_groups(app: Celery) -> None:
    """Celery flattens groups in a group, but not chains that end in groups."""
    flat = group(group(adds(3)), add.s(50, 50), group(adds(2, 3))).apply_async()
    assert sorted(flat.get(timeout=SECONDS)) == [*sums(5), 100]
    nested = group(add.s(1, 1) | group(add.s(1), add.s(2)), add.s(5, 5)).apply_async()
    assert nested.get(timeout=SECONDS) == [[3, 4], 10]
    assert nested.results[0].get(timeout=SECONDS) == [3, 4]


def test_groups_and_chords_in_message_protocol_1(worker: Worker) -> None:
    """Its messages lack a task's index in its group."""
    with worker.client(task_protocol=1) as app:
        assert group(adds(3)).apply_async().get(timeout=SECONDS) == sums(3)
        result = chord(adds(3), tsum.s()).apply_async()
        assert result.get(timeout=SECONDS) == sum(sums(3))
        assert result.parent.get(timeout=SECONDS) == sums(3)
        result = group(adds(3)).apply_async()
        result.save()
        elsewhere = f"""
            from celery.result import GroupResult
            print(GroupResult.restore("{result.id}").get(timeout=20))
        """
        assert python(elsewhere, app) == str(sums(3))


def test_groups_at_the_end_of_chains_in_a_group(app: Celery) -> None:
    """Their members are sent as members of the outer group, which has no own result if it has only one chain."""
    ending = add.s(1, 1) | group(add.s(1), add.s(2))
    for tasks, expected in ([ending], [3, 4]), ([ending, add.s(5, 5)], [[3, 4], 10]):
        assert group(tasks).apply_async().get(timeout=SECONDS) == expected
        result = group(tasks).apply_async()
        result.save()
        elsewhere = f"""
            from celery.result import GroupResult
            print(GroupResult.restore("{result.id}").get(timeout=20))
        """
        assert python(elsewhere, app) == str(expected)


def test_a_group_result_of_group_results(app: Celery) -> None:
    inner = [group(adds(3)).apply_async(), group(adds(2, 3)).apply_async()]
    outer = GroupResult("outer", [inner[0], add.delay(1, 1), inner[1]])
    assert outer.get(timeout=SECONDS) == [sums(3), 2, sums(2, 3)]
    assert [each.get(timeout=SECONDS) for each in inner] == [sums(3), sums(2, 3)]


def test_two_groups_are_read_alternately(app: Celery) -> None:
    first, second = group(adds(10)).apply_async(), group(adds(10, 10)).apply_async()
    values = []
    for one, other in zip(first, second):
        values += [one.get(timeout=SECONDS), other.get(timeout=SECONDS)]
    assert values[::2] == sums(10)
    assert values[1::2] == sums(10, 10)


def test_a_group_and_lone_tasks_in_one_result_set(app: Celery) -> None:
    lone = [add.delay(number, 1) for number in range(3)]
    members = group(adds(3)).apply_async()
    result = app.ResultSet([*lone, *members.results])
    assert result.get(timeout=SECONDS) == [1, 2, 3, *sums(3)]
    assert members.get(timeout=SECONDS) == sums(3)


# -- chains


def test_a_chain(app: Celery) -> None:
    result = chain(add.s(1, 2), add.s(10), add.s(100)).apply_async()
    assert result.get(timeout=SECONDS) == 113
    assert (result.parent.get(timeout=SECONDS), result.parent.parent.get(timeout=SECONDS)) == (13, 3)


def test_a_chain_ends_with_the_failure_of_any_link(app: Celery) -> None:
    result = chain(add.s(1, 2), fail.si("apples", 2), add.s(100)).apply_async()
    with pytest.raises(OutOfStockError, match="apples"):
        result.get(timeout=SECONDS)


def test_a_chain_into_a_group(app: Celery) -> None:
    result = chain(add.s(1, 2), group(add.s(number) for number in range(5))).apply_async()
    assert result.get(timeout=SECONDS) == [3, 4, 5, 6, 7]
    assert result.parent.get(timeout=SECONDS) == 3


def test_a_group_of_chains(app: Celery) -> None:
    result = group(add.s(number, 1) | add.s(10) for number in range(5)).apply_async()
    assert result.get(timeout=SECONDS) == [11, 12, 13, 14, 15]


def test_a_group_into_a_chain(app: Celery) -> None:
    """Celery turns it into a chord."""
    result = chain(group(adds(4)), tsum.s(), add.s(100)).apply_async()
    assert result.get(timeout=SECONDS) == sum(sums(4)) + 100


# -- chords


def test_a_chord(app: Celery) -> None:
    result = chord(adds(10))(tsum.s())
    assert result.get(timeout=SECONDS) == sum(sums(10))
    assert result.parent.get(timeout=SECONDS) == sums(10), "the header's results are kept"


def test_a_chords_header_can_be_read_before_its_body_runs(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = chord([*adds(3), gated.s(str(gate), 1)])(tsum.s())
    assert result.parent.results[0].get(timeout=SECONDS) == 0
    until(lambda: app.backend.group_progress(result.parent.id) == 3, SECONDS)
    gate.touch()
    assert result.parent.get(timeout=SECONDS) == [*sums(3), 1], "joined while chord_unlock polls"
    assert result.get(timeout=SECONDS) == sum(sums(3)) + 1


def test_a_chord_with_a_group_body(app: Celery) -> None:
    result = chord(adds(3))(group(tsum.s(), collect.s("more")))
    assert result.get(timeout=SECONDS) == [sum(sums(3)), [sums(3), "more"]]


def test_a_chord_with_a_chain_body(app: Celery) -> None:
    assert chord(adds(3))(tsum.s() | add.s(100)).get(timeout=SECONDS) == sum(sums(3)) + 100


def test_a_chord_in_a_chord(app: Celery) -> None:
    inner = chord(adds(3), tsum.s())
    assert chord([inner, add.s(10, 10), inner.clone()])(tsum.s()).get(timeout=SECONDS) == 2 * sum(sums(3)) + 20


def test_chords_in_a_group(app: Celery) -> None:
    result = group(chord(adds(3), tsum.s()), add.s(1, 1), chord(adds(2), collect.s("second"))).apply_async()
    assert result.get(timeout=SECONDS) == [sum(sums(3)), 2, [sums(2), "second"]]


def test_a_chord_with_a_nested_group_in_its_header(app: Celery) -> None:
    result = chord([group(adds(2)), add.s(5, 5)])(collect.s())
    assert [sorted(header) for header in result.get(timeout=SECONDS)] == [[0, 2, 10]]


def test_a_failing_header_is_a_chord_error_that_names_the_dependency(app: Celery, tmp_path: Path) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s().on_error(errback.s(folder=str(tmp_path))))
    with pytest.raises(ChordError) as caught:
        result.get(timeout=SECONDS, follow_parents=False)
    failed = result.parent.results[1]
    assert f"Dependency {failed.id} raised OutOfStockError('apples', 4)" in str(caught.value)
    assert result.state == "FAILURE"
    until((tmp_path / "told").exists, SECONDS)
    assert result.parent.get(timeout=SECONDS, propagate=False)[0] == 2


@pytest.mark.skipif(celery.VERSION < (5, 6), reason="Celery 5.5 leaves all but one of them pending")
def test_a_failing_header_fails_every_task_of_a_group_body(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(group(tsum.s(), collect.s()))
    for member in result:
        # Celery 5.7 stores the cause; 5.6 revokes them.
        with pytest.raises((ChordError, OutOfStockError, TaskRevokedError), match=r"apples|revoked"):
            member.get(timeout=SECONDS, follow_parents=False)


def test_waiting_for_a_chord_ends_when_its_header_fails(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s())
    with pytest.raises((ChordError, OutOfStockError)):
        result.get(timeout=SECONDS)


# -- tasks that send tasks


def test_children(app: Celery) -> None:
    result = launch.delay(3)
    group_id = result.get(timeout=SECONDS)
    (child,) = result.children
    assert isinstance(child, GroupResult)
    assert (child.id, child.get(timeout=SECONDS)) == (group_id, sums(3))
    values = [value for _, value in result.collect(timeout=SECONDS)]
    assert values == [group_id, sums(3), *sums(3)]


def test_a_task_that_joins_its_own_group(worker: Worker, app: Celery) -> None:
    if worker.pool == "solo":
        with pytest.raises(TimeoutError, match="2 results are missing"):
            launch_and_wait.delay(2, 0.5).get(timeout=SECONDS)
    else:
        assert launch_and_wait.delay(20, SECONDS).get(timeout=SECONDS) == sums(20)


def test_replace(app: Celery) -> None:
    assert replaced.delay(1, 2).get(timeout=SECONDS) == 3
    assert replaced_by_chain.delay(1).get(timeout=SECONDS) == 12
    assert replaced_by_group.delay(3).get(timeout=SECONDS) == sums(3)
    in_group = group(replaced.s(1, 2), replaced_by_chain.s(1), add.s(1, 1)).apply_async()
    assert in_group.get(timeout=SECONDS) == [3, 12, 2]
    assert chain(replaced.s(1, 2), add.s(10)).apply_async().get(timeout=SECONDS) == 13
    assert chord([replaced.s(1, 2), add.s(1, 1)])(tsum.s()).get(timeout=SECONDS) == 5


def test_ids(app: Celery) -> None:
    result = chain(ids.si(), group(ids.si(), ids.si())).apply_async()
    first, second = result.get(timeout=SECONDS)
    root = result.parent.get(timeout=SECONDS)
    assert (first["group"], second["group"], root["group"]) == (result.id, result.id, None)
    assert {root["id"]} == {member["root"] for member in (root, first, second)}
    assert [first["parent"], second["parent"]] == [root["id"]] * 2


def test_stamping(app: Celery) -> None:
    lone = stamps.si()
    lone.stamp(customer="acme")
    assert lone.apply_async().get(timeout=SECONDS) == {"customer": "acme"}
    whole = group(stamps.si(), stamps.si())
    whole.stamp(customer="acme")
    assert whole.apply_async().get(timeout=SECONDS) == [{"customer": "acme"}] * 2


# -- faults


def test_a_task_executed_twice_counts_once(app: Celery) -> None:
    """The broker delivers a task twice, so its result is in the group's queue twice."""
    result = group(adds(5)).apply_async()
    again = result.results[2]
    add.apply_async((2, 2), task_id=again.id, group_id=result.id, group_index=2)
    until(lambda: app.backend.group_progress(result.id) == 6, SECONDS)
    assert result.get(timeout=SECONDS) == sums(5)
    metas = list(app.backend.get_many([member.id for member in result], timeout=SECONDS))
    assert sorted(task_id for task_id, _ in metas) == sorted(member.id for member in result)


def test_late_acknowledged_tasks_of_a_killed_process(worker: Worker, app: Celery, tmp_path: Path) -> None:
    if worker.pool != "prefork":
        # The other pools have no processes to kill: the task requests to run again.
        for number in range(3):
            (tmp_path / f"ran-{number}").touch()
    result = group(dies_once.s(str(tmp_path), number) for number in range(3)).apply_async()
    assert result.get(timeout=SECONDS) == [0, 1, 2]
    assert result.results[0].state == states.SUCCESS
    assert slow.delay(0, "alive").get(timeout=SECONDS) == "alive"
