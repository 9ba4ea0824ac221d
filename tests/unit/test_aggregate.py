"""``Aggregate``: which of the awaited ids have arrived, compared with a model, in both implementations."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.result import GroupResult
from celery.states import READY_STATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres import _impl

IDS = st.sampled_from(["a", "b", "c", "d", "e"])
STATUSES = st.sampled_from(["SUCCESS", "FAILURE", "REVOKED", "STARTED", "PROGRESS", "RETRY"])


def arrival(task_id: str, status: str = "SUCCESS", mark: Any = None) -> tuple[Any, str, dict[str, Any]]:
    return mark, task_id, {"task_id": task_id, "status": status, "result": None}


@pytest.fixture
def aggregate_class(impl: dict[str, Any]) -> Any:
    return impl["aggregate"].Aggregate


def test_missing_ids_keep_their_order(aggregate_class: Any) -> None:
    ids = [f"task-{n}" for n in (3, 1, 2, 1, 3)]
    aggregate = aggregate_class(ids, READY_STATES)
    assert aggregate.missing() == ["task-3", "task-1", "task-2"]
    assert len(aggregate) == 3
    aggregate.feed([arrival("task-1")])
    assert aggregate.missing() == ["task-3", "task-2"]


def test_feed_sorts(aggregate_class: Any) -> None:
    aggregate = aggregate_class(iter(["a", "b"]), READY_STATES)
    first, started, again, stranger = arrival("a"), arrival("b", "STARTED"), arrival("a"), arrival("z")
    assert aggregate.feed([started, first, again, stranger]) == ([first], [started], [again], [stranger])
    assert "a" not in aggregate
    assert "b" in aggregate
    assert "z" not in aggregate


def test_a_state_after_the_result_is_repeated(aggregate_class: Any) -> None:
    aggregate = aggregate_class(["a"], READY_STATES)
    late = arrival("a", "STARTED")
    aggregate.feed([arrival("a")])
    assert aggregate.feed([late]) == ([], [], [late], [])


def test_marks_are_returned_unchanged(aggregate_class: Any) -> None:
    mark, given_ = object(), {"task_id": "a", "status": "SUCCESS", "result": 1}
    ready, _, _, _ = aggregate_class(["a"], READY_STATES).feed([(mark, "a", given_)])
    assert ready[0][0] is mark
    assert ready[0][2] is given_


def test_the_caller_chooses_the_ready_states(aggregate_class: Any) -> None:
    aggregate = aggregate_class(["a", "b"], ["STARTED"])
    started, done = arrival("a", "STARTED"), arrival("b")
    assert aggregate.feed([started, done]) == ([started], [done], [], [])
    assert aggregate.missing() == ["b"]


def test_nothing_awaited(aggregate_class: Any) -> None:
    aggregate = aggregate_class([], READY_STATES)
    assert not aggregate
    assert aggregate.missing() == []
    assert aggregate.feed([]) == ([], [], [], [])
    assert aggregate.feed([arrival("a")]) == ([], [], [], [arrival("a")])


@pytest.mark.parametrize("stranger", [None, 7, ("a",), b"a"])
def test_contains_with_other_types_than_str(aggregate_class: Any, stranger: object) -> None:
    assert stranger not in aggregate_class(["a"], READY_STATES)


def test_a_batch_with_a_meta_without_status_is_refused(aggregate_class: Any) -> None:
    with pytest.raises(KeyError, match="status"):
        aggregate_class(["a"], READY_STATES).feed([(None, "a", {})])


def test_a_refused_batch_leaves_the_count_correct(aggregate_class: Any) -> None:
    aggregate = aggregate_class(["a", "b"], READY_STATES)
    with pytest.raises(KeyError):
        aggregate.feed([arrival("a"), (None, "b", {})])
    assert len(aggregate) == len(aggregate.missing())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    awaited=st.lists(IDS),
    batches=st.lists(st.lists(st.builds(arrival, st.sampled_from("abcdez"), STATUSES, st.integers()))),
)
def test_against_a_model(aggregate_class: Any, awaited: list[str], batches: list[list[Any]]) -> None:
    aggregate = aggregate_class(awaited, READY_STATES)
    left = list(dict.fromkeys(awaited))
    for batch in batches:
        expected: tuple[list[Any], ...] = ([], [], [], [])
        for one in batch:
            if one[1] not in awaited:
                expected[3].append(one)
            elif one[1] not in left:
                expected[2].append(one)
            elif one[2]["status"] not in READY_STATES:
                expected[1].append(one)
            else:
                expected[0].append(one)
                left.remove(one[1])
        assert aggregate.feed(batch) == expected
        assert aggregate.missing() == left
        assert len(aggregate) == len(left)
        assert all(task_id in aggregate for task_id in left)


def test_fulfil(impl: dict[str, Any]) -> None:
    with Celery(broker="memory://", backend="fastres://", set_as_current=False) as app:
        results = [app.AsyncResult(task_id) for task_id in "abc"]
        group = GroupResult("g", results, app=app)
        called: list[Any] = []
        results[1].then(called.append)
        metas = [arrival(task_id)[2] for task_id in "abc"]
        metas[2]["children"] = [(("d", None), None)]
        for result, meta in zip(results, metas):
            assert not group.on_ready.ready
            impl["aggregate"].fulfil(result, meta)
            # A repeated result does not notify again.
            impl["aggregate"].fulfil(result, arrival(result.id, "FAILURE")[2])
        assert [result._cache for result in results] == metas
        assert called == [results[1]]
        assert [child.id for child in results[2].children] == ["d"]
        assert group.on_ready.ready


PARTS = (b"1\n22", b"0\n1\n1", b"2\n")


@pytest.mark.parametrize(
    ("parts", "ordered"),
    [
        ((), []),
        (PARTS, [PARTS[1], PARTS[0], PARTS[2]]),
        ((b"01\n", b"00\n"), [b"00\n", b"01\n"]),
        *((parts, None) for parts in ((b"3\n", *PARTS[:2]), (PARTS[0], *PARTS[:2]), (PARTS[2], *PARTS[1:]))),
        *(
            ((part,), None)
            for part in (
                b"", b"\n1", b"0", b"-\n1", b"-0\n1", b"+0\n1", b" 0\n1", b"0 FAILURE a b\n1", b"0_0\n1",
                b"0" * 19 + b"\n1", b"1" * 5000 + b"\n1", "\N{ARABIC-INDIC DIGIT ZERO}\n1".encode(),
            )
        ),
    ],
)  # fmt: skip
def test_in_order(impl: dict[str, Any], parts: tuple[bytes, ...], ordered: list[bytes] | None) -> None:
    assert impl["aggregate"].in_order(parts) == ordered


@pytest.mark.parametrize(
    ("parts", "listed"),
    [
        ((), b""), ((b"0\n",), b""), (PARTS, b"22,1\n1,"), ((b"0\n", b"1\n", b"2\n"), b",,"),
        ((b"", b"1", b"\n1"), b",,1"),
    ],
)  # fmt: skip
def test_listed(impl: dict[str, Any], parts: tuple[bytes, ...], listed: bytes) -> None:
    assert impl["aggregate"].listed(parts) == listed


@pytest.mark.parametrize("other", [None, "0\n1", [], [b"0\n1"], bytearray(b"0\n1")])
def test_listed_refuses_other_types_than_parts(impl: dict[str, Any], other: Any) -> None:
    with pytest.raises(TypeError):
        impl["aggregate"].listed([b"0\n1", other])


@given(st.permutations(range(30)), st.lists(st.binary(), min_size=30, max_size=30))
def test_both_implementations_sort_results(places: list[int], values: list[bytes]) -> None:
    parts = [b"%d\n%b" % pair for pair in zip(places, values)]
    ordered = sorted(parts, key=lambda part: int(part.partition(b"\n")[0]))
    for name in _impl.PACKAGES:
        aggregate = _impl.load(name)["aggregate"]
        assert aggregate.in_order(parts) == ordered
        assert aggregate.listed(parts) == b",".join(values)
