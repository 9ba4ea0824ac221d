"""The messages of a saved group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult, GroupResult, result_from_tuple
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from fastres import groups
from fastres.groups import leaves, pack, unpack


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    with Celery(broker="memory://", backend="fastres://", set_as_current=False) as app:
        yield app


def group_of(app: Celery, group_id: str, *members: Any, parent: Any = None) -> GroupResult:
    results = [app.AsyncResult(one) if isinstance(one, str) else one for one in members]
    return GroupResult(group_id, results, parent=parent, app=app)


# -- leaves


def test_leaves_of_nested_groups(app: Celery) -> None:
    inner = group_of(app, "inner", "b", group_of(app, "innermost", "c"))
    assert [one.id for one in leaves([app.AsyncResult("a"), inner, app.AsyncResult("d")])] == ["a", "b", "c", "d"]
    assert list(leaves([])) == []


# -- pack, unpack


@pytest.fixture
def in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members in a message; with the real 50,000 a test takes seconds (an integration test does that)."""
    monkeypatch.setattr(groups, "SAVED_PER_MESSAGE", 2)


def through_json(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [loads(*dumps(one, serializer="json")[2:], *dumps(one, serializer="json")[:2]) for one in messages]


def restored(messages: list[dict[str, Any]], app: Celery) -> GroupResult:
    saved = unpack(messages)
    assert saved is not None
    return result_from_tuple((saved.identity, saved.children), app)


@pytest.mark.usefixtures("in_twos")
@pytest.mark.parametrize(("members", "portions"), [(0, 1), (1, 1), (2, 1), (3, 2), (5, 3)])
def test_a_group_of_several_messages(app: Celery, members: int, portions: int) -> None:
    group = group_of(app, "g", *(f"t{n}" for n in range(members)))
    messages = through_json(pack("g", group))
    assert len(messages) == portions
    assert all(message["status"] == "SUCCESS" and message["task_id"] == "g" for message in messages)
    assert [one.id for one in restored(messages, app).results] == [f"t{n}" for n in range(members)]
    assert [one.id for one in restored(messages[::-1], app).results] == [f"t{n}" for n in range(members)]


def test_nested_groups_and_parents_are_restored(app: Celery) -> None:
    parent = AsyncResult("parent", app=app)
    group = group_of(app, "g", "a", group_of(app, "h", "b", "c"), parent=parent)
    again = restored(through_json(pack("g", group)), app)
    assert again == group
    assert again.parent is not None
    assert again.parent.id == "parent"
    assert [one.id for one in leaves(again.results)] == ["a", "b", "c"]


def test_no_messages() -> None:
    assert unpack([]) is None


@pytest.mark.usefixtures("in_twos")
def test_an_incomplete_save_is_ignored_for_the_one_before(app: Celery) -> None:
    old, new = group_of(app, "g", "a", "b", "c"), group_of(app, "g", "d", "e", "f")
    before, after = pack("g", old), pack("g", new)
    assert restored([*before, after[0]], app) == old
    assert restored([*before, *after], app) == new
    assert restored([*before, after[1], after[0]], app) == new
    assert unpack(after[1:]) is None


@pytest.mark.usefixtures("in_twos")
def test_a_repeated_message(app: Celery) -> None:
    group = group_of(app, "g", "a", "b", "c")
    messages = pack("g", group)
    assert restored([messages[0], messages[0], messages[1]], app) == group


@given(ids=st.lists(st.text(min_size=1), unique=True, max_size=20))
def test_any_ids(app: Celery, ids: list[str]) -> None:
    group = group_of(app, "g", *ids)
    saved = unpack(pack("g", group))
    assert saved is not None
    assert [child[0][0] for child in saved.children] == ids
