"""The owner of a channel that consumes."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastres.amqp.session import all_up_to
from fastres.errors import refusal
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres._protocols import Delivery
    from fastres.addresses import Address
    from fastres.amqp.session import Session

__all__ = ("Consumer",)

TAG, CONSUMER = attrgetter("delivery_tag"), attrgetter("consumer_tag")


class Consumer:
    """Owns a channel: its queues, its unacknowledged deliveries, and whether it is closing.

    Deliveries of another channel will be redelivered, and cannot be acknowledged here.
    """

    def __init__(self, session: Session, channel: Any) -> None:
        self.session = session
        self.channel = channel
        #: By consumer tag.
        self.addresses: dict[str, Address] = {}
        #: Consumer tags by delivery tag, in order.
        self.unacknowledged: dict[Any, str] = {}
        #: Deliveries since the last call of ``take``.
        self.received: list[Delivery] = []
        self.cancelled = False

    def receive(self, deliveries: list[Delivery]) -> None:
        """Called with deliveries of the consumers."""
        if len(self.addresses) == 1:
            self.unacknowledged.update(dict.fromkeys(map(TAG, deliveries), deliveries[0].consumer_tag))
        else:
            self.unacknowledged.update(zip(map(TAG, deliveries), map(CONSUMER, deliveries)))
        self.received += deliveries

    def take_received(self) -> list[Delivery]:
        received, self.received = self.received, []
        return received

    def on_cancel(self, tag: str) -> None:
        """Called when the broker has cancelled a consumer: the queue was deleted."""
        self.cancelled = True

    def on_close(self, why: Exception) -> None:
        """Called when the broker has closed the channel, for example after ``consumer_timeout``."""
        why = refusal(why, self.session.uri)
        logger.warning("The broker closed a channel that results are read over, which is opened again: %s", why)
        self.cancelled = True

    def address_of(self, delivery: Delivery) -> Address:
        return self.addresses[delivery.consumer_tag]

    def settle(self, deliveries: Iterable[Delivery]) -> list[Any]:
        """Remove deliveries from the unacknowledged ones. Returns: their delivery tags."""
        settle = self.unacknowledged.pop
        return [tag for tag in map(TAG, deliveries) if settle(tag, None)]

    def acknowledge(self, tags: list[Any]) -> None:
        """Acknowledge in as few frames as possible."""
        self.session.acknowledge(self.channel, tags, all_up_to(tags, self.unacknowledged))
