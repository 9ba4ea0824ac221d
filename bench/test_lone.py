"""Results of lone tasks, each in a queue of its own."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from runs import Case
from workloads import Size

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    peers = ("fastres", "celery-amqp-backend", "Celery redis")
    return [Case(peer, "lone", size.lone, 1) for peer in peers]


def test_lone(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
