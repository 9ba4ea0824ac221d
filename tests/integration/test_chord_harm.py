"""A chord harms no other, and always ends: whatever is raised, refused, or cannot be read on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import amqp
import kombu
import pytest
from amqp.exceptions import MessageNacked
from backend_kit import Broker, MakeApp, on_classic_queues, until
from celery import Celery, chord, group, uuid
from celery.exceptions import ChordError
from chord_kit import Unrun, finish
from proj import (
    BROKEN,
    add,
    big,
    broken,
    chord_errback,
    echo,
    numbered,
    tenanted,
    traced,
    tsum,
    unprintable,
    unsent,
)
from rabbitmq_node import Node, Redis
from workers import JoinerProcess, Worker, adds, client, python

import fastres

SECONDS = 20


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    options = {"namespace": "harm"}
    with Worker(node.url, pool="threads", concurrency=4, result_backend_transport_options=options) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def error_of(result: Any) -> str:
    with pytest.raises(ChordError) as caught:
        result.get(timeout=SECONDS, follow_parents=False)
    assert result.state == "FAILURE"
    return str(caught.value)


def others_are_joined() -> None:
    assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6


# -- what is the user's


@pytest.mark.parametrize("how", BROKEN)
def test_what_a_task_of_a_header_raises(app: Celery, how: str, tmp_path: Any) -> None:
    body = tsum.s().on_error(chord_errback.s(folder=str(tmp_path)))
    result = chord([add.s(1, 1), broken.s(how)])(body)
    assert "Dependency" in error_of(result)
    until((tmp_path / f"told-{result.id}").exists, SECONDS)
    others_are_joined()


def test_an_exception_that_cannot_be_shown(app: Celery) -> None:
    assert "UnprintableError" in error_of(chord([unprintable.s(), add.s(1, 1)])(tsum.s()))
    others_are_joined()


@pytest.mark.parametrize(
    "how", ["ConnectionError", "TimeoutError", "kombu", "AccessRefused", "NotFound", "SystemExit", "own"]
)
def test_what_sending_the_body_raises(app: Celery, how: str, tmp_path: Any) -> None:
    body = unsent.s(how=how).on_error(chord_errback.s(folder=str(tmp_path)))
    result = chord(adds(2))(body)
    assert "Callback error" in error_of(result)
    until((tmp_path / f"told-{result.id}").exists, SECONDS)
    others_are_joined()


def test_a_result_that_cannot_be_decoded(node: Node) -> None:
    """msgpack writes keys that it does not read."""
    conf = {
        "result_backend_transport_options": {"namespace": uuid()},
        "result_accept_content": ["json", "msgpack"],
        "result_serializer": "msgpack",
    }
    with Worker(node.url, pool="threads", **conf) as worker, worker.client():
        result = chord([add.s(1, 1), numbered.s()])(tsum.s())
        with pytest.raises(ChordError, match=f"result of task {result.parent.results[1].id} cannot be decoded"):
            result.get(timeout=SECONDS, follow_parents=False)
        others_are_joined()


def test_groups_in_bodies_and_bodies_in_groups(app: Celery) -> None:
    """What their last links return is theirs, and no part of the header's."""
    result = chord(adds(2))(group(echo.s() | tsum.s(), echo.s()))
    assert result.get(timeout=SECONDS) == [2, [0, 2]]
    result = (group(adds(2)) | group(tsum.s() | add.s(1), echo.s())).apply_async()
    assert result.get(timeout=SECONDS) == [3, [0, 2]]


# -- two applications that share a namespace


@pytest.mark.parametrize("routed", ["default", "routes"])
def test_the_joiner_of_another_application(node: Node, routed: str, tmp_path: Any) -> None:
    """What follows a chord goes where the worker of its last part would send it, as with Redis."""
    theirs, queue = f"theirs-{uuid()}", f"ours-{uuid()}"
    shared = {"namespace": uuid()}
    routes = {"proj.*": {"queue": queue}} if routed == "routes" else {}
    conf = {"task_routes": routes, "task_default_queue": queue if routed == "default" else f"empty-{uuid()}"}
    with (
        JoinerProcess(node.url, task_default_queue=theirs, result_backend_transport_options=shared) as joiner,
        Worker(
            node.url, pool="threads", arguments=f"-Q {queue}", **conf,
            result_backend_transport_options={**shared, "chord_joiner": False},
        ) as worker,
        worker.client() as app,
    ):  # fmt: skip
        others_are_joined()
        assert chord(adds(2))(group(echo.s(), echo.s() | tsum.s())).get(timeout=SECONDS) == [[0, 2], 2]
        assert chord(adds(2))(chord([add.si(1, 1), add.si(2, 2)], tsum.s())).get(timeout=SECONDS) == 6
        # One that says where it goes, with arguments that the joiner's application knows nothing of.
        explicit = chord(adds(2))(tsum.s().set(queue=queue))
        assert explicit.get(timeout=SECONDS) == 2
        result = chord([add.s(1, 1), broken.s("ValueError")])(
            tsum.s().on_error(chord_errback.s(folder=str(tmp_path)))
        )
        assert "Dependency" in error_of(result)
        until((tmp_path / f"told-{result.id}").exists, SECONDS)
        assert "give each a `namespace` of its own" in joiner.log()
        (said,) = {shard.open.queue for shard in app.backend.asker.status(SECONDS) if shard.open is not None}
        assert said == theirs


# -- a chord that is sent like no other


def test_two_tasks_of_a_header_with_one_id(node: Node, app: Celery, redis: Redis) -> None:
    def results(app: Celery) -> list[int]:
        one = uuid()
        header = [add.s(1, 1).set(task_id=one), add.s(2, 2).set(task_id=one), add.s(3, 3)]
        return sorted(chord(header)(echo.s()).get(timeout=SECONDS, follow_parents=False))

    ours = results(app)
    with Worker(node.url, redis.url, pool="threads") as worker, worker.client() as theirs:
        assert results(theirs) == ours == [2, 4, 6]


# -- where the body goes


@pytest.fixture
def options() -> dict[str, Any]:
    return {"namespace": uuid(), "keep_chord_results": False}


@pytest.fixture
def joined(node: Node, broker: Broker, make_app: MakeApp, options: dict[str, Any]) -> Iterator[Unrun]:
    app = make_app(result_backend_transport_options=options)
    with JoinerProcess(node.url, result_backend_transport_options=options):
        yield Unrun(app, broker)


def full_queue(broker: Broker, kind: str = "classic") -> kombu.Queue:
    """A queue that takes no more; on an exchange, as that of an application that does not declare it."""
    name = f"full-{uuid()}"
    arguments = {"x-queue-type": kind, "x-max-length": 1, "x-overflow": "reject-publish"}
    queue = kombu.Queue(name, kombu.Exchange("amq.direct"), name, queue_arguments=arguments)
    channel = broker.connection.channel()
    queue(channel).declare()
    channel.confirm_select()
    with contextlib.suppress(MessageNacked):
        # A quorum queue takes some more.
        while True:
            channel.basic_publish_confirm(amqp.Message(b"x"), "", name)
    channel.close()
    return queue


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_body_whose_queue_is_full(
    joined: Unrun, broker: Broker, make_app: MakeApp, options: Any, kind: str
) -> None:
    """A transaction on a full quorum queue ends well, without the message: bodies are not sent like that."""
    app, full = make_app(result_backend_transport_options=options), full_queue(broker, kind).name
    before = broker.messages(full) or 0
    refused = [joined.begin(3, queue=None, exchange="amq.direct", routing_key=full) for _ in range(8)]
    others = [joined.begin(2, number) for number in range(3)]
    for requests in [*refused, *others]:
        finish(joined, requests)
    results = [app.AsyncResult(requests[0].chord.id) for requests in refused]
    # Of each sender a quorum queue takes one at least.
    until(lambda: sum(result.ready() for result in results) + (broker.messages(full) or 0) - before == 8, SECONDS)
    failed = [result for result in results if result.ready()]
    assert len(failed) == 8 if kind == "classic" else failed
    for result in failed:
        with pytest.raises(ChordError, match=r"The broker refused the message.*make room there"):
            result.get(timeout=SECONDS)
    assert joined.wait(3) == [(number, [0, 1]) for number in range(3)]
    until(lambda: all(shard.open and not shard.open.count for shard in app.backend.asker.status(5)), SECONDS)


def test_the_broker_is_away_when_parts_are_to_be_written_again(
    node: Node, broker: Broker, make_app: MakeApp, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classic queue refuses bodies when the parts are acknowledged: the joiner keeps them until it can."""
    app, full = make_app(result_backend_transport_options=options), full_queue(broker)
    app.amqp.queues.add(full)
    put_back, refusals = app.backend.chords.put_back, [fastres.BrokerUnreachable("away")] * 2

    def fail_at_first(*args: Any) -> None:
        if refusals:
            raise refusals.pop()
        put_back(*args)

    monkeypatch.setattr(app.backend.chords, "put_back", fail_at_first)
    unrun = Unrun(app, broker)
    # The joiner of this process knows the signature of its function.
    unrun.task.typing = False
    refused = [unrun.begin(3, queue=full.name) for _ in range(3)]
    try:
        for requests in [*refused, *(unrun.begin(2, number) for number in range(3))]:
            finish(unrun, requests)
        # So that they are complete at the same time.
        app.backend.joiner.start()
        for requests in refused:
            with pytest.raises(ChordError, match="The broker refused the message"):
                app.AsyncResult(requests[0].chord.id).get(timeout=SECONDS)
        assert not refusals
        assert unrun.wait(3) == [(number, [0, 1]) for number in range(3)]
    finally:
        app.backend.joiner.stop()


def test_a_body_whose_queue_is_gone_gets_it_back(joined: Unrun, broker: Broker) -> None:
    """The connection of the joiner has declared it once, and kombu remembers that."""
    finish(joined, joined.begin(2))
    assert joined.wait(1) == [("body", [0, 1])]
    broker.channel().queue_delete(joined.bodies)
    finish(joined, joined.begin(2))
    assert joined.wait(1) == [("body", [0, 1])]


@pytest.mark.parametrize("exchange", ["amq.topic", "gone"])
def test_a_body_that_no_queue_wants(joined: Unrun, make_app: MakeApp, options: Any, exchange: str) -> None:
    app = make_app(result_backend_transport_options=options)
    requests = joined.begin(2, queue=None, exchange=exchange, routing_key=f"nowhere-{uuid()}")
    finish(joined, requests)
    with pytest.raises(ChordError, match=r"no queue for its body|no exchange"):
        app.AsyncResult(requests[0].chord.id).get(timeout=SECONDS)
    finish(joined, joined.begin(2))
    assert joined.wait(1) == [("body", [0, 1])]


# -- joiners of other versions


@on_classic_queues("nothing can be got of one with a single active consumer")
def test_an_event_of_a_newer_version_is_left_to_newer_joiners(
    node: Node, broker: Broker, make_app: MakeApp, options: dict[str, Any], reports: Any
) -> None:
    app = make_app(result_backend_transport_options=options)
    unrun = Unrun(app, broker)
    finish(unrun, unrun.begin(2))
    newer = b'{"version":99,"chord":"c","unheard":"of"}\n'
    log = f"{options['namespace']}.chords.0"
    broker.channel().basic_publish(amqp.Message(newer), "", log)
    until(lambda: broker.messages(log) == 4)
    with JoinerProcess(node.url, result_backend_transport_options=options) as joiner:
        until(lambda: "leaves them to others" in joiner.log(), SECONDS)
        until(lambda: broker.messages(log) == 4, SECONDS)
        # The newer one has joined it meanwhile.
        kept = [broker.channel().basic_get(log, no_ack=True).body for _ in range(4)]
        for body in kept:
            if body != newer:
                broker.channel().basic_publish(amqp.Message(body), "", log)
        assert unrun.wait(1) == [("body", [0, 1])]


# -- compression and sizes


def test_parts_are_compressed_as_results_are(node: Node, broker: Broker) -> None:
    options = {"namespace": uuid(), "keep_chord_results": False}
    conf = {"result_backend_transport_options": options, "result_compression": "gzip"}
    with Worker(node.url, pool="threads", **conf) as worker, worker.client() as app:
        value = "x" * 1_000_000
        unrun = Unrun(app, broker)
        requests = unrun.begin(2)
        finish(unrun, requests, [value, value])
        assert unrun.wait(1) == [("body", [value, value])]
        assert chord(adds(3))(echo.s()).get(timeout=SECONDS) == [0, 2, 4]
        assert "raised" in error_of(chord([broken.s("TimeoutError"), add.s(1, 1)])(tsum.s()))


@pytest.mark.parametrize("size", [99_850, 150_000])
def test_a_result_that_is_too_large_fails_its_task_and_the_chord(size: int) -> None:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(Node({"max_message_size": "100000"}))
        app = stack.enter_context(stack.enter_context(Worker(node.url, pool="threads")).client())
        result = chord([big.s(size), add.s(1, 1)])(echo.s())
        with pytest.raises(ChordError):
            result.get(timeout=SECONDS, follow_parents=False)
        first = result.parent.results[0]
        with contextlib.suppress(Exception):
            first.get(timeout=SECONDS)
        assert first.state == app.AsyncResult(first.id).state == "FAILURE"


# -- the request that the body is sent from


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_the_body_is_sent_from_the_request_of_the_last_part(node: Node, redis: Redis, pool: str) -> None:
    """An override of ``apply_async`` sees the same request as on Redis: headers, correlation id, host name."""
    got = []
    for backend in ("fastres://", redis.url):
        with Worker(node.url, backend, pool=pool) as worker, worker.client():
            header = [tenanted.s().set(headers={"tenant": "shop"}) for _ in range(2)]
            result = chord(header)(tenanted.s().set(priority=3))
            body = result.get(timeout=SECONDS, follow_parents=False)
            parts = {part.id for part in result.parent.results}
            assert body["cid"] in parts
            got.append({"tenant": body["tenant"], "sent_by": body["sent_by"] == body["hostname"]})
    assert got == [{"tenant": "shop", "sent_by": True}] * 2


def test_a_join_is_a_span(node: Node) -> None:
    """With the real SDK, in a new process, because its provider cannot be replaced."""
    code = """
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from fastres.chords.tracing import continued

        kept = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(kept))
        trace.set_tracer_provider(provider)
        with continued({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}, {"fastres.chord.parts": 3}):
            with trace.get_tracer("test").start_as_current_span("publish"):
                pass
        publish, join = kept.get_finished_spans()
        assert publish.parent.span_id == join.context.span_id, publish
        print(join.name, dict(join.attributes), f"{join.context.trace_id:x}", f"{join.parent.span_id:x}")
    """
    attributes = {"fastres.chord.parts": 3}
    with client(node.url) as app:
        told = python(code, app)
    assert told == f"fastres.chord.join {attributes} {'ab' * 16} {'cd' * 8}"


@pytest.mark.parametrize(("sdk", "place"), [("opentelemetry", 0), ("sentry", 1)])
def test_the_body_is_in_the_trace_of_its_header(node: Node, redis: Redis, sdk: str, place: int) -> None:
    trace = uuid().replace("-", "")
    of_sentry = {"sentry-trace": f"{trace}-{trace[:16]}-1"}
    of_all = {"traceparent": f"00-{trace}-{trace[:16]}-01"}
    headers = {"opentelemetry": of_all, "sentry": {**of_sentry, "headers": of_sentry}}[sdk]
    for backend in ("fastres://", redis.url):
        with Worker(node.url, backend, pool="solo", traced_by=sdk) as worker, worker.client():
            header = [traced.s().set(headers=headers) for _ in range(2)]
            result = chord(header)(traced.s())
            assert result.get(timeout=SECONDS, follow_parents=False)[place] == trace, backend
