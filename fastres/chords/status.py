"""Which chords are open: the joiners know, and are asked through the shards that they read."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import amqp
import msgspec
from kombu.utils.uuid import uuid

from fastres.amqp.connector import establish
from fastres.amqp.rabbitmq import session_of
from fastres.chords.events import CONTENT_TYPE, Event, write_event

if TYPE_CHECKING:
    from fastres.chords.reducer import Reducer

__all__ = ("Open", "OpenChord", "ShardStatus", "ask", "describe")

#: How many chords are told one by one.
SHOWN = 100
#: Seconds between two looks for an answer.
INTERVAL = 0.02


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


class Open(msgspec.Struct):
    """The open chords of a shard."""

    count: int
    #: The oldest ones.
    chords: list[OpenChord]
    #: Since when their joiner runs, in seconds since the epoch, 0: it does not say.
    running_since: float = 0.0
    #: Where its application sends tasks that nothing else is said of; empty: it does not say.
    queue: str = ""


class ShardStatus(msgspec.Struct):
    """What there is to tell of a shard."""

    queue: str
    #: How many joiners read it or stand by.
    joiners: int
    #: How many events wait to be read.
    waiting: int
    #: What its joiner says, None: it did not say anything.
    open: Open | None


def describe(reducer: Reducer, since: float, queue: str) -> Open:
    """A joiner's answer, which runs since then, and whose tasks go to that queue."""
    oldest = reducer.open()
    return Open(
        len(oldest),
        [
            OpenChord(chord.id, len(chord.parts), chord.total, chord.since, chord.at)
            for chord in oldest[:SHOWN]
        ],
        since,
        queue,
    )  # fmt: skip


def ask(backend: Any, timeout: float) -> list[ShardStatus]:
    """Ask the joiners of all shards, and wait for each answer for ``timeout`` seconds."""
    connection = backend.connector.open()
    establish(connection)
    with closing(connection):
        return [_ask(backend, connection, number, timeout) for number in range(backend.options.chord_shards)]


def _ask(backend: Any, connection: Any, number: int, timeout: float) -> ShardStatus:
    address = backend.addresses.chords(number)
    state = session_of(connection).declare(backend.addresses.queue(address))
    status = ShardStatus(address.name, state.consumers, state.messages, None)
    if not state.consumers:
        return status
    channel = connection.channel()
    reply_to = f"{address.name}.{uuid()}"
    channel.queue_declare(reply_to, exclusive=True)
    question = amqp.Message(write_event(Event(ask=reply_to)), content_type=CONTENT_TYPE)
    channel.basic_publish(question, "", address.name)
    end = time.monotonic() + timeout
    while status.open is None and time.monotonic() < end:
        message = channel.basic_get(reply_to, no_ack=True)
        if message is None:
            time.sleep(INTERVAL)
        else:
            status.open = msgspec.json.decode(message.body, type=Open)
    channel.queue_delete(reply_to)
    return status
