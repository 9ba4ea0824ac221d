"""AMQP 0-9-1 frames out of a stream of bytes: deliveries of our own channels, everything else as it came.

The wire layout is in fastres/_py/frames.py.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memcmp, memcpy

from amqp.exceptions import FrameSyntaxError

__all__ = ("Delivery", "Frames", "MessageTemplate", "publication")

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
    """A delivery of which frames are still to come."""

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
        """Read a header and a body that follow whole, in one frame each: where they end.

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
        """Read the properties that a result needs into the delivery; the size of the body."""
        cdef unsigned long long size
        cdef unsigned int flags
        cdef str value
        skip(cursor, 4)
        size = longlong(cursor)
        if size > 0x7FFFFFFFFFFFFFFF:
            raise FrameSyntaxError(f"a body of {size} bytes")
        flags = short_(cursor)
        if flags & 1:
            # The specification lets flags go on in another short; nobody has ever had that many properties.
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
    """Whether a whole frame of this kind and channel starts here."""
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
    """The fields of a table that mean something to fastres: compression, and fastres-keep."""
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


# Writes forward; whoever makes one has measured what will be written.
cdef struct Pen:
    unsigned char* p


cdef inline void put(Pen* pen, bytes data) noexcept:
    memcpy(pen.p, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    pen.p += PyBytes_GET_SIZE(data)


cdef inline void put_integer(Pen* pen, unsigned long long value, int size) noexcept nogil:
    cdef int number
    for number in range(size):
        pen.p[number] = <unsigned char>((value >> (8 * (size - 1 - number))) & 0xFF)
    pen.p += size


cdef inline void put_string(Pen* pen, bytes text) noexcept:
    put_integer(pen, PyBytes_GET_SIZE(text), 1)
    put(pen, text)


cdef inline void put_frame(Pen* pen, int kind, int channel_id, size_t size) noexcept nogil:
    """The begin of a frame."""
    put_integer(pen, kind, 1)
    put_integer(pen, channel_id, 2)
    put_integer(pen, size, 4)


cdef bytes short_string(str text):
    cdef bytes encoded = text.encode("utf-8", "surrogateescape")
    if PyBytes_GET_SIZE(encoded) > 255:
        raise FrameSyntaxError(f"a name of {len(encoded)} bytes, 255 are the most: {text[:40]}...")
    return encoded


def publication(
    int channel_id, size_t frame_max, str exchange, str routing_key, bint mandatory, bytes body not None,
    str content_type, str content_encoding, bytes headers not None, unsigned char delivery_mode, str correlation_id,
):
    """See :class:`fastres._protocols.Publication`."""
    if frame_max <= OVERHEAD:
        raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
    cdef bytes to = short_string(exchange)
    cdef bytes key = short_string(routing_key)
    cdef bytes kind = short_string(content_type)
    cdef bytes encoding = short_string(content_encoding)
    cdef bytes task = short_string(correlation_id)
    cdef size_t left = PyBytes_GET_SIZE(body)
    cdef size_t most = frame_max - OVERHEAD
    cdef size_t method = 6 + 1 + PyBytes_GET_SIZE(to) + 1 + PyBytes_GET_SIZE(key) + 1
    cdef size_t header = (
        14 + 1 + PyBytes_GET_SIZE(kind) + 1 + PyBytes_GET_SIZE(encoding) + PyBytes_GET_SIZE(headers)
        + 1 + 1 + PyBytes_GET_SIZE(task)
    )
    cdef size_t parts = left // most + (left % most != 0)
    cdef bytes frames = PyBytes_FromStringAndSize(
        NULL, method + OVERHEAD + header + OVERHEAD + left + parts * OVERHEAD
    )
    cdef const char* rest = PyBytes_AS_STRING(body)
    cdef size_t size
    cdef Pen pen
    pen.p = <unsigned char*>PyBytes_AS_STRING(frames)
    put_frame(&pen, METHOD, channel_id, method)
    put_integer(&pen, 0x003C0028, 4)
    put_integer(&pen, 0, 2)
    put_string(&pen, to)
    put_string(&pen, key)
    put_integer(&pen, mandatory, 1)
    put_integer(&pen, FRAME_END, 1)
    put_frame(&pen, HEADER, channel_id, header)
    put_integer(&pen, 0x003C0000, 4)
    put_integer(&pen, left, 8)
    put_integer(&pen, 0xF400 if PyBytes_GET_SIZE(headers) else 0xD400, 2)
    put_string(&pen, kind)
    put_string(&pen, encoding)
    put(&pen, headers)
    put_integer(&pen, delivery_mode, 1)
    put_string(&pen, task)
    put_integer(&pen, FRAME_END, 1)
    while left:
        size = min(left, most)
        put_frame(&pen, BODY, channel_id, size)
        memcpy(pen.p, rest, size)
        pen.p += size
        put_integer(&pen, FRAME_END, 1)
        rest += size
        left -= size
    return frames


cdef enum:
    # What differs: fastres._protocols.
    ID = 0
    PLACE = 1
    TEXT = 2
    TABLE = 3
    ID_SIZE = 36


cdef class MessageTemplate:
    """See :class:`fastres._protocols.MessageTemplate`."""

    cdef bytes _method
    cdef list _pieces
    cdef bytes _slots
    cdef int _channel_id
    cdef size_t _most
    # Octets of a header without its texts, and how many texts there are.
    cdef size_t _fixed
    cdef size_t _texts
    cdef size_t _table
    cdef bytearray _buffer
    cdef size_t _used

    def __init__(
        self, int channel_id, size_t frame_max, str exchange, str routing_key, bint mandatory, properties,
        bytes slots not None, size_t table,
    ):
        if frame_max <= OVERHEAD:
            raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
        self._pieces = [bytes(piece) for piece in properties]
        if len(slots) != len(self._pieces) - 1 or not set(slots) <= {ID, PLACE, TEXT, TABLE}:
            raise ValueError(f"{len(self._pieces)} pieces of properties do not go with slots {slots!r}")
        cdef bytes to = short_string(exchange)
        cdef bytes key = short_string(routing_key)
        cdef size_t method = 6 + 1 + PyBytes_GET_SIZE(to) + 1 + PyBytes_GET_SIZE(key) + 1
        self._method = PyBytes_FromStringAndSize(NULL, method + OVERHEAD)
        cdef Pen pen
        pen.p = <unsigned char*>PyBytes_AS_STRING(self._method)
        put_frame(&pen, METHOD, channel_id, method)
        put_integer(&pen, 0x003C0028, 4)
        put_integer(&pen, 0, 2)
        put_string(&pen, to)
        put_string(&pen, key)
        put_integer(&pen, mandatory, 1)
        put_integer(&pen, FRAME_END, 1)
        self._slots = slots
        self._channel_id = channel_id
        self._most = frame_max - OVERHEAD
        self._fixed = 12 + sum(map(len, self._pieces))
        self._texts = 0
        self._table = table
        for slot in slots:
            self._fixed += ID_SIZE if slot == ID else 4
            self._texts += slot == TEXT
        self._buffer = bytearray(1 << 16)
        self._used = 0

    def add(self, bytes id_ not None, unsigned int place, bytes text not None, bytes body not None):
        if PyBytes_GET_SIZE(id_) != ID_SIZE:
            raise ValueError(f"an id has {ID_SIZE} bytes: {id_!r}")
        cdef size_t header = self._fixed + self._texts * PyBytes_GET_SIZE(text)
        if header > self._most:
            raise FrameSyntaxError(f"a header of {header} bytes, over the {self._most} of a frame")
        cdef size_t left = PyBytes_GET_SIZE(body)
        cdef size_t parts = left // self._most + (left % self._most != 0)
        cdef size_t size = (
            PyBytes_GET_SIZE(self._method) + header + OVERHEAD + left + parts * OVERHEAD
        )
        cdef size_t room = len(self._buffer)
        if room - self._used < size:
            if PyByteArray_Resize(self._buffer, max(2 * room, self._used + size)) < 0:
                raise MemoryError
        cdef Pen pen
        pen.p = <unsigned char*>PyByteArray_AS_STRING(self._buffer) + self._used
        put(&pen, self._method)
        put_frame(&pen, HEADER, self._channel_id, header)
        put_integer(&pen, 0x003C0000, 4)
        put_integer(&pen, left, 8)
        cdef Py_ssize_t number
        cdef int slot
        put(&pen, <bytes>self._pieces[0])
        for number in range(PyBytes_GET_SIZE(self._slots)):
            slot = PyBytes_AS_STRING(self._slots)[number]
            if slot == ID:
                put(&pen, id_)
            elif slot == PLACE:
                put_integer(&pen, place, 4)
            elif slot == TABLE:
                put_integer(&pen, self._table + self._texts * PyBytes_GET_SIZE(text), 4)
            else:
                put_integer(&pen, PyBytes_GET_SIZE(text), 4)
                put(&pen, text)
            put(&pen, <bytes>self._pieces[number + 1])
        put_integer(&pen, FRAME_END, 1)
        cdef const char* rest = PyBytes_AS_STRING(body)
        cdef size_t part
        while left:
            part = min(left, self._most)
            put_frame(&pen, BODY, self._channel_id, part)
            memcpy(pen.p, rest, part)
            pen.p += part
            put_integer(&pen, FRAME_END, 1)
            rest += part
            left -= part
        self._used += size

    def __len__(self):
        return self._used

    def take(self):
        frames = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(self._buffer), self._used)
        self._used = 0
        return frames
