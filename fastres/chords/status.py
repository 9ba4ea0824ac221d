"""Which chords are open: the joiners know, and are asked through the shards that they read."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import amqp
import msgspec
from kombu.utils.uuid import uuid

from fastres.amqp.connector import establish
from fastres.amqp.rabbitmq import session_of
from fastres.chords.events import CONTENT_TYPE, Event, state_of, write_event
from fastres.counts import JoinerCounts

if TYPE_CHECKING:
    from fastres.chords.reducer import Chord, Reducer
    from fastres.chords.shard import Caller

__all__ = ("Open", "OpenChord", "ShardStatus", "answer_to", "ask", "ask_about")

#: How many chords are told one by one.
SHOWN = 100
#: Seconds between two looks for an answer.
INTERVAL = 0.01
#: Seconds that the broker may take to answer, at least.
LEAST_LIMIT = 5.0
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
    """What there is to tell of a shard."""

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


def ask_about(backend: Any, chord_id: str, shard: int, timeout: float) -> OpenChord | None:
    """Ask the joiner of a shard about a chord; None: it knows nothing of it, or there is no joiner."""
    connection = backend.connector.open()
    establish(connection)
    with closing(connection):
        body = _ask(backend, connection, shard, timeout, Event(about=chord_id))[1]
    try:
        return None if body is None else msgspec.json.decode(body, type=OpenChord)
    except msgspec.ValidationError:
        # Null, or the answer of a joiner that is older than this question.
        return None


def ask(backend: Any, timeout: float) -> list[ShardStatus]:
    """Ask the joiners of all shards, and wait for each answer for ``timeout`` seconds."""
    connection = backend.connector.open()
    establish(connection)
    with closing(connection):
        return [_status(backend, connection, number, timeout) for number in range(backend.options.chord_shards)]


def _status(backend: Any, connection: Any, number: int, timeout: float) -> ShardStatus:
    status, body = _ask(backend, connection, number, timeout, Event())
    if body is not None:
        status.open = msgspec.json.decode(body, type=Open)
    return status


def _ask(
    backend: Any, connection: Any, number: int, timeout: float, question: Event
) -> tuple[ShardStatus, bytes | None]:
    """Ask a shard's joiner. Returns: what the broker says of the shard, and the answer."""
    address = backend.addresses.chords(number)
    session = session_of(connection)
    # A broker that stands still is not waited for without an end.
    session.limit(max(timeout, LEAST_LIMIT))
    state = session.declare(backend.addresses.queue(address))
    status = ShardStatus(address.name, state.consumers, state.messages, None)
    if not state.consumers:
        return status, None
    channel = connection.channel()
    question.ask = f"{address.name}.{uuid()}"
    channel.queue_declare(question.ask, exclusive=True)
    message = amqp.Message(write_event(question), content_type=CONTENT_TYPE)
    channel.basic_publish(message, "", address.name)
    end = time.monotonic() + timeout
    answer = None
    while answer is None and time.monotonic() < end:
        got = channel.basic_get(question.ask, no_ack=True)
        if got is None:
            time.sleep(INTERVAL)
        else:
            answer = got.body if isinstance(got.body, bytes) else got.body.encode()
    channel.queue_delete(question.ask)
    return status, answer
