"""Where a result lives: the names of queues, and what they are declared with.

| result of             | address                                                       |
| --------------------- | ------------------------------------------------------------- |
| a lone task           | ``rkey(task_id)``, the contract of Celery 3.1                 |
| a member of a group   | ``fastres.group.<group id>``; its states before the last one: |
|                       | ``fastres.states.<group id>``                                 |
| a client's (rpc)      | the client's reply queue                                      |
| a saved group         | ``fastres.saved.<group id>``                                  |
| a part of a chord     | ``fastres.chords.<shard>``, and where its task's result goes  |

A namespace replaces ``fastres``, and stands before the names of lone tasks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery.exceptions import ImproperlyConfigured

__all__ = ("Address", "Addresses")

#: RabbitMQ's longest time, in milliseconds: a larger x-expires is refused.
MAX_EXPIRES = 2**32 - 1

#: Celery's own default for ``result_exchange``, which every application has without asking for it.
CELERY_EXCHANGE = "celeryresults"


@dataclass(frozen=True)
class Address:
    """A queue that results are sent to."""

    name: str
    #: How many messages it keeps, None: all. A lone task's keeps its latest state.
    max_length: int | None = None
    #: Whether it is there for good, and read by one consumer at a time while others stand by.
    is_log: bool = False


class Addresses:
    """Names and queues of one backend.

    Args:
        namespace: prefix of every name, None for the default names.
        exchange: exchange that carries results; Celery's default means the default exchange.
        exchange_type: ``direct`` or ``topic``.
        expires: seconds after which an unused queue goes away with its results; None: never.
        queue_class: a subclass of ``kombu.Queue``.
        exchange_class: a subclass of ``kombu.Exchange``.
    """

    def __init__(
        self,
        namespace: str | None,
        exchange: str | None,
        exchange_type: str,
        expires: float | None,
        queue_class: Any,
        exchange_class: Any,
    ) -> None:
        self._prefix = f"{namespace}." if namespace else ""
        self._family = namespace or "fastres"
        self._queue_class = queue_class
        self.expires = expires
        named = exchange if exchange and exchange != CELERY_EXCHANGE else ""
        if named and exchange_type not in ("direct", "topic"):
            raise ImproperlyConfigured(
                f"result_exchange_type={exchange_type!r}: a result goes to one queue by its routing key, "
                "which takes a 'direct' or a 'topic' exchange"
            )
        self.exchange = exchange_class(named, type=exchange_type if named else "direct")

    def rkey(self, task_id: str) -> str:
        return self._prefix + task_id.replace("-", "")

    def task(self, task_id: str) -> Address:
        return Address(self.rkey(task_id), max_length=1)

    def group(self, group_id: str) -> Address:
        return Address(f"{self._family}.group.{group_id}")

    def states(self, group_id: str) -> Address:
        return Address(f"{self._family}.states.{group_id}")

    def saved(self, group_id: str) -> Address:
        return Address(f"{self._family}.saved.{group_id}")

    def chords(self, shard: int) -> Address:
        return Address(f"{self._family}.chords.{shard}", is_log=True)

    def refused(self) -> Address:
        """Where messages are put that came to a shard and are no events of chords."""
        return Address(f"{self._family}.chords.refused")

    def mailbox(self, oid: str) -> Address:
        return Address(oid)

    def probe(self, name: str) -> Address:
        """A queue to try the broker with."""
        return Address(f"{self._family}.probe.{name}")

    def queue(self, address: Address) -> Any:
        """The queue at an address: durable, classic, never auto-delete (RabbitMQ 4.3 refuses transient
        queues that are not exclusive, and an auto-delete one loses what comes while nobody consumes).
        """
        arguments: dict[str, Any] = {}
        if address.is_log:
            arguments["x-single-active-consumer"] = True
        elif self.expires:
            arguments["x-expires"] = min(max(int(self.expires * 1000), 1), MAX_EXPIRES)
        if address.max_length is not None:
            arguments["x-max-length"] = address.max_length
        return self._queue_class(
            address.name,
            self.exchange,
            address.name,
            durable=True,
            auto_delete=False,
            queue_arguments=arguments,
        )
