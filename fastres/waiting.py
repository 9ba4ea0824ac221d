"""How a user waits for results: the part of the backend that Celery calls asynchronous."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from celery import states

from fastres._protocols import Meta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres.layout import Layout
    from fastres.read.pending import Pending
    from fastres.read.wait import Waits

__all__ = ("Waiting",)

#: State and task id of a meta.
FIELDS = itemgetter("status", "task_id")


class Waiting:
    """What ``AsyncResult``, ``ResultSet`` and users wait with: a base of the backends."""

    is_async = True

    layout: Layout
    _waits: Waits
    _pending: Pending
    _ensure_not_eager: Callable[[], None]

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        cache: bool = True,
        propagate: bool = True,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
        READY_STATES: frozenset[str] = states.READY_STATES,
        PROPAGATE_STATES: frozenset[str] = states.PROPAGATE_STATES,
        **kwargs: Any,
    ) -> Any:
        """Wait for a task and return its result.

        Args:
            timeout: seconds, None: for ever.
            cache: take the result from this process's cache if it is there.
            propagate: raise the exception of a failed task.
            no_ack: False: leave the result for others even where the option ``take`` is ``"always"``.
            on_interval: called about once a second.

        Raises:
            celery.exceptions.TimeoutError: it did not come in time.
            Exception: what the task raised, with ``propagate``.
        """
        meta = self._waits.cached(task_id, READY_STATES) if cache else None
        if meta is None:
            meta = self._waits.one(task_id, timeout, no_ack, on_interval=on_interval, ready_states=READY_STATES)
        if propagate and meta["status"] in PROPAGATE_STATES:
            raise meta["result"]
        return meta["result"]

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        no_ack: bool = True,
        now: Callable[[], float] = time.time,
        getfields: Callable[[Meta], tuple[str, str]] = FIELDS,
        READY_STATES: frozenset[str] = states.READY_STATES,
        PROPAGATE_STATES: frozenset[str] = states.PROPAGATE_STATES,
        *,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, Meta]]:
        """Yield ``(task_id, meta)`` of many tasks as they become ready; nothing of it is kept here.

        Args:
            timeout: seconds for all of them, None: for ever.
            no_ack: False: leave the results for others, whatever the option ``take`` is.
            now: the clock that the timeout is measured with, in seconds.
            getfields: state and task id of a meta.
            READY_STATES: the states that are final.
            on_message: called with every meta that comes, those of states that are not final too.
            on_interval: called about once a second, and after each batch.
            max_iterations: how often to look, None: until all are there.

        Raises:
            celery.exceptions.TimeoutError: not all came in time.
        """
        results = self._waits.many(
            task_ids,
            timeout,
            no_ack,
            now=now,
            ready_states=READY_STATES,
            on_message=on_message,
            on_interval=on_interval,
            rounds=max_iterations,
        )
        return results if getfields is FIELDS else ((getfields(meta)[1], meta) for _, meta in results)

    def iter_native(
        self,
        result: Any,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, Any]]:
        """Yield ``(task_id, meta)`` of a group's members as they become ready, then ``(group_id, results)`` of the
        groups in it: what ``ResultSet.join_native`` joins.
        """
        self._ensure_not_eager()
        return self._waits.group(result, timeout, no_ack, on_message=on_message, on_interval=on_interval)

    def iter_header(self, group_id: str, count: int) -> Iterator[Meta]:
        """The metas of so many results of a group, whichever tasks they are of, as they come; each is taken.

        Raises: fastres.ResultsGone: some of them are not there.
        """
        return self._waits.header(group_id, count)

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Called when somebody may wait for a result: a callback added with ``then`` fires when it is read."""
        self._pending.add(result)
        if result._cache is not None and not result.on_ready.ready:
            result.on_ready(result)
        return result

    def add_pending_results(self, results: Iterable[Any], weak: bool = False) -> list[Any]:
        return [self.add_pending_result(result, weak) for result in results]

    def remove_pending_result(self, result: Any) -> Any:
        """Called when a result is ready, forgotten, or no longer referred to: it is held by a weak reference."""
        self.layout.unexpected(result.id)
        self._pending.remove(result)
        return result

    def on_result_fulfilled(self, result: Any) -> None:
        """Called by Celery when nobody waits for a result any more."""

    def wait_for_pending(
        self,
        result: Any,
        callback: Callable[[str, Any], Any] | None = None,
        propagate: bool = True,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Wait for an ``AsyncResult``, and return or raise what the task did."""
        self._ensure_not_eager()
        if result._cache is None:
            meta = self._waits.cached(result.id)
            if meta is None:
                meta = self._waits.one(result.id, timeout, no_ack, on_interval=on_interval, on_message=on_message)
            result._maybe_set_cache(meta)
            self._pending.fulfil(result.id, meta)
        return result.maybe_throw(callback=callback, propagate=propagate)
