"""System calls of a join, counted by strace in a separate pass, which takes longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from runs import Case
from test_joins import comparison
from workloads import Size

pytestmark = pytest.mark.timeout(1800)


def cases(size: Size) -> list[Case]:
    return [dataclasses.replace(case, traced=True) for case in comparison(size.traced, fast=1, slow=1)]


def test_system_calls(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    taken = measure(case)
    assert taken["calls"] >= 1
