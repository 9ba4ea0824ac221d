"""The messages of the chord log: written events are read back, and anything else is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastres.chords.events import (
    Event,
    Part,
    Plan,
    pack_part,
    pack_plan,
    read_event,
    unpack_part,
    unpack_plan,
    write_event,
)
from fastres.errors import MalformedEvent

#: Any text that JSON can hold: no surrogates.
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
#: Content types, encodings and states contain no spaces.
WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
TIMES = st.floats(0, 1e12)
PARTS = st.builds(
    Part,
    st.none() | st.integers(0, 2**40),
    st.sampled_from(["SUCCESS", "FAILURE", "REVOKED"]) | WORDS,
    st.sampled_from(["application/json", "application/x-python-serialize"]) | WORDS,
    st.sampled_from(["utf-8", "binary"]) | WORDS,
    st.binary(max_size=200),
    st.just("") | WORDS,
)
PLANS = st.builds(Plan, WORDS, WORDS, st.binary(max_size=200))


@given(PARTS)
@example(Part(0, "SUCCESS", "application/json", "utf-8", b"\n\n"))
def test_a_part_is_read_as_it_was_written(part: Part) -> None:
    assert unpack_part(pack_part(part)) == part


@given(PLANS)
@example(Plan("application/json", "utf-8", b"\n"))
def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert unpack_plan(pack_plan(plan)) == plan


@st.composite
def events(draw: st.DrawFn) -> tuple[Event, bytes, list[bytes]]:
    """The head of an event, the plan and the parts behind it."""
    plan = draw(st.binary(max_size=50))
    parts = draw(st.lists(st.binary(max_size=50), max_size=5))
    event = Event(
        chord=draw(TEXT.filter(bool)),
        since=draw(TIMES),
        at=draw(TIMES),
        size=draw(st.none() | st.integers(0, 2**40)),
        added=draw(st.lists(TEXT, max_size=3)),
        plan=len(plan),
        parts=[(draw(TEXT), len(part)) for part in parts],
        root=draw(TEXT),
        mark=draw(TEXT),
        notified=draw(st.lists(TEXT, max_size=3)),
        ask=draw(TEXT),
    )
    return event, plan, parts


@given(events())
def test_an_event_is_read_as_it_was_written(written: tuple[Event, bytes, list[bytes]]) -> None:
    event, plan, parts = written
    for kind in (bytes, bytearray, memoryview):
        assert read_event(kind(write_event(event, plan, parts))) == (event, plan + b"".join(parts))


def test_the_first_line_is_the_head() -> None:
    """A person can read it: it is not a binary format."""
    part = pack_part(Part(3, "SUCCESS", "application/json", "utf-8", b'"value"'))
    assert part == b'3\n"value"'
    assert read_event(write_event(Event("c", at=1.5, part="t"), parts=[part])) == (
        Event("c", at=1.5, part="t"),
        part,
    )
    body = write_event(Event("c", at=1.5, parts=[("t", len(part))]), parts=[part])
    assert body == b'{"chord":"c","at":1.5,"parts":[["t",9]]}\n3\n"value"'


def test_fields_of_newer_versions_are_ignored() -> None:
    event, rest = read_event(b'{"chord":"c","new":{"of":[1]},"size":1}\n')
    assert (event, rest) == (Event("c", size=1), b"")


@given(events(), st.data())
def test_an_event_that_is_cut_off_is_malformed(written: tuple[Event, bytes, list[bytes]], data: Any) -> None:
    event, plan, parts = written
    body = write_event(event, plan, parts)
    length = data.draw(st.integers(0, len(body) - 1))
    if length == len(body) - 1 and body.endswith(b"}\n"):
        # Nothing follows the head, so its line end may be missing.
        assert read_event(body[:length]) == (event, b"")
        return
    with pytest.raises(MalformedEvent, match=r"\w"):
        read_event(body[:length])
    with pytest.raises(MalformedEvent, match=r"too many|cut off|not an event"):
        read_event(body + b"!")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n",
        b"{}",
        b"{}\n",
        b"null\n",
        b"[]\n",
        b'"chord"\n',
        b'{"chord":5}\n',
        b'{"chord":null}\n',
        b'{"chord":"c"}\nx',
        b'{"chord":"c","plan":1}\n',
        b'{"chord":"c","plan":-1,"parts":[["t",2]]}\nx',
        b'{"chord":"c","plan":2,"parts":[["t",-1]]}\nx',
        b'{"chord":"c","plan":1e0}\n?\n',
        b'{"chord":"c","plan":99999999999999999999999999}\n',
        b'{"chord":"c","parts":[["t"]]}\n',
        b'{"chord":"c","parts":[["t",1,1]]}\nx',
        b'{"chord":"c","at":1e999}\n',
        b'{"chord":"c","at":NaN}\n',
        b'{"chord":"c","size":-1}\n',
        b'{"chord":"\xff"}\n',
        b'{"chord":"\\ud800"}\n',
        b'{"status": "SUCCESS", "result": 1, "task_id": "a"}',
        b"\x80\x04K\x05.",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_garbage_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedEvent, match=r"\w"):
        read_event(body)


def test_deep_nesting_does_not_stop_a_joiner() -> None:
    """In an unknown field: Python limits its depth."""
    with contextlib.suppress(MalformedEvent):
        read_event(b'{"other":' + b"[" * 100_000 + b"]" * 100_000 + b',"chord":"c"}\n')


@given(st.binary(max_size=100))
@example(b"\xff\nrest")
@example(b"1" * 5000 + b"\nrest")
@example(b"1 2 3\nrest")
@example(b"")
def test_any_bytes_are_an_event_or_malformed(body: bytes) -> None:
    for read in (read_event, unpack_part, unpack_plan):
        with contextlib.suppress(MalformedEvent):
            read(body)
    # As the rest behind a well-formed head.
    head = b'{"chord":"c","parts":[["t",%d]]}\n' % len(body)
    assert read_event(head + body)[1] == body


def test_bytes_that_are_not_a_part_are_malformed() -> None:
    for body in (b"", b"x\n1", b"1 SUCCESS\n1", b"1 SUCCESS a\n1", b"1 SUCCESS a b c d\n1", b"\xff\n1"):
        with pytest.raises(MalformedEvent, match="begins with"):
            unpack_part(body)
    for body in (b"", b"json\n", b"a b c\n", b"\xff \xff\n"):
        with pytest.raises(MalformedEvent, match="begins with"):
            unpack_plan(body)
