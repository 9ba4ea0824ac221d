"""The logger of fastres, and the counters of reported messages."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from celery.utils.log import get_logger
from kombu.exceptions import ContentDisallowed
from kombu.utils.functional import LRUCache

from fastres.errors import MalformedResult

if TYPE_CHECKING:
    from fastres._protocols import Delivery
    from fastres.addresses import Address

__all__ = ("Reports", "logger")

logger = get_logger("fastres")

#: How many reports are remembered so as not to be made twice.
REMEMBERED = 10_000


class Reports:
    """Reports messages that are not usable results: each is logged and counted once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._reported = LRUCache(limit=REMEMBERED)

    def add(
        self,
        kind: str,
        queue: str,
        task_id: object,
        tag: object,
        why: object,
        fingerprint: int,
        recount: bool = False,
    ) -> None:
        """Report a message.

        Args:
            fingerprint: identifies the message. A message that was seen is not reported again.
            recount: count it again all the same: it is another one.
        """
        key = (kind, queue, task_id, fingerprint)
        known = key in self._reported
        if known and not recount:
            return
        self.counts[kind] += 1
        if not known:
            self._reported[key] = True
            logger.warning(
                "%s result in queue %r, task id %s, delivery tag %s: %s", kind, queue, task_id, tag, why
            )

    def foreign(self, delivery: Delivery, address: Address, task_id: str) -> None:
        """Report a result if it is in the queue of another task."""
        if address.of_task is not None and task_id != address.of_task:
            self.add(
                "unknown", address.name, task_id, delivery.delivery_tag,
                f"it is in the queue of task {address.of_task}, and stays there", 0,
            )  # fmt: skip

    def unreadable(self, delivery: Delivery, queue: str, exc: Exception) -> None:
        """Report a message that is no result."""
        if isinstance(exc, ContentDisallowed):
            kind = "disallowed"
        elif isinstance(exc, MalformedResult):
            kind = "malformed"
        else:
            kind = "undecodable"
        self.add(
            kind, queue, delivery.correlation_id, delivery.delivery_tag,
            f"{type(exc).__name__}: {exc}", hash(delivery.body),
        )  # fmt: skip
