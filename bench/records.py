"""The figures of a run: medians of its repetitions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Measures, computed from the figures of a process: CPU per result, and per part, in microseconds; memory in MB,
#: wall in seconds, and in milliseconds for each operation.
MEASURES = {
    "cpu": lambda taken: taken["cpu"] / taken["count"] * 1e6,
    "prepare": lambda taken: taken["prepare"] / taken["count"] * 1e6,
    "wall": lambda taken: taken["wall"],
    "rate": lambda taken: taken["count"] / taken["wall"],
    "calls": lambda taken: taken["calls"] / taken["count"],
    "peak": lambda taken: taken["peak"],
    "growth": lambda taken: taken["growth"],
    "held": lambda taken: taken["held"],
    "part": lambda taken: taken["part"] / taken["count"] * 1e6,
    "stored": lambda taken: taken["stored"] / taken["count"] * 1e6,
    "queues": lambda taken: taken["queues"],
    "queues each": lambda taken: taken["queues"] / taken["count"],
    "each": lambda taken: taken["wall"] / taken["count"] * 1e3,
    "p50": lambda taken: taken["p50"] * 1e3,
    "read": lambda taken: taken["read"] / taken["count"] * 1e6,
    "joiner": lambda taken: taken["joiner"],
}


@dataclass(frozen=True)
class Key:
    """The key of a measured case."""

    peer: str
    how: str
    count: int
    workload: str = "dict"
    serializer: str = "json"
    traced: bool = False


class Records:
    """The benchmarks in a file that `pytest --benchmark-json` wrote."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text("utf-8"))
        self.machine: dict[str, Any] = data["machine_info"]
        self.date: str = data["datetime"]
        self._taken: dict[Key, list[dict[str, float]]] = {}
        for benchmark in data["benchmarks"]:
            info = benchmark["extra_info"]
            key = Key(**{name: info[name] for name in Key.__dataclass_fields__})
            self._taken.setdefault(key, []).append(info)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._taken)

    def counts(self, **fields: Any) -> list[int]:
        """The numbers of results that something was measured with, in order."""
        fields.setdefault("traced", False)
        fields = {"workload": "dict", "serializer": "json", **fields}
        return sorted({key.count for key in self if fields.items() <= vars(key).items()})

    def median(self, measure: str, key: Key) -> float | None:
        """The median over all repetitions, None if it was not measured."""
        values = []
        for taken in self._taken.get(key, ()):
            try:
                values.append(MEASURES[measure](taken))
            except KeyError:
                return None
        return statistics.median(values) if values else None

    def repetitions(self, key: Key) -> int:
        return len(self._taken.get(key, ()))
