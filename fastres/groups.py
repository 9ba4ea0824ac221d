"""Groups: which task is a member of which."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Callable

from celery.canvas import _chain, chord, group
from celery.result import GroupResult, ResultBase
from kombu.utils.functional import LRUCache
from vine import barrier

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fastres.pending import Pending

__all__ = ("GroupTable", "Groups", "leaves", "member_of", "members_to_come", "own_groups")

#: Members that are remembered, over all groups; the newest group is kept whole however large it is.
REMEMBERED = 1_000_000

#: Where the signatures are in one that is made of others, by its type.
INSIDE = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}

#: Tasks that are known to be in no group.
REMEMBERED_ALONE = 10_000


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
            added = dict.fromkeys(task_ids)
            members.update(added)
            self._group_of.update(dict.fromkeys(added, group_id))

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
        GroupTable.__init__(self)

    def _make_room(self) -> None:
        while self._members and len(self._group_of) >= REMEMBERED:
            self._forget(next(iter(self._members)))

    def _forget(self, group_id: str) -> None:
        self._forgotten.pop(group_id, None)
        for task_id in self._members.pop(group_id, ()):
            if self._group_of.get(task_id) == group_id:
                del self._group_of[task_id]


class Groups(GroupTable):
    """Finds the group of a task: from what this process has sent, restored or holds.

    Args:
        pending: the result objects of this process.
        has_result: whether the queue of a group holds a result of a task.
        member_queues: whether each member has a queue of its own, as if there were no groups.
    """

    def __init__(self, pending: Pending, has_result: Callable[[str, str], bool], member_queues: bool) -> None:
        super().__init__()
        self._pending = pending
        self._has_result = has_result
        self._member_queues = member_queues

    def in_request(self, request: Any) -> str | None:
        """The group that the task of a request is a member of.

        The body of a chord carries the group id of its header, but is no member of it: it has no index there, and
        is no part of a chord. Tasks that were sent with Celery's message protocol 1 have no index anywhere.
        """
        if self._member_queues:
            return None
        if getattr(request, "group_index", None) is None and not getattr(request, "chord", None):
            return None
        return getattr(request, "group", None)

    def find(self, task_id: str) -> str | None:
        """The group of a task id, as far as this process knows."""
        if self._member_queues:
            return None
        group_id = self.group_of(task_id)
        if group_id is None and not self.is_alone(task_id):
            held = [member_of(result) for result in self._pending.of(task_id)]
            groups = {group.id: group for group in held if group is not None and group.id}
            for group_id, group in groups.items():
                if len(groups) == 1:
                    self.know(group)
                # Celery gives the parent of a nested chord another id than the one its parts are sent with.
                elif self._has_result(group_id, task_id):
                    self.add(group_id, (task_id,))
                    break
        return group_id

    def split(self, task_ids: list[str]) -> tuple[list[str], dict[str, list[str]]]:
        """Task ids that are alone, and the others by their group."""
        alone: list[str] = []
        groups: dict[str, list[str]] = {}
        known = {} if self._member_queues else self._group_of
        groups_known = set(map(known.get, task_ids))
        if len(groups_known) == 1 and None not in groups_known:
            # As a rule they are all of one group, and there may be a million of them.
            return alone, {groups_known.pop(): task_ids}  # type: ignore[dict-item]
        for task_id in task_ids:
            group_id = known.get(task_id) or self.find(task_id)
            if group_id is None:
                alone.append(task_id)
            elif group_id in groups:
                groups[group_id].append(task_id)
            else:
                groups[group_id] = [task_id]
        return alone, groups

    def know(self, group: GroupResult) -> None:
        """Remember the members of a group, and of the groups in it."""
        own = []
        for result in group.results:
            if isinstance(result, GroupResult):
                self.know(result)
            elif result.id not in self._group_of and not self.is_alone(result.id):
                own.append(result.id)
        self.add(group.id, own)

    def elsewhere(self, group: GroupResult) -> dict[str, list[str]]:
        """Tasks in a known result that are members of another group than the ``GroupResult`` they are in."""
        found: dict[str, list[str]] = {}
        for result in group.results:
            if isinstance(result, GroupResult):
                for group_id, task_ids in self.elsewhere(result).items():
                    found.setdefault(group_id, []).extend(task_ids)
            elif (own := self.group_of(result.id)) is not None and own != group.id:
                found.setdefault(own, []).append(result.id)
        return found


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


def members_to_come(signature: Any) -> Iterator[tuple[str, str]]:
    """The members of groups in a signature that goes with a task for its worker to send: group id and task id.

    Celery freezes a group at a chain's end with the id of the group that the chain is in. Its ``GroupResult`` has
    another id, and may be all that is left: ``group(a | group(b, c))``, one chain in a group.
    """
    if not isinstance(signature, dict):
        return
    options, kwargs = signature.get("options") or {}, signature.get("kwargs") or {}
    inside = INSIDE.get(signature.get("subtask_type") or "")
    if inside is None:
        if options.get("group_index") is not None and options.get("group_id") and options.get("task_id"):
            yield options["group_id"], options["task_id"]
        return
    for name in inside:
        tasks = kwargs.get(name)
        # What a generator will give is left to who sends it.
        for task in tasks if isinstance(tasks, (list, tuple)) else (tasks,):
            yield from members_to_come(task)


def _listeners(promise: Any) -> Sequence[Any]:
    one, many = getattr(promise, "_svpending", None), getattr(promise, "_lvpending", None)
    return [one] if one is not None else list(many or ())
