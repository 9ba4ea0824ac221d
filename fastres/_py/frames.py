"""Parses AMQP 0-9-1 frames: deliveries on channels of fastres are assembled, all other frames are passed on.

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

from fastres._protocols import COMPRESSION, KEEP

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Delivery", "Frames")

FRAME = Struct(">BHI")
CONTENT = Struct(">HHQH")
METHOD, HEADER, BODY = 1, 2, 3
FRAME_END = 0xCE
#: Octets of a frame around its payload.
OVERHEAD = 8
LARGEST_BODY = 2**63 - 1
BASIC_DELIVER = b"\x00\x3c\x00\x3c"
BASIC_GET_OK = b"\x00\x3c\x00\x47"

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
    """A delivery that is not complete yet."""

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


class Cursor:
    """A bounds-checked cursor that reads forward."""

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
        # The specification allows further flags in another short. No implementation uses them.
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
