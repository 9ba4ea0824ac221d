"""Helpers of tests with a broker: store results as a worker does, inspect the broker, wait."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import amqp
import celery
import kombu
import pytest
from amqp.exceptions import NotFound
from celery import Celery, group, uuid
from celery.app.task import Context
from celery.backends.base import Backend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult, GroupResult

from fastres import AMQPBackend
from fastres.ids import Kind, kin_of, new_id, new_kin

MakeApp = Callable[..., Celery]
Reports = Callable[[], list[str]]

#: The version of Celery: older ones lack features.
CELERY = tuple(map(int, celery.__version__.split(".")[:2]))

#: Whether the applications of the tests have quorum queues.
QUORUM = os.environ.get("FASTRES_TEST_QUEUES") == "quorum"

#: Timeouts in seconds: of operations that end by themselves, and of those that only wait for a busy broker.
ENOUGH = 20.0
SOON = 5.0


class Impatient(AMQPBackend):
    """Gives up early if the broker is unreachable; its URL is ``backend_kit:Impatient+fastres://``."""

    retry_policy: ClassVar[dict[str, Any]] = {
        "max_retries": 2,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.1,
    }


class Older(AMQPBackend):
    """Sends chords as an old fastres without a joiner; its URL is ``backend_kit:Older+fastres://``."""

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> None:
        Backend.apply_chord(self, header_result_args, body, **kwargs)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        Backend.set_chord_size(self, group_id, chord_size)


#: For tests that cut connections: py-amqp leaves a socket to the garbage collector if it breaks during the handshake,
#: or the handshake is interrupted.
CUT_GREETINGS = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("no_leftovers"),
]


def cuts_greetings(test: Any) -> Any:
    """Decorates a test that cuts connections."""
    for mark in CUT_GREETINGS:
        test = mark(test)
    return test


def close(app: Celery) -> None:
    """Close an application and its connections: Celery leaves its own to the garbage collector."""
    # app.backend would create one.
    backend = app._backend
    if isinstance(backend, AMQPBackend):
        backend.close()
    elif isinstance(backend, RPCBackend) and backend.result_consumer._consumer is not None:
        backend.result_consumer.stop()
    with contextlib.ExitStack() as acquired:
        # The pool stays: all applications on a broker share it.
        for _ in range(app.pool.limit):
            acquired.enter_context(app.pool.acquire()).close()
    app.close()


def clear_cache(backend: AMQPBackend, task_id: str) -> None:
    """Clear a backend's cache of a task, as in a new process. The result stays in its queue."""
    backend._cache.pop(task_id, None)
    backend.layout.looks.forget_all()


def request_of(task_id: str, **fields: Any) -> Context:
    """The request of a task, as in its worker."""
    return Context({"id": task_id, "correlation_id": task_id, **fields})


def store(app: Celery, task_id: str, result: Any = None, state: str = "SUCCESS", **fields: Any) -> None:
    """Store a result as the worker of the task does; ``fields`` are of its request."""
    app.backend.store_result(task_id, result, state, request=request_of(task_id, **fields))


def new_ids(count: int) -> list[str]:
    return [uuid() for _ in range(count)]


def member_ids(group_id: str, count: int) -> list[str]:
    """Ids like those of a group's members."""
    return [new_id(kin_of(group_id), Kind.MEMBER) for _ in range(count)]


def page_ids(count: int) -> list[str]:
    """Ids like those of lone tasks that are sent one after the other."""
    kin = new_kin()
    return [new_id(kin, Kind.PAGE) for _ in range(count)]


def ids_of(held: GroupResult) -> list[str]:
    return [member.id for member in held.results]


def group_of(app: Celery, members: int | Iterable[str] = 3, group_id: str | None = None) -> GroupResult:
    """A group of tasks that were not sent: so many, or with these ids."""
    group_id = group_id or uuid()
    ids = member_ids(group_id, members) if isinstance(members, int) else members
    return GroupResult(group_id, [app.AsyncResult(task_id) for task_id in ids], app=app)


def held_by(app: Celery, held: GroupResult) -> GroupResult:
    """The same group in another application."""
    return group_of(app, ids_of(held), held.id)


def store_member(app: Celery, held: GroupResult, index: int, result: Any = None, state: str = "SUCCESS") -> None:
    """Store the result of a group's member as its worker does."""
    store(app, held.results[index].id, result, state, group=held.id, group_index=index)


def store_group(app: Celery, held: GroupResult, results: Iterable[Any] | None = None, start: int = 0) -> None:
    """Store results of a group's members from index ``start`` on; the default results are the indexes."""
    for index, result in enumerate(range(start, len(held)) if results is None else results, start):
        store_member(app, held, index, result)


def queue_of(group_id: str) -> str:
    """The queue of a group's results."""
    return f"fastres.{kin_of(group_id):015x}"


def fill_group(app: Celery, broker: Broker, held: GroupResult, results: Iterable[Any] | None = None) -> None:
    """As store_group(), for large groups: the first as a worker does, the others as fast as the broker accepts them."""
    pairs = zip(ids_of(held), range(len(held)) if results is None else results)
    store_group(app, held, [next(pairs)[1]])
    broker.fill(queue_of(held.id), (success(task_id, result) for task_id, result in pairs))


def nobodys_task(app: Celery) -> Any:
    """A task that no worker runs."""

    # Not shared: every later application would have it.
    @app.task(name="nobody.runs.this", shared=False)
    def task() -> None: ...

    return task


def send(app: Celery, task_id: str | None = None) -> AsyncResult:
    """Send a task that no worker runs."""
    return app.send_task("nobody.runs.this", task_id=task_id, queue="nobody")


def send_group(app: Celery, count: int) -> GroupResult:
    """Send a group of tasks that no worker runs."""
    task = nobodys_task(app)
    return group([task.s() for _ in range(count)], app=app).apply_async(queue="nobody")


def reply(
    worker: Celery, client: Celery | str, task_id: str, result: Any = None, state: str = "SUCCESS", **fields: Any
) -> None:
    """Store a result as the worker of the task does, for a client or the name of its mailbox."""
    reply_to = client if isinstance(client, str) else client.thread_oid
    store(worker, task_id, result, state, reply_to=reply_to, **fields)


def in_thread(function: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def until(condition: Callable[[], Any], timeout: float = ENOUGH, pause: float = 0.02, so: object = None) -> Any:
    """Wait for a true value, and return it; AssertionError with ``so`` if there is none in time."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not so after {timeout} seconds: {so or condition}"
        time.sleep(pause)
    return value


#: Seconds until ``rabbitmqctl list_queues`` shows the messages of a quorum queue.
COUNTED = 1.5


def settled(count: Callable[[], Any], for_: float = 0.3) -> Any:
    """The broker's count once it is stable: quorum queues count requeued messages late."""
    value = count()
    end = time.monotonic() + (for_ if QUORUM else 0)
    while time.monotonic() < end:
        time.sleep(0.02)
        before, value = value, count()
        if value != before:
            end = time.monotonic() + for_
    return value


def on_classic_queues(why: str) -> Any:
    """A test that only applies to classic queues."""
    return pytest.mark.skipif(QUORUM, reason=f"quorum queues: {why}")


class Broker:
    """Direct access to the broker, without fastres."""

    def __init__(self, url: str) -> None:
        self.connection = kombu.Connection(url)

    def close(self) -> None:
        self.connection.release()

    def channel(self) -> Any:
        return self.connection.default_channel

    def state(self, name: str) -> Any:
        """The numbers of ready messages and consumers of a queue; None if it does not exist."""
        with self.connection.channel() as channel:
            try:
                return channel.queue_declare(name, passive=True)
            except NotFound:
                return None

    def messages(self, name: str) -> int | None:
        state = settled(lambda: self.state(name))
        return None if state is None else int(state.message_count)

    def wait_for_consumer(self, *names: str) -> None:
        for name in names:
            until(lambda name=name: (state := self.state(name)) and state.consumer_count, so=f"consumer of {name}")

    def wait_until_gone(self, *names: str) -> None:
        for name in names:
            until(lambda name=name: self.state(name) is None, SOON, so=f"{name} is gone")

    def look(self, name: str) -> Any:
        """The first message of a queue, which stays there."""
        with self.connection.channel() as channel:
            message = channel.basic_get(name)
            assert message is not None, f"{name} is empty"
            return message

    def declare(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        arguments = {"x-queue-type": "classic", **(arguments or {"x-expires": 60_000})}
        self.channel().queue_declare(name, durable=True, auto_delete=False, arguments=arguments)

    def put(self, name: str, body: Any, arguments: dict[str, Any] | None = None, **properties: Any) -> None:
        """Publish to a queue by its name; a ``body`` of another type than bytes is encoded as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        properties = {"content_type": "application/json", "content_encoding": "utf-8", **properties}
        if arguments is not None:
            self.declare(name, arguments)
        kombu.Producer(self.channel(), auto_declare=False).publish(body, routing_key=name, **properties)
        # The broker replies after it has handled earlier messages.
        self.channel().basic_qos(0, 0, False)

    def fill(self, name: str, metas: Iterable[dict[str, Any]]) -> None:
        """Publish many results to an existing queue, without waiting for confirms."""
        channel = self.channel()
        for meta in metas:
            properties = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 1}
            message = amqp.Message(json.dumps(meta), correlation_id=meta["task_id"], **properties)
            channel.basic_publish(message, routing_key=name)
        channel.basic_qos(0, 0, False)


def success(task_id: str, result: Any = None) -> dict[str, Any]:
    return {"task_id": task_id, "status": "SUCCESS", "result": result, "traceback": None, "children": []}


@contextlib.contextmanager
def takes(seconds: float, late: float = 0.1) -> Iterator[None]:
    """Check that the block takes so many seconds, to a tenth."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert seconds - 0.01 <= took <= seconds + late, f"{took:.3f} s instead of {seconds}"


def in_another_process(code: str, *args: str) -> Any:
    """Run Python code in a new process, with ``sys.argv[1:]``. Returns: its output, which is JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return json.loads(done.stdout)
