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
    """Messages that are no result anybody can use: each is logged once, and counted every time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._reported = LRUCache(limit=REMEMBERED)

    def add(self, kind: str, queue: str, task_id: object, tag: object, why: object, fingerprint: int) -> bool:
        """Report a message; False when this was done before."""
        key = (kind, queue, task_id, fingerprint)
        if key in self._reported:
            return False
        self._reported[key] = True
        self.counts[kind] += 1
        logger.warning("%s result in queue %r, task id %s, delivery tag %s: %s", kind, queue, task_id, tag, why)
        return True
