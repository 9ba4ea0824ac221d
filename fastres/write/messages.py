"""Encodes results as messages."""

from __future__ import annotations

from datetime import datetime, timezone, tzinfo
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import ImproperlyConfigured
from kombu.compression import compress, encoders, get_encoder

from fastres._impl import encode
from fastres._protocols import COMPRESSION
from fastres.amqp.publishing import Message

if TYPE_CHECKING:
    from fastres._protocols import Meta

__all__ = ("Encoder", "plain_meta")

#: Characters of a correlation id at most: a property has 255 bytes, and a character up to 4.
LONGEST_CORRELATION_ID = 63


class Encoder:
    """Encodes results as messages.

    Args:
        serializer: the name of a serializer of kombu.
        compression: the name of a compression method of kombu; None: no compression.
        delivery_mode: 2: persistent, 1: transient.

    Raises:
        celery.exceptions.ImproperlyConfigured: there is no such compression.
    """

    def __init__(self, serializer: str, compression: str | None, delivery_mode: int) -> None:
        self._serializer = serializer
        self._compression = compression or None
        self._delivery_mode = delivery_mode
        if self._compression:
            try:
                get_encoder(self._compression)
            except KeyError:
                raise ImproperlyConfigured(
                    f"result_compression={compression!r}: there is no such method; "
                    f"there are {', '.join(sorted(encoders()))}"
                ) from None

    def encode(
        self,
        meta: Meta,
        correlation_id: str,
        headers: dict[str, Any] | None = None,
        expiration: float | None = None,
    ) -> Message:
        """A message.

        Args:
            expiration: seconds after which the broker drops it; None: when its queue expires.

        Raises:
            kombu.exceptions.EncodeError: the serializer does not take a value.
        """
        content_type, content_encoding, body = encode(meta, self._serializer)
        if self._compression:
            body, compression = compress(body, self._compression)
            headers = {**(headers or {}), COMPRESSION: compression}
        # Only the body has room for any id.
        if len(correlation_id) > LONGEST_CORRELATION_ID or not correlation_id.isprintable():
            correlation_id = ""
        return Message(
            body, content_type, content_encoding, correlation_id, self._delivery_mode, headers or {}, expiration
        )


def plain_meta(result: Any, state: str, traceback: Any, request: Any, children: list[Any], zone: tzinfo) -> Meta:
    """A meta as Celery makes it without ``result_extended``.

    In Celery, looking up that setting and formatting the date take longer than everything else.

    Args:
        children: of the task, as tuples.
        zone: of the application's times.
    """
    done = datetime.now(timezone.utc).astimezone(zone) if state in states.READY_STATES else None
    meta = {
        "status": state,
        "result": result,
        "traceback": traceback,
        "children": children,
        "date_done": None if done is None else done.isoformat(),
    }
    for field, of_request in (("group_id", "group"), ("parent_id", "parent_id")):
        value = getattr(request, of_request, None)
        if value:
            meta[field] = value
    return meta
