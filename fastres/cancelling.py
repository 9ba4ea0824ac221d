"""Cancelling groups and chords: one message to the workers, one to each joiner, one to each queue of results.

The message in a queue of results is a notice of cancellation. Readers of the queue that wait for a task without a
result, or look up its state, take it for the revoked task's result. The notice expires with the queue.
"""

from __future__ import annotations

from typing import Any

from celery import states
from celery.exceptions import ImproperlyConfigured, TaskRevokedError
from celery.result import AsyncResult, GroupResult, ResultSet

from fastres import ids
from fastres._protocols import CANCELLED

__all__ = ("COMMAND", "cancel", "revoke_rest")

#: The remote control command of the workers: see ``fastres.worker``.
COMMAND = "fastres_cancel"
#: The argument of the exception that waits raise.
REASON = "cancelled"


class _Found:
    """The ids of groups, headers and tasks that belong to a cancelled result."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        #: The groups among them that are headers of chords.
        self.headers: list[str] = []
        #: Tasks that are in no group: bodies, and tasks before a group in a chain.
        self.tasks: list[str] = []
        #: Tasks whose results calls may wait for.
        self.awaited: dict[str, None] = {}

    def visit(self, result: Any) -> None:
        if isinstance(result, ResultSet):
            self._visit_members(result)
        else:
            self.awaited[result.id] = None
        # There may be many: not by recursion.
        before = result.parent if isinstance(result, (AsyncResult, GroupResult)) else None
        while before is not None:
            if isinstance(before, GroupResult):
                self.headers.append(before.id)
                self._visit_members(before)
            else:
                kin = ids.parse(before.id)
                if kin is None or kin.kind != ids.Kind.STEP:
                    # A step of a group's member is known by its kin, and there may be a million.
                    self.tasks.append(before.id)
            before = before.parent

    def _visit_members(self, results: ResultSet) -> None:
        if isinstance(results, GroupResult):
            self.groups.append(results.id)
        # Those of a group that was sent in bulk have neither groups nor chains among them.
        plain = getattr(results, "task_ids", None)
        if plain is not None:
            self.awaited.update(dict.fromkeys(plain))
            return
        for member in results.results:
            if isinstance(member, ResultSet) or member.parent is not None:
                self.visit(member)
            else:
                self.awaited[member.id] = None


def cancel(result: Any) -> None:
    """Cancel a group or a chord: no more of its tasks begin, and every process that waits for it is notified at once.

    For any size, this sends one message to the workers, one for each chord, and one to each queue of results,
    which is usually one queue. Nothing is stored for each task. Running tasks are not stopped. The errbacks of a
    chord are called once, with a ``ChordError``; its body is not called. For tasks without a result, ``get()``
    raises ``TaskRevokedError`` in every process, and the state is ``REVOKED``. Stored results stay.

    Args:
        result: a ``GroupResult``, or the ``AsyncResult`` of a chord or of a chain with a group in it.

    Raises:
        TypeError: there is no group in it: ``AsyncResult.revoke()`` is for single tasks.
        celery.exceptions.ImproperlyConfigured: the result backend is not ``fastres://``.
        fastres.BrokerUnreachable: the broker could not be reached; calling this again does no harm.
    """
    found = _Found()
    if isinstance(result, (AsyncResult, ResultSet)):
        found.visit(result)
    if not found.groups:
        raise TypeError(
            f"cancel() takes a GroupResult, or the AsyncResult of a chord that knows its header, not {result!r}; "
            "AsyncResult.revoke() is for single tasks"
        )
    backend = _backend_of(result.app)
    single = [] if isinstance(result, ResultSet) else [result.id]
    _notify_workers(backend, found.groups, found.tasks + single)
    with backend.in_one_write():
        for header in found.headers:
            backend.chords.fail(header, "It was cancelled")
        _notify_waits(backend, found.groups, list(found.awaited))


def revoke_rest(backend: Any, group_id: str) -> None:
    """Cancel the header tasks that have not begun, of a chord whose body was called without them.

    The missing results of a small header arrive in a page, under ids that are not known here: its
    workers store that each was revoked.
    """
    _notify_workers(backend, [group_id], [])
    if not _is_on_page(group_id):
        _put_notice(backend, _member_of(group_id), True)


def _backend_of(app: Any) -> Any:
    backend = app.backend
    if getattr(backend, "loop_reader", None) is None:
        raise ImproperlyConfigured(
            f"cancel() needs result_backend fastres://, where results are found by their ids, not {backend!r}"
        )
    return backend


def _notify_workers(backend: Any, group_ids: list[str], task_ids: list[str]) -> None:
    backend.app.control.broadcast(COMMAND, arguments={"group_ids": group_ids, "task_ids": task_ids})


def _notify_waits(backend: Any, group_ids: list[str], task_ids: list[str]) -> None:
    """Put a notice into each queue of the results of groups and tasks."""
    addresses = backend.addresses
    named = addresses.by_result(task_ids)
    for group_id in group_ids:
        member = _member_of(group_id)
        # The results of a small chord share their queue with others.
        if not _is_on_page(group_id) and named.pop(addresses.rkey(member), None):
            _put_notice(backend, member, True)
    alone = []
    for of_queue in named.values():
        kin = ids.parse(of_queue[0])
        if kin is None:
            alone += of_queue
        else:
            _put_notice(backend, ids.new_id(kin.kin, kin.kind), of_queue)
    # Each of these tasks has a queue of its own, in which a notice must not follow a stored result.
    for task_id, meta in backend.layout.look_at_all(alone).items():
        if meta is None or meta["status"] not in states.READY_STATES:
            backend.store_result(task_id, TaskRevokedError(REASON), states.REVOKED)


def _is_on_page(group_id: str) -> bool:
    kin = ids.parse(group_id)
    return kin is not None and kin.kind == ids.Kind.PAGE


def _member_of(group_id: str) -> str:
    return ids.new_id(ids.kin_of(group_id), ids.Kind.MEMBER)


def _put_notice(backend: Any, task_id: str, about: list[str] | bool) -> None:
    """Put a notice into a queue of results.

    Args:
        task_id: an id in the queue, of no task.
        about: the cancelled tasks; True: all tasks of the queue.
    """
    backend.put_notice(
        {
            "task_id": task_id,
            "status": states.REVOKED,
            "result": backend.encode_result(TaskRevokedError(REASON), states.REVOKED),
            "traceback": None,
            "children": [],
            CANCELLED: about,
        }
    )
