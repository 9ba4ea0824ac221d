# cython: freethreading_compatible=True
"""Message to result: kombu's registry decides what is accepted and how values come back."""

import bz2
import lzma
import zlib

from kombu.compression import decompress
from kombu.exceptions import DecodeError
from kombu.serialization import loads

from fastres.errors import MalformedResult, OversizedResult

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

__all__ = ("Decoder",)

# Decompressors of the standard library stop at a limit; the others are checked when they are done.
STOPPING = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}


cdef class Decoder:
    """See :class:`fastres._protocols.Decoder`."""

    cdef frozenset _accept
    cdef Py_ssize_t _max_size

    def __init__(self, accept, Py_ssize_t max_size):
        self._accept = None if accept is None else frozenset(accept)
        # One more than the limit is asked for, and must be a size still.
        self._max_size = min(max_size, PY_SSIZE_T_MAX - 1)

    def decode_all(self, deliveries):
        cdef list arrivals = []
        cdef list refused = []
        for delivery in deliveries:
            try:
                meta = self.decode(delivery)
            except Exception as exc:
                refused.append((delivery, exc))
            else:
                arrivals.append((delivery, meta["task_id"], meta))
        return arrivals, refused

    def decode(self, delivery):
        body = delivery.body
        if delivery.compression:
            body = self._decompress(body, delivery.compression)
        meta = loads(body, delivery.content_type, delivery.content_encoding, accept=self._accept)
        if not isinstance(meta, dict):
            raise MalformedResult(f"a result is a mapping, this message holds {type(meta).__name__}")
        if not isinstance(meta.get("task_id"), str):
            if not delivery.correlation_id:
                raise MalformedResult("a result without task_id, in a message without correlation id")
            meta["task_id"] = delivery.correlation_id
        if not isinstance(meta.get("status"), str):
            raise MalformedResult("a result without status")
        if "result" not in meta:
            raise MalformedResult("a result without result")
        return meta

    cdef _decompress(self, body, compression):
        data = body.encode() if isinstance(body, str) else body
        try:
            if compression in STOPPING:
                stopping = STOPPING[compression]()
                unpacked = stopping.decompress(data, self._max_size + 1)
                if len(unpacked) <= self._max_size and not stopping.eof:
                    raise DecodeError(f"a truncated {compression} body")
            else:
                unpacked = decompress(data, compression)
        except DecodeError:
            raise
        except Exception as exc:
            raise DecodeError(f"cannot unpack a {compression} body: {exc!r}") from exc
        if len(unpacked) > self._max_size:
            raise OversizedResult(f"a {compression} body of more than {self._max_size} bytes")
        return unpacked
