"""Joins groups in which tasks fail, or of which not all tasks are awaited: ``fastres.settle`` for groups."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import TimeoutError

from fastres.cancelling import cancel
from fastres.chords.settle import allowed_of, checked
from fastres.groups import leaves as leaves_of

if TYPE_CHECKING:
    from celery.result import ResultSet

__all__ = ("join",)


def join(
    results: ResultSet,
    *,
    settle: bool = False,
    tolerate: float | None = None,
    first: int | None = None,
    deadline: float | None = None,
    revoke: bool = False,
    timeout: float | None = None,
) -> list[Any]:
    """Wait for enough tasks of a group and return their results, in the order of the group.

    Takes the results that it reads from the broker, as ``GroupResult.get`` does. Other results stay there.

    Args:
        results: a ``GroupResult`` or ``ResultSet``. The results of groups inside it are in the same flat list.
        settle: return the exceptions of failed and revoked tasks in their places. If False, the first exception is
            raised, or left out if ``first`` is given.
        tolerate: as ``settle``, for at most this number of tasks, or this share of all tasks (a float below 1). One
            failure more is raised.
        first: return when this number of tasks has succeeded, with the results that have arrived by then. If all
            tasks have ended and fewer have succeeded, the last exception is raised.
        deadline: seconds after which the results that have arrived are returned.
        revoke: when ``first`` or ``deadline`` ends the wait, cancel the tasks that have not begun:
            :func:`fastres.cancel`.
        timeout: seconds after which an exception is raised.

    Raises:
        fastres.ResultsMissing: not enough results arrived before the timeout.
        Exception: the exception of a task.
        ValueError: ``tolerate``, ``first`` or ``deadline`` is out of range.
    """
    terms = checked(tolerate=tolerate, first=first, deadline=deadline)
    leaves = list(leaves_of(results.results))
    if not leaves:
        return []
    settle = settle or tolerate is not None
    allowed = allowed_of(terms, len(leaves))
    ids = list(dict.fromkeys(leaf.id for leaf in leaves))
    values: dict[str, Any] = {}
    succeeded = failed = 0
    error: BaseException | None = None
    #: Raised after the loop: inside, a task's TimeoutError would be taken for the end of the wait.
    fatal: BaseException | None = None
    ends_at_deadline = timeout is None or (deadline is not None and deadline < timeout)
    arriving = leaves[0].backend.get_many(ids, timeout=deadline if ends_at_deadline else timeout)
    try:
        with contextlib.closing(arriving):
            for task_id, meta in arriving:
                if meta["status"] in states.PROPAGATE_STATES:
                    failed, error = failed + 1, meta["result"]
                    if (not settle and first is None) or (allowed is not None and failed > allowed):
                        fatal = error
                        break
                    if settle:
                        values[task_id] = error
                else:
                    succeeded += 1
                    values[task_id] = meta["result"]
                if succeeded == first:
                    break
            else:
                if first is not None and succeeded < first:
                    fatal = error
    except TimeoutError:
        if deadline is None or not ends_at_deadline:
            raise
    if fatal is not None:
        raise fatal
    if revoke and succeeded + failed < len(ids):
        cancel(results)
    return [values[leaf.id] for leaf in leaves if leaf.id in values]
