"""In the main process of a worker, whatever its pool: a look whether results can be stored, and the joiner."""

from __future__ import annotations

import threading
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
    joiner = _joiner_of(sender)
    if joiner is not None:
        joiner.start()


def _stop(sender: Any = None, **kwargs: Any) -> None:
    joiner = _joiner_of(sender)
    if joiner is not None:
        joiner.stop()


def _joiner_of(sender: Any) -> Joiner | None:
    backend = getattr(getattr(sender, "app", None), "backend", None)
    return getattr(backend, "joiner", None)
