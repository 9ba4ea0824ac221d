"""Chords as in Celery's canvas guide, with real workers of each pool, which join them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import CELERY, until
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from celery.result import GroupResult
from proj import (
    add,
    adding,
    adding_more,
    collect,
    echo,
    fail,
    ids,
    replaced,
    replaced_by_chain,
    replaced_by_chord,
    replaced_by_group,
    retried,
    slow,
    stamps,
    tsum,
)
from rabbitmq_node import Node
from workers import Worker, adds, sums

SECONDS = 15


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def worker(request: pytest.FixtureRequest, node: Node) -> Iterator[Worker]:
    with Worker(
        node.url, pool=request.param, result_backend_transport_options={"namespace": request.param}
    ) as worker:
        yield worker
        assert "celery.chord_unlock" not in worker.log()


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def value(result: Any) -> Any:
    return result.get(timeout=SECONDS)


# -- headers


@pytest.mark.parametrize("count", [2, 10, 200])
def test_results_are_in_the_order_of_the_header(app: Celery, count: int) -> None:
    result = chord(adds(count))(collect.s("more"))
    assert value(result) == [sums(count), "more"]
    assert value(result.parent) == sums(count)


def test_results_are_in_the_order_of_the_header_and_not_of_arrival(app: Celery) -> None:
    header = [slow.s(0.3 - number / 20, number) for number in range(5)]
    assert value(chord(header)(collect.s())) == [[0, 1, 2, 3, 4]]


def test_a_chord_that_is_called_in_other_ways(app: Celery) -> None:
    assert value(chord(adds(3), tsum.s())()) == 6
    assert value(chord(adds(3), tsum.s()).delay()) == 6
    assert value(chord(header=group(adds(3)), body=tsum.s()).apply_async()) == 6
    assert value((group(adds(3)) | tsum.s()).apply_async()) == 6
    assert value(chord([add.s(1), add.s(2)], tsum.s()).apply_async((10,))) == 23, "partial arguments of the header"


@pytest.mark.skipif(CELERY < (5, 7), reason="Celery sends the tasks of the second one with the group of the first")
def test_the_very_same_signature_twice(app: Celery) -> None:
    again = chord(adds(3), collect.s())
    assert [value(result) for result in (again(), again())] == [[sums(3)]] * 2


def test_a_generator_as_header(app: Celery) -> None:
    assert value(chord(add.s(number, number) for number in range(7))(collect.s())) == [sums(7)]
    assert value(chord((add.s(number, number) for number in range(7)), collect.s()).apply_async()) == [sums(7)]
    assert value((group(add.s(number, number) for number in range(7)) | collect.s()).apply_async()) == [sums(7)]


def test_an_empty_header(app: Celery) -> None:
    assert value(chord([])(collect.s())) == [[]]
    assert value(chord(group(), collect.s()).apply_async()) == [[]]
    assert value(chord(iter([]), collect.s()).apply_async()) == [[]]


def test_a_header_of_a_single_task(app: Celery) -> None:
    assert value(chord([add.s(1, 1)])(collect.s())) == [[2]]
    assert value(chord([add.s(1, 1)], collect.s()).apply_async()) == [[2]]
    assert value((group([add.s(1, 1)]) | collect.s()).apply_async()) == [[2]]
    assert value(chord(add.s(1, 1) for _ in range(1))(collect.s())) == [[2]]


def test_chains_in_a_header(app: Celery) -> None:
    header = [add.s(1, 1) | add.s(10), add.s(5, 5), chain(add.s(1, 2), add.s(3), add.s(4))]
    assert value(chord(header)(collect.s())) == [[12, 10, 10]]
    assert value(chord([add.s(1, 1) | add.s(10)])(collect.s())) == [[12]]


def test_groups_in_a_header(app: Celery) -> None:
    """Celery makes one group of groups in a group."""
    assert sorted(value(chord([group(adds(2)), add.s(5, 5)])(collect.s()))[0]) == [0, 2, 10]
    nested = chord([group(group(adds(2)), add.s(4, 4)), group(adds(2))])(collect.s())
    assert sorted(value(nested)[0]) == [0, 0, 2, 2, 8]


def test_results_of_groups_at_the_end_of_chains_in_a_header_are_nested(app: Celery) -> None:
    header = [add.s(1, 1) | group(add.s(1), add.s(2)), add.s(5, 5), group(adds(3)) | tsum.s()]
    assert value(chord(header)(collect.s())) == [[[3, 4], 10, 6]]
    deeper = [
        add.s(1, 1) | group(add.s(1), add.s(2) | group(add.s(100), add.s(200))),
        add.s(1, 1) | group(add.s(1), add.s(2)),
    ]
    assert value(chord(deeper)(collect.s())) == [[[3, [104, 204]], [3, 4]]]


def test_chords_in_a_header(app: Celery) -> None:
    inner = chord(adds(3), tsum.s())
    assert value(chord([inner, add.s(10, 10), inner.clone()])(collect.s())) == [[6, 20, 6]]
    three = chord([chord([inner.clone(), add.s(1, 1)], tsum.s()), add.s(2, 2)])
    assert value(three(collect.s())) == [[8, 4]]
    with_group = chord(adds(2), group(tsum.s(), collect.s()))
    assert value(chord([with_group, add.s(1, 1)])(collect.s())) == [[[2, [[0, 2]]], 2]]


def test_retries_of_header_tasks(app: Celery) -> None:
    assert value(chord([retried.s(2), add.s(1, 1), retried.s(1)])(collect.s())) == [[3, 2, 2]]


def test_results_of_every_kind_in_a_header(app: Celery) -> None:
    values = [None, 'text ü \U0001f600 "quoted"', 2**70, 1.5, [1, [2]], {"key": {"deep": [True, None]}}, "", []]
    assert value(chord(echo.s(one) for one in values)(collect.s())) == [values]


# -- replaced tasks


def test_replace_in_a_header(app: Celery) -> None:
    header = [replaced.s(1, 2), add.s(1, 1), replaced_by_chain.s(1)]
    assert value(chord(header)(collect.s())) == [[3, 2, 12]]


def test_replace_by_a_group_in_a_header(app: Celery) -> None:
    assert value(chord([replaced_by_group.s(3), add.s(5, 5)])(collect.s())) == [[sums(3), 10]]
    two = [replaced_by_group.s(2), replaced_by_group.s(3)]
    assert value(chord(two)(collect.s())) == [[sums(2), sums(3)]]


def test_replace_by_a_chord_in_a_header(app: Celery) -> None:
    assert value(chord([replaced_by_chord.s(3), add.s(5, 5)])(collect.s())) == [[6, 10]]
    assert value(chord([replaced_by_chord.s(3), replaced_by_chord.s(4)])(collect.s())) == [[6, 12]]


def test_replace_in_a_body(app: Celery) -> None:
    assert value(chord(adds(3))(tsum.s() | replaced_by_group.s())) == sums(6)
    assert value(chord(adds(3))(tsum.s() | replaced_by_chord.s())) == sum(sums(6))


def test_add_to_chord(app: Celery) -> None:
    (values,) = value(chord([adding.s(7, 8), add.s(1, 1)])(collect.s()))
    # At the place of the task that added them.
    assert sorted(values[:3], key=str) == [14, 16, "added"]
    assert values[3:] == [2]


def test_added_tasks_add_tasks(app: Celery) -> None:
    (values,) = value(chord([adding_more.s(3), add.s(5, 5)])(collect.s()))
    assert sorted(values) == [0, 1, 2, 3, 10]


# -- bodies


def test_an_immutable_body(app: Celery) -> None:
    assert value(chord(adds(3))(add.si(40, 2))) == 42


def test_a_chain_as_body(app: Celery) -> None:
    assert value(chord(adds(3))(tsum.s() | add.s(100) | add.s(1000))) == 1106
    assert value(chord(adds(3))(chain(tsum.s(), group(add.s(1), add.s(2))))) == [7, 8]


def test_a_group_as_body(app: Celery) -> None:
    result = chord(adds(3))(group(tsum.s(), collect.s("more"), add.si(1, 1)))
    assert isinstance(result, GroupResult)
    assert value(result) == [6, [sums(3), "more"], 2]


def test_a_chord_as_body(app: Celery) -> None:
    body = chord([tsum.s(), collect.s("inner")], collect.s("outer"))
    assert value(chord(adds(3))(body)) == [[6, [sums(3), "inner"]], "outer"]


def test_chained_chords(app: Celery) -> None:
    twice = chain(
        group(adds(3)), tsum.s(), group(add.s(1), add.s(2)), tsum.s(), group(add.s(1), add.s(2)), tsum.s()
    )
    assert value(twice.apply_async()) == 2 * (2 * 6 + 3) + 3
    groups = chain(group(adds(2)), group(collect.s("a"), collect.s("b")), collect.s("c"))
    assert value(groups.apply_async()) == [[[[0, 2], "a"], [[0, 2], "b"]], "c"]


def test_chords_in_chains_and_groups(app: Celery) -> None:
    assert value(chain(add.s(1, 1), chord([add.s(1), add.s(2)], tsum.s()), add.s(10)).apply_async()) == 17
    result = group(chord(adds(3), tsum.s()), add.s(1, 1), chord(adds(2), collect.s("second"))).apply_async()
    assert value(result) == [6, 2, [sums(2), "second"]]


# -- results, ids and progress


def test_parents(app: Celery) -> None:
    result = chain(add.s(1, 1), chord([add.s(1), add.s(2)], tsum.s()), add.s(10)).apply_async()
    assert value(result) == 17
    assert value(result.parent) == 7
    assert value(result.parent.parent) == [3, 4]
    assert value(result.parent.parent.parent) == 2


def test_ids_of_a_chords_tasks(app: Celery) -> None:
    result = chord([ids.si(), ids.si()])(group(ids.si(), ids.si()))
    bodies, parts = value(result), value(result.parent)
    assert [part["id"] for part in parts] == [member.id for member in result.parent]
    assert {part["group"] for part in parts} == {result.parent.id}
    assert {body["parent"] for body in bodies} <= {part["id"] for part in parts}
    assert len({each["root"] for each in bodies}) == 1


def test_a_chords_progress(app: Celery) -> None:
    result = chord(adds(5))(tsum.s())
    assert value(result) == sum(sums(5))
    until(lambda: result.parent.completed_count() == 5, SECONDS)
    assert result.parent.ready()
    until(result.ready, SECONDS)


def test_stamps(app: Celery) -> None:
    canvas = chord([stamps.si(), stamps.si()], collect.s() | echo.s())
    canvas.stamp(customer="acme")
    assert value(canvas.apply_async()) == [[{"customer": "acme"}] * 2]


def test_many_chords_at_once(app: Celery) -> None:
    results = [chord(adds(3, number))(tsum.s()) for number in range(50)]
    assert [value(result) for result in results] == [sum(sums(3, number)) for number in range(50)]


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_worker_of_greenlets(node: Node, pool: str) -> None:
    """Celery's greenlet workers take 0.1 s for a task with any backend, so only a few of the tests above run here."""
    options = {"namespace": pool}
    with (
        Worker(node.url, pool=pool, concurrency=10, result_backend_transport_options=options) as worker,
        worker.client(),
    ):
        assert value(chord(adds(10))(collect.s("more"))) == [sums(10), "more"]
        inner = chord(adds(3), tsum.s())
        assert value(chord([inner, add.s(10, 10), replaced_by_group.s(2)])(collect.s())) == [[6, 20, sums(2)]]
        with pytest.raises(ChordError, match="OutOfStockError"):
            chord([fail.s("apples"), add.s(1, 1)])(tsum.s()).get(timeout=SECONDS, follow_parents=False)
        assert "celery.chord_unlock" not in worker.log()
