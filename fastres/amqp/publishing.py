"""A message on its way to the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastres.addresses import Address

__all__ = ("Message", "Publishing")


class Message(NamedTuple):
    """A message to publish, encoded."""

    body: bytes
    content_type: str
    content_encoding: str
    correlation_id: str
    #: 2: on disk too, 1: in memory.
    delivery_mode: int
    headers: dict[str, Any]


class Publishing(NamedTuple):
    """A message, and where it goes."""

    message: Any
    exchange: str
    routing_key: str
    #: The queue that is made for it if there is none; None: it is not ours to make.
    address: Address | None = None
    #: Whether the broker must confirm this body before the parts of its chord are acknowledged.
    confirm: bool = False
