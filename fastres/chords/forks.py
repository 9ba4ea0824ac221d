"""A process that forks beside a thread: the fork waits until the thread holds nothing that a child would miss."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("busy",)

#: Seconds after which a fork goes ahead: a broker that does not answer must not keep a pool from its children.
PATIENCE = 5.0


class _Gate:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.forking = False


_gate = _Gate()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Locks may be held and sockets written to in here: no fork begins meanwhile."""
    gate = _gate
    with gate.changed:
        gate.changed.wait_for(lambda: not gate.forking, PATIENCE)
        gate.inside += 1
    try:
        yield
    finally:
        with gate.changed:
            gate.inside -= 1
            gate.changed.notify_all()


def _before() -> None:
    gate = _gate
    gate.changed.acquire()
    gate.forking = True
    gate.changed.wait_for(lambda: not gate.inside, PATIENCE)


def _in_parent() -> None:
    _gate.forking = False
    _gate.changed.notify_all()
    _gate.changed.release()


def _in_child() -> None:
    global _gate
    _gate = _Gate()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
