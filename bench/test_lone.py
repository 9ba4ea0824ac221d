"""Lone tasks: their results joined, and stored; their states looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from runs import Case
from workloads import Size

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    both = ("fastres", "Celery redis")
    return [
        *(Case(peer, "lone", size.lone, 1) for peer in ("fastres", "celery-amqp-backend", "Celery redis")),
        *(Case(peer, "store_lone", size.stored, size.fast) for peer in both),
        *(
            Case(peer, how, count, size.fast)
            for how, count in (("pending", size.lone), ("pending_threads", size.looks), ("done", size.lone))
            for peer in both
        ),
    ]


def test_lone(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
