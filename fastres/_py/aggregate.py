"""The task ids that a join waits for, and which of them have come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastres._protocols import Arrival, Sorted

__all__ = ("Aggregate",)


class Aggregate:
    """See :class:`fastres._protocols.Aggregate`."""

    def __init__(self, task_ids: Iterable[str], ready_states: Iterable[str]) -> None:
        # One table answers "awaited?" and "came before?": a million ids are held once.
        self._came = dict.fromkeys(task_ids, False)
        self._left = len(self._came)
        self._ready_states = frozenset(ready_states)

    def __len__(self) -> int:
        return self._left

    def __contains__(self, task_id: object) -> bool:
        return self._came.get(task_id) is False  # type: ignore[call-overload]

    def missing(self) -> list[str]:
        return [task_id for task_id, came in self._came.items() if not came]

    def feed(self, arrivals: Sequence[Arrival]) -> Sorted:
        came = self._came
        ready: list[Arrival] = []
        states: list[Arrival] = []
        repeated: list[Arrival] = []
        foreign: list[Arrival] = []
        for arrival in arrivals:
            _, task_id, meta = arrival
            before = came.get(task_id)
            if before is None:
                foreign.append(arrival)
            elif before:
                repeated.append(arrival)
            elif meta["status"] in self._ready_states:
                came[task_id] = True
                self._left -= 1
                ready.append(arrival)
            else:
                states.append(arrival)
        return ready, states, repeated, foreign
