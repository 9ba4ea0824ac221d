"""Groups in memory: who is a member of which, and what a saved group is made of."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import in_thread
from celery import Celery, chain, chord, group
from celery.result import AsyncResult, GroupResult, result_from_tuple
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from fastres import groups
from fastres import saved as saved_groups
from fastres.groups import GroupTable, leaves, member_of, members_to_come
from fastres.saved import pack, unpack


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    with Celery(broker="memory://", backend="fastres://", set_as_current=False) as app:
        yield app


def group_of(app: Celery, group_id: str, *members: Any, parent: Any = None) -> GroupResult:
    results = [app.AsyncResult(one) if isinstance(one, str) else one for one in members]
    return GroupResult(group_id, results, parent=parent, app=app)


# -- what goes with a task


def test_members_that_are_sent_later(app: Celery) -> None:
    task = app.signature("task")
    # Frozen, as what a task carries along is; the group itself has another id.
    last = group([task, chord([task], task), task | task]).clone()
    results = last.freeze(group_id="outer").results
    assert list(members_to_come(last)) == [("outer", result.id) for result in results]
    assert list(members_to_come(chain(task, group([task])))) == []
    assert list(members_to_come(None)) == []


# -- GroupTable


def test_members_keep_their_order() -> None:
    table = GroupTable()
    table.add("g", ["b", "a"])
    table.add("g", ["c", "a"])
    assert list(table.members("g") or ()) == ["b", "a", "c"]
    assert [table.group_of(one) for one in "abcd"] == ["g", "g", "g", None]
    assert table.members("other") is None


def test_forgotten_tells_the_last_one() -> None:
    table = GroupTable()
    table.add("g", ["a", "b"])
    assert not table.forget("g", "a")
    assert not table.forget("g", "a")
    assert table.forget("g", "b")


def test_discard() -> None:
    table = GroupTable()
    table.add("g", ["a", "b"])
    table.add("h", ["b"])
    table.discard("g")
    assert table.members("g") is None
    assert table.group_of("a") is None
    assert table.group_of("b") == "h"
    table.discard("never heard of")


def test_a_group_that_is_added_again_after_it_was_forgotten_starts_anew() -> None:
    table = GroupTable()
    table.add("g", ["a", "b"])
    table.forget("g", "a")
    table.discard("g")
    table.add("g", ["a", "b"])
    assert not table.forget("g", "b")


def test_tasks_of_no_group() -> None:
    table = GroupTable()
    assert not table.is_alone("a")
    table.add_alone("a")
    assert table.is_alone("a")
    assert table.group_of("a") is None


def test_clear() -> None:
    table = GroupTable()
    table.add("g", ["a"])
    table.clear()
    assert table.members("g") is None
    assert table.group_of("a") is None


def test_the_oldest_groups_make_room_and_the_newest_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the million that it is: that many ids take seconds, and 200 MB.
    monkeypatch.setattr(groups, "REMEMBERED", 10)
    table = GroupTable()
    for name in "ghi":
        table.add(name, [f"{name}{n}" for n in range(8)])
    assert table.members("g") is None
    assert table.group_of("g0") is None
    assert len(table.members("i") or ()) == 8
    table.add("j", [f"j{n}" for n in range(50)])
    assert len(table.members("j") or ()) == 50
    assert table.group_of("j49") == "j"


def test_many_threads_add() -> None:
    table = GroupTable()

    def add(number: int) -> None:
        for i in range(500):
            table.add("g", [f"{number}-{i}"])

    threads = [in_thread(add, number) for number in range(4)]
    for thread in threads:
        thread.join()
    assert len(table.members("g") or ()) == 2000


# -- leaves, member_of


def test_leaves_of_nested_groups(app: Celery) -> None:
    inner = group_of(app, "inner", "b", group_of(app, "innermost", "c"))
    assert [one.id for one in leaves([app.AsyncResult("a"), inner, app.AsyncResult("d")])] == ["a", "b", "c", "d"]
    assert list(leaves([])) == []


def test_member_of_a_group_that_is_held(app: Celery) -> None:
    group = group_of(app, "g", "a", "b")
    assert member_of(group.results[1]) is group


def test_member_of_none(app: Celery) -> None:
    lone = app.AsyncResult("a")
    lone.then(lambda result: None)
    assert member_of(lone) is None


def test_member_of_beside_other_callbacks(app: Celery) -> None:
    group = group_of(app, "g", "a")
    result = group.results[0]
    result.then(lambda result: None)
    result.then(lambda result: None)
    assert member_of(result) is group


def test_member_of_a_group_that_is_gone(app: Celery) -> None:
    result = app.AsyncResult("a")
    group = group_of(app, "g", result)
    del group
    gc.collect()
    assert member_of(result) is None


def test_member_of_a_result_that_is_ready(app: Celery) -> None:
    result = app.AsyncResult("a")
    group = group_of(app, "g", result)
    result._maybe_set_cache({"status": "SUCCESS", "result": 1, "task_id": "a"})
    assert group.ready()
    assert member_of(result) in (None, group)


# -- pack, unpack


@pytest.fixture
def in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members to a message: with the 50,000 that it is, as an integration test saves, a test takes seconds."""
    monkeypatch.setattr(saved_groups, "SAVED_PER_MESSAGE", 2)


def through_json(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [loads(*dumps(one, serializer="json")[2:], *dumps(one, serializer="json")[:2]) for one in messages]


def restored(messages: list[dict[str, Any]], app: Celery) -> GroupResult:
    saved = unpack(messages)
    assert saved is not None
    return result_from_tuple((saved.identity, saved.children), app)


@pytest.mark.usefixtures("in_twos")
@pytest.mark.parametrize(("members", "portions"), [(0, 1), (1, 1), (2, 1), (3, 2), (5, 3)])
def test_a_group_in_portions(app: Celery, members: int, portions: int) -> None:
    group = group_of(app, "g", *(f"t{n}" for n in range(members)))
    messages = through_json(pack("g", group, []))
    assert len(messages) == portions
    assert all(message["status"] == "SUCCESS" and message["task_id"] == "g" for message in messages)
    assert [one.id for one in restored(messages, app).results] == [f"t{n}" for n in range(members)]
    assert [one.id for one in restored(messages[::-1], app).results] == [f"t{n}" for n in range(members)]


def test_nested_groups_and_parents_survive(app: Celery) -> None:
    parent = AsyncResult("parent", app=app)
    group = group_of(app, "g", "a", group_of(app, "h", "b", "c"), parent=parent)
    again = restored(through_json(pack("g", group, [])), app)
    assert again == group
    assert again.parent is not None
    assert again.parent.id == "parent"
    assert [one.id for one in leaves(again.results)] == ["a", "b", "c"]


@pytest.mark.usefixtures("in_twos")
def test_who_is_alone_is_saved_too(app: Celery) -> None:
    messages = through_json(pack("g", group_of(app, "g", "a", "b", "c"), ["a", "c"]))
    for order in (messages, messages[::-1]):
        saved = unpack(order)
        assert saved is not None
        assert saved.alone == ["a", "c"]


def test_nothing_saved() -> None:
    assert unpack([]) is None


@pytest.mark.usefixtures("in_twos")
def test_a_save_that_is_not_whole_gives_way_to_the_one_before(app: Celery) -> None:
    old, new = group_of(app, "g", "a", "b", "c"), group_of(app, "g", "d", "e", "f")
    before, after = pack("g", old, []), pack("g", new, [])
    assert restored([*before, after[0]], app) == old
    assert restored([*before, *after], app) == new
    assert restored([*before, after[1], after[0]], app) == new
    assert unpack(after[1:]) is None


@pytest.mark.usefixtures("in_twos")
def test_a_portion_that_came_twice(app: Celery) -> None:
    group = group_of(app, "g", "a", "b", "c")
    messages = pack("g", group, [])
    assert restored([messages[0], messages[0], messages[1]], app) == group


@given(ids=st.lists(st.text(min_size=1), unique=True, max_size=20))
def test_any_ids(app: Celery, ids: list[str]) -> None:
    group = group_of(app, "g", *ids)
    saved = unpack(pack("g", group, []))
    assert saved is not None
    assert [child[0][0] for child in saved.children] == ids
