"""The reducer's state of chords: the sum of their events, in any order and with repetitions."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterable
from functools import partial
from itertools import permutations
from typing import Any

import pytest
from chord_kit import PLAN, Log, added_event, delivery, part_event, results, size_event
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres.chords import reducer as module
from fastres.chords.events import WITH_TERMS, Event, Part, Terms, pack_part, read_event, write_event
from fastres.chords.reducer import Chord, Merge, Reducer

NOW = 1000.0


def fed(*bodies: bytes, largest: int = module.MAX_MERGED) -> Reducer:
    reducer = Reducer(largest)
    reducer.feed([delivery(tag, body) for tag, body in enumerate(bodies, 1)], NOW)
    return reducer


def ids(count: int, of: str = "task") -> list[str]:
    return [f"{of}-{number}" for number in range(count)]


def commit(log: Log, reducer: Reducer, merges: Iterable[Merge]) -> int:
    """Replace messages by merged ones, as the shard does."""
    done = list(merges)
    for merge in done:
        log.acknowledge(merge.tags)
        for body in merge.bodies:
            log.publish(body)
        reducer.release(merge.chord, merge.tags)
    return len(done)


def tags_of(chord: Chord) -> list[int]:
    return sorted(held.tag for held in chord.messages())


# -- when a chord is complete


FAILED = pack_part(Part(0, "FAILURE", "application/json", "utf-8", b'{"exc_type":"E"}'))


def test_a_chord_is_complete_with_the_successes_of_its_terms() -> None:
    size = size_event("c", 4, terms=Terms(first=2))
    events = [part_event("c", "a"), part_event("c", "failed", FAILED), part_event("c", "b")]
    for at in range(4):
        told = [*events[:at], size, *events[at:]]
        for count in range(4):
            assert not fed(*told[:count]).complete
        (chord,) = fed(*told).complete.values()
        assert len(chord.parts) == 3
    assert not fed(size, *events[:2], events[0]).complete, "the same part twice"
    # With all parts it is complete, no matter how few have succeeded.
    failed = [part_event("c", f"failed {number}", FAILED) for number in range(3)]
    assert fed(size, events[0], *failed).complete


def test_at_its_deadline_a_chord_is_complete_with_the_parts_that_have_arrived() -> None:
    reducer = fed(size_event("c", 4, terms=Terms(deadline=50.0)), part_event("c", "a"), size_event("other", 2))
    reducer.close_at_deadline(49.0)
    assert not reducer.complete
    reducer.close_at_deadline(51.0)
    (chord,) = reducer.complete.values()
    assert (chord.id, chord.closed, list(chord.results())) == ("c", True, ["a"])


def test_terms_survive_a_merge_and_a_snapshot() -> None:
    terms = Terms(tolerate=0.5, first=3, deadline=50.0)
    reducer = fed(size_event("c", 4, terms=terms), part_event("c", "a"), part_event("c", "failed", FAILED))
    chord = reducer.chords["c"]
    merged = [body for merge in reducer.gather() for body in merge.bodies]
    for bodies in (reducer.snapshot(chord), merged):
        assert read_event(bodies[0])[0].version == WITH_TERMS
        (again,) = fed(*bodies).chords.values()
        assert (again.terms, again.first, again.succeeded, len(again.parts)) == (terms, 3, 1, 2)


def test_a_chord_whose_deadline_passes_during_a_merge_waits_for_the_merge() -> None:
    reducer = fed(size_event("c", 4, terms=Terms(deadline=50.0)), part_event("c", "a"))
    (merge,) = reducer.gather()
    reducer.close_at_deadline(51.0)
    assert not reducer.complete
    reducer.feed([delivery(10 + at, body) for at, body in enumerate(merge.bodies)], NOW)
    assert list(reducer.complete) == ["c"]


def test_a_chord_is_complete_with_its_size_body_and_all_parts() -> None:
    events = [size_event("c", 2), part_event("c", "a"), part_event("c", "b")]
    for missing in range(3):
        reducer = fed(*events[:missing], *events[missing + 1 :])
        assert not reducer.complete
        assert list(reducer.chords) == ["c"]
    (chord,) = fed(*events).complete.values()
    assert (chord.id, chord.parts, chord.plan, chord.total) == ("c", results("a", "b"), PLAN, 2)
    assert tags_of(chord) == [1, 2, 3]


def test_a_size_without_a_body_is_not_enough() -> None:
    sized = write_event(Event("c", at=1.0, size=1))
    assert not fed(sized, part_event("c", "a")).complete
    assert fed(sized, part_event("c", "a"), size_event("c", 1)).complete


def test_a_chord_waits_for_an_added_task() -> None:
    reducer = fed(size_event("c", 1), added_event("c", "b"), part_event("c", "a"))
    assert not reducer.complete
    assert reducer.chords["c"].total == 2
    reducer.feed([delivery(9, added_event("c", "b"))], NOW)
    assert reducer.chords["c"].total == 2, "added once, however often it is told"
    reducer.feed([delivery(10, part_event("c", "b"))], NOW)
    assert reducer.complete["c"].parts == results("a", "b")


def test_a_complete_chord_waits_for_a_task_that_was_added() -> None:
    """A joiner that takes over first reads the events that the previous one had not merged."""
    reducer = fed(size_event("c", 1), part_event("c", "a"))
    assert list(reducer.complete) == ["c"]
    reducer.feed([delivery(9, added_event("c", "b"))], NOW)
    assert not reducer.complete


def test_a_repeated_part_counts_once_and_the_first_one_counts() -> None:
    again = part_event("c", "a", b'-\n"another result"')
    reducer = fed(size_event("c", 2), part_event("c", "a"), again, again)
    assert not reducer.complete
    reducer.feed([delivery(9, part_event("c", "b"))], NOW)
    assert reducer.complete["c"].parts == results("a", "b")
    assert tags_of(reducer.complete["c"]) == [1, 2, 3, 4, 9], "acknowledged all the same"


def test_two_parts_with_one_id_count_if_their_places_differ() -> None:
    first, second = (pack_part(Part(place, "SUCCESS", "application/json", "utf-8", b"1")) for place in range(2))
    events = [size_event("c", 2), part_event("c", "a", first), part_event("c", "a", second)]
    reducer = fed(*events, events[1], events[2])
    assert list(reducer.complete["c"].parts.values()) == [first, second]
    # As another joiner reads them after they were merged.
    again = fed(*reducer.snapshot(reducer.complete["c"]))
    assert list(again.complete["c"].parts.values()) == [first, second]


def test_a_snapshot_contains_the_whole_state() -> None:
    reducer = fed(size_event("c", 2), added_event("c", "b"), *(part_event("c", each) for each in "abd"))
    chord = reducer.complete["c"]
    chord.failed = "refused"
    chord.update_needed()
    chord.context = {"hostname": "here"}
    (again,) = fed(*reducer.snapshot(chord)).complete.values()
    for name in ("id", "size", "run", "plan", "parts", "added", "needed", "failed", "context", "since", "at"):
        assert getattr(again, name) == getattr(chord, name), name


def test_late_parts_are_kept_for_a_while() -> None:
    """They may belong to a chord that is being sent again: its size arrives after all of its tasks were sent."""
    reducer = fed(size_event("c", 1), part_event("c", "a"))
    reducer.forget(reducer.complete["c"], NOW)
    long_after = NOW + 10 * module.LATE_PARTS_KEPT
    reducer.feed([delivery(3, part_event("c", "a"))], long_after)
    assert not reducer.expired(None, long_after + module.LATE_PARTS_KEPT / 2, time.time())
    reducer.feed([delivery(4, size_event("c", 1))], long_after + 1)
    assert list(reducer.complete) == ["c"]
    reducer.forget(reducer.complete["c"], long_after)
    reducer.feed([delivery(5, part_event("c", "a"))], long_after)
    assert len(reducer.expired(None, long_after + module.LATE_PARTS_KEPT + 1, time.time())) == 1


def test_chords_do_not_mix() -> None:
    """Even if their tasks have the same ids."""
    reducer = fed(size_event("c", 1), size_event("d", 1), part_event("c", "a"))
    assert list(reducer.complete) == ["c"]
    reducer.feed([delivery(9, part_event("d", "a", b"its own"))], NOW)
    assert reducer.complete["d"].parts == {"a": b"its own"}


def test_messages_that_are_no_events_and_events_of_no_chord() -> None:
    garbage, question, mark = b"garbage", write_event(Event(ask="queue")), write_event(Event(mark="m"))
    reducer = fed(garbage, question, part_event("c", "a"), mark)
    assert [(delivery.delivery_tag, delivery.body) for delivery, _ in reducer.refused] == [(1, garbage)]
    assert [(tag, event.ask, event.mark) for tag, event in reducer.others] == [(2, "queue", ""), (4, "", "m")]
    assert reducer.count == 1


def test_the_fewest_missing_parts() -> None:
    parts = [part_event(chord, task_id) for chord in "ab" for task_id in ids(5)]
    assert fed().fewest_missing() == 0
    # Its size may arrive at any moment.
    assert fed(*parts[:5]).fewest_missing() == 5
    assert fed(size_event("a", 9), size_event("b", 8), *parts).fewest_missing() == 3
    # A chord with a pending merge lacks no part; and comparing all of them would take long.
    assert fed(size_event("a", 5), *parts[:5]).fewest_missing() == 0
    assert fed(*(size_event(str(number), 9) for number in range(module.MAX_COMPARED + 1))).fewest_missing() == 0


# -- any order, repetitions, merged and fed back, from one reducer to the next


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge after a few events."""
    monkeypatch.setattr(module, "MERGED_EVENTS", 4)
    monkeypatch.setattr(module, "MERGE_FACTOR", 2)


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, list[str], list[bytes]]:
    """The size of a chord, its added tasks, and its events in some order, some of them repeated.

    A task is added before the one that adds it returns.
    """
    size, added = draw(st.integers(1, 20)), draw(st.integers(0, 3))
    tasks = [*ids(size), *ids(added, "added")]
    events = [size_event("c", size), *(part_event("c", task) for task in tasks)]
    events = draw(st.permutations(events + draw(st.lists(st.sampled_from(events), max_size=10))))
    adding = part_event("c", tasks[0])
    parent = read_event(adding)[0].parts
    for task in ids(added, "added"):
        first = next(at for at, event in enumerate(events) if read_event(event)[0].parts == parent)
        events.insert(draw(st.integers(0, first)), added_event("c", task))
    return size, tasks, events


ACTIONS = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 8)),
    st.tuples(st.sampled_from(["merges", "gather", "renew", "end"]), st.just(0)),
)


@settings(deadline=None, max_examples=300)
@given(orders(), st.lists(ACTIONS, max_size=40))
@pytest.mark.usefixtures("small")
def test_a_chord_is_complete_once_with_exactly_its_own_parts(
    order: tuple[int, list[str], list[bytes]], actions: list[tuple[str, int]]
) -> None:
    size, tasks, events = order
    log, reducer = Log(), Reducer()
    for event in events:
        log.publish(event)
    # Older events must be read before a new reducer's chords count as complete.
    before = 0
    for action, count in [*actions, *([("read", 8), ("merges", 0)] * 50)]:
        if action == "read":
            deliveries = log.deliver(count)
            reducer.feed(deliveries, NOW)
            before -= len(deliveries)
            assert not reducer.refused
        elif action == "end":
            log.give_back()
            reducer, before = Reducer(), len(log.ready)
        else:
            merges = {
                "renew": partial(reducer.renew, NOW + 1),
                "merges": reducer.merges,
                "gather": reducer.gather,
            }
            commit(log, reducer, merges[action]())
        chord = reducer.complete.get("c")
        assert reducer.count == len(log.unacknowledged) - len(reducer.obsolete)
        if chord is not None and before <= 0:
            assert chord.size == size
            assert len(chord.parts) >= size + len(chord.added)
    assert not log.ready
    assert reducer.complete["c"].parts == results(*tasks)
    assert reducer.complete["c"].added == set(tasks[size:])
    assert sorted(log.unacknowledged) == tags_of(reducer.complete["c"]), (
        "all that holds it is acknowledged with it"
    )


@pytest.mark.usefixtures("small")
def test_merged_events_hold_the_same_state_in_few_messages() -> None:
    log, reducer = Log(), Reducer()
    tasks = ids(40)
    for body in (size_event("c", 41), added_event("c", "more"), *(part_event("c", task) for task in tasks)):
        log.publish(body)
    while log.ready:
        reducer.feed(log.deliver(3), NOW)
        commit(log, reducer, reducer.merges())
    assert len(log) < 4 + 2 * 4
    commit(log, reducer, reducer.gather())
    (body,) = log.ready.values()
    event, _ = read_event(body)
    assert (event.chord, event.size, event.added, event.plan) == ("c", 41, ["more"], len(PLAN))
    assert sorted(task_id for task_id, _ in event.parts) == sorted(tasks)
    assert fed(body).chords["c"].parts == results(*tasks)


def test_times_and_the_root_survive_a_merge() -> None:
    part = write_event(Event("c", at=20.0, parts=[("a", 1)], root="root"), parts=[b"x"])
    reducer = fed(size_event("c", 2, at=10.0), part)
    (merge,) = reducer.gather()
    again = fed(*merge.bodies).chords["c"]
    assert (again.since, again.at, again.last, again.root) == (10.0, 20.0, "a", "root")


def test_messages_that_were_held_for_long_are_renewed() -> None:
    reducer = fed(size_event("c", 9), part_event("c", "a"))
    reducer.feed([delivery(3, part_event("c", "b"))], NOW + 10)
    assert list(reducer.renew(NOW)) == []
    (merge,) = reducer.renew(NOW + 5)
    assert merge.tags == [1, 2]
    reducer.release(merge.chord, merge.tags)
    assert tags_of(reducer.chords["c"]) == [3]
    assert fed(*merge.bodies).chords["c"].parts == results("a")


def test_a_large_batch_is_split() -> None:
    tasks = ids(30)
    reducer = fed(size_event("c", 99), *(part_event("c", task, b"x" * 400) for task in tasks), largest=1000)
    (merge,) = reducer.gather()
    assert len(merge.bodies) == len({read_event(body)[0].mark for body in merge.bodies}) == 10
    assert [read_event(body)[0].size for body in merge.bodies] == [99] + [None] * 9
    assert set(fed(*merge.bodies).chords["c"].parts) == set(tasks)
    reducer.release(merge.chord, merge.tags)
    reducer.feed([delivery(100 + tag, body) for tag, body in enumerate(merge.bodies)], NOW)
    assert list(reducer.gather()) == [], "what is large stays as it is"


# -- late events


def fire(reducer: Reducer, chord_id: str, now: float = NOW) -> None:
    reducer.forget(reducer.complete[chord_id], now)


def test_a_late_part_neither_fires_the_chord_again_nor_stays_forever() -> None:
    reducer = fed(size_event("c", 1), part_event("c", "a"))
    fire(reducer, "c")
    assert reducer.count == 0
    reducer.feed([delivery(9, part_event("c", "a"))], NOW)
    assert not reducer.complete
    assert reducer.count == 1
    assert reducer.expired(None, NOW + module.LATE_PARTS_KEPT - 1, time.time()) == []
    (late,) = reducer.expired(None, NOW + module.LATE_PARTS_KEPT + 1, time.time())
    assert tags_of(late) == [9]


def test_a_cancelled_chord_is_complete_with_the_parts_that_have_arrived() -> None:
    cancelled = write_event(Event("c", at=1.0, failed="It was cancelled", version=2))
    events = [size_event("c", 3), part_event("c", "a"), cancelled]
    for told in permutations(events):
        reducer = fed(*told)
        assert reducer.complete["c"].failed == "It was cancelled"
        assert not fed(*told[: told.index(cancelled)]).complete
    assert not fed(cancelled, events[1]).complete, "its errbacks are not known yet"
    # Later parts are late, and so is a second cancellation; neither shows up as an open chord.
    fire(reducer, "c")
    reducer.feed([delivery(8, part_event("c", "b")), delivery(9, cancelled)], NOW)
    assert reducer.open() == []
    (late,) = reducer.expired(None, NOW + module.LATE_PARTS_KEPT + 1, time.time())
    assert tags_of(late) == [8, 9]
    unknown = fed(cancelled)
    assert unknown.open() == []
    assert [chord.id for chord in unknown.expired(None, NOW + module.LATE_PARTS_KEPT + 1, time.time())] == ["c"]


def test_a_chord_that_is_sent_again_fires_again() -> None:
    """A task that sends a chord with fixed ids may run twice."""
    reducer = fed(size_event("c", 1), part_event("c", "a"))
    fire(reducer, "c")
    reducer.feed([delivery(8, part_event("c", "a")), delivery(9, size_event("c", 1))], NOW)
    assert reducer.complete["c"].parts == results("a")
    fire(reducer, "c")
    assert not reducer.chords


def test_a_repeated_size_event_does_not_open_the_chord_again() -> None:
    size = write_event(Event("c", at=1.0, size=1, run="first", plan=len(PLAN)), PLAN)
    reducer = fed(size, part_event("c", "a"))
    fire(reducer, "c")
    reducer.feed([delivery(9, size)], NOW)
    assert (reducer.chords, reducer.count, reducer.obsolete) == ({}, 0, [9])
    again = write_event(Event("c", at=2.0, size=1, run="second", plan=len(PLAN)), PLAN)
    reducer.feed([delivery(10, again), delivery(11, part_event("c", "a"))], NOW)
    assert list(reducer.complete) == ["c"]


def test_open_chords_are_sorted_by_age_without_late_parts() -> None:
    reducer = fed(size_event("c", 1), part_event("c", "a"))
    fire(reducer, "c")
    for tag, (chord_id, at) in enumerate([("young", 3.0), ("old", 2.0), ("c", 1.0)], 9):
        event = Event(chord_id, at=at, parts=[("late", 3)])
        reducer.feed([delivery(tag, write_event(event, parts=[b"0\n1"]))], NOW)
    assert [chord.id for chord in reducer.open()] == ["old", "young"]


def test_a_chord_waits_for_its_pending_merges() -> None:
    """If it fired before, a batch of it would stay in the log."""
    reducer = fed(*(part_event("c", task) for task in ids(3)))
    (merge,) = reducer.gather()
    reducer.release(merge.chord, merge.tags)
    reducer.feed([delivery(9, size_event("c", 3))], NOW)
    assert not reducer.complete
    reducer.feed([delivery(10, merge.bodies[0])], NOW)
    assert tags_of(reducer.complete["c"]) == [9, 10]
    (merge,) = reducer.renew(NOW + 1)
    assert not reducer.complete, "complete ones are renewed too while their errbacks take their time"


def test_a_batch_that_is_delivered_after_its_chord_has_expired_is_obsolete() -> None:
    reducer = fed(*(part_event("c", task, at=1.0) for task in ids(3)))
    (merge,) = reducer.gather()
    reducer.release(merge.chord, merge.tags)
    (chord,) = reducer.expired(60, NOW, 100.0)
    reducer.forget(chord, NOW)
    reducer.feed([delivery(10, merge.bodies[0])], NOW)
    assert reducer.obsolete == [10]
    assert (reducer.chords, reducer.count) == ({}, 0)


# -- chords that never complete


def test_a_chord_without_new_events_expires() -> None:
    reducer = fed(size_event("c", 9, at=100.0), part_event("c", "a", at=200.0), size_event("d", 9, at=250.0))
    assert reducer.expired(None, NOW, 1e9) == []
    assert reducer.expired(60, NOW, 255.0) == []
    (chord,) = reducer.expired(60, NOW, 265.0)
    assert (chord.id, len(chord.parts)) == ("c", 1)
    reducer.forget(chord, NOW)
    assert list(reducer.chords) == ["d"]
    assert reducer.count == 1


# -- costs

MANY = 100_000


def arriving(count: int) -> list[Any]:
    """The events of a chord with parts of 100 bytes, as the broker would deliver them."""
    tasks = [f"{number:08x}-3f2b-4b6e-9c1d-000000000000" for number in range(count)]
    random.Random(1).shuffle(tasks)
    packed = b'0\n"%b"' % (b"x" * 96)
    bodies = [size_event("c", count + 1), *(part_event("c", task, packed) for task in tasks)]
    assert len(packed) == 100
    return bodies


def test_messages_and_memory_of_a_large_chord() -> None:
    """Messages in the broker, where each takes kilobytes, and memory in the process."""
    bodies = arriving(MANY)
    log, reducer = Log(), Reducer()
    most = 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for start in range(0, len(bodies), 1000):
            for body in bodies[start : start + 1000]:
                log.publish(body)
            while log.ready:
                reducer.feed(log.deliver(1000), NOW)
                commit(log, reducer, reducer.merges())
                most = max(most, len(log.unacknowledged))
        # The messages themselves are in the broker.
        logged = sum(len(body) + 33 for _, body in log.unacknowledged.values())
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(reducer.chords["c"].parts) == MANY
    assert len(log) == reducer.count < 100
    assert most < 2 * module.MERGED_EVENTS + 100
    assert (held - logged) / MANY <= 400


@pytest.mark.parametrize("left", [0, 1])
def test_a_large_chord_is_complete_with_its_last_part(left: int) -> None:
    bodies = arriving(5000)
    reducer = fed(*bodies, *(part_event("c", f"last {number}") for number in range(1 - left)))
    assert bool(reducer.complete) is not bool(left)
