"""AMQP 0-9-1 frames out of a stream of bytes: deliveries of our own channels, everything else as it came.

Wire layout (AMQP 0-9-1 specification, sections 4.2.3 and 4.2.6; network byte order)::

    frame           type octet | channel short | size long | payload | frame-end octet, 0xCE
    type 1, method  class short | method short | arguments
    type 2, header  class short | weight short | body size longlong | property flags short | properties
    type 3, body    a part of the body
    Basic.Deliver   (class 60, method 60) consumer-tag shortstr | delivery-tag longlong | redelivered octet |
                    exchange shortstr | routing-key shortstr
    Basic.Get-Ok    (class 60, method 71) delivery-tag longlong | redelivered octet | exchange shortstr |
                    routing-key shortstr | message-count long: a delivery without a consumer tag
    Basic.Publish   (class 60, method 40) reserved short | exchange shortstr | routing-key shortstr | mandatory bit
    properties      flag bit 15 content-type shortstr | 14 content-encoding shortstr | 13 headers table |
                    12 delivery-mode octet | 11 priority octet | 10 correlation-id shortstr | ...
    table           size long | (name shortstr | type octet | value)*
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from amqp.exceptions import FrameSyntaxError

from fastres._protocols import COMPRESSION, ID, KEEP, PLACE, TABLE, TEXT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ("Delivery", "Frames", "MessageTemplate", "publication")

FRAME = Struct(">BHI")
CONTENT = Struct(">HHQH")
#: What a content header begins with, and a long.
LEAD, LONG = Struct(">HHQ"), Struct(">I")
#: Octets of a UUID as text.
ID_SIZE = 36
METHOD, HEADER, BODY = 1, 2, 3
FRAME_END = 0xCE
#: Octets of a frame around its payload.
OVERHEAD = 8
LARGEST_BODY = 2**63 - 1
BASIC_DELIVER = b"\x00\x3c\x00\x3c"
BASIC_GET_OK = b"\x00\x3c\x00\x47"
BASIC_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"

#: Sizes of field values by their type (RabbitMQ's types); None: a long says how many octets follow.
VALUE_SIZES: dict[int, int | None] = {
    ord(kind): size
    for kinds, size in (
        ("V", 0), ("tbB", 1), ("su", 2), ("Iif", 4), ("D", 5), ("lLdT", 8), ("SAFx", None),
    )
    for kind in kinds
}  # fmt: skip


class Delivery:
    """See :class:`fastres._protocols.Delivery`."""

    __slots__ = (
        "body", "channel_id", "compression", "consumer_tag", "content_encoding", "content_type",
        "correlation_id", "delivery_tag", "keep", "redelivered",
    )  # fmt: skip

    def __init__(
        self,
        channel_id: int,
        consumer_tag: str,
        delivery_tag: Any,
        redelivered: bool,
        body: Any,
        content_type: str | None = None,
        content_encoding: str | None = None,
        correlation_id: str | None = None,
        compression: str | None = None,
        keep: bool = False,
    ) -> None:
        self.channel_id = channel_id
        self.consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.body = body
        self.content_type = content_type
        self.content_encoding = content_encoding
        self.correlation_id = correlation_id
        self.compression = compression
        self.keep = keep


class Partial:
    """A delivery of which frames are still to come."""

    __slots__ = ("delivery", "frames", "left", "parts")

    def __init__(self, delivery: Delivery, frame: bytes) -> None:
        self.delivery = delivery
        self.frames = [frame]
        self.parts: list[bytes] = []
        self.left = -1


class Frames:
    """See :class:`fastres._protocols.Frames`."""

    def __init__(self, frame_max: int) -> None:
        self.consumed = 0
        self._frame_max = frame_max
        self._owned: set[int] = set()
        self._partial: dict[int, Partial] = {}
        self._rest = b""

    def own(self, channel_id: int) -> None:
        self._owned.add(channel_id)

    def disown(self, channel_id: int) -> None:
        self._owned.discard(channel_id)
        self._partial.pop(channel_id, None)

    def feed(self, data: Any) -> tuple[list[Delivery], list[tuple[int, int, bytes]]]:
        buffer = self._rest + bytes(data)
        self._rest = b""
        deliveries: list[Delivery] = []
        others: list[tuple[int, int, bytes]] = []
        start, end = 0, len(buffer)
        while end - start >= FRAME.size:
            kind, channel_id, size = FRAME.unpack_from(buffer, start)
            if size > self._frame_max - OVERHEAD:
                raise FrameSyntaxError(
                    f"a frame of {size + OVERHEAD} bytes, {self._frame_max} were negotiated at most"
                )
            if end - start < size + OVERHEAD:
                break
            stop = start + size + OVERHEAD
            if buffer[stop - 1] != FRAME_END:
                raise FrameSyntaxError(f"a frame ends with {buffer[stop - 1]:#04x} instead of 0xce")
            delivery = None
            self.consumed += 1
            payload = start + FRAME.size
            partial = self._partial.get(channel_id)
            method = buffer[payload : payload + 4] if kind == METHOD and channel_id in self._owned else b""
            if method in (BASIC_DELIVER, BASIC_GET_OK):
                if partial is not None:
                    raise FrameSyntaxError(f"a delivery on channel {channel_id} inside of another")
                consumed = method == BASIC_DELIVER
                self._partial[channel_id] = Partial(
                    _deliver(Cursor(buffer, payload + 4, stop - 1), channel_id, consumed), buffer[start:stop]
                )
            elif kind == HEADER and partial is not None and partial.left < 0:
                partial.left = _header(Cursor(buffer, payload, stop - 1), partial.delivery)
                partial.frames.append(buffer[start:stop])
                if not partial.left:
                    delivery = self._complete(channel_id, b"")
            elif kind == BODY and partial is not None and partial.left > 0:
                if size > partial.left:
                    raise FrameSyntaxError(f"a body on channel {channel_id} is longer than its header says")
                partial.left -= size
                if partial.left:
                    partial.parts.append(buffer[payload : stop - 1])
                    partial.frames.append(buffer[start:stop])
                else:
                    delivery = self._complete(channel_id, buffer[payload : stop - 1])
            else:
                self.consumed -= 1
                others.append((kind, channel_id, buffer[payload : stop - 1]))
            if delivery is not None:
                deliveries.append(delivery)
            start = stop
        self._rest = buffer[start:]
        return deliveries, others

    def unused(self) -> bytes:
        frames = [frame for partial in self._partial.values() for frame in partial.frames]
        rest, self._rest = self._rest, b""
        self.consumed -= len(frames)
        self._partial.clear()
        return b"".join([*frames, rest])

    def _complete(self, channel_id: int, last: bytes) -> Delivery:
        partial = self._partial.pop(channel_id)
        partial.delivery.body = b"".join([*partial.parts, last]) if partial.parts else last
        return partial.delivery


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
) -> bytes:
    """See :class:`fastres._protocols.Publication`."""
    if frame_max <= OVERHEAD:
        raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
    method = BASIC_PUBLISH + short_string(exchange) + short_string(routing_key) + bytes([bool(mandatory)])
    flags = 0x8000 | 0x4000 | (0x2000 if headers else 0) | 0x1000 | 0x0400
    properties = (
        short_string(content_type) + short_string(content_encoding) + headers + bytes([delivery_mode])
        + short_string(correlation_id)
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


class Cursor:
    """Reads forward within bounds."""

    __slots__ = ("_buffer", "_end", "_position")

    def __init__(self, buffer: bytes, position: int, end: int) -> None:
        self._buffer = buffer
        self._position = position
        self._end = end

    def skip(self, size: int) -> int:
        """Where ``size`` octets begin, which are passed over."""
        position = self._position
        if size > self._end - position:
            raise FrameSyntaxError("a frame is shorter than its contents")
        self._position = position + size
        return position

    def integer(self, size: int) -> int:
        position = self.skip(size)
        return int.from_bytes(self._buffer[position : position + size], "big")

    def string(self) -> str:
        size = self.integer(1)
        position = self.skip(size)
        return self._buffer[position : position + size].decode("utf-8", "surrogateescape")

    def long_string(self) -> str:
        size = self.integer(4)
        position = self.skip(size)
        return self._buffer[position : position + size].decode("utf-8", "surrogateescape")

    def within(self, size: int) -> Cursor:
        """A cursor over the next ``size`` octets."""
        position = self.skip(size)
        return Cursor(self._buffer, position, position + size)

    def __bool__(self) -> bool:
        return self._position < self._end


def _deliver(cursor: Cursor, channel_id: int, consumed: bool) -> Delivery:
    consumer_tag = cursor.string() if consumed else ""
    delivery_tag = cursor.integer(8)
    redelivered = bool(cursor.integer(1) & 1)
    cursor.string()
    cursor.string()
    return Delivery(channel_id, consumer_tag, delivery_tag, redelivered, b"")


def _header(cursor: Cursor, delivery: Delivery) -> int:
    """Read the properties that a result needs into the delivery; the size of the body."""
    cursor.skip(4)
    size = cursor.integer(8)
    if size > LARGEST_BODY:
        raise FrameSyntaxError(f"a body of {size} bytes")
    flags = cursor.integer(2)
    if flags & 1:
        # The specification lets flags go on in another short; nobody has ever had that many properties.
        raise FrameSyntaxError("continued property flags")
    if flags & 0x8000:
        delivery.content_type = cursor.string()
    if flags & 0x4000:
        delivery.content_encoding = cursor.string()
    if flags & 0x2000:
        for name, value in _known(cursor.within(cursor.integer(4))):
            if name == COMPRESSION:
                delivery.compression = value
            else:
                delivery.keep = value
    if flags & 0x1000:
        cursor.skip(1)
    if flags & 0x0800:
        cursor.skip(1)
    if flags & 0x0400:
        delivery.correlation_id = cursor.string()
    return size


def _known(table: Cursor) -> Iterator[tuple[str, Any]]:
    """The fields of a table that mean something to fastres."""
    while table:
        name = table.string()
        kind = table.integer(1)
        if name == COMPRESSION and kind == ord("S"):
            yield name, table.long_string()
        elif name == KEEP and kind == ord("t"):
            yield name, bool(table.integer(1))
        elif kind in VALUE_SIZES:
            size = VALUE_SIZES[kind]
            table.skip(table.integer(4) if size is None else size)
        else:
            raise FrameSyntaxError(f"a header of the unknown type {kind:#04x}")
