"""Joining a group on other terms than that all of it succeeds: what ``fastres.settle`` is for chords."""

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
    """The results of a group's tasks, in its order.

    What is read is taken from the broker, as by ``GroupResult.get``; what is not waited for stays there.

    Args:
        results: a ``GroupResult`` or ``ResultSet``; those of groups in it are in one list with the others.
        settle: have the exception of each task that has failed, or was revoked, in its place. Otherwise the first
            is raised, or is left out where ``first`` is given.
        tolerate: ``settle`` so many of them, or a share below 1 of all, and raise the next one.
        first: return as soon as so many have succeeded, with what has come until then. Where all have come and
            fewer have succeeded, the last failure is raised.
        deadline: seconds after which what has come is returned.
        revoke: have the tasks that have not begun when ``first`` or ``deadline`` ends the wait not begin any more:
            :func:`fastres.cancel`.
        timeout: seconds after which an exception is raised.

    Raises:
        fastres.ResultsMissing: not all came before the timeout.
        Exception: what a task has raised.
        ValueError: ``tolerate``, ``first`` or ``deadline`` is out of its range.
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
    #: What is raised in the end: not in there, where a task's TimeoutError would be taken for the end of the wait.
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
