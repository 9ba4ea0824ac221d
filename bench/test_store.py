"""The cost of storing a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from runs import Case
from workloads import Size

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    peers = ("fastres, no confirm", "Celery rpc", "fastres", "Celery redis")
    return [Case(peer, "store", size.stored, size.slow) for peer in peers]


def test_store(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
