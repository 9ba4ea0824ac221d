"""AMQP 0-9-1 frames: written as a broker does, for the tests of their reader, and read."""

from __future__ import annotations

import struct

from amqp.basic_message import Message
from amqp.serialization import dumps


def frame(kind: int, channel: int, payload: bytes, end: int = 0xCE) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + bytes([end])


def method(channel: int, class_id: int, method_id: int, arguments: bytes = b"") -> bytes:
    return frame(1, channel, struct.pack(">HH", class_id, method_id) + arguments)


def delivery(
    channel: int,
    body: bytes,
    *,
    tag: str = "fastres-1",
    delivery_tag: int = 1,
    redelivered: bool = False,
    part: int = 131_064,
    **properties: object,
) -> list[bytes]:
    """The frames of a message, its body in parts of ``part`` bytes; properties as py-amqp takes them."""
    arguments = dumps("sLbss", (tag, delivery_tag, redelivered, "", "some.queue"))
    header = struct.pack(">HHQ", 60, 0, len(body)) + Message(b"", **properties)._serialize_properties()
    return [
        method(channel, 60, 60, arguments),
        frame(2, channel, header),
        *(frame(3, channel, body[start : start + part]) for start in range(0, len(body), part)),
    ]


HEARTBEAT = frame(8, 0, b"")
#: As `methods` returns them.
QUEUE_DECLARE, BASIC_CONSUME, BASIC_PUBLISH, QUEUE_DELETE = (50, 10), (60, 20), (60, 40), (50, 40)


def methods(stream: bytes) -> list[tuple[int, int]]:
    """Class and method of each method frame in a stream of whole frames."""
    found = []
    while stream:
        kind, _, size = struct.unpack_from(">BHI", stream)
        if kind == 1:
            found.append(struct.unpack_from(">HH", stream, 7))
        stream = stream[size + 8 :]
    return found


def kinds(stream: bytes) -> list[int]:
    """The type of each frame in a stream of whole frames."""
    found = []
    while stream:
        kind, _, size = struct.unpack_from(">BHI", stream)
        found.append(kind)
        stream = stream[size + 8 :]
    return found
