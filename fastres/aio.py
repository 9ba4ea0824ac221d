"""Waiting for results in an event loop: nothing here blocks the loop, or needs a thread for each wait.

One thread of the process reads for all waits, over the connection that other waits of the process use. A cancelled
wait (``asyncio.timeout``, for example) leaves no consumer and no unacknowledged message behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from celery import current_app, states
from celery.exceptions import ImproperlyConfigured
from celery.result import AsyncResult, ResultSet

from fastres.groups import leaves
from fastres.read.loop_reader import Wait
from fastres.watching import Progress
from fastres.watching import progress as progress_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from fastres._protocols import Meta
    from fastres.read.loop_reader import LoopReader

__all__ = ("as_completed", "get", "join", "progress", "state")


async def get(result: Any, timeout: float | None = None, *, propagate: bool = True, app: Any = None) -> Any:
    """Wait for a task or a group and return its result, as ``result.get(timeout)`` does.

    Args:
        result: an ``AsyncResult``, a ``GroupResult``, or the id of a task.
        timeout: seconds; None: no limit.
        propagate: raise the exception of a failed task. If False, return the exception.
        app: the application of a task id; default: the current application.

    Raises:
        fastres.ResultsMissing: the result did not arrive before the timeout.
        Exception: the exception of the task.
    """
    if isinstance(result, ResultSet):
        return await join(result, timeout, propagate=propagate)
    if isinstance(result, str):
        result = (app or current_app).AsyncResult(result)
    if result._cache is None:
        async with _waiting(result.backend, lambda: {result.id: result}, timeout) as came:
            _, error = await came.get()
            if error is not None:
                raise error
    return _value(result._cache, propagate)


async def join(results: ResultSet, timeout: float | None = None, *, propagate: bool = True) -> list[Any]:
    """Wait for all tasks of a group and return their results, in the order of the group.

    The results of groups inside the group are in the same flat list.

    Args:
        results: a ``GroupResult`` or ``ResultSet``.
        timeout: seconds for all tasks; None: no limit.
        propagate: raise the first exception that arrives. If False, the list has each exception in its place.

    Raises:
        Exception: as :func:`get`.
    """
    backend = results.app.backend
    members: list[Any] = []

    def missing() -> dict[str, Any]:
        members.extend(leaves(results.results))
        return {member.id: member for member in members if member._cache is None}

    def values() -> list[Any]:
        by_id = {member.id: member for member in members if member._cache is not None}
        return [_value(by_id[member.id]._cache, propagate) for member in members]

    async with _waiting(backend, missing, timeout) as came:
        while True:
            pairs, error = await came.get()
            if error is not None:
                raise error
            if pairs is None:
                break
            if propagate:
                for _, meta in pairs:
                    _value(meta, propagate)
        # There may be a million results: let the loop run other tasks meanwhile.
        return list(await _called(backend, values))


async def as_completed(
    results: Any, timeout: float | None = None, *, propagate: bool = False, app: Any = None
) -> AsyncIterator[tuple[str, Any]]:
    """Yield ``(task id, value)`` of tasks as they end. The value of a failed task is its exception.

    Args:
        results: a ``GroupResult`` or ``ResultSet``, ``AsyncResult`` instances, or task ids.
        timeout: seconds for all tasks; None: no limit.
        propagate: raise exceptions instead of yielding them.
        app: the application of task ids; default: the current application.

    Raises:
        Exception: as :func:`get`.
    """
    if isinstance(results, ResultSet):
        members: list[Any] = list(leaves(results.results))
        app = app or results.app
    else:
        members = list(results)
        app = app or next((member.app for member in members if isinstance(member, AsyncResult)), None)
    backend = (app or current_app).backend
    known = {each.id: each for each in members if isinstance(each, AsyncResult) and each._cache is not None}
    for task_id, result in known.items():
        yield task_id, _value(result._cache, propagate)
    ids = dict.fromkeys(getattr(member, "id", member) for member in members)
    left = [task_id for task_id in ids if task_id not in known]
    if not left:
        return
    pairs: deque[tuple[str, Meta]] = deque()
    async with _waiting(backend, lambda: left, timeout) as came:
        try:
            while True:
                more, error = await came.get()
                if error is not None:
                    raise error
                if more is None:
                    return
                pairs.extend(more)
                while pairs:
                    task_id, meta = pairs.popleft()
                    yield task_id, _value(meta, propagate)
        finally:
            # Not consumed, and out of their queues.
            while not came.empty():
                pairs.extend(came.get_nowait()[0] or ())
            _loop_reader(backend).keep(pairs)


async def state(task: Any, *, app: Any = None) -> str:
    """The state of a task, an ``AsyncResult`` or an id, as ``AsyncResult.state`` has it."""
    result = (app or current_app).AsyncResult(task) if isinstance(task, str) else task
    return str(await _called(result.backend, lambda: result.state))


async def progress(group: Any, *, app: Any = None) -> Progress:
    """How far a group or a chord is: see :func:`fastres.progress`."""
    of = group.parent if isinstance(group, AsyncResult) and group.parent is not None else group
    app = app or getattr(of, "app", None) or current_app
    found: Progress = await _called(app.backend, lambda: progress_of(group, app=app))
    return found


def _value(meta: Meta, propagate: bool) -> Any:
    if propagate and meta["status"] in states.PROPAGATE_STATES:
        raise meta["result"]
    return meta["result"]


def _loop_reader(backend: Any) -> LoopReader:
    reader: LoopReader | None = getattr(backend, "loop_reader", None)
    if reader is None:
        raise ImproperlyConfigured(
            f"fastres.aio needs result_backend fastres://, where results are found by their ids, not {backend!r}"
        )
    return reader


def _to_loop(callback: Callable[[Any], object]) -> Callable[[Any], None]:
    """A function for other threads that schedules the callback in the running loop, if that loop still runs."""
    loop = asyncio.get_running_loop()

    def call(argument: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(callback, argument)

    return call


@contextlib.asynccontextmanager
async def _waiting(
    backend: Any, task_ids: Callable[[], Iterable[str]], timeout: float | None
) -> AsyncIterator[asyncio.Queue[tuple[Any, BaseException | None]]]:
    """A queue of ``(pairs, None)`` with task ids and metas; last ``(None, error)``, where the error may be None."""
    reader = _loop_reader(backend)
    came: asyncio.Queue[tuple[Any, BaseException | None]] = asyncio.Queue()
    put = _to_loop(came.put_nowait)
    wait = Wait(task_ids, timeout, lambda pairs: put((pairs, None)), lambda error: put((None, error)))
    reader.add(wait)
    try:
        yield came
    finally:
        reader.cancel(wait)


async def _called(backend: Any, function: Callable[[], Any]) -> Any:
    """Call a function in the reader's thread, where it may block, and return its result."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def set_outcome(outcome: tuple[Any, BaseException | None]) -> None:
        result, error = outcome
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    report = _to_loop(set_outcome)

    def call() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = function(), None
        except Exception as exc:
            outcome = None, exc
        report(outcome)

    _loop_reader(backend).do(call)
    return await done
