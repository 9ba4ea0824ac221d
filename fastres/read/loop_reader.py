"""The thread that reads for the waits of event loops."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastres.errors import BrokerUnreachable
from fastres.logs import logger
from fastres.read.join import Join

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from fastres._protocols import Meta
    from fastres.amqp.connection import Link
    from fastres.read.wait import Waits

__all__ = ("LoopReader", "Wait")

#: Seconds that a read lasts at most.
INTERVAL = 1.0


class Wait:
    """A wait of an event loop. The thread of the loop reader calls its callbacks.

    Args:
        task_ids: called in the thread, returns the ids of the tasks, of which there may be many; or their results
            by their ids, which are fulfilled before the callbacks.
        timeout: seconds, None: for ever.
        arrived: called with the metas of results, by task id, as they come.
        ended: called once: with None when all results have arrived, otherwise with an exception.
    """

    def __init__(
        self,
        task_ids: Callable[[], Iterable[str]],
        timeout: float | None,
        arrived: Callable[[list[tuple[str, Meta]]], object],
        ended: Callable[[BaseException | None], object],
    ) -> None:
        self.task_ids = task_ids
        self.timeout = timeout
        self.join: Join
        self.waiting: dict[str, Any] | None = None
        self.cancelled = False
        self.arrived = arrived
        self.ended = ended
        self.takes = False


class LoopReader:
    """Reads for many waits, in a thread that starts with the first wait.

    Args:
        waits: the backend's.
        link: the consuming connection.
    """

    def __init__(self, waits: Waits, link: Link) -> None:
        self._waits = waits
        self._link = link
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        #: Work for the thread, and a signal that there is some.
        self._commands: deque[Callable[[], object]] = deque()
        self._called = threading.Event()
        self._open: dict[Wait, None] = {}

    def do(self, command: Callable[[], object]) -> None:
        """Schedule a call in the thread, without waiting for it."""
        if self._pid != os.getpid():
            # In a forked child: the thread is the parent's.
            self._begin()
        self._commands.append(command)
        self._called.set()
        if self._thread is None or not self._thread.is_alive():
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._link.attended = True
                    self._thread = threading.Thread(target=self._run, name="fastres-loop-reader", daemon=True)
                    self._thread.start()
        self._link.interrupt()

    def add(self, wait: Wait) -> None:
        """Begin a wait; its methods are called until it has ended."""
        self.do(lambda: self._add(wait))

    def cancel(self, wait: Wait) -> None:
        """End a wait, and remove its subscriptions."""
        wait.cancelled = True
        self.do(lambda: self._end(wait))

    def keep(self, pairs: Iterable[tuple[str, Meta]]) -> None:
        """Keep results that were read and not handed over, for later calls of this process."""
        self._waits.keep(dict(pairs))

    # -- in the thread

    def _run(self) -> None:
        while True:
            try:
                self._step()
            except Exception:
                # The waits concerned get the exception; the thread must not end.
                logger.exception("An error in the thread that reads for event loops, which goes on")

    def _step(self) -> None:
        self._called.clear()
        while self._commands:
            self._commands.popleft()()
        for wait in list(self._open):
            self._collect(wait)
        due = self._link.beat()
        if not self._open:
            self._called.wait(min(due, threading.TIMEOUT_MAX))
            return
        try:
            self._waits.look([wait.join for wait in self._open], min(INTERVAL, due), self._has_batches)
        except BrokerUnreachable as exc:
            # A wait that has timed out gets its own exception; all others end with this one.
            if all(wait.join.left() > 0 for wait in self._open):
                for wait in list(self._open):
                    self._end(wait, exc)

    def _has_batches(self) -> bool:
        return bool(self._commands) or any(wait.join.has_batches() for wait in self._open)

    def _add(self, wait: Wait) -> None:
        try:
            task_ids = wait.task_ids()
            wait.waiting = task_ids if isinstance(task_ids, dict) else None
            wait.join = Join(task_ids, timeout=wait.timeout)
        except Exception as exc:
            wait.ended(exc)
            return
        self._open[wait] = None
        try:
            if wait.join.aggregate:
                wait.takes = self._waits.begin(wait.join)
            else:
                self._end(wait)
        except Exception as exc:
            self._end(wait, exc)

    def _collect(self, wait: Wait) -> None:
        try:
            pairs = self._waits.collect(wait.join, wait.takes, wait.waiting)
        except Exception as exc:
            self._end(wait, exc)
            return
        if pairs and wait.cancelled:
            self.keep(pairs)
        elif pairs:
            wait.arrived(pairs)
        if wait.join.complete and not wait.join.has_batches():
            self._end(wait)

    def _end(self, wait: Wait, why: BaseException | None = None) -> None:
        if self._open.pop(wait, wait) is not None:
            # It has ended before.
            return
        try:
            self._waits.end(wait.join)
        finally:
            wait.ended(why)
