"""A shard whose joiner ends at any commit: every chord fires once, with all its parts, and leaves no message."""

from __future__ import annotations

import time
from typing import Any

import pytest
from chord_kit import Lab, added_event, part_event, results, size_event
from hypothesis import given, settings
from hypothesis import strategies as st

import fastres
from fastres.chords import reducer, shard
from fastres.chords.events import WITH_TERMS, Event, Part, Terms, pack_part, read_event, write_event


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge after a few events, and count a few acknowledgements as slow."""
    monkeypatch.setattr(reducer, "MERGED_EVENTS", 4)
    monkeypatch.setattr(reducer, "MERGE_FACTOR", 2)
    monkeypatch.setattr(shard, "PREFETCH", 6)
    monkeypatch.setattr(shard, "COMMIT_BYTES", 1000)
    monkeypatch.setattr(shard, "MAX_STEPS", 20)


def tasks_of(chord_id: str, count: int) -> list[str]:
    return [f"{chord_id}-{number}" for number in range(count)]


@st.composite
def chords(draw: st.DrawFn) -> tuple[dict[str, list[str]], list[bytes]]:
    """Tasks of some chords, and their events in a possible order, some repeated before the chord is complete."""
    sizes = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    tasks: dict[str, list[str]] = {}
    events: list[bytes] = []
    for number, size in enumerate(sizes):
        chord_id = f"chord{number}"
        its = tasks_of(chord_id, size)
        parts = [part_event(chord_id, task) for task in its]
        told = draw(st.permutations([size_event(chord_id, size), *parts]))
        if draw(st.booleans()):
            its.append("added")
            told.insert(told.index(parts[0]), added_event(chord_id, "added"))
            told.append(part_event(chord_id, "added"))
        for at in draw(st.lists(st.integers(0, len(told) - 2), max_size=3)):
            # Before the last event: anything behind it is late.
            told.insert(draw(st.integers(at, len(told) - 1)), told[at])
        tasks[chord_id] = its
        events = merged(draw, events, told)
    return tasks, events


def merged(draw: st.DrawFn, one: list[bytes], other: list[bytes]) -> list[bytes]:
    """Two sequences as one, each in its order."""
    places = sorted(
        draw(st.lists(st.integers(0, len(one)), min_size=len(other), max_size=len(other))), reverse=True
    )
    both = list(one)
    for place, event in zip(places, reversed(other)):
        both.insert(place, event)
    return both


ACTIONS = st.one_of(
    st.tuples(st.just("come"), st.integers(1, 10)),
    st.tuples(st.just("read"), st.integers(1, 6)),
    st.tuples(st.just("look"), st.just(0)),
    st.tuples(st.sampled_from(["end", "leave"]), st.just(0)),
    # The next commit works; the one after it fails.
    st.tuples(st.sampled_from(["lost", "unanswered"]), st.integers(0, 2)),
)


def act(lab: Lab, actions: list[tuple[str, int]], events: list[bytes]) -> None:
    """Publish events, and let joiners read and end; at the end all events were published and read."""
    for action, count in actions:
        if action == "come":
            for event in events[:count]:
                lab.log.publish(event)
            events = events[count:]
        elif action == "read":
            lab.step(count)
        elif action == "look":
            lab.maintain()
        elif action == "end":
            lab.end()
        elif action == "leave":
            lab.leave_shard()
        else:
            lab.commits = [None] * count + [action == "unanswered"]
    for event in events:
        lab.log.publish(event)
    lab.finish()


@settings(deadline=None, max_examples=200)
@given(chords(), st.lists(ACTIONS, max_size=40))
def test_chords_fire_once_wherever_the_joiner_ends(
    made: tuple[dict[str, list[str]], list[bytes]], actions: list[tuple[str, int]]
) -> None:
    tasks, events = made
    lab = Lab()
    act(lab, actions, events)
    fired = [chord_id for chord_id, _ in lab.fired]
    assert sorted(fired) == sorted(tasks), "each once"
    for chord_id, parts in lab.fired:
        assert parts == results(*tasks[chord_id])
    assert not lab.log, "nothing is left over"
    # All tasks run again, and another joiner reads their parts.
    for chord_id, its in tasks.items():
        for task in its:
            lab.log.publish(part_event(chord_id, task))
    lab.end()
    lab.finish()
    assert len(lab.fired) == len(fired)
    assert not lab.reported


FAILURE = pack_part(Part(None, "FAILURE", "application/json", "utf-8", b'{"exc_type": "ValueError"}'))


@st.composite
def chords_on_terms(draw: st.DrawFn) -> tuple[dict[str, Any], list[bytes]]:
    """Chords with terms, or cancelled; their events in any order."""
    made: dict[str, Any] = {}
    events: list[bytes] = []
    for number in range(draw(st.integers(1, 3))):
        chord_id, size = f"chord{number}", draw(st.integers(1, 10))
        its = tasks_of(chord_id, size)
        failing = draw(st.sets(st.sampled_from(its)))
        terms = draw(
            st.one_of(
                st.none(),
                st.builds(
                    Terms,
                    tolerate=st.none() | st.integers(0, size),
                    first=st.none() | st.integers(1, size),
                    deadline=st.none() | st.sampled_from([1.0, 1e12]),
                ),
            )
        )
        parts = [part_event(chord_id, task, FAILURE if task in failing else None) for task in its]
        parts += draw(st.lists(st.sampled_from(parts), max_size=3))
        told = [size_event(chord_id, size, terms=terms), *parts]
        if terms is None or draw(st.booleans()):
            cancelled = Event(chord_id, at=time.time(), failed="It was cancelled", version=WITH_TERMS)
            told += [write_event(cancelled)] * draw(st.integers(1, 2))
        made[chord_id] = size, failing, terms
        events = merged(draw, events, draw(st.permutations(told)))
    return made, events


@settings(deadline=None, max_examples=300)
@given(chords_on_terms(), st.lists(ACTIONS, max_size=40))
def test_chords_on_terms_fire_once_wherever_the_joiner_ends(
    made: tuple[dict[str, Any], list[bytes]], actions: list[tuple[str, int]]
) -> None:
    """They leave nothing that could open them again: later parts are late."""
    expected, events = made
    lab = Lab()
    act(lab, actions, events)
    assert sorted(chord_id for chord_id, _ in lab.fired) == sorted(expected), "each once"
    for chord_id, parts in lab.fired:
        size, failing, terms = expected[chord_id]
        complete = len(parts) == size
        if terms is not None and terms.first is not None and not complete and terms.deadline != 1.0:
            enough = len(parts.keys() - failing) >= terms.first
            too_many = terms.tolerate is not None and len(parts.keys() & failing) > terms.tolerate
            assert enough or too_many or lab.failed[chord_id]
    for body in lab.log.bodies():
        assert read_event(body)[0].size is None, "no joiner takes it for an open chord"


@pytest.mark.parametrize("fine", range(8))
def test_no_chord_is_lost_where_a_commit_acknowledges_first(fine: int) -> None:
    """A broker that ends in between has acknowledged and published nothing; here a body may be sent twice."""
    lab = Lab(acknowledges_first=True)
    its = tasks_of("c", 9)
    for event in [size_event("c", 9), *(part_event("c", task) for task in its)]:
        lab.log.publish(event)
    lab.commits = [None] * fine + [False]
    while lab.commits:
        lab.step(4)
    lab.finish()
    assert {chord_id for chord_id, _ in lab.fired} == {"c"}
    for _, parts in lab.fired:
        assert parts == results(*its)


def test_messages_stay_unacknowledged_if_a_full_log_refuses_the_merged_one() -> None:
    lab = Lab()
    for event in [size_event("c", 9), *(part_event("c", task) for task in tasks_of("c", 8))]:
        lab.log.publish(event)
    lab.step(2)
    lab.is_full = True
    with pytest.raises(fastres.MessageRefused, match="is full"):
        lab.step(6)
    lab.is_full = False
    lab.end()
    lab.log.publish(part_event("c", "c-8"))
    lab.finish()
    assert lab.fired == [("c", results(*tasks_of("c", 9)))]


def test_a_pending_merge_leaves_nothing_after_its_chord_has_fired() -> None:
    """It would be delivered to another joiner, which does not know that the chord has fired."""
    lab = Lab()
    for event in [size_event("c", 5), *(part_event("c", task) for task in tasks_of("c", 4))]:
        lab.log.publish(event)
    lab.step(5)
    (mark, batch) = list(lab.log.ready.values())
    assert read_event(mark)[0].mark
    assert len(read_event(batch)[0].parts) == 4
    lab.log.publish(part_event("c", "c-4"))
    # The last part was published before the batch.
    lab.log.ready = dict(zip(sorted(lab.log.ready), [mark, part_event("c", "c-4"), batch]))
    lab.step(2)
    lab.end()
    # The last task runs again, because its worker ended before it acknowledged the task.
    lab.log.publish(part_event("c", "c-4"))
    lab.finish()
    assert lab.fired == [("c", results(*tasks_of("c", 5)))]


def test_a_shard_is_read_to_its_end_before_anything_is_fired() -> None:
    """An earlier joiner may have merged the first event, which added a task, into a later one."""
    lab = Lab()
    for event in [size_event("c", 1), part_event("c", "a"), added_event("c", "b")]:
        lab.log.publish(event)
    lab.step(2)
    assert not lab.fired
    lab.finish()
    assert not lab.fired
    lab.log.publish(part_event("c", "b"))
    lab.finish()
    assert lab.fired == [("c", results("a", "b"))]


def test_nothing_expires_before_a_shard_was_read_to_its_end() -> None:
    """No joiner ran for longer than the expiry: the first events are old, newer ones are behind them."""
    lab = Lab()
    long_ago = time.time() - 1000
    for event in [
        size_event("c", 2, long_ago),
        part_event("c", "a", at=long_ago),
        part_event("c", "b", at=long_ago),
    ]:
        lab.log.publish(event)
    for event in [size_event("d", 2, long_ago), part_event("d", "a", at=long_ago)]:
        lab.log.publish(event)
    lab.step(2)
    lab.maintain(expires=60)
    lab.finish()
    assert lab.fired == [("c", results("a", "b"))]
    lab.maintain(expires=60)
    assert not lab.log, "what is not complete has expired"


def test_several_chords_in_a_commit() -> None:
    lab = Lab()
    commits: list[int] = []
    commit = lab.commit

    def counted(channel: Any) -> None:
        commits.append(len(lab.fired))
        commit(channel)

    lab.step(1)
    lab.commit = counted  # type: ignore[method-assign]
    lab.log.publish(part_event("c0", "t0"))
    lab.finish()
    for number in range(3):
        lab.log.publish(size_event(f"c{number}", 1))
    for number in range(1, 3):
        lab.log.publish(part_event(f"c{number}", f"t{number}"))
    commits.clear()
    lab.finish()
    assert [chord_id for chord_id, _ in lab.fired] == ["c0", "c1", "c2"]
    assert len(commits) == 1


def test_garbage_is_set_aside() -> None:
    lab = Lab()
    for event in [b"garbage", size_event("c", 1), b"", part_event("c", "a"), b"{}"]:
        lab.log.publish(event)
    lab.finish()
    assert lab.fired == [("c", results("a"))]
    assert not lab.log
    assert len(lab.reported) == 3
    assert all(report[:2] == ("malformed", "log.0") for report in lab.reported)
