"""The queues of results: their names and their arguments.

| result of                   | address                                                         |
| --------------------------- | --------------------------------------------------------------- |
| a task                      | named by its id: ``fastres.ids``                                |
| a client's (rpc)            | the client's reply queue                                        |
| a saved group               | ``fastres.saved.<quoted group id>``                             |
| a part of a chord           | ``fastres.chords.<shard>``, and where its task's result goes    |

A namespace replaces ``fastres``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from celery.exceptions import ImproperlyConfigured

from fastres import ids
from fastres.amqp.publishing import milliseconds

__all__ = ("Address", "Addresses")

#: How many states before the result are kept: of a task with a queue of its own, and of all tasks of a kin.
STATES_OF_ONE, STATES_OF_ALL = 1, 10_000
#: The same where they may get out of order while they are looked at.
STATES_OUT_OF_ORDER = 10

#: Celery's own default for ``result_exchange``, which every application has without asking for it.
CELERY_EXCHANGE = "celeryresults"


@dataclass(frozen=True)
class Address:
    """A queue that results are sent to."""

    name: str
    #: How many messages it keeps, None: all.
    max_length: int | None = None
    #: The task that it is for, None: several. It may be used again and again, and not expire as a whole: each of
    #: its messages does.
    of_task: str | None = None
    #: Whether tasks that are still to be sent will share it.
    is_page: bool = False
    #: Whether it never expires, and has a single active consumer.
    is_log: bool = False
    #: Whether it is a quorum queue: requeued messages may come behind later ones, there are no exclusive consumers, and
    #: it cannot be deleted on the condition that it is empty.
    is_quorum: bool = False


class Addresses:
    """Names and queues of one backend.

    Args:
        namespace: prefix of every name, None: ``fastres``.
        exchange: exchange that carries results; Celery's default means the default exchange.
        exchange_type: ``direct`` or ``topic``.
        expires: seconds after which an unused queue goes away with its results; None: never.
        queue_type: ``classic`` or ``quorum``.
        queue_class: a subclass of ``kombu.Queue``.
        exchange_class: a subclass of ``kombu.Exchange``.
    """

    def __init__(
        self,
        namespace: str | None,
        exchange: str | None,
        exchange_type: str,
        expires: float | None,
        queue_type: str,
        queue_class: Any,
        exchange_class: Any,
    ) -> None:
        self.prefix = namespace or ids.PREFIX
        self._queue_class = queue_class
        self.expires = expires
        self.is_quorum = queue_type == "quorum"
        named = exchange if exchange and exchange != CELERY_EXCHANGE else ""
        if named and exchange_type not in ("direct", "topic"):
            raise ImproperlyConfigured(
                f"result_exchange_type={exchange_type!r}: a result goes to one queue by its routing key, "
                "which takes a 'direct' or a 'topic' exchange"
            )
        self.exchange = exchange_class(named, type=exchange_type if named else "direct")

    def rkey(self, task_id: str) -> str:
        """The name of the queue of a task's result."""
        return ids.queue_name(task_id, self.prefix)

    def result(self, task_id: str) -> Address:
        """Where a task's result is."""
        kin = ids.parse(task_id)
        if kin is None:
            return Address(self.rkey(task_id), of_task=task_id, is_quorum=self.is_quorum)
        return Address(self.rkey(task_id), is_page=kin.kind == ids.Kind.PAGE, is_quorum=self.is_quorum)

    def states(self, task_id: str) -> Address:
        """Where the states of a task are that are not final: apart, so that results can be counted."""
        result = self.result(task_id)
        kept = STATES_OF_ALL if result.of_task is None else STATES_OF_ONE
        if self.is_quorum:
            # The latest need not be the last one.
            kept = max(kept, STATES_OUT_OF_ORDER)
        return replace(result, name=result.name + ids.STATES, max_length=kept)

    def by_result(self, task_ids: list[str]) -> dict[str, list[str]]:
        """Task ids by the name of the queue of their results."""
        return ids.by_queue(task_ids, self.prefix)

    def group(self, group_id: str) -> Address:
        """Where the results of a group's members are, if they have ids of its kin."""
        kin = ids.parse(group_id)
        return self.result(ids.new_id(ids.kin_of(group_id), ids.Kind.MEMBER if kin is None else kin.kind))

    def saved(self, group_id: str) -> Address:
        return Address(ids.quoted_name("saved", group_id, self.prefix), is_quorum=self.is_quorum)

    def chords(self, shard: int) -> Address:
        return Address(f"{self.prefix}.chords.{shard}", is_log=True, is_quorum=self.is_quorum)

    def refused(self) -> Address:
        """Where messages are put that came to a shard and are no events of chords."""
        return Address(f"{self.prefix}.chords.refused", is_quorum=self.is_quorum)

    def mailbox(self, oid: str) -> Address:
        return Address(oid)

    def queue(self, address: Address) -> Any:
        """The queue at an address: durable, of a type that no default of the virtual host changes, never
        auto-delete (RabbitMQ 4.3 refuses transient queues that are not exclusive, and an auto-delete one loses
        messages that arrive while there is no consumer).
        """
        arguments: dict[str, Any] = {"x-queue-type": "quorum" if address.is_quorum else "classic"}
        if address.is_log:
            arguments["x-single-active-consumer"] = True
        elif self.expires:
            arguments["x-expires"] = milliseconds(self.expires)
            if address.of_task is not None:
                arguments["x-message-ttl"] = arguments["x-expires"]
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
