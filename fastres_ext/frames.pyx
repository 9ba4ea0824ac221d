"""Parses AMQP 0-9-1 frames: deliveries on channels of fastres are assembled, all other frames are passed on.

The wire layout is in fastres/_py/frames.py.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memcmp, memcpy

from amqp.exceptions import FrameSyntaxError

__all__ = ("Delivery", "Frames")

cdef enum:
    METHOD = 1
    HEADER = 2
    BODY = 3
    FRAME_END = 0xCE
    DELIVER = 60
    GET_OK = 71
    FRAME_HEADER = 7
    OVERHEAD = 8


# Holds strings, bytes and numbers: nothing that could refer back to it.
@cython.no_gc
@cython.freelist(1024)
cdef class Delivery:
    """See :class:`fastres._protocols.Delivery`."""

    def __init__(
        self, channel_id, consumer_tag, delivery_tag, redelivered, body, content_type=None,
        content_encoding=None, correlation_id=None, compression=None, keep=False,
    ):
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


cdef class Partial:
    """A delivery that is not complete yet."""

    cdef Delivery delivery
    cdef list frames
    cdef list parts
    cdef long long left


# Reads forward within bounds. `need > end - p` cannot overflow; `p + need > end` could.
cdef struct Cursor:
    const unsigned char* p
    const unsigned char* end


cdef int too_short() except -1:
    raise FrameSyntaxError("a frame is shorter than its contents")


cdef inline int need(Cursor* cursor, size_t size) except -1:
    if size > <size_t>(cursor.end - cursor.p):
        too_short()
    return 0


cdef inline int skip(Cursor* cursor, size_t size) except -1:
    need(cursor, size)
    cursor.p += size
    return 0


cdef inline int octet(Cursor* cursor) except -1:
    need(cursor, 1)
    cursor.p += 1
    return cursor.p[-1]


cdef inline unsigned int short_(Cursor* cursor) except? 0xFFFF:
    need(cursor, 2)
    cursor.p += 2
    return (<unsigned int>cursor.p[-2] << 8) | cursor.p[-1]


cdef inline unsigned int long_(Cursor* cursor) except? 0xFFFFFFFF:
    need(cursor, 4)
    cursor.p += 4
    return be32(cursor.p - 4)


cdef inline unsigned int be32(const unsigned char* p) noexcept nogil:
    return (<unsigned int>p[0] << 24) | (<unsigned int>p[1] << 16) | (<unsigned int>p[2] << 8) | p[3]


cdef inline unsigned long long longlong(Cursor* cursor) except? 0xFFFFFFFFFFFFFFFF:
    need(cursor, 8)
    cursor.p += 8
    return (<unsigned long long>be32(cursor.p - 8) << 32) | be32(cursor.p - 4)


cdef inline str text(Cursor* cursor, size_t size):
    need(cursor, size)
    cursor.p += size
    return PyUnicode_DecodeUTF8(<const char*>(cursor.p - size), size, "surrogateescape")


# Names of consumers, content types and encodings come again and again.
cdef inline str known_text(Cursor* cursor, str known, bytes encoded):
    cdef size_t size = octet(cursor)
    need(cursor, size)
    if (
        known is not None
        and <size_t>PyBytes_GET_SIZE(encoded) == size
        and memcmp(cursor.p, PyBytes_AS_STRING(encoded), size) == 0
    ):
        cursor.p += size
        return known
    return text(cursor, size)


cdef class Frames:
    """See :class:`fastres._protocols.Frames`."""

    # Threads may share one: whatever reads or changes it holds its critical section, which a GIL makes free.
    cdef readonly Py_ssize_t consumed
    cdef size_t _frame_max
    cdef set _owned
    cdef dict _partial
    cdef bytes _rest
    cdef str _tag, _content_type, _content_encoding
    cdef bytes _tag_bytes, _content_type_bytes, _content_encoding_bytes

    def __init__(self, size_t frame_max):
        self._frame_max = frame_max
        self._owned = set()
        self._partial = {}
        self._rest = b""

    @cython.critical_section
    def own(self, channel_id):
        self._owned.add(channel_id)

    @cython.critical_section
    def disown(self, channel_id):
        self._owned.discard(channel_id)
        self._partial.pop(channel_id, None)

    @cython.critical_section
    def feed(self, data):
        cdef bytes buffer = data if type(data) is bytes and not self._rest else self._rest + bytes(data)
        self._rest = b""
        cdef list deliveries = []
        cdef list others = []
        cdef const unsigned char* begin = <const unsigned char*>PyBytes_AS_STRING(buffer)
        cdef const unsigned char* start = begin
        cdef const unsigned char* end = begin + PyBytes_GET_SIZE(buffer)
        cdef const unsigned char* stop
        cdef const unsigned char* payload
        cdef const unsigned char* after
        cdef size_t size
        cdef int kind, channel_id
        cdef Delivery delivery
        cdef Partial partial
        cdef Cursor cursor
        while end - start >= FRAME_HEADER:
            kind = start[0]
            channel_id = (<int>start[1] << 8) | start[2]
            size = be32(start + 3)
            if size + OVERHEAD > self._frame_max:
                raise FrameSyntaxError(
                    f"a frame of {size + OVERHEAD} bytes, {self._frame_max} were negotiated at most"
                )
            if <size_t>(end - start) < size + OVERHEAD:
                break
            payload = start + FRAME_HEADER
            stop = payload + size + 1
            if stop[-1] != FRAME_END:
                raise FrameSyntaxError(f"a frame ends with {stop[-1]:#04x} instead of 0xce")
            self.consumed += 1
            cursor.p = payload
            cursor.end = stop - 1
            partial = self._partial.get(channel_id) if self._partial else None
            if (
                kind == METHOD
                and size >= 4
                and payload[0] == 0 and payload[1] == 60 and payload[2] == 0
                and (payload[3] == DELIVER or payload[3] == GET_OK)
                and channel_id in self._owned
            ):
                if partial is not None:
                    raise FrameSyntaxError(f"a delivery on channel {channel_id} inside of another")
                cursor.p += 4
                delivery = self._deliver(&cursor, channel_id, payload[3] == DELIVER)
                after = self._content(stop, end, delivery, channel_id)
                if after != NULL:
                    self.consumed += 2
                    deliveries.append(delivery)
                    stop = after
                else:
                    partial = Partial.__new__(Partial)
                    partial.delivery = delivery
                    partial.frames = [cut(start, stop)]
                    partial.left = -1
                    self._partial[channel_id] = partial
            elif kind == HEADER and partial is not None and partial.left < 0:
                partial.left = self._header(&cursor, partial.delivery)
                if partial.left:
                    partial.frames.append(cut(start, stop))
                else:
                    del self._partial[channel_id]
                    partial.delivery.body = b""
                    deliveries.append(partial.delivery)
            elif kind == BODY and partial is not None and partial.left > 0:
                if size > <unsigned long long>partial.left:
                    raise FrameSyntaxError(f"a body on channel {channel_id} is longer than its header says")
                partial.left -= size
                if partial.left:
                    if partial.parts is None:
                        partial.parts = []
                    partial.parts.append(cut(payload, stop - 1))
                    partial.frames.append(cut(start, stop))
                else:
                    del self._partial[channel_id]
                    if partial.parts is None:
                        partial.delivery.body = cut(payload, stop - 1)
                    else:
                        partial.parts.append(cut(payload, stop - 1))
                        partial.delivery.body = b"".join(partial.parts)
                    deliveries.append(partial.delivery)
            else:
                self.consumed -= 1
                others.append((kind, channel_id, cut(payload, stop - 1)))
            start = stop
        self._rest = cut(start, end)
        return deliveries, others

    @cython.critical_section
    def unused(self):
        cdef list frames = []
        for partial in self._partial.values():
            frames += (<Partial>partial).frames
        rest, self._rest = self._rest, b""
        self.consumed -= len(frames)
        self._partial.clear()
        frames.append(rest)
        return b"".join(frames)

    cdef const unsigned char* _content(
        self, const unsigned char* start, const unsigned char* end, Delivery delivery, int channel_id
    ) except? NULL:
        """Read a content header and a body that follow in one complete frame each, and return where they end.

        NULL: they do not; what is not as it should be is left for the one who takes frame by frame to refuse.
        """
        cdef const unsigned char* header = start + FRAME_HEADER
        cdef const unsigned char* body
        cdef size_t header_size, body_size
        cdef Cursor cursor
        if not follows(start, end, HEADER, channel_id, self._frame_max):
            return NULL
        header_size = be32(start + 3)
        start = header + header_size + 1
        if not follows(start, end, BODY, channel_id, self._frame_max):
            return NULL
        body = start + FRAME_HEADER
        body_size = be32(start + 3)
        # The size of the body stands behind class and weight.
        if header_size < 12 or be32(header + 4) != 0 or be32(header + 8) != body_size or body_size == 0:
            return NULL
        cursor.p = header
        cursor.end = header + header_size
        self._header(&cursor, delivery)
        delivery.body = cut(body, body + body_size)
        return body + body_size + 1

    cdef Delivery _deliver(self, Cursor* cursor, int channel_id, bint consumed):
        cdef Delivery delivery = Delivery.__new__(Delivery)
        cdef str tag = ""
        if consumed:
            tag = known_text(cursor, self._tag, self._tag_bytes)
            if tag is not self._tag:
                self._tag, self._tag_bytes = tag, tag.encode("utf-8", "surrogateescape")
        delivery.consumer_tag = tag
        delivery.channel_id = channel_id
        delivery.delivery_tag = longlong(cursor)
        delivery.redelivered = bool(octet(cursor) & 1)
        skip(cursor, octet(cursor))
        skip(cursor, octet(cursor))
        delivery.keep = False
        return delivery

    cdef long long _header(self, Cursor* cursor, Delivery delivery) except -2:
        """Read the properties that results use into the delivery, and return the size of the body."""
        cdef unsigned long long size
        cdef unsigned int flags
        cdef str value
        skip(cursor, 4)
        size = longlong(cursor)
        if size > 0x7FFFFFFFFFFFFFFF:
            raise FrameSyntaxError(f"a body of {size} bytes")
        flags = short_(cursor)
        if flags & 1:
            # By the specification, flags may continue in another short; basic.properties needs one only.
            raise FrameSyntaxError("continued property flags")
        if flags & 0x8000:
            value = known_text(cursor, self._content_type, self._content_type_bytes)
            if value is not self._content_type:
                self._content_type, self._content_type_bytes = value, value.encode("utf-8", "surrogateescape")
            delivery.content_type = value
        if flags & 0x4000:
            value = known_text(cursor, self._content_encoding, self._content_encoding_bytes)
            if value is not self._content_encoding:
                self._content_encoding = value
                self._content_encoding_bytes = value.encode("utf-8", "surrogateescape")
            delivery.content_encoding = value
        if flags & 0x2000:
            read_headers(cursor, delivery)
        if flags & 0x1000:
            skip(cursor, 1)
        if flags & 0x0800:
            skip(cursor, 1)
        if flags & 0x0400:
            delivery.correlation_id = text(cursor, octet(cursor))
        return <long long>size


cdef inline bint follows(
    const unsigned char* start, const unsigned char* end, int kind, int channel_id, size_t frame_max
) noexcept nogil:
    """Whether a complete frame of this kind and channel starts here."""
    cdef size_t size
    if end - start < FRAME_HEADER:
        return False
    size = be32(start + 3)
    return (
        start[0] == kind
        and ((<int>start[1] << 8) | start[2]) == channel_id
        and size + OVERHEAD <= frame_max
        and <size_t>(end - start) >= size + OVERHEAD
        and start[FRAME_HEADER + size] == FRAME_END
    )


cdef int read_headers(Cursor* cursor, Delivery delivery) except -1:
    """Read the fields of a table that fastres uses: compression and fastres-keep."""
    cdef Cursor table
    cdef size_t size = long_(cursor)
    cdef const unsigned char* name
    cdef int name_size, kind
    need(cursor, size)
    table.p = cursor.p
    table.end = cursor.p + size
    cursor.p += size
    while table.p < table.end:
        name_size = octet(&table)
        name = table.p
        skip(&table, name_size)
        kind = octet(&table)
        if name_size == 11 and kind == c"S" and memcmp(name, b"compression", 11) == 0:
            size = long_(&table)
            delivery.compression = text(&table, size)
        elif name_size == 12 and kind == c"t" and memcmp(name, b"fastres-keep", 12) == 0:
            delivery.keep = octet(&table) != 0
        elif kind == c"V":
            pass
        elif kind in (c"t", c"b", c"B"):
            skip(&table, 1)
        elif kind in (c"s", c"u"):
            skip(&table, 2)
        elif kind in (c"I", c"i", c"f"):
            skip(&table, 4)
        elif kind == c"D":
            skip(&table, 5)
        elif kind in (c"l", c"L", c"d", c"T"):
            skip(&table, 8)
        elif kind in (c"S", c"A", c"F", c"x"):
            size = long_(&table)
            skip(&table, size)
        else:
            raise FrameSyntaxError(f"a header of the unknown type {kind:#04x}")
    return 0


cdef inline bytes cut(const unsigned char* start, const unsigned char* stop):
    return PyBytes_FromStringAndSize(<const char*>start, stop - start)
