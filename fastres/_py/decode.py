"""Decodes messages to results. kombu's registry defines which content types are accepted and how they are decoded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kombu.serialization import dumps, loads

from fastres.compression import unpack
from fastres.errors import MalformedResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastres._protocols import Arrival, Delivery, Meta

__all__ = ("Decoder", "encode")


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
            body = unpack(body, delivery.compression, self._max_size)
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
