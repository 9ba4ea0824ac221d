"""Aggregation: the task ids that a join waits for, the result objects of the tasks that have ended, and the results
of a chord's header in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vine import barrier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastres._protocols import Arrival, Meta, Sorted

__all__ = ("Aggregate", "fulfil", "in_order", "listed")

#: Of a number that may be a place.
DIGITS = 18


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


def fulfil(result: Any, meta: Meta) -> None:
    """See :class:`fastres._protocols.Fulfil`."""
    if result._cache is not None:
        return
    if meta.get("children"):
        result._set_cache(meta)
    else:
        result._cache = meta
    ready = result.on_ready
    listener = ready._svpending
    # Most members of a group have one listener, the barrier of the group. It is called without the promise between
    # them, which is kept for later calls of ``then``.
    if isinstance(listener, barrier) and not ready._lvpending:
        ready._svpending = None
        listener()
    else:
        ready(result)


def in_order(parts: Sequence[bytes]) -> list[bytes] | None:
    """See :class:`fastres._protocols.InOrder`."""
    ordered: list[bytes | None] = [None] * len(parts)
    for part in parts:
        place, newline, _ = part.partition(b"\n")
        # Not a number: there is none, or the part has more fields than a plain result.
        if not newline or not place.isdigit() or len(place) > DIGITS:
            return None
        index = int(place)
        if index >= len(ordered) or ordered[index] is not None:
            return None
        ordered[index] = part
    return ordered  # type: ignore[return-value]


def listed(parts: Sequence[bytes]) -> bytes:
    """See :class:`fastres._protocols.Listed`."""
    return b",".join([bytes.partition(part, b"\n")[2] for part in parts])
