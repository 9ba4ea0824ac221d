"""Messages to publish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastres.addresses import Address

__all__ = ("MAX_EXPIRES", "Message", "Publishing", "milliseconds")

#: RabbitMQ's longest time, in milliseconds: it refuses a larger x-expires or expiration.
MAX_EXPIRES = 2**32 - 1


class Message(NamedTuple):
    """An encoded message."""

    body: bytes
    content_type: str
    content_encoding: str
    correlation_id: str
    #: 2: on disk too, 1: in memory.
    delivery_mode: int
    headers: dict[str, Any]
    #: Seconds after which the broker drops the message; None: when its queue expires.
    expiration: float | None = None


class Publishing(NamedTuple):
    """A message and its route."""

    message: Any
    exchange: str
    routing_key: str
    #: The queue to declare if it does not exist; None: the queue is not fastres's own.
    address: Address | None = None
    #: Whether the broker must confirm this body before the parts of its chord are acknowledged.
    confirm: bool = False


def milliseconds(seconds: float) -> int:
    """Seconds as RabbitMQ takes an expiry: at least one millisecond, at most ``MAX_EXPIRES``."""
    return min(max(int(seconds * 1000), 1), MAX_EXPIRES)
