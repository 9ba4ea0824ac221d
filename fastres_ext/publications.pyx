"""Encodes messages to publish as AMQP 0-9-1 frames.

The wire layout is in fastres/_py/frames.py.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

from amqp.exceptions import FrameSyntaxError

__all__ = ("MessageTemplate", "publication")

cdef enum:
    METHOD = 1
    HEADER = 2
    BODY = 3
    FRAME_END = 0xCE
    OVERHEAD = 8


# Writes forward, without checks: the caller has computed the size before.
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
    """Write the begin of a frame."""
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
    str expiration="",
):
    """See :class:`fastres._protocols.Publication`."""
    if frame_max <= OVERHEAD:
        raise FrameSyntaxError(f"frames of {frame_max} bytes at most hold nothing")
    cdef bytes to = short_string(exchange)
    cdef bytes key = short_string(routing_key)
    cdef bytes kind = short_string(content_type)
    cdef bytes encoding = short_string(content_encoding)
    cdef bytes task = short_string(correlation_id)
    cdef bytes lifetime = short_string(expiration)
    cdef unsigned int flags = 0xD400
    cdef size_t left = PyBytes_GET_SIZE(body)
    cdef size_t most = frame_max - OVERHEAD
    cdef size_t method = 6 + 1 + PyBytes_GET_SIZE(to) + 1 + PyBytes_GET_SIZE(key) + 1
    cdef size_t header = (
        14 + 1 + PyBytes_GET_SIZE(kind) + 1 + PyBytes_GET_SIZE(encoding) + PyBytes_GET_SIZE(headers)
        + 1 + 1 + PyBytes_GET_SIZE(task)
    )
    if PyBytes_GET_SIZE(headers):
        flags |= 0x2000
    if PyBytes_GET_SIZE(lifetime):
        flags |= 0x0100
        header += 1 + PyBytes_GET_SIZE(lifetime)
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
    put_integer(&pen, flags, 2)
    put_string(&pen, kind)
    put_string(&pen, encoding)
    put(&pen, headers)
    put_integer(&pen, delivery_mode, 1)
    put_string(&pen, task)
    if PyBytes_GET_SIZE(lifetime):
        put_string(&pen, lifetime)
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

    # Threads may share one: whatever reads or changes it holds its critical section, which a GIL makes free.
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

    @cython.critical_section
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

    @cython.critical_section
    def __len__(self):
        return self._used

    @cython.critical_section
    def take(self):
        frames = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(self._buffer), self._used)
        self._used = 0
        return frames
