"""Joins of a group: every peer, on the same broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from runs import Case
from workloads import SERIALIZERS, WORKLOADS, Size

#: Results of a join that is not repeated as often.
HUGE = 200_000

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    found = []
    for count in size.joins:
        # A million takes minutes.
        huge = count > HUGE
        found += comparison(count, 2 if huge else size.fast, 1 if huge else size.slow)
    scale = [count for count in size.scale if count not in size.joins]
    return found + [Case("fastres", "get_many", count, size.fast) for count in scale] + matrix(size)


def comparison(count: int, fast: int, slow: int) -> list[Case]:
    return [
        Case("rabbitmq-c", "get_many", count, fast),
        Case("rabbitmq-c, acknowledging", "get_many", count, fast),
        Case("fastres", "get", count, fast),
        Case("fastres", "get_many", count, fast),
        Case("fastres-rpc", "get", count, fast),
        Case("fastres (Python)", "get", count, slow),
        Case("fastres (Python)", "get_many", count, slow),
        Case("Celery rpc", "get", count, slow),
        Case("Celery redis", "get", count, slow),
        Case("Celery redis", "get_many", count, slow),
        Case("kombu Consumer", "get_many", count, slow),
    ]


def matrix(size: Size) -> list[Case]:
    peers = ("fastres", "Celery rpc", "Celery redis")[: size.slow]
    return [
        Case(peer, "get", size.matrix, 1, workload, serializer)
        for workload in WORKLOADS
        for serializer in SERIALIZERS
        for peer in peers
        if size.matrix and (workload, serializer) != ("dict", "json")
    ]


def test_join(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
