"""The logger of fastres, and the book in which it counts what it reported."""

from __future__ import annotations

from collections import Counter

from celery.utils.log import get_logger
from kombu.utils.functional import LRUCache

__all__ = ("Reports", "logger")

logger = get_logger("fastres")

#: How many reports are remembered so as not to be made twice.
REMEMBERED = 10_000


class Reports:
    """Messages that are no result anybody can use: each is logged and counted once."""

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
            fingerprint: tells messages of a kind, queue and task apart; one that was seen is not reported again.
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
