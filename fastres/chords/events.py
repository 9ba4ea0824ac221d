"""The format of the events of chords, the messages of the log.

Each event adds knowledge about one chord. Events may arrive in any order, more than once, and merged into larger
events. A message is one line of JSON, the head, followed by bytes:

| bytes                | what it is                                                                     |
| -------------------- | ------------------------------------------------------------------------------ |
| head, ``\\n``         | ``Event`` as JSON                                                              |
| ``head.plan`` bytes  | the plan: ``type encoding\\n``, then the body's signature and the structure of  |
|                      | the header, serialized as the tasks of the application are                     |
| ``head.part``: all   | a part: ``place state type encoding compression\\n``, then the result,          |
| the rest; each of    | serialized as results are; what is not given is ``-``, ``SUCCESS``, JSON in    |
| ``head.parts``       | UTF-8, not compressed                                                          |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from celery import states

from fastres.errors import MalformedEvent, NewerEvent

__all__ = (
    "REFERENCE",
    "Event",
    "Part",
    "Plan",
    "Terms",
    "is_success",
    "pack_part",
    "pack_plan",
    "place_of",
    "read_event",
    "state_of",
    "unpack_part",
    "unpack_plan",
    "write_event",
)

#: The content type of events.
CONTENT_TYPE = "application/x-fastres-chord"
#: The delivery mode of events: persistent.
PERSISTENT = 2

#: The highest event version that this joiner reads; and the version since which events have terms.
VERSION = WITH_TERMS = 2

JSON = "application/json"
UTF8 = "utf-8"


class Terms(msgspec.Struct, omit_defaults=True, gc=False):
    """The terms on which a chord ends: see ``fastres.settle``."""

    tolerate: int | float | None = None
    first: int | None = None
    #: Seconds; in an event the time when they are over, in seconds since the epoch.
    deadline: float | None = None
    #: Whether the tasks that have not begun by then are revoked.
    revoke: bool = False


class Event(msgspec.Struct, omit_defaults=True, gc=False):
    """The head of an event."""

    #: The id of the chord's header group; empty for questions.
    chord: str = ""
    #: The times of the first and of the last occurrence in this event, in seconds since the epoch.
    since: float = 0.0
    at: float = 0.0
    #: The number of parts of the header, and a name for this sending of the chord.
    size: int | None = None
    run: str = ""
    #: Ids of tasks that were added to the header.
    added: list[str] = []
    #: Errbacks that were already called, for a part that was a failed chord itself.
    notified: list[str] = msgspec.field(default_factory=list, name="told")
    #: The length of the plan, in bytes.
    plan: int = 0
    #: The task id of a single part; or of several parts, the task ids and the lengths in bytes.
    part: str = ""
    parts: list[tuple[str, int]] = []
    #: The root task of the last part, if it is another task, and fields of its request: ``log.context_of``.
    root: str = ""
    context: dict[str, Any] = {}
    #: The terms on which the chord ends, if it has any: ``fastres.settle``.
    terms: Terms | None = None
    #: Why the chord fails, whatever its parts are: the broker has refused its body, or it was cancelled.
    failed: str = ""
    #: The name of a merged event. Its joiner recognizes the event by it.
    mark: str = ""
    #: The reply queue of a question about open chords.
    ask: str = ""
    #: The chord that a question is about; empty: all chords.
    about: str = ""
    #: The version that a joiner must know to understand the event.
    version: int = 1


class Part(NamedTuple):
    """The result or the exception of a header task."""

    #: Its place in the header.
    place: int | None
    state: str
    content_type: str
    content_encoding: str
    #: Serialized, and compressed if ``compression`` says so.
    result: bytes
    compression: str = ""


class Plan(NamedTuple):
    """The body of a chord and the structure of its header, serialized."""

    content_type: str
    content_encoding: str
    content: bytes


#: The defaults of state, content type, content encoding and compression of a part.
PLAIN = (states.SUCCESS, JSON, UTF8, "")

_head = msgspec.json.Encoder()
_event = msgspec.json.Decoder(Event)


def pack_part(part: Part) -> bytes:
    place = "-" if part.place is None else part.place
    if (part.state, part.content_type, part.content_encoding, part.compression) == PLAIN:
        return b"%b\n%b" % (str(place).encode(), part.result)
    line = f"{place} {part.state} {part.content_type} {part.content_encoding}"
    if part.compression:
        line += f" {part.compression}"
    return b"%b\n%b" % (line.encode(), part.result)


#: A part whose result is in the queue of the header's results: ``fastres.lazy``.
REFERENCE = pack_part(Part(None, states.SUCCESS, JSON, UTF8, b"null"))


def unpack_part(packed: bytes) -> Part:
    """Raises: MalformedEvent: these bytes are no part."""
    line, _, result = packed.partition(b"\n")
    try:
        words = line.decode().split(" ")
        place = None if words[0] == "-" else int(words[0])
        # Parts of older versions have no compression.
        rest = words[1:] if len(words) != 4 else [*words[1:], ""]
        state, content_type, content_encoding, compression = rest or PLAIN
    except ValueError:
        raise MalformedEvent(f"a part of a chord begins with {line[:80]!r}") from None
    return Part(place, state, content_type, content_encoding, result, compression)


def state_of(packed: bytes) -> bytes:
    """The state of the task that a packed part is of."""
    words = packed[: packed.find(b"\n")].split(b" ", 2)
    return words[1] if len(words) > 1 else b"SUCCESS"


def is_success(packed: bytes) -> bool:
    """Whether a packed part is of a task that has succeeded."""
    return state_of(packed) == b"SUCCESS"


def place_of(packed: bytes) -> bytes:
    """The place of a packed part in the header."""
    return packed.partition(b"\n")[0].partition(b" ")[0]


def pack_plan(plan: Plan) -> bytes:
    return b"%b\n%b" % (f"{plan.content_type} {plan.content_encoding}".encode(), plan.content)


def unpack_plan(packed: bytes) -> Plan:
    """Raises: MalformedEvent: these bytes are no plan."""
    line, _, content = packed.partition(b"\n")
    try:
        content_type, content_encoding = line.decode().split(" ")
    except ValueError:
        raise MalformedEvent(f"the plan of a chord begins with {line[:80]!r}") from None
    return Plan(content_type, content_encoding, content)


def write_event(event: Event, plan: bytes = b"", parts: Any = ()) -> bytes:
    """An event as a message's body.

    Args:
        event: its head; the lengths in it are those of the plan and of the parts.
        plan: packed.
        parts: packed, in the order of the head.
    """
    return b"\n".join((_head.encode(event), plan + b"".join(parts)))


def read_event(body: Any) -> tuple[Event, bytes]:
    """The head of an event, and the bytes behind it.

    Raises:
        MalformedEvent: these bytes are no event, or their lengths do not add up.
        NewerEvent: a newer fastres has written it.
    """
    head, _, rest = bytes(body).partition(b"\n")
    try:
        event = _event.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedEvent(f"not an event of a chord: {exc}") from exc
    if event.version > VERSION:
        raise NewerEvent(
            f"an event of chord {event.chord} has version {event.version}, and this fastres knows {VERSION}: it "
            "is left to the joiners of newer workers; upgrade this one"
        )
    if event.part and not event.parts and not event.plan:
        return event, rest
    length, shortest = event.plan, event.plan
    for _, each in event.parts:
        length += each
        shortest = min(shortest, each) if each < 0 else shortest
    if length != len(rest) or shortest < 0 or event.part:
        raise MalformedEvent(f"an event of chord {event.chord} is cut off, or has bytes too many")
    if event.size is not None and event.size < 0:
        raise MalformedEvent(f"chord {event.chord} has {event.size} parts")
    if not (event.chord or event.mark or event.ask):
        raise MalformedEvent("an event of no chord")
    return event, rest
