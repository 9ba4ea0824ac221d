"""Hooks in the main process of a worker of any pool: check that results can be stored, start the joiner, revoke,
cancel."""

from __future__ import annotations

import contextlib
import os
import threading
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery.exceptions import TaskRevokedError
from celery.signals import task_received, worker_init, worker_ready, worker_shutdown

from fastres import ids
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastres.chords.joiner import Joiner

__all__ = ("connect_signals", "is_notified_already")

#: The prefix of a cancelled kin among the ids of revoked tasks, which also contain the ids of cancelled groups.
#: Celery's workers send them to starting workers, and forget them in the end.
KIN = "fastres-kin-{:015x}"


class _Dropping(threading.local):
    """Whether this thread drops a cancelled task, whose waits the notice has ended."""

    silently = False


_dropping = _Dropping()


def connect_signals() -> None:
    """From now on, workers with a backend of fastres say if it does not work, and join chords."""
    worker_init.connect(_hook_cancel, dispatch_uid="fastres-cancel")
    worker_ready.connect(_check, dispatch_uid="fastres-check")
    worker_ready.connect(_start, dispatch_uid="fastres-joiner-ready")
    # Workers that are embedded into a process, as in tests, do not say when they are ready.
    task_received.connect(_start, dispatch_uid="fastres-joiner-received")
    worker_shutdown.connect(_stop, dispatch_uid="fastres-joiner-shutdown")


def _check(sender: Any = None, **kwargs: Any) -> None:
    backend = getattr(getattr(sender, "app", None), "backend", None)
    check = getattr(backend, "check_writing", None)
    if check is not None:
        # An unreachable broker is retried for a while.
        threading.Thread(target=_run_check, args=(check,), name="fastres-check", daemon=True).start()


def _run_check(check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as exc:
        logger.error("Results of tasks cannot be stored: %s", exc)


def _start(sender: Any = None, **kwargs: Any) -> None:
    _speed_up_revoke(getattr(getattr(sender, "app", None), "backend", None))
    joiner = _joiner_of(sender)
    if joiner is not None:
        joiner.start()


def _speed_up_revoke(backend: Any) -> None:
    """Have the remote control command ``revoke`` of Celery 5.7 look at all of its tasks at once.

    It asks the backend for the state of each, and stores that it was revoked, in the worker's main process.
    """
    from celery.worker import control

    revoke = getattr(control, "_revoke", None)
    if revoke is None or hasattr(revoke, "__wrapped__") or not hasattr(backend, "many_at_once"):
        return

    @wraps(revoke)
    def revoke_at_once(state: Any, task_ids: Any, *args: Any, **kwargs: Any) -> Any:
        at_once = getattr(state.app.backend, "many_at_once", None)
        if at_once is None or len(task_ids) < 2:
            return revoke(state, task_ids, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(at_once(task_ids))
            except Exception as exc:
                logger.warning("The states of %d tasks cannot be looked up together: %s", len(task_ids), exc)
            returned = revoke(state, task_ids, *args, **kwargs)
            try:
                stack.close()
            except Exception as exc:
                # As Celery does for a single task.
                logger.warning("Failed to mark %d tasks as revoked in backend: %s", len(task_ids), exc)
            return returned

    control._revoke = revoke_at_once


def is_notified_already() -> bool:
    """Whether this thread drops a task that was cancelled with its group, and need not store that."""
    return _dropping.silently


def _hook_cancel(**kwargs: Any) -> None:
    """Register the remote control command of ``fastres.cancel``, and drop cancelled tasks."""
    from celery.worker import state as worker_state
    from celery.worker.control import control_command
    from celery.worker.request import Request

    if hasattr(Request.revoked, "__wrapped__"):
        return
    known, revoked, on_accepted = worker_state.revoked, Request.revoked, Request.on_accepted

    @wraps(revoked)
    def revoked_or_cancelled(self: Any) -> bool:
        if not len(known) or self._already_revoked or self.id in known or not _is_cancelled(self, known):
            return bool(revoked(self))
        kin = ids.parse(self.id)
        _dropping.silently = kin is not None and kin.kind in (ids.Kind.MEMBER, ids.Kind.STEP)
        known.add(self.id)
        try:
            return bool(revoked(self))
        finally:
            known.discard(self.id)
            _dropping.silently = False

    @wraps(on_accepted)
    def accepted_or_cancelled(self: Any, pid: int, time_accepted: float) -> None:
        # A pool of threads is given tasks before it has a thread for them; this is called in the thread.
        if len(known) and pid == os.getpid() and _is_cancelled(self, known) and self.revoked():
            raise TaskRevokedError(self.id)
        on_accepted(self, pid, time_accepted)

    Request.revoked, Request.on_accepted = revoked_or_cancelled, accepted_or_cancelled

    @control_command(name="fastres_cancel", visible=False)  # type: ignore[untyped-decorator]
    def fastres_cancel(state: Any, group_ids: Iterable[str], task_ids: Iterable[str] = (), **kwargs: Any) -> Any:
        """Have no more tasks of groups begin, nor these tasks."""
        known.update(task_ids)
        for group_id in group_ids:
            known.add(group_id)
            kin = ids.parse(group_id)
            if kin is None or kin.kind != ids.Kind.PAGE:
                known.add(KIN.format(ids.kin_of(group_id)))
        logger.info("Groups cancelled: %s", ", ".join(group_ids))
        return {"ok": "cancelled"}


def _is_cancelled(request: Any, known: Any) -> bool:
    """Whether a task belongs to a cancelled group, as a member or as a step of a member's chain."""
    kin = ids.parse(request.id)
    if kin is not None and kin.kind != ids.Kind.PAGE and KIN.format(kin.kin) in known:
        return True
    # Celery gives a chord's body the group of its header, and no place in it.
    if request.group and request.request_dict.get("group_index") is not None and request.group in known:
        return True
    if kin is not None and kin.kind != ids.Kind.PAGE:
        return False
    try:
        # The last task of a chain is the member.
        following = request._context.chain
        return bool(following) and following[0].get("options", {}).get("group_id") in known
    except Exception:
        # It cannot be decoded, which is for Celery to say.
        return False


def _stop(sender: Any = None, **kwargs: Any) -> None:
    joiner = _joiner_of(sender)
    if joiner is not None:
        joiner.stop()


def _joiner_of(sender: Any) -> Joiner | None:
    backend = getattr(getattr(sender, "app", None), "backend", None)
    return getattr(backend, "joiner", None)
