"""The status of open chords: what a joiner answers to questions about them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from fastres.chords.events import Event, state_of
from fastres.counts import JoinerCounts

if TYPE_CHECKING:
    from fastres.chords.reducer import Chord, Reducer
    from fastres.chords.shard import Caller

__all__ = ("Open", "OpenChord", "ShardStatus", "answer_to")

#: The number of chords that are listed.
SHOWN = 100
SUCCESS, REVOKED = b"SUCCESS", b"REVOKED"


class OpenChord(msgspec.Struct):
    """A chord that is not complete."""

    id: str
    #: The number of parts that have arrived.
    parts: int
    #: The number of parts of the header; None: not known yet.
    total: int | None
    #: When its first and its last event were sent, in seconds since the epoch.
    since: float
    last: float
    #: The number of parts of failed and of revoked tasks.
    failed: int = 0
    revoked: int = 0


class Open(msgspec.Struct):
    """The open chords of a shard."""

    count: int
    #: The oldest ones.
    chords: list[OpenChord]
    #: The start of the joiner, in seconds since the epoch; 0: unknown.
    running_since: float = 0.0
    #: The default queue of the joiner's application; empty: unknown.
    queue: str = ""
    #: The numbers of parts of all open chords that have arrived, and that are missing as far as known.
    parts: int = 0
    missing: int = 0
    #: The counters of the joiner.
    counts: JoinerCounts | None = None


class ShardStatus(msgspec.Struct):
    """The status of a shard."""

    queue: str
    #: How many joiners read it or stand by.
    joiners: int
    #: How many events wait to be read.
    waiting: int
    #: The answer of the joiner; None: there was no answer.
    open: Open | None


def describe_chord(chord: Chord) -> OpenChord:
    """The status of an open chord."""
    count, failed, revoked = chord.counted
    # Parts are only added: there may be a million, which are not counted again each time.
    for packed in islice(chord.parts.values(), count, None):
        state = state_of(packed)
        revoked += state == REVOKED
        failed += state not in (SUCCESS, REVOKED)
        count += 1
    chord.counted = count, failed, revoked
    return OpenChord(chord.id, count, chord.total, chord.since, chord.at, failed, revoked)


def describe(reducer: Reducer, joiner: Caller) -> Open:
    """The answer of a joiner to a question."""
    oldest = reducer.open()
    return Open(
        len(oldest),
        [describe_chord(chord) for chord in oldest[:SHOWN]],
        joiner.since,
        joiner.backend.app.conf.task_default_queue,
        sum(len(chord.parts) for chord in oldest),
        sum(max(0, (chord.total or 0) - len(chord.parts)) for chord in oldest),
        joiner.backend.counts.joiner,
    )


def answer_to(event: Event, reducer: Reducer, joiner: Caller) -> bytes:
    """The answer of a joiner to a question; null for a chord that is not open."""
    if not event.about:
        return msgspec.json.encode(describe(reducer, joiner))
    chord = reducer.chords.get(event.about)
    return msgspec.json.encode(None if chord is None else describe_chord(chord))
