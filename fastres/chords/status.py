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

#: How many chords are told one by one.
SHOWN = 100
SUCCESS, REVOKED = b"SUCCESS", b"REVOKED"


class OpenChord(msgspec.Struct):
    """A chord that is not complete."""

    id: str
    #: How many parts have come.
    parts: int
    #: How many it takes, None: not known yet.
    total: int | None
    #: When its first and its last event were sent, in seconds since the epoch.
    since: float
    last: float
    #: How many of them are of tasks that have failed, and that were revoked.
    failed: int = 0
    revoked: int = 0


class Open(msgspec.Struct):
    """The open chords of a shard."""

    count: int
    #: The oldest ones.
    chords: list[OpenChord]
    #: Since when their joiner runs, in seconds since the epoch, 0: it does not say.
    running_since: float = 0.0
    #: Where its application sends tasks that nothing else is said of; empty: it does not say.
    queue: str = ""
    #: How many parts of all of them have come, and are to come as far as is known.
    parts: int = 0
    missing: int = 0
    #: What the joiner has done.
    counts: JoinerCounts | None = None


class ShardStatus(msgspec.Struct):
    """The status of a shard."""

    queue: str
    #: How many joiners read it or stand by.
    joiners: int
    #: How many events wait to be read.
    waiting: int
    #: What its joiner says, None: it did not say anything.
    open: Open | None


def describe_chord(chord: Chord) -> OpenChord:
    """What a joiner knows of an open chord."""
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
    """A joiner's answer."""
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
    """A joiner's answer to somebody who asks; of a chord that is not open it is null."""
    if not event.about:
        return msgspec.json.encode(describe(reducer, joiner))
    chord = reducer.chords.get(event.about)
    return msgspec.json.encode(None if chord is None else describe_chord(chord))
