"""The result objects of a process, which are fulfilled when their results are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from fastres._impl import fulfil

if TYPE_CHECKING:
    from fastres._protocols import Meta

__all__ = ("Pending",)


class Pending:
    """Result objects by task id, held by weak references."""

    def __init__(self) -> None:
        #: The first of each id, and those beyond it.
        self._first: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._others: dict[str, WeakSet[Any]] = {}

    def add(self, result: Any) -> None:
        first = self._first.setdefault(result.id, result)
        if first is not result:
            self._others.setdefault(result.id, WeakSet()).add(result)

    def remove(self, result: Any) -> None:
        others = self._others.get(result.id)
        if others is not None and not any(other is not result for other in others):
            self._others.pop(result.id, None)

    def of(self, task_id: str) -> list[Any]:
        """The result objects of a task that are alive."""
        first: Any = self._first.get(task_id)
        return [*([] if first is None else [first]), *self._others.get(task_id, ())]

    def fulfil(self, task_id: str, meta: Meta) -> None:
        """Fulfil all result objects of a task, which call their callbacks (``then``)."""
        first = self._first.get(task_id)
        if first is not None:
            fulfil(first, meta)
        if task_id in self._others:
            for result in list(self._others[task_id]):
                fulfil(result, meta)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]
