"""Sending tasks in bulk: the cost of the sender, and the time until the last task is in its queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peers import LIMIT
from runs import Case
from workloads import Size

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    few, many = size.sent
    return [
        Case("fastres", "send", few, size.fast),
        Case(LIMIT, "send", few, size.fast),
        Case("fastres", "send_group", few, size.slow),
        *(Case(peer, "send_chord", few, size.slow) for peer in ("fastres", "Celery redis")),
        Case("fastres", "send", many, size.slow),
    ]


def test_sending(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
