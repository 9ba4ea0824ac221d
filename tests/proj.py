"""The tasks of the test application, shared by every application of a process.

As a module of a worker (``celery -A proj``) it is configured by PROJ_BROKER, PROJ_BACKEND and PROJ_CONF (JSON).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from datetime import date, datetime, timezone
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import UUID

import amqp
import celery
import kombu
from celery import Celery, Task, chain, chord, current_app, current_task, group, shared_task
from celery.result import allow_join_result

import fastres

Json = dict[str, Any]


def conf_of_run(backend: str, conf: Json) -> Json:
    """Settings of an application; the environment variable FASTRES_TEST_QUEUES sets the type of its queues."""
    queue_type = os.environ.get("FASTRES_TEST_QUEUES")
    if queue_type is None or not backend.startswith(("fastres://", "fastress://")):
        return conf
    options = conf.get("result_backend_transport_options") or {}
    return {**conf, "result_backend_transport_options": {"queue_type": queue_type, **options}}


def make_app(broker: str, backend: str, conf: Json | None = None, current: bool = False) -> Celery:
    """An application with these tasks; `current`: make it Celery's current application."""
    app = Celery("proj", broker=broker, backend=backend, set_as_current=current)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        result_chord_retry_interval=0.1,
        **conf_of_run(backend, conf or {}),
    )
    app.made_with = (broker, backend, conf or {})
    if current:
        app.set_default()
    return app


class OutOfStockError(Exception):
    """A user's exception."""

    def __init__(self, item: str, left: int) -> None:
        super().__init__(item, left)
        self.item = item
        self.left = left


@shared_task
def add(x: int, y: int) -> int:
    return x + y


@shared_task
def tsum(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task
def echo(value: Any) -> Any:
    return value


#: Values that serializers encode in their own ways.
TYPED = {
    "json": [
        datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc),
        Decimal("1.10"),
        UUID(int=5),
        date(2026, 1, 2),
        b"\0ff",
    ],
    "pickle": [datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc), Decimal("1.10"), UUID(int=5), (1, 2)],
    "yaml": [datetime(2026, 1, 2, 3, 4, 5, 6), date(2026, 1, 2)],
    "msgpack": [b"\0ff", {"deep": [1.5]}],
}


@shared_task
def typed(serializer: str, index: int) -> Any:
    return TYPED[serializer][index]


@shared_task
def shown(values: list[Any], more: Any = None) -> list[str]:
    return [repr(value) for value in (*values, *([] if more is None else [more]))]


@shared_task
def collect(values: list[Any], *more: Any) -> list[Any]:
    return [values, *more]


@shared_task
def slow(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


@shared_task
def noted(numbers: list[int], file: str, name: str) -> None:
    """The body of a chord that writes to a file, for tests without results."""
    with open(file, "a") as notes:
        notes.write(f"{name}:{sum(numbers)}\n")


@shared_task
def fail(item: str, left: int = 0) -> None:
    raise OutOfStockError(item, left)


#: Exceptions of users' tasks that clients of brokers raise too.
BROKEN = {
    "ConnectionError": ConnectionError("the shop is closed"),
    "ConnectionResetError": ConnectionResetError(104, "reset"),
    "TimeoutError": TimeoutError("too slow"),
    "FileNotFoundError": FileNotFoundError(2, "No such file", "/orders"),
    "socket.timeout": socket.timeout("timed out"),
    "amqp": amqp.exceptions.RecoverableConnectionError("theirs"),
    "AccessRefused": amqp.exceptions.AccessRefused("theirs"),
    "NotFound": amqp.exceptions.NotFound("theirs"),
    "kombu": kombu.exceptions.OperationalError("theirs"),
    "celery": celery.exceptions.TimeoutError("theirs"),
    "fastres": getattr(fastres, "BrokerUnreachable", OSError)("theirs"),  # 0.1.0 has none
    "TimeLimitExceeded": celery.exceptions.TimeLimitExceeded(3),
}


@shared_task
def broken(how: str) -> None:
    raise BROKEN[how]


@shared_task
def numbered() -> Any:
    return {1: "a"}


class UnprintableError(Exception):
    """A user's exception with a faulty ``__repr__``."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


@shared_task
def unprintable() -> None:
    raise UnprintableError("x")


class UnsentError(Exception):
    """The exception of an override of ``apply_async``."""


class Unsent(Task):
    """A task whose sending fails: the user's override of ``apply_async`` raises."""

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        how = (kwargs or {}).get("how")
        if how == "SystemExit":
            raise SystemExit(1)
        if how is not None:
            raise BROKEN.get(how) or UnsentError(how)
        return super().apply_async(args, kwargs, **options)


@shared_task(base=Unsent)
def unsent(values: Any, how: str) -> Any:
    return values


class Tenanted(Task):
    """Tasks with the tenant of the task that sends them."""

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        headers = dict(options.pop("headers", None) or {})
        request = current_task.request if current_task else None
        if request is not None and "tenant" not in headers:
            headers["tenant"] = request.get("tenant") or (request.headers or {}).get("tenant") or "public"
            headers["cid"] = request.correlation_id
            headers["sent_by"] = request.hostname
        return super().apply_async(args, kwargs, headers=headers, **options)


@shared_task(base=Tenanted, bind=True)
def tenanted(self: Any, *values: Any) -> Json:
    request = self.request
    return {"id": request.id, **{name: request.get(name) for name in ("tenant", "cid", "sent_by", "hostname")}}


@shared_task
def fail_with_key(key: str) -> None:
    raise KeyError(key)


@shared_task(ignore_result=True)
def silent(value: Any) -> Any:
    return value


@shared_task
def errback(request: Any, exc: BaseException, traceback: Any, folder: str) -> None:
    """Writes the id of the failed task and its exception into a file."""
    Path(folder, "told").write_text(f"{request.id} {exc!r}")


@shared_task
def chord_errback(request: Any, exc: BaseException, traceback: Any, folder: str) -> None:
    """Writes the failed task, its exception and the cause into a file, atomically."""
    telling = Path(folder, f"telling-{request.id}")
    telling.write_text(f"{request.id}\n{exc!r}\n{exc.__cause__!r}\n{traceback}")
    telling.rename(Path(folder, f"told-{request.id}"))


@shared_task
def patient_errback(request: Any, exc: BaseException, traceback: Any, path: str) -> None:
    """Creates a file to show that it runs, and ends when another file exists."""
    Path(f"{path}-waiting").touch()
    gated(path, None)


@shared_task
def noted_errback(request: Any, exc: BaseException, traceback: Any, folder: str) -> None:
    """Appends a line to a file at each call, and ends when the gate file exists."""
    with open(Path(folder, "noted"), "a") as file:
        file.write(f"{request.id}\n")
    gated(str(Path(folder, "gate")), None)


@shared_task
def record(values: Any, folder: str, name: str) -> None:
    """Write the arguments of a body to a file, as one line."""
    with open(Path(folder, "record"), "a") as file:
        file.write(json.dumps([name, values]) + "\n")


@shared_task
def count_lazily(results: Any) -> list[int]:
    """The body of a chord that gets its header's results by reference."""
    sizes = sorted(len(value) for value in results)
    return [len(results), sum(sizes), sizes[-1]]


@shared_task(bind=True)
def delivery(self: Any, values: Any) -> Json:
    """The delivery info of a body."""
    info = self.request.delivery_info
    return {"values": values, "queue": info["routing_key"], "priority": info["priority"]}


@shared_task(bind=True)
def retried(self: Any, times: int) -> int:
    """Fails so many times, then returns how often it ran."""
    if self.request.retries < times:
        raise self.retry(countdown=0, max_retries=times)
    return int(self.request.retries) + 1


@shared_task(bind=True, max_retries=1)
def retried_in_vain(self: Any, item: str) -> None:
    try:
        raise OutOfStockError(item, 0)
    except OutOfStockError as exc:
        raise self.retry(exc=exc, countdown=0) from exc


@shared_task(bind=True)
def progress(self: Any, steps: int, pause: float = 0.05) -> int:
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"step": step, "of": steps})
        time.sleep(pause)
    return steps


@shared_task(bind=True, soft_time_limit=1)
def progress_without_end(self: Any) -> None:
    while True:
        self.update_state(state="PROGRESS", meta={"at": time.time()})


def start_tracing(how: str | None) -> None:
    """Trace this process with an SDK that reports nowhere."""
    if how == "opentelemetry":
        from opentelemetry import trace
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.trace import TracerProvider

        trace.set_tracer_provider(TracerProvider())
        CeleryInstrumentor().instrument()
    elif how == "sentry":
        import sentry_sdk
        from sentry_sdk.integrations.celery import CeleryIntegration

        sentry_sdk.init("http://key@127.0.0.1:1/1", traces_sample_rate=1.0, integrations=[CeleryIntegration()])


@shared_task(bind=True)
def traced(self: Any, *values: Any) -> Any:
    """The trace id in a task's headers."""
    headers = self.request.headers or {}
    otel, sentry = headers.get("traceparent"), headers.get("sentry-trace")
    return (otel.split("-")[1] if otel else None, sentry.split("-")[0] if sentry else None)


@shared_task(bind=True)
def ids(self: Any) -> Json:
    request = self.request
    return {"id": request.id, "group": request.group, "root": request.root_id, "parent": request.parent_id}


@shared_task(bind=True)
def stamps(self: Any) -> Json:
    return {header: self.request.stamps.get(header) for header in self.request.stamped_headers or ()}


@shared_task
def big(size: int) -> str:
    return "x" * size


@shared_task(bind=True)
def launch(self: Any, count: int) -> str:
    """Sends a group, which becomes its child, and does not wait."""
    return str(group(add.s(number, number) for number in range(count)).apply_async().id)


@shared_task
def launch_and_wait(count: int, timeout: float) -> list[int]:
    """A task that joins the group that it sent: Celery warns of it, but users do it."""
    with allow_join_result():
        result: list[int] = (
            group(add.s(number, number) for number in range(count)).apply_async().get(timeout=timeout)
        )
    return result


@shared_task(bind=True)
def replaced(self: Any, x: int, y: int) -> None:
    raise self.replace(add.s(x, y))


@shared_task(bind=True)
def replaced_by_group(self: Any, count: int) -> None:
    raise self.replace(group(add.s(number, number) for number in range(count)))


@shared_task(bind=True)
def replaced_by_chord(self: Any, count: int) -> None:
    raise self.replace(chord([add.s(number, number) for number in range(count)], tsum.s()))


@shared_task(bind=True)
def replaced_by_failure(self: Any, item: str) -> None:
    raise self.replace(chain(add.s(1, 1), fail.si(item)))


@shared_task(bind=True)
def adding(self: Any, *numbers: int) -> str:
    """Adds tasks to the chord that it is in."""
    for number in numbers:
        self.add_to_chord(add.si(number, number))
    return "added"


@shared_task(bind=True)
def adding_more(self: Any, depth: int) -> int:
    """Adds a task to the chord that it is in, which adds another one."""
    if depth:
        self.add_to_chord(adding_more.si(depth - 1))
    return depth


@shared_task(bind=True)
def replaced_by_chain(self: Any, x: int) -> None:
    raise self.replace(add.s(x, 1) | add.s(10))


@shared_task(acks_late=True, reject_on_worker_lost=True)
def dies_once(folder: str, number: int) -> int:
    """Kills its process on the first run: the broker delivers the task again."""
    mark = Path(folder, f"ran-{number}")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


class Dying(Task):
    """Kills its process when its result is stored, or the whole worker if told to."""

    with_worker = False

    def after_return(self, status: str, value: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        if self.with_worker:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=Dying, acks_late=True)
def dies_afterwards(path: str) -> int:
    return _count_run(path)


@shared_task(base=Dying, acks_late=True, with_worker=True)
def dies_with_its_worker(path: str) -> int:
    return _count_run(path)


def _count_run(path: str) -> int:
    """The number of runs of a task."""
    with open(path, "a+") as runs:
        runs.write("ran\n")
        runs.seek(0)
        return len(runs.readlines())


@shared_task(acks_late=True, reject_on_worker_lost=True)
def late(seconds: float, value: Any) -> Any:
    """Runs again when its worker is lost (``acks_late``)."""
    time.sleep(seconds)
    return value


@shared_task
def gated(path: str, value: Any) -> Any:
    """Ends when a file exists."""
    end = time.monotonic() + 60
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.02)
    return value


if find_spec("celery_batches"):
    from celery_batches import Batches

    @shared_task(base=Batches, flush_every=5, flush_interval=0.2)
    def doubled(requests: list[Any]) -> None:
        for request in requests:
            current_app.backend.mark_as_done(request.id, 2 * request.args[0], request=request)


if "PROJ_BROKER" in os.environ:
    settings = json.loads(os.environ.get("PROJ_CONF", "{}"))
    start_tracing(settings.pop("traced_by", None))
    app = make_app(os.environ["PROJ_BROKER"], os.environ.get("PROJ_BACKEND", "fastres://"), settings, current=True)
