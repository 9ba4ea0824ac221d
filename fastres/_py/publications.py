"""Encodes messages to publish as AMQP 0-9-1 frames. The wire layout is in ``frames.py``."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from amqp.exceptions import FrameSyntaxError

from fastres._protocols import ID, PLACE, TABLE, TEXT
from fastres._py.frames import BODY, CONTENT, FRAME, HEADER, METHOD, OVERHEAD

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("MessageTemplate", "publication")

#: The begin of a content header, and a long.
LEAD, LONG = Struct(">HHQ"), Struct(">I")
#: Octets of a UUID as text.
ID_SIZE = 36
BASIC_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"


def publication(
    channel_id: int,
    frame_max: int,
    exchange: str,
    routing_key: str,
    mandatory: bool,
    body: bytes,
    content_type: str,
    content_encoding: str,
    headers: bytes,
    delivery_mode: int,
    correlation_id: str,
    expiration: str = "",
) -> bytes:
    """See :class:`fastres._protocols.Publication`."""
    if frame_max <= OVERHEAD:
        raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
    method = BASIC_PUBLISH + short_string(exchange) + short_string(routing_key) + bytes([bool(mandatory)])
    flags = 0x8000 | 0x4000 | (0x2000 if headers else 0) | 0x1000 | 0x0400 | (0x0100 if expiration else 0)
    properties = (
        short_string(content_type) + short_string(content_encoding) + headers + bytes([delivery_mode])
        + short_string(correlation_id) + (short_string(expiration) if expiration else b"")
    )  # fmt: skip
    size = frame_max - OVERHEAD
    return b"".join(
        [
            frame(METHOD, channel_id, method),
            frame(HEADER, channel_id, CONTENT.pack(60, 0, len(body), flags) + properties),
            *(frame(BODY, channel_id, body[start : start + size]) for start in range(0, len(body), size)),
        ]
    )


class MessageTemplate:
    """See :class:`fastres._protocols.MessageTemplate`."""

    def __init__(
        self,
        channel_id: int,
        frame_max: int,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        properties: Sequence[bytes],
        slots: bytes,
        table: int,
    ) -> None:
        if frame_max <= OVERHEAD:
            raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
        if len(slots) != len(properties) - 1 or not set(slots) <= {ID, PLACE, TEXT, TABLE}:
            raise ValueError(f"{len(properties)} pieces of properties do not go with slots {slots!r}")
        method = BASIC_PUBLISH + short_string(exchange) + short_string(routing_key) + bytes([bool(mandatory)])
        self._method = frame(METHOD, channel_id, method)
        self._channel_id = channel_id
        self._most = frame_max - OVERHEAD
        self._first, *rest = properties
        self._rest = list(zip(slots, rest))
        self._table = table
        self._texts = slots.count(TEXT)
        self._frames: list[bytes] = []
        self._size = 0

    def add(self, id_: bytes, place: int, text: bytes, body: bytes) -> None:
        if len(id_) != ID_SIZE:
            raise ValueError(f"an id has {ID_SIZE} bytes: {id_!r}")
        table = LONG.pack(self._table + self._texts * len(text))
        values = id_, LONG.pack(place), LONG.pack(len(text)) + text, table
        pieces = [LEAD.pack(60, 0, len(body)), self._first]
        for slot, piece in self._rest:
            pieces += (values[slot], piece)
        header = b"".join(pieces)
        if len(header) > self._most:
            raise FrameSyntaxError(f"a header of {len(header)} bytes, over the {self._most} of a frame")
        added = [self._method, frame(HEADER, self._channel_id, header)]
        for start in range(0, len(body), self._most):
            added.append(frame(BODY, self._channel_id, body[start : start + self._most]))
        self._frames += added
        self._size += sum(map(len, added))

    def __len__(self) -> int:
        return self._size

    def take(self) -> bytes:
        frames, self._frames, self._size = b"".join(self._frames), [], 0
        return frames


def frame(kind: int, channel_id: int, payload: bytes) -> bytes:
    return FRAME.pack(kind, channel_id, len(payload)) + payload + b"\xce"


def short_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    if len(encoded) > 255:
        raise FrameSyntaxError(f"a name of {len(encoded)} bytes, 255 are the most: {text[:40]}...")
    return bytes([len(encoded)]) + encoded
