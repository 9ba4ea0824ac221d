"""Groups: which task is a member of which, and what ``GroupResult.save`` keeps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.canvas import _chain, chord, group
from celery.result import GroupResult, ResultBase
from kombu.utils.functional import LRUCache
from kombu.utils.uuid import uuid
from vine import barrier

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ("GroupTable", "leaves", "member_of", "own_groups", "pack", "unpack")

#: Members that are remembered, over all groups; the newest group is kept whole however large it is.
REMEMBERED = 1_000_000

#: Tasks that are known to be in no group.
REMEMBERED_ALONE = 10_000

#: Results in one message of a saved group: some 2.6 MB, under every broker's limit.
SAVED_PER_MESSAGE = 50_000


class GroupTable:
    """Which group a task id belongs to, as far as this process has sent, restored or held the group."""

    def __init__(self) -> None:
        self._group_of: dict[str, str] = {}
        self._members: OrderedDict[str, dict[str, None]] = OrderedDict()
        self._forgotten: dict[str, set[str]] = {}
        self._alone = LRUCache(limit=REMEMBERED_ALONE)
        self._lock = threading.Lock()

    def add(self, group_id: str, task_ids: Iterable[str]) -> None:
        with self._lock:
            members = self._members.get(group_id)
            if members is None:
                self._make_room()
                members = self._members[group_id] = {}
            for task_id in task_ids:
                members[task_id] = None
                self._group_of[task_id] = group_id

    def add_alone(self, task_id: str) -> None:
        """A task that is no member of a group, whatever ``GroupResult`` its result is put into."""
        self._alone[task_id] = True

    def is_alone(self, task_id: str) -> bool:
        return task_id in self._alone

    def group_of(self, task_id: str) -> str | None:
        return self._group_of.get(task_id)

    def members(self, group_id: str) -> dict[str, None] | None:
        """The known members, in the order they were added; None when nothing is known of the group."""
        return self._members.get(group_id)

    def is_forgotten(self, group_id: str, task_id: str) -> bool:
        return task_id in self._forgotten.get(group_id, ())

    def forget(self, group_id: str, task_id: str) -> bool:
        """Delete the result of a member: whether it was the last one."""
        with self._lock:
            forgotten = self._forgotten.setdefault(group_id, set())
            forgotten.add(task_id)
            return forgotten.issuperset(self._members.get(group_id, ()))

    def discard(self, group_id: str) -> None:
        with self._lock:
            self._forget(group_id)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _make_room(self) -> None:
        while self._members and len(self._group_of) >= REMEMBERED:
            self._forget(next(iter(self._members)))

    def _forget(self, group_id: str) -> None:
        self._forgotten.pop(group_id, None)
        for task_id in self._members.pop(group_id, ()):
            if self._group_of.get(task_id) == group_id:
                del self._group_of[task_id]


def leaves(results: Iterable[ResultBase]) -> Iterator[Any]:
    """The task results among results and nested groups of results."""
    for result in results:
        if isinstance(result, GroupResult):
            yield from leaves(result.results)
        else:
            yield result


def member_of(result: Any) -> GroupResult | None:
    """The ``GroupResult`` that this task result was put into, None when there is none alive.

    A task result does not know its group. But every GroupResult waits for its members with a ``vine.barrier``,
    which is how a group that was unpickled, or put together by hand, is found.
    """
    for listener in _listeners(result.on_ready):
        if isinstance(listener, barrier):
            for on_full in _listeners(listener.p):
                method = getattr(on_full, "fun", None)
                owner = getattr(method() if method is not None else None, "__self__", None)
                if isinstance(owner, GroupResult):
                    return owner
    return None


def own_groups(body: Any, header_id: str) -> None:
    """Give the members of groups in a chord's body the id of their own group.

    Celery freezes a body with the group id of its header, which its members then carry in their messages.
    """
    if isinstance(body, group):
        for task in body.tasks:
            if task.options.get("group_id") == header_id:
                task.options["group_id"] = body.options["task_id"]
            own_groups(task, header_id)
    elif isinstance(body, chord):
        own_groups(body.body, header_id)
    elif isinstance(body, _chain):
        for task in body.tasks:
            own_groups(task, header_id)


def _listeners(promise: Any) -> Sequence[Any]:
    one, many = getattr(promise, "_svpending", None), getattr(promise, "_lvpending", None)
    return [one] if one is not None else list(many or ())


class Saved(NamedTuple):
    """A group that was saved: Celery's ``as_tuple`` in two parts."""

    identity: Any
    children: list[Any]
    #: Task ids among the children that are no members of a group.
    alone: list[str]


def pack(group_id: str, result: GroupResult, alone: list[str]) -> list[dict[str, Any]]:
    """A group as the messages that keep it, its members in portions."""
    identity, children = result.as_tuple()
    portions = [
        children[start : start + SAVED_PER_MESSAGE] for start in range(0, len(children), SAVED_PER_MESSAGE)
    ] or [[]]
    save_id = uuid()
    return [
        {
            "task_id": group_id,
            "status": "SUCCESS",
            "result": (identity, portion),
            "alone": alone if number == 0 else [],
            "save_id": save_id,
            "portion": number,
            "portions": len(portions),
        }
        for number, portion in enumerate(portions)
    ]


def unpack(messages: Iterable[dict[str, Any]]) -> Saved | None:
    """What :func:`pack` made messages of: the newest save of which every portion is there; None without one."""
    saves: dict[str, dict[int, dict[str, Any]]] = {}
    for message in messages:
        saves.setdefault(message["save_id"], {})[message["portion"]] = message
    for portions in reversed(list(saves.values())):
        first = next(iter(portions.values()))
        if len(portions) == first["portions"]:
            children = [child for number in sorted(portions) for child in portions[number]["result"][1]]
            return Saved(first["result"][0], children, portions[0]["alone"])
    return None
