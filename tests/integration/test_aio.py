"""Waiting for results in an event loop."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from backend_kit import Broker, MakeApp, cuts_greetings, group_of, page_ids, store, store_group, store_member
from celery import Celery, chord, group, uuid
from celery.exceptions import ImproperlyConfigured, TimeoutError
from proj import OutOfStockError, add, fail, gated, tsum
from proxy import Proxy
from rabbitmq_node import Node
from workers import Worker, adds, client

import fastres
from fastres import aio

SECONDS = 20


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    with Worker(node.url, pool="threads", concurrency=4) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


async def in_executor(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call blocking code in a thread, such as Celery's sending."""
    return await asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args, **kwargs))


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Callable[[Any], Any]:
    """Runs a coroutine in a loop whose debug mode warns of blocking code."""
    new_loop = (
        asyncio.new_event_loop if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    )

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        loop = new_loop()
        loop.set_debug(True)
        # More than Celery's own code takes on a busy machine, and less than a wait for a broker.
        loop.slow_callback_duration = 2
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            slow = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
            assert not [text for text in slow if "took" in text], slow

    return run


def test_get(app: Celery, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        result = await in_executor(add.delay, 1, 2)
        assert await aio.get(result, timeout=SECONDS) == 3
        assert result._cache is not None
        assert await aio.get(result) == 3
        assert await aio.get(result.id, timeout=SECONDS, app=app) == 3
        with pytest.raises(OutOfStockError):
            await aio.get(await in_executor(fail.delay, "apples", 4), timeout=SECONDS)
        value = await aio.get(await in_executor(fail.delay, "apples", 4), timeout=SECONDS, propagate=False)
        assert isinstance(value, OutOfStockError)
        assert await aio.get(await in_executor(chord(adds(5)), tsum.s()), timeout=SECONDS) == 20
        assert await aio.state(result) == "SUCCESS"
        assert await aio.state(*page_ids(1)) == "PENDING"

    run(main())


def test_groups(app: Celery, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        assert await aio.join(await in_executor(group(adds(50)).apply_async), timeout=SECONDS) == [
            2 * n for n in range(50)
        ]
        nested = await in_executor(group(add.s(1, 1), group(add.s(2, 2), add.s(3, 3))).apply_async)
        assert await aio.get(nested, timeout=SECONDS) == [2, 4, 6]
        # Results that were read before are not waited for.
        assert await aio.join(nested, timeout=1) == [2, 4, 6]
        failing = [add.s(1, 1), fail.s("apples", 4)]
        with pytest.raises(OutOfStockError):
            await aio.join(await in_executor(group(failing).apply_async), timeout=SECONDS)
        value, error = await aio.join(
            await in_executor(group(failing).apply_async), timeout=SECONDS, propagate=False
        )
        assert (value, type(error)) == (2, OutOfStockError)
        assert await aio.join(app.GroupResult(uuid(), [])) == []

    run(main())


def test_as_completed(app: Celery, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        sent = await in_executor(group([*adds(20), fail.s("apples", 4)]).apply_async)
        came = {task_id: value async for task_id, value in aio.as_completed(sent, timeout=SECONDS)}
        assert [came[each.id] for each in sent[:20]] == [2 * n for n in range(20)]
        assert isinstance(came[sent[20].id], OutOfStockError)
        lone = [await in_executor(add.delay, n, n) for n in range(5)]
        assert len([each async for each in aio.as_completed(lone, timeout=SECONDS)]) == 5
        ids = [each.id for each in [await in_executor(add.delay, n, n) for n in range(5)]]
        assert {task_id async for task_id, _ in aio.as_completed(ids, timeout=SECONDS, app=app)} == set(ids)
        with pytest.raises(OutOfStockError):
            async for _ in aio.as_completed(
                [await in_executor(fail.delay, "apples", 4)], timeout=SECONDS, propagate=True
            ):
                pass
        assert [each async for each in aio.as_completed([], app=app)] == []

    run(main())


def test_timeouts_and_cancelled_waits_leave_nothing(
    node: Node, make_app: MakeApp, broker: Broker, run: Callable[[Any], Any]
) -> None:
    app, writer = make_app(node.url), make_app(node.url)
    held, lone = group_of(app), app.AsyncResult(*page_ids(1))
    store_member(writer, held, 0, 0)

    async def main() -> None:
        start = time.monotonic()
        with pytest.raises(fastres.ResultsMissing, match="2 results are missing of 3"):
            await aio.join(held, timeout=0.5)
        # Results that arrived are not lost.
        assert [member._cache is not None for member in held] == [True, False, False]
        with pytest.raises(TimeoutError):
            await aio.get(lone, timeout=0.3)
        soon = time.monotonic()
        with pytest.raises(TimeoutError):
            await aio.get(lone, timeout=0.1)
        assert time.monotonic() - soon < 0.7
        assert 0.8 <= time.monotonic() - start < 3
        for wait in (aio.join(held), aio.get(lone)):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wait, 0.2)
        async for _, value in aio.as_completed(held):
            assert value == 0
            break
        task = asyncio.ensure_future(aio.get(lone))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await aio.state(lone)

    run(main())
    others = group_of(app)
    store_group(writer, others, range(3))

    async def first() -> None:
        came = aio.as_completed([each.id for each in others], timeout=SECONDS, app=app)
        async for _ in came:
            break
        await came.aclose()

    run(first())
    # Results that were read but not returned can be read again here.
    rest = dict(app.backend.get_many([each.id for each in others][1:], timeout=SECONDS))
    assert len(rest) == 2
    # Results that were not returned are there for others.
    store_group(writer, held, range(1, 3), start=1)
    store(writer, lone.id, "late")
    again = make_app(node.url)
    assert again.AsyncResult(lone.id).get(timeout=SECONDS) == "late"
    assert dict(again.backend.get_many([each.id for each in held][1:], timeout=SECONDS)).keys() == {
        each.id for each in held[1:]
    }
    assert not app.backend.loop_reader._open


def test_many_waits_at_once(app: Celery, run: Callable[[Any], Any], broker: Broker) -> None:
    """All waits share one thread and one connection."""
    before = {thread.ident for thread in threading.enumerate()}

    async def main() -> None:
        results = await in_executor(lambda: [add.delay(n, n) for n in range(200)])
        values = await asyncio.gather(*(aio.get(result, timeout=SECONDS) for result in results))
        assert values == [2 * n for n in range(200)]

    run(main())
    added = {thread.name for thread in threading.enumerate() if thread.ident not in before}
    # Except the threads of the loop's executor, which sends.
    assert {name for name in added if not name.startswith(("asyncio_", "uvloop_"))} <= {"fastres-loop-reader"}


def test_a_large_group_blocks_no_loop(node: Node, make_app: MakeApp, run: Callable[[Any], Any]) -> None:
    app, writer = make_app(node.url), make_app(node.url, result_backend_transport_options={"confirm": False})
    held = group_of(app, 20_000)
    store_group(writer, held, range(20_000))
    longest = 0.0

    async def main() -> list[int]:
        async def tick() -> None:
            nonlocal longest
            while True:
                start = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - start)

        ticking = asyncio.ensure_future(tick())
        values = await aio.join(held, timeout=60)
        ticking.cancel()
        return values

    assert run(main()) == list(range(20_000))
    # Threads of one interpreter take turns of 5 ms; a busy machine has taken 0.51 s.
    assert longest < 1


@cuts_greetings
def test_the_connection_is_cut(node: Node, run: Callable[[Any], Any]) -> None:
    with Proxy(node.port) as proxy, client(proxy.url) as app, client(node.url) as writer:
        held, lone = group_of(app, 100), app.AsyncResult(*page_ids(1))

        async def main() -> None:
            both = asyncio.gather(aio.join(held, timeout=SECONDS), aio.get(lone, timeout=SECONDS))
            await asyncio.sleep(0.5)
            proxy.cut()
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, store_group, writer, held, range(50))
            proxy.cut()
            await loop.run_in_executor(None, lambda: store_group(writer, held, range(50, 100), start=50))
            await loop.run_in_executor(None, store, writer, lone.id, "there")
            assert await both == [list(range(100)), "there"]

        run(main())


def test_threads_wait_at_the_same_time(app: Celery, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        results = await in_executor(lambda: [add.delay(n, n) for n in range(40)])
        in_threads = [loop.run_in_executor(None, lambda r=r: r.get(timeout=SECONDS)) for r in results[::2]]
        values = await asyncio.gather(*(aio.get(result, timeout=SECONDS) for result in results[1::2]))
        assert values == [2 * n for n in range(1, 40, 2)]
        assert await asyncio.gather(*in_threads) == [2 * n for n in range(0, 40, 2)]

    run(main())


def test_progress(app: Celery, run: Callable[[Any], Any], tmp_path: Any) -> None:
    async def main() -> None:
        gate = tmp_path / "gate"
        result = await in_executor(chord([add.s(1, 1), add.s(2, 2), gated.s(str(gate), 1)]), tsum.s())
        end = time.monotonic() + SECONDS
        while (found := await aio.progress(result)).ready < 2:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert found == fastres.Progress(2, 3, 2, 0, 0, True)
        assert await aio.progress(result.parent.id, app=app) == found
        gate.touch()
        assert await aio.get(result, timeout=SECONDS) == 7
        assert (await aio.progress(result))[:2] == (3, 3)

    run(main())


def test_unsupported_calls(node: Node, make_app: MakeApp) -> None:
    app = make_app(node.url, result_backend="fastres-rpc://")
    with pytest.raises(ImproperlyConfigured, match="fastres://"):
        asyncio.run(aio.get(app.AsyncResult(uuid())))


def test_after_a_fork(node: Node, make_app: MakeApp) -> None:
    app, writer = make_app(node.url), make_app(node.url)
    ids = page_ids(2)
    for id_ in ids:
        store(writer, id_, id_)
    assert asyncio.run(aio.get(app.AsyncResult(ids[0]), timeout=SECONDS)) == ids[0]
    pid = os.fork()
    if not pid:
        try:
            ok = asyncio.run(aio.get(app.AsyncResult(ids[1]), timeout=SECONDS)) == ids[1]
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert asyncio.run(aio.get(app.AsyncResult(ids[1]), timeout=SECONDS)) == ids[1]
