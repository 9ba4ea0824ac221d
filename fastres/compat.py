"""Methods that only the class of Celery 3.1 had."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import kombu
from celery import states
from celery.exceptions import TimeoutError

from fastres.errors import BacklogLimitExceeded

if TYPE_CHECKING:
    from fastres._protocols import Meta
    from fastres.layout import Layout
    from fastres.read.wait import Waits

__all__ = ("Celery31",)


class Celery31:
    """The part of ``celery.backends.amqp.AMQPBackend`` of Celery 3.1 that no backend of Celery 5 has."""

    class Consumer(kombu.Consumer):  # type: ignore[misc]
        """Consumer that does not declare queues by itself."""

        auto_declare = False

    class Queue(kombu.Queue):  # type: ignore[misc]
        """Queue that never caches its declaration."""

        can_cache_declaration = False

    Exchange = kombu.Exchange
    Producer = kombu.Producer

    #: Raised when there are too many messages for a task id.
    BacklogLimitExceeded = BacklogLimitExceeded

    retry_policy: ClassVar[dict[str, Any]] = {
        "max_retries": 20,
        "interval_start": 0,
        "interval_step": 1,
        "interval_max": 1,
    }

    layout: Layout
    _waits: Waits

    def rkey(self, task_id: str) -> str:
        """The name of the queue of a task's result."""
        return self.layout.addresses.rkey(task_id)

    def destination_for(self, task_id: str, request: Any) -> tuple[str, str]:
        """Routing key and correlation id of a task's result.

        Raises:
            RuntimeError: ``fastres-rpc://``: the client that sent the task is unknown.
        """
        return self.layout.destination(task_id, request)

    def on_reply_declare(self, task_id: str) -> list[Any]:
        """The queues that are declared before a task's result is sent."""
        return self.layout.queues(task_id)

    def consume(
        self,
        task_id: str,
        timeout: float | None = None,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> Meta:
        """Wait for a task and return its meta: ``status``, ``result``, ``traceback`` and the rest.

        Raises:
            socket.timeout: it did not come in ``timeout`` seconds.
        """
        try:
            return self._waits.one(task_id, timeout, no_ack, on_interval=on_interval)
        except TimeoutError as exc:
            raise socket.timeout(str(exc)) from exc

    def drain_events(
        self,
        connection: Any,
        consumer: Any,
        timeout: float | None = None,
        on_interval: Callable[[], Any] | None = None,
        now: Callable[[], float] = time.time,
        wait: Callable[..., Any] | None = None,
    ) -> dict[str, Meta]:
        """Drain a connection until final results come to a consumer, and return them by task id.

        Args:
            connection: a ``kombu.Connection``.
            consumer: a ``Consumer`` on it; its callbacks are replaced.
            timeout: seconds, None: for ever.
            on_interval: called after each event, and about once a second.
            now: the clock, in seconds.
            wait: drains one event, default ``connection.drain_events``.

        Raises:
            socket.timeout: none came in time.
        """
        wait = wait or connection.drain_events
        results: dict[str, Meta] = {}

        def on_result(meta: Meta, message: Any) -> None:
            if meta["status"] in states.READY_STATES:
                results[meta["task_id"]] = self._waits.to_python(meta)

        consumer.callbacks[:] = [on_result]
        start = now()
        while not results:
            left = None if timeout is None else timeout - (now() - start)
            if left is not None and left <= 0:
                raise socket.timeout(f"no result came within {timeout} seconds")
            # A read without an event is not an error; the time limit is checked here.
            with contextlib.suppress(socket.timeout):
                wait(timeout=1.0 if left is None else min(1.0, left))
            if on_interval is not None:
                on_interval()
        self._waits.keep(results)
        return results
