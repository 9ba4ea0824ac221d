"""Message to result: kombu's registry decides what is accepted and how values come back."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import TYPE_CHECKING, Any

from kombu.compression import decompress
from kombu.exceptions import DecodeError
from kombu.serialization import loads

from fastres.errors import MalformedResult, OversizedResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres._protocols import Body, Meta

__all__ = ("Decoder",)

#: Decompressors of the standard library stop at a limit; the others are checked when they are done.
STOPPING: dict[str, Any] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}


class Decoder:
    """See :class:`fastres._protocols.Decoder`."""

    def __init__(self, accept: Iterable[str] | None, max_size: int) -> None:
        self._accept = None if accept is None else frozenset(accept)
        self._max_size = max_size

    def decode(
        self,
        body: Body,
        content_type: str | None,
        content_encoding: str | None,
        compression: str | None,
        correlation_id: str | None,
    ) -> Meta:
        if compression:
            body = self._decompress(body, compression)
        meta = loads(body, content_type, content_encoding, accept=self._accept)
        if not isinstance(meta, dict):
            raise MalformedResult(f"a result is a mapping, this message holds {type(meta).__name__}")
        if not isinstance(meta.get("task_id"), str):
            if not correlation_id:
                raise MalformedResult("a result without task_id, in a message without correlation id")
            meta["task_id"] = correlation_id
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
