"""Notifies backends when their process forks or ends."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
from typing import Any, Protocol
from weakref import WeakSet

from celery.signals import worker_process_shutdown

__all__ = ("notify_of_process",)


class ProcessListener(Protocol):
    """An object that is notified."""

    def after_fork(self) -> None:
        """Called in a forked child: abandon the parent's connections and state."""

    def at_exit(self) -> None:
        """Called at the end of the process: wait for outstanding confirms."""


_listeners: WeakSet[ProcessListener] = WeakSet()


def notify_of_process(backend: ProcessListener) -> None:
    """Notify a backend, as long as it exists, when its process has forked and when it ends."""
    _listeners.add(backend)


def _after_fork_in_child() -> None:
    for backend in list(_listeners):
        backend.after_fork()


def _at_exit(**kwargs: Any) -> None:
    for backend in list(_listeners):
        backend.at_exit()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
# The children of Celery's pool end without it, those of multiprocessing's have finalizers of their own.
worker_process_shutdown.connect(_at_exit, weak=False, dispatch_uid="fastres-confirms")
multiprocessing.util.register_after_fork(
    _at_exit, lambda at_exit: multiprocessing.util.Finalize(None, at_exit, exitpriority=0)
)
