"""Waits for the result of a task, of many tasks, or of a group. Each result is handed over once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import states
from celery.result import GroupResult

from fastres._impl import fulfil
from fastres._protocols import CANCELLED, SENT_AT
from fastres.errors import BrokerUnreachable
from fastres.groups import leaves
from fastres.read.join import Join

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator, MutableMapping

    from celery.result import AsyncResult

    from fastres._protocols import Meta
    from fastres.addresses import Addresses
    from fastres.counts import Counts
    from fastres.read.join import Batch
    from fastres.read.reader import Reader

__all__ = ("Waits",)


class Waits:
    """The waits of a backend.

    Args:
        layout: ``SharedQueues`` or ``Mailbox``: where the results come, and which waits take them.
        reader: reads them.
        cache: metas by task id that can be asked for again.
        decode_failure: makes the result of a failed task's meta an exception, in place.
        failures: the states whose result is an exception.
        counts: the counters of the process.
    """

    def __init__(
        self,
        layout: Any,
        reader: Reader,
        cache: MutableMapping[str, Meta],
        decode_failure: Callable[[Meta], object],
        failures: frozenset[str],
        counts: Counts,
    ) -> None:
        self._counts = counts
        self._layout = layout
        self._addresses: Addresses = layout.addresses
        self._reader = reader
        self._cache = cache
        self._decode_failure = decode_failure
        self._failures = failures

    def cached(self, task_id: str, ready_states: Iterable[str] = states.READY_STATES) -> Meta | None:
        """A final meta that was read before."""
        meta: Meta | None = self._cache.get(task_id)
        return meta if meta is not None and meta["status"] in ready_states else None

    def keep(self, metas: dict[str, Meta]) -> None:
        """Have metas that can be asked for again, by task id."""
        self._cache.update(metas)

    def to_python(self, meta: Meta) -> Meta:
        """Make a failure's result an exception; one that cannot be made is that failure's result."""
        try:
            self._decode_failure(meta)
        except Exception as exc:
            meta["result"] = exc
        return meta

    def one(
        self,
        task_id: str,
        timeout: float | None,
        no_ack: bool = True,
        *,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        ready_states: Iterable[str] = states.READY_STATES,
    ) -> Meta:
        """The final meta of a task.

        Raises:
            celery.exceptions.TimeoutError: it did not come in time.
        """
        join = Join([task_id], ready_states, timeout)
        take = self._layout.takes(no_ack, alone=True)
        results = self._results(join, take, ready_states, on_interval=on_interval, on_message=on_message)
        with contextlib.closing(results):
            _, meta = next(results)
        # As Celery's other backends do after each message: AsyncResult.get looks at the parents there, and raises
        # the exception of a chord's header instead of the ChordError of its body. Not before the end of the wait:
        # the parents' results may be in the same queue.
        if on_interval is not None:
            on_interval()
        return meta

    def many(
        self,
        task_ids: Iterable[str],
        timeout: float | None,
        no_ack: bool = True,
        *,
        now: Callable[[], float],
        ready_states: Iterable[str] = states.READY_STATES,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        rounds: int | None = None,
    ) -> Iterator[tuple[str, Meta]]:
        """The final metas of tasks as they come, those that were read before first.

        Args:
            now: the clock that the timeout is measured with, in seconds.
            rounds: how often to look, None: until all are there.
        """
        join = Join(task_ids, ready_states, timeout, now)
        known = [task_id for task_id in list(self._cache.keys()) if task_id in join.aggregate]
        cached = {task_id: meta for task_id in known if (meta := self.cached(task_id, ready_states))}
        join.aggregate.feed([(None, task_id, meta) for task_id, meta in cached.items()])
        yield from cached.items()
        yield from self._results(
            join,
            self._layout.takes(no_ack),
            ready_states,
            on_message=on_message,
            on_interval=on_interval,
            rounds=rounds,
        )

    def group(
        self,
        result: Any,
        timeout: float | None,
        no_ack: bool = True,
        *,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """The final metas of a group's members as they come, then the results of each group in it."""
        nested = [child for child in result.results if isinstance(child, GroupResult)]
        # Without groups in it, all that comes is the group's own.
        direct = {child.id for child in result.results if not isinstance(child, GroupResult)} if nested else None
        waiting: dict[str, AsyncResult] = {}
        # A result may be in the group more than once.
        again: dict[str, list[AsyncResult]] = {}
        for child in leaves(result.results) if nested else result.results:
            if child._cache is not None:
                if direct is None or child.id in direct:
                    yield child.id, child._cache
            elif waiting.setdefault(child.id, child) is not child:
                again.setdefault(child.id, []).append(child)
        join = Join(waiting, timeout=timeout)
        take = self._layout.takes(no_ack)
        for pair in self._results(join, take, on_message=on_message, on_interval=on_interval, waiting=waiting):
            task_id, meta = pair
            if again:
                for child in again.get(task_id, ()):
                    fulfil(child, meta)
            if direct is None or task_id in direct:
                yield pair
        for child in nested:
            yield child.id, child.results

    def header(self, group_id: str, count: int) -> Iterator[Meta]:
        """The metas of so many results of a group, whichever tasks they are of, as they come; each is taken.

        Raises: fastres.ResultsGone: some of them are not there.
        """
        for _, _, meta in self._reader.stream(self._addresses.group(group_id), count):
            yield self.to_python(meta) if meta["status"] in self._failures else meta

    def _results(
        self,
        join: Join,
        take: bool,
        ready_states: Iterable[str] = states.READY_STATES,
        *,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        rounds: int | None = None,
        waiting: dict[str, AsyncResult] | None = None,
    ) -> Generator[tuple[str, Meta], None, None]:
        """Final results of tasks as they come, each handed over when the next one is asked for.

        Args:
            waiting: by task id, what is to hold each result before it counts as handed over: whoever iterates may
                be interrupted before it has done anything with it.
        """
        if not join.aggregate:
            return
        # A look or two, as ResultSet._iter_meta asks for, takes nothing.
        take = take and rounds is None
        try:
            with_states = on_message is not None or not states.READY_STATES.issuperset(ready_states)
            self._layout.open(join, take, with_states)
            for batch in self._reader.wait(join, on_interval=on_interval, rounds=rounds):
                yield from self._hand_over(join, batch, take, on_message, waiting)
        except BrokerUnreachable as exc:
            if join.left() > 0:
                raise
            raise self._reader.timeout_error(join, exc) from exc
        finally:
            # Outside of the method: a signal may come before its first line.
            try:
                self._reader.leave(join)
            except BaseException:
                self._reader.abandon(join)
                raise

    def _hand_over(
        self,
        join: Join,
        batch: Batch,
        take: bool,
        on_message: Callable[[Meta], Any] | None = None,
        waiting: dict[str, AsyncResult] | None = None,
    ) -> Iterator[tuple[str, Meta]]:
        failures = self._failures
        handed = 0
        try:
            for mark, task_id, meta in batch.arrivals:
                if on_message is not None:
                    meta.pop(SENT_AT, None)
                    on_message(meta)
                if batch.final:
                    failed = meta["status"] in failures
                    if failed:
                        self.to_python(meta)
                    # Results that were taken can be asked for again. A cancelled task may still run.
                    if (join.few and not failed) or (failed and take and mark is not CANCELLED):
                        self._cache[task_id] = meta
                    if waiting is not None:
                        fulfil(waiting[task_id], meta)
                    handed += 1
                    yield task_id, meta
        finally:
            self._counts.joined += handed
            self._reader.handed_over(join, handed, take)

    # -- for the loop reader

    def begin(self, join: Join) -> bool:
        """Subscribe a join. Returns: whether it takes its results."""
        take = bool(self._layout.takes(True, alone=join.alone))
        self._layout.open(join, take, False)
        return take

    def collect(
        self, join: Join, take: bool, waiting: dict[str, AsyncResult] | None = None
    ) -> list[tuple[str, Meta]]:
        """The new results of a join, which are handed over: to the result objects in ``waiting`` first, if given."""
        return [
            pair
            for batch in self._reader.wait(join, rounds=0)
            for pair in self._hand_over(join, batch, take, None, waiting)
        ]

    def end(self, join: Join) -> None:
        """A join is complete, or given up."""
        try:
            self._reader.leave(join)
        except BaseException:
            self._reader.abandon(join)
            raise

    def look(self, joins: Collection[Join], seconds: float, done: Callable[[], bool]) -> None:
        """Read for joins, for at most so many seconds."""
        self._reader.look(joins, seconds, done)
