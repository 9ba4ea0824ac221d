"""Decodes messages to results. kombu's registry defines which content types are accepted and how they are decoded.

JSON goes by another way where that makes no difference: see ``Decoder._fast``.
"""

import msgspec
from kombu.serialization import TRUSTED_CONTENT, dumps, loads, registry
from kombu.utils.json import dumps as kombu_json_dumps
from kombu.utils.json import loads as kombu_json

from fastres.compression import unpack
from fastres.errors import MalformedResult

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memchr

from fastres_ext.frames cimport Delivery

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef extern from * nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <string.h>
    """
    void* memmem(const void* haystack, size_t size, const void* needle, size_t needle_size)

__all__ = ("Decoder", "encode")

# Values that nest deeper are left to kombu.
cdef int DEEPEST = 64


def encode(meta, serializer):
    """See :class:`fastres._protocols.Encode`.

    Values that JSON has itself are written by msgspec, everything else by kombu: what is read is the same.
    """
    cdef object body
    if serializer == "json" and is_plain(meta, 0) and is_kombus_json():
        try:
            return "application/json", "utf-8", msgspec.json.encode(meta)
        except (ValueError, OverflowError):
            # A lone surrogate, say.
            pass
    content_type, content_encoding, body = dumps(meta, serializer)
    return content_type, content_encoding, body.encode(content_encoding) if isinstance(body, str) else body


cdef bint is_kombus_json() except -1:
    encoder = registry._encoders.get("json")
    return encoder is not None and encoder[2] is kombu_json_dumps


cdef bint is_plain(object value, int depth) except -1:
    """Whether JSON has a type for all these values, so that no encoder of kombu is needed."""
    cdef double number
    kind = type(value)
    if kind is str or kind is int or value is None or kind is bool:
        return True
    if kind is float:
        number = <double>value
        return number - number == 0  # not so for NaN and the infinities
    if depth == DEEPEST:
        return False
    if kind is dict:
        for key, inner in (<dict>value).items():
            if type(key) is not str or not is_plain(inner, depth + 1):
                return False
        return True
    if kind is list:
        for inner in <list>value:
            if not is_plain(inner, depth + 1):
                return False
        return True
    if kind is tuple:
        for inner in <tuple>value:
            if not is_plain(inner, depth + 1):
                return False
        return True
    return False


cdef class Decoder:
    """See :class:`fastres._protocols.Decoder`."""

    cdef frozenset _accept
    cdef Py_ssize_t _max_size
    cdef object _decode_json

    def __init__(self, accept, Py_ssize_t max_size):
        self._accept = None if accept is None else frozenset(accept)
        # One more than the limit is asked for, and must be a size still.
        self._max_size = min(max_size, PY_SSIZE_T_MAX - 1)
        self._decode_json = msgspec.json.Decoder().decode

    def decode_all(self, deliveries):
        cdef list arrivals = []
        cdef list refused = []
        cdef dict meta
        cdef bint plain = self._plain_json()
        for delivery in deliveries:
            try:
                meta = self._decode(delivery, plain)
            except Exception as exc:
                refused.append((delivery, exc))
            else:
                arrivals.append((delivery, meta["task_id"], meta))
        return arrivals, refused

    def decode(self, delivery):
        return self._decode(delivery, self._plain_json())

    # A Delivery may be None, in C as in Python: without this its attributes would be read all the same.
    @cython.nonecheck(True)
    cdef dict _decode(self, Delivery delivery, bint plain):
        cdef object meta = None
        cdef object body = delivery.body
        if type(body) is not bytes and isinstance(body, (bytearray, memoryview)):
            # Not every decoder takes them.
            body = bytes(body)
        if delivery.compression:
            body = unpack(body, delivery.compression, self._max_size)
        if plain and type(body) is bytes and delivery.content_type == "application/json":
            meta = self._fast(<bytes>body)
        if meta is None:
            meta = loads(body, delivery.content_type, delivery.content_encoding, accept=self._accept)
        if not isinstance(meta, dict):
            raise MalformedResult(f"a result is a mapping, this message holds {type(meta).__name__}")
        if not isinstance((<dict>meta).get("task_id"), str):
            if not delivery.correlation_id:
                raise MalformedResult("a result without task_id, in a message without correlation id")
            meta["task_id"] = delivery.correlation_id
        if not isinstance((<dict>meta).get("status"), str):
            raise MalformedResult("a result without status")
        if "result" not in <dict>meta:
            raise MalformedResult("a result without result")
        return <dict>meta

    cdef bint _plain_json(self) except -1:
        """Whether JSON is accepted, and no application has replaced kombu's decoder."""
        if registry._decoders.get("application/json") is not kombu_json:
            return False
        if self._accept is None:
            return "application/json" not in registry._disabled_content_types
        return "application/json" in self._accept or "application/json" in TRUSTED_CONTENT

    cdef object _fast(self, bytes body):
        """Decode a JSON body; None: kombu has to decode it.

        msgspec makes of JSON what Python's json does, value for value, or refuses it (NaN, infinities, lone
        surrogates, numbers beyond a double, whatever is not JSON): then kombu decides. kombu's own part are the
        objects with a ``__type__``, a name that may be spelt with escapes of ASCII characters too.
        """
        cdef const char* text = PyBytes_AS_STRING(body)
        cdef size_t size = PyBytes_GET_SIZE(body)
        if memmem(text, size, b"__type__", 8) != NULL:
            return None
        if memchr(text, c"\\", size) != NULL and memmem(text, size, b"\\u00", 4) != NULL:
            return None
        try:
            return self._decode_json(body)
        except (ValueError, RecursionError):
            return None
