"""Chords: the cost of a part, the time from the last part to the body, the joiner, whole chords."""

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
        *(Case(peer, "part", size.parts, size.fast) for peer in both),
        *(Case("fastres", "fire", count, size.fast) for count in size.fired),
        *(Case("Celery redis", "fire", count, size.slow) for count in size.fired),
        Case("fastres", "join", size.joined, size.fast),
        *(Case("fastres", "hold", count, size.slow) for count in size.held),
        *(
            Case(peer, how, count, size.slow)
            for how, count in (("chord", size.tasks), ("small", size.chords))
            for peer in ("fastres", "Celery redis", "fastres, not kept")
        ),
        *(Case("fastres", "open", count, size.slow) for count in size.open),
        Case("fastres", "refer", size.referred, size.slow),
        *(Case(peer, "round_trip", size.single, size.fast) for peer in both),
        *(Case("fastres", how, size.counted, 1) for how in ("alone", "group", "chains")),
    ]


def test_chord(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["count"] == case.count
