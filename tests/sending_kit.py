"""Helpers of sending tests: tasks that no worker runs, and the messages that were sent."""

from __future__ import annotations

from typing import Any

from backend_kit import Broker, until
from celery import Celery, uuid
from kombu.serialization import loads


def nobodys(app: Celery, **options: Any) -> Any:
    # A task for each test, because tests may share an application.
    @app.task(name=f"tests.nobodys.{uuid()}", shared=False, **options)
    def task(*args: Any, **kwargs: Any) -> None: ...

    return task


def sent(broker: Broker, queue: str, count: int = 1) -> list[Any]:
    """Take the messages of a queue once there are so many: Celery does not wait for confirms."""
    channel = broker.channel()
    until(lambda: (broker.messages(queue) or 0) >= count)
    found = []
    while (message := channel.basic_get(queue, no_ack=True)) is not None:
        found.append(message)
    return found


def args_of(message: Any) -> Any:
    return loads(message.body, message.content_type, message.content_encoding)[0]
