"""Forking a process whose joiner runs: the fork waits until the joiner's thread holds no lock that a child needs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("busy",)

#: Seconds that all forks together wait for a thread: neither a silent broker nor a slow errback may keep a pool from
#: starting its children.
MAX_WAIT = 5.0


class _Gate:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        #: When threads entered, on the monotonic clock.
        self.inside: dict[object, float] = {}
        self.forking = False

    def time_left(self) -> float:
        """The seconds for which a fork still waits."""
        return max(self.inside.values(), default=float("-inf")) + MAX_WAIT - time.monotonic()


_gate = _Gate()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A context in which this thread may hold locks and write to sockets: no fork starts meanwhile."""
    gate, token = _gate, object()
    with gate.changed:
        gate.changed.wait_for(lambda: not gate.forking, MAX_WAIT)
        gate.inside[token] = time.monotonic()
    try:
        yield
    finally:
        with gate.changed:
            del gate.inside[token]
            gate.changed.notify_all()


def _before() -> None:
    gate = _gate
    gate.changed.acquire()
    gate.forking = True
    while (time_left := gate.time_left()) > 0:
        gate.changed.wait(time_left)


def _in_parent() -> None:
    _gate.forking = False
    _gate.changed.notify_all()
    _gate.changed.release()


def _in_child() -> None:
    global _gate
    _gate = _Gate()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
