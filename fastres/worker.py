"""In the main process of a worker, whatever its pool: whether results can be stored, the joiner, and revoking."""

from __future__ import annotations

import contextlib
import threading
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery.signals import task_received, worker_ready, worker_shutdown

from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastres.chords.joiner import Joiner

__all__ = ("attend",)


def attend() -> None:
    """From now on, workers with a backend of fastres say if it does not work, and join chords."""
    worker_ready.connect(_check, dispatch_uid="fastres-check")
    worker_ready.connect(_start, dispatch_uid="fastres-joiner-ready")
    # Workers that are embedded into a process, as in tests, do not say when they are ready.
    task_received.connect(_start, dispatch_uid="fastres-joiner-received")
    worker_shutdown.connect(_stop, dispatch_uid="fastres-joiner-shutdown")


def _check(sender: Any = None, **kwargs: Any) -> None:
    backend = getattr(getattr(sender, "app", None), "backend", None)
    check = getattr(backend, "check_writing", None)
    if check is not None:
        # A broker that is away is sought for a while.
        threading.Thread(target=_complain, args=(check,), name="fastres-check", daemon=True).start()


def _complain(check: Callable[[], None]) -> None:
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
            told = revoke(state, task_ids, *args, **kwargs)
            try:
                stack.close()
            except Exception as exc:
                # As Celery does when it is one.
                logger.warning("Failed to mark %d tasks as revoked in backend: %s", len(task_ids), exc)
            return told

    control._revoke = revoke_at_once


def _stop(sender: Any = None, **kwargs: Any) -> None:
    joiner = _joiner_of(sender)
    if joiner is not None:
        joiner.stop()


def _joiner_of(sender: Any) -> Joiner | None:
    backend = getattr(getattr(sender, "app", None), "backend", None)
    return getattr(backend, "joiner", None)
