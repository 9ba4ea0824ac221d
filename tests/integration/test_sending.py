"""Groups and chords that are sent in bulk: the messages are those that Celery would send."""

from __future__ import annotations

import contextlib
import functools
import pickle
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from backend_kit import Broker, MakeApp, until
from celery import Celery, chord, group, signals, uuid
from celery.app.task import Task
from celery.exceptions import ChordError
from celery.result import GroupResult
from proj import add, broken, chord_errback, echo, tsum
from rabbitmq_node import Node
from sending_kit import args_of, nobodys, sent
from workers import Worker

import fastres
from fastres import sending

SECONDS = 30
#: The fields that differ between two tasks.
OWN = ("id", "root_id", "group", "correlation_id")


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    with Worker(node.url, pool="threads", concurrency=4, accept_content=["json", "pickle"]) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


@pytest.fixture
def in_bulk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of messages in each bulk."""
    written: list[int] = []
    finish = sending.Bulk.finish

    def counted(self: Any) -> None:
        finish(self)
        written.append(self.written)

    monkeypatch.setattr(sending.Bulk, "finish", counted)
    return written


def stripped(message: Any, times: bool) -> Any:
    """A message without ids and times."""
    headers = {key: value for key, value in message.headers.items() if key not in OWN}
    if times:
        for name in ("eta", "expires"):
            headers[name] = headers[name] and len(headers[name])
    properties = {
        key: value for key, value in message.properties.items() if key not in (*OWN, "application_headers")
    }
    if times and "expiration" in properties:
        properties["expiration"] = len(properties["expiration"])
    delivery = {key: message.delivery_info[key] for key in ("exchange", "routing_key", "redelivered")}
    return message.body, message.content_type, message.content_encoding, headers, properties, delivery


def ids_in(message: Any) -> tuple[Any, ...]:
    headers = message.headers
    return (
        headers["id"],
        headers["root_id"] == headers["id"],
        message.properties["correlation_id"] == headers["id"],
    )


WHEN = datetime.now(timezone.utc) + timedelta(hours=1)
ARGUMENTS: list[tuple[Any, ...]] = [
    (1, "x" * 20), (2, "it's"), (-3, 'a "word"'), (1.5, None), (True, "é\U0001f600"), ("only",), (),
    ([1, {"a": (2,)}],), (10**20, "\\n\n\t"), ("y" * 300, "z" * 2000), (float("inf"), "nan"),
    ({"k": "v"}, [[[[1]]]]),
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 7},
        {"expires": 600},
        {"expires": WHEN},
        {"countdown": 100},
        {"eta": WHEN},
        {"time_limit": 30, "soft_time_limit": 20},
        {"headers": {"tenant": "acme", "group_index": 5, "nested": {"id": "x"}}},
        {"ignore_result": True},
        {"compression": "zlib"},
        {"shadow": "another name", "argsrepr": "(<hidden>)", "kwargsrepr": "{}"},
        {"delivery_mode": 1},
        {"stamped_headers": ["stamp"], "stamp": "value"},
        {"reply_to": "somewhere"},
    ],
    ids=lambda options: "-".join(options) or "none",
)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_messages_are_those_of_celery(
    quiet: Celery, broker: Broker, in_bulk: list[int], options: dict[str, Any], serializer: str
) -> None:
    task, queue = nobodys(quiet), quiet.conf.task_default_queue
    if serializer == "pickle":
        options = {**options, "serializer": "pickle"}
    times = not {"expires", "countdown", "eta"}.isdisjoint(options)
    kwargs = {"key": "value", "number": 1}
    group([task.s(*args, **kwargs).set(**options) for args in ARGUMENTS], app=quiet).apply_async()
    expected = sent(broker, queue, len(ARGUMENTS))
    result = fastres.apply_many(task, ARGUMENTS, kwargs=kwargs, **options)
    found = sent(broker, queue)
    assert in_bulk == [len(ARGUMENTS)]
    assert [stripped(each, times) for each in found] == [stripped(each, times) for each in expected]
    assert [ids_in(each)[1:] for each in found] == [ids_in(each)[1:] for each in expected]
    assert [ids_in(each)[0] for each in found] == [each.id for each in result]
    assert {each.headers["group"] for each in found} == {result.id}


@pytest.mark.parametrize("serializer", ["yaml", "msgpack"])
def test_other_serializers(quiet: Celery, broker: Broker, in_bulk: list[int], serializer: str) -> None:
    task, queue = nobodys(quiet, serializer=serializer), quiet.conf.task_default_queue
    arguments = [(number, "text") for number in range(5)]
    group([task.s(*args) for args in arguments], app=quiet).apply_async()
    expected = sent(broker, queue, 5)
    fastres.apply_many(task, arguments)
    assert [stripped(each, False) for each in sent(broker, queue)] == [stripped(each, False) for each in expected]
    assert in_bulk == [5]


def test_partial_and_immutable_signatures(quiet: Celery, broker: Broker, in_bulk: list[int]) -> None:
    task, queue = nobodys(quiet), quiet.conf.task_default_queue
    for signature in (task.s("last", own=1), task.si("all"), task.s().on_error(task.s("errback"))):
        group([signature.clone((number,), {"more": 2}) for number in range(3)], app=quiet).apply_async()
        expected = sent(broker, queue, 3)
        fastres.apply_many(signature, [(number,) for number in range(3)], kwargs={"more": 2})
        found = sent(broker, queue)
        assert [stripped(each, False) for each in found] == [stripped(each, False) for each in expected]
    assert in_bulk == [3] * 3


def test_tasks_without_a_registered_class(quiet: Celery, broker: Broker, in_bulk: list[int]) -> None:
    fastres.apply_many("elsewhere.task", [(1,), (2,), (3,)], app=quiet, queue=quiet.conf.task_default_queue)
    found = sent(broker, quiet.conf.task_default_queue)
    assert [each.headers["task"] for each in found] == ["elsewhere.task"] * 3
    assert in_bulk == [3]
    with pytest.raises(TypeError, match="app="):
        fastres.apply_many("elsewhere.task", [])


def test_large_messages_and_many(quiet: Celery, broker: Broker, in_bulk: list[int]) -> None:
    task, queue = nobodys(quiet), quiet.conf.task_default_queue
    sizes = [10, 131_064, 131_072, 400_000, 1]
    fastres.apply_many(task, (("x" * size,) for size in sizes))
    assert [len(args_of(each)[0]) for each in sent(broker, queue)] == sizes
    result = fastres.apply_many(task, ((number,) for number in range(4000)))
    assert len(result) == 4000 == broker.messages(queue)
    places = [(each.headers["group_index"], args_of(each)) for each in sent(broker, queue)]
    assert places == [(number, [number]) for number in range(4000)]


def test_groups_are_run_and_joined(app: Celery, in_bulk: list[int]) -> None:
    result = fastres.apply_many(add, ((number, number) for number in range(500)))
    assert isinstance(result, GroupResult)
    assert len(result) == 500
    assert result.get(timeout=SECONDS) == [2 * number for number in range(500)]
    assert result.successful()
    assert in_bulk == [500]
    for count in range(3):
        result = fastres.apply_many(add, [(1, 1)] * count)
        assert result.get(timeout=SECONDS) == [2] * count
    result = fastres.apply_many(add, [(1, 1)] * 3)
    saved = pickle.loads(pickle.dumps(result))
    assert (saved.id, saved.results) == (result.id, result.results)
    called = []
    result.then(called.append)
    assert result.join(timeout=SECONDS) == [2] * 3
    assert called == [result]
    result = fastres.apply_many(add, [(1, 1)] * 3)
    result.save()
    assert GroupResult.restore(result.id, app=app).get(timeout=SECONDS) == [2] * 3


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_chords(app: Celery, count: int) -> None:
    result = fastres.apply_many(add, ((number, number) for number in range(count)), body=tsum.s())
    assert result.get(timeout=SECONDS) == sum(2 * number for number in range(count))
    assert len(result.parent) == count


def test_bodies_of_every_kind(app: Celery, tmp_path: Any) -> None:
    arguments = [(number, number) for number in range(5)]
    assert fastres.apply_many(add, arguments, body=tsum.s() | add.s(1)).get(timeout=SECONDS) == 21
    assert fastres.apply_many(add, arguments, body=group(tsum.s(), tsum.s())).get(timeout=SECONDS) == [20, 20]
    inner = chord([add.si(1, 1), add.si(2, 2)], tsum.s())
    assert fastres.apply_many(add, arguments, body=inner).get(timeout=SECONDS) == 6
    assert fastres.apply_many(add, arguments, body=fastres.lazy(tsum.s())).get(timeout=SECONDS) == 20
    settled = fastres.settle(echo.s(), first=5)
    assert sorted(fastres.apply_many(add, arguments, body=settled).get(timeout=SECONDS)) == [0, 2, 4, 6, 8]
    body = tsum.s().on_error(chord_errback.s(folder=str(tmp_path)))
    failed = fastres.apply_many(broken, [("ValueError",)] * 3, body=body)
    with pytest.raises(ChordError):
        failed.get(timeout=SECONDS, follow_parents=False)
    until((tmp_path / f"told-{failed.id}").exists, SECONDS)
    # The caller's signature is unchanged.
    assert "task_id" not in body.options


@pytest.mark.parametrize("error", [LookupError, ConnectionResetError, TimeoutError])
@pytest.mark.parametrize("in_bulk", [True, False])
def test_a_chord_whose_header_ends_in_an_exception(
    app: Celery, tmp_path: Any, in_bulk: bool, error: type[Exception]
) -> None:
    """It fails, whatever the exception is, because its body could never be called."""

    def arguments() -> Iterator[tuple[int, int]]:
        yield from ((number, number) for number in range(100))
        # All parts arrive before the chord's size.
        time.sleep(1)
        raise error("no more rows")

    body = tsum.s().on_error(chord_errback.s(folder=str(tmp_path))).set(task_id=uuid())
    with contextlib.ExitStack() as stack:
        if not in_bulk:
            listen = functools.partial(signals.before_task_publish.connect, weak=False)
            stack.callback(signals.before_task_publish.disconnect, listen(lambda **_: None))
        with pytest.raises(error, match="no more rows"):
            fastres.apply_many(add, arguments(), body=body)
    body_id = body.options["task_id"]
    with pytest.raises(ChordError, match=rf"the task after 100 tasks .* {error.__name__}\('no more rows'\)"):
        app.AsyncResult(body_id).get(timeout=SECONDS)
    until((tmp_path / f"told-{body_id}").exists, SECONDS)


def test_a_chord_whose_header_is_refused(app: Celery, broker: Broker, tmp_path: Any) -> None:
    broker.channel().exchange_declare("tests.nowhere", "topic", durable=True, auto_delete=False)
    body = tsum.s().on_error(chord_errback.s(folder=str(tmp_path))).set(task_id=uuid())
    where = {"exchange": "tests.nowhere", "routing_key": "nothing"}
    with pytest.raises(fastres.TasksNotSent):
        fastres.apply_many(add, [(1, 1)] * 10, body=body, **where)
    body_id = body.options["task_id"]
    with pytest.raises(ChordError, match="10 of 10 tasks of its header could not be sent: no queue"):
        app.AsyncResult(body_id).get(timeout=SECONDS)
    until((tmp_path / f"told-{body_id}").exists, SECONDS)


# -- cases that are left to Celery


def receiver(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    def before(sender: Any = None, headers: Any = None, **_: Any) -> None:
        headers["seen"] = "yes"
        seen.append(headers["id"])

    signals.before_task_publish.connect(before, weak=False)
    return functools.partial(signals.before_task_publish.disconnect, before)


def later_receiver(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    def after(sender: Any = None, headers: Any = None, **_: Any) -> None:
        seen.append(headers["id"])

    signals.after_task_publish.connect(after, weak=False)
    return functools.partial(signals.after_task_publish.disconnect, after)


def wrapped(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    """As Sentry does."""
    apply_async = Task.apply_async

    @functools.wraps(apply_async)
    def instrumented(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = apply_async(self, *args, **kwargs)
        seen.append(result.id)
        return result

    monkeypatch.setattr(Task, "apply_async", instrumented)
    return lambda: None


def router(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> None:
        seen.append(args)

    app.conf.task_routes = (route,)
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()
    return lambda: None


def sent_event(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    app.conf.task_send_sent_event = True
    seen += range(5)
    return lambda: None


def own_send_task(app: Celery, monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> Any:
    send_task = app.send_task

    def own(name: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return send_task(name, *args, **kwargs)

    monkeypatch.setattr(app, "send_task", own)
    return lambda: None


@pytest.mark.parametrize("hook", [receiver, later_receiver, wrapped, router, sent_event, own_send_task])
def test_code_that_wants_to_see_each_task_sees_it(
    quiet: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch, in_bulk: list[int], hook: Callable[..., Any]
) -> None:
    seen: list[Any] = []
    undo = hook(quiet, monkeypatch, seen)
    try:
        result = fastres.apply_many(nobodys(quiet), [(number,) for number in range(5)])
    finally:
        undo()
    assert in_bulk == []
    assert len(seen) == 5
    found = sent(broker, quiet.conf.task_default_queue, 5)
    assert [each.headers["id"] for each in found] == [each.id for each in result]
    if hook is receiver:
        assert [each.headers["seen"] for each in found] == ["yes"] * 5


def test_an_override_of_apply_async(quiet: Celery, broker: Broker, in_bulk: list[int]) -> None:
    class Tenanted(Task):
        def apply_async(self, args: Any = None, *more: Any, **options: Any) -> Any:
            options["headers"] = {"tenant": f"tenant-{args[0]}"}
            return super().apply_async(args, *more, **options)

    fastres.apply_many(nobodys(quiet, base=Tenanted), [(number,) for number in range(4)])
    found = sent(broker, quiet.conf.task_default_queue, 4)
    assert [each.headers["tenant"] for each in found] == [f"tenant-{number}" for number in range(4)]
    assert in_bulk == []


def test_routes_by_name_and_annotations_are_in_the_template(
    node: Node, make_app: MakeApp, broker: Broker, in_bulk: list[int]
) -> None:
    queue = f"routed-{uuid()}"
    app = make_app(node.url, task_routes={"tests.*": {"queue": queue}}, task_annotations={"*": {"priority": 3}})
    fastres.apply_many(nobodys(app), [(1,), (2,), (3,)])
    found = sent(broker, queue)
    assert [each.properties["priority"] for each in found] == [3] * 3
    assert in_bulk == [3]


def test_eager(node: Node, make_app: MakeApp) -> None:
    app = make_app(node.url, task_always_eager=True)

    @app.task(name="tests.eager_double", shared=False)
    def double(number: int) -> int:
        return 2 * number

    @app.task(name="tests.eager_sum", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    assert fastres.apply_many(double, [(1,), (2,)]).get() == [2, 4]
    assert fastres.apply_many(double, [(1,), (2,)], body=total.s()).get() == 6
