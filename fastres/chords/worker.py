"""Runs the joiner in the main process of a worker, whatever its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.signals import task_received, worker_ready, worker_shutdown

if TYPE_CHECKING:
    from fastres.chords.joiner import Joiner

__all__ = ("attend",)


def attend() -> None:
    """From now on, workers with a backend of fastres join chords."""
    worker_ready.connect(_start, dispatch_uid="fastres-joiner-ready")
    # Workers that are embedded into a process, as in tests, do not say when they are ready.
    task_received.connect(_start, dispatch_uid="fastres-joiner-received")
    worker_shutdown.connect(_stop, dispatch_uid="fastres-joiner-shutdown")


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
