"""Message to result: kombu's registry decides what is accepted and how values come back."""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu.compression import decompress
from kombu.exceptions import DecodeError
from kombu.serialization import dumps, loads

from fastres.errors import MalformedResult, OversizedResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastres._protocols import Arrival, Body, Delivery, Meta

__all__ = ("Decoder", "encode")

#: Bytes that unpacking LZMA may take: a header of 13 bytes can ask for 4 GB. The highest preset takes 65 MB.
LZMA_MEMORY = 1 << 28
#: Decompressors of the standard library stop at a limit; the others are checked when they are done.
STOPPING: dict[str, Any] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=LZMA_MEMORY),
}


def encode(meta: Meta, serializer: str) -> tuple[str, str, bytes]:
    """See :class:`fastres._protocols.Encode`."""
    content_type, content_encoding, body = dumps(meta, serializer)
    return content_type, content_encoding, body.encode(content_encoding) if isinstance(body, str) else body


class Decoder:
    """See :class:`fastres._protocols.Decoder`."""

    def __init__(self, accept: Iterable[str] | None, max_size: int) -> None:
        self._accept = None if accept is None else frozenset(accept)
        # One more than the limit is asked for, and must be a size still.
        self._max_size = min(max_size, sys.maxsize - 1)

    def decode_all(self, deliveries: Sequence[Delivery]) -> tuple[list[Arrival], list[tuple[Delivery, Exception]]]:
        arrivals: list[Arrival] = []
        refused: list[tuple[Delivery, Exception]] = []
        for delivery in deliveries:
            try:
                meta = self.decode(delivery)
            except Exception as exc:
                refused.append((delivery, exc))
            else:
                arrivals.append((delivery, meta["task_id"], meta))
        return arrivals, refused

    def decode(self, delivery: Delivery) -> Meta:
        body = delivery.body
        if isinstance(body, (bytearray, memoryview)):
            # Not every decoder takes them.
            body = bytes(body)
        if delivery.compression:
            body = self._decompress(body, delivery.compression)
        meta: Meta = loads(body, delivery.content_type, delivery.content_encoding, accept=self._accept)
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

    def _decompress(self, body: Body, compression: str) -> Any:
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
