"""What the tests of the backends share: writing results as a worker does, and looking at the broker itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import amqp
import kombu
from amqp.exceptions import NotFound
from celery import Celery, uuid
from celery.app.task import Context
from celery.result import GroupResult

#: Seconds that anything may take that ends by itself, and what is only a matter of the broker's having time.
ENOUGH = 20.0
SOON = 5.0


def request_of(task_id: str, **fields: Any) -> Context:
    """The request of a task, as its worker has it."""
    return Context({"id": task_id, "correlation_id": task_id, **fields})


def store(app: Celery, task_id: str, result: Any = None, state: str = "SUCCESS", **fields: Any) -> None:
    """Store a result as the worker of the task does; ``fields`` are of its request."""
    app.backend.store_result(task_id, result, state, request=request_of(task_id, **fields))


def group_of(app: Celery, count: int = 3, group_id: str | None = None) -> GroupResult:
    """A group of tasks that nobody has sent."""
    return GroupResult(group_id or uuid(), [app.AsyncResult(uuid()) for _ in range(count)], app=app)


def store_group(app: Celery, group: GroupResult, results: Iterable[Any] | None = None) -> None:
    """Store the results of a group's members, 0, 1, 2 ... unless given."""
    for index, (member, result) in enumerate(zip(group.results, results or range(len(group)))):
        store(app, member.id, result, group=group.id, group_index=index)


class Broker:
    """The broker, without fastres."""

    def __init__(self, url: str) -> None:
        self.connection = kombu.Connection(url)

    def close(self) -> None:
        self.connection.release()

    def channel(self) -> Any:
        return self.connection.default_channel

    def state(self, name: str) -> Any:
        """Messages that are ready and consumers of a queue, None where there is none."""
        with self.connection.channel() as channel:
            try:
                return channel.queue_declare(name, passive=True)
            except NotFound:
                return None

    def messages(self, name: str) -> int | None:
        state = self.state(name)
        return None if state is None else int(state.message_count)

    def wait_for_consumer(self, name: str) -> None:
        end = time.monotonic() + ENOUGH
        while (state := self.state(name)) is None or not state.consumer_count:
            assert time.monotonic() < end, f"nobody consumes from {name}"

    def wait_until_gone(self, *names: str) -> None:
        end = time.monotonic() + SOON
        while left := [name for name in names if self.state(name) is not None]:
            assert time.monotonic() < end, f"queues are left: {left}"

    def look(self, name: str) -> Any:
        """The first message of a queue, which stays there."""
        with self.connection.channel() as channel:
            message = channel.basic_get(name)
            assert message is not None, f"{name} is empty"
            return message

    def put(self, name: str, body: Any, arguments: dict[str, Any] | None = None, **properties: Any) -> None:
        """Publish to a queue by its name; a ``body`` that is no bytes is encoded as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        properties = {"content_type": "application/json", "content_encoding": "utf-8", **properties}
        if arguments is not None:
            self.channel().queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        kombu.Producer(self.channel(), auto_declare=False).publish(body, routing_key=name, **properties)
        # When this is answered the broker has what came before.
        self.channel().basic_qos(0, 0, False)

    def fill(self, name: str, metas: Iterable[dict[str, Any]]) -> None:
        """Publish many results to a queue that exists, faster than a backend that waits for confirms."""
        channel = self.channel()
        for meta in metas:
            properties = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 1}
            message = amqp.Message(json.dumps(meta), correlation_id=meta["task_id"], **properties)
            channel.basic_publish(message, routing_key=name)
        channel.basic_qos(0, 0, False)


def success(task_id: str, result: Any = None) -> dict[str, Any]:
    return {"task_id": task_id, "status": "SUCCESS", "result": result, "traceback": None, "children": []}


@contextlib.contextmanager
def takes(seconds: float) -> Iterator[None]:
    """The block takes so long, to a tenth of a second."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert seconds - 0.01 <= took <= seconds + 0.1, f"{took:.3f} s instead of {seconds}"


def in_another_process(code: str, *args: str) -> Any:
    """Run Python code in a process of its own, with ``sys.argv[1:]``; what it prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return json.loads(done.stdout)
