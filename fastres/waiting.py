"""Waiting for results: the part of a backend that Celery calls asynchronous."""

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
    """The methods that ``AsyncResult``, ``ResultSet`` and users wait with."""

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
            timeout: seconds; None: no limit.
            cache: return the result from this process's cache if it is there.
            propagate: raise the exception of a failed task.
            no_ack: False leaves the result for other readers even if the option ``take`` is ``"always"``.
            on_interval: called about once a second.

        Raises:
            fastres.ResultsMissing: the result did not arrive before the timeout.
            Exception: the exception of the task, with ``propagate``.
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
        """Yield ``(task_id, meta)`` of many tasks as they become ready, in constant memory.

        Args:
            timeout: seconds for all tasks; None: no limit.
            no_ack: False leaves the results for other readers, whatever the option ``take`` is.
            now: the clock that measures the timeout, in seconds.
            getfields: returns state and task id of a meta.
            READY_STATES: the final states.
            on_message: called with every meta that arrives, also of states that are not final.
            on_interval: called about once a second, and after each batch.
            max_iterations: how many times to read; None: until all results have arrived.

        Raises:
            fastres.ResultsMissing: not all results arrived before the timeout.
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
        """Yield and take the metas of ``count`` results of a group, of any of its tasks, as they arrive.

        Raises:
            fastres.ResultsGone: there are fewer results.
        """
        return self._waits.header(group_id, count)

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Called by Celery before a result is waited for: callbacks added with ``then`` are called when it is read."""
        self._pending.add(result)
        if result._cache is not None and not result.on_ready.ready:
            result.on_ready(result)
        return result

    def add_pending_results(self, results: Iterable[Any], weak: bool = False) -> list[Any]:
        return [self.add_pending_result(result, weak) for result in results]

    def remove_pending_result(self, result: Any) -> Any:
        """Called by Celery when a result is ready, forgotten, or no longer referred to."""
        self.layout.unexpected(result.id)
        self._pending.remove(result)
        return result

    def on_result_fulfilled(self, result: Any) -> None:
        """Called by Celery when no wait for a result is left."""

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
        """Wait for an ``AsyncResult``, and return its value or raise its exception."""
        self._ensure_not_eager()
        if result._cache is None:
            meta = self._waits.cached(result.id)
            if meta is None:
                meta = self._waits.one(result.id, timeout, no_ack, on_interval=on_interval, on_message=on_message)
            result._maybe_set_cache(meta)
            self._pending.fulfil(result.id, meta)
        return result.maybe_throw(callback=callback, propagate=propagate)
