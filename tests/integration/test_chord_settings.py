"""Chords with an application's settings: serializers, compression, routes, kept results, joiners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import COUNTED, queue_of, settled, until
from celery import chain, chord, group, uuid
from celery.exceptions import ChordError, ImproperlyConfigured
from proj import TYPED, add, collect, delivery, echo, fail, replaced_by_chord, shown, silent, tsum, typed
from rabbitmq_node import Node
from workers import JoinerProcess, Worker, adds, client, sums

import fastres

SECONDS = 15
SERIALIZERS = ["json", "pickle", "msgpack", "yaml"]
PLAIN = [None, "text ü \U0001f600", 2**40, -1.5, [1, [2]], {"key": {"deep": [True, None]}}, "", []]


# -- serializers


@pytest.fixture(scope="module", params=SERIALIZERS)
def of_results(request: pytest.FixtureRequest, node: Node) -> Iterator[str]:
    """The result serializer of a worker that accepts tasks in any serializer."""
    conf = {
        "result_serializer": request.param,
        "accept_content": SERIALIZERS,
        "result_accept_content": SERIALIZERS,
        "result_backend_transport_options": {"namespace": f"results-in-{request.param}"},
    }
    with Worker(node.url, pool="threads", **conf) as worker:
        request.node.worker = worker
        yield request.param


@pytest.fixture
def worker(of_results: str, request: pytest.FixtureRequest) -> Worker:
    worker: Worker = request.node.getparent(pytest.Module).worker
    return worker


@pytest.mark.parametrize("of_tasks", ["json", "pickle", "msgpack"])
def test_serializers(worker: Worker, of_results: str, of_tasks: str) -> None:
    with worker.client(task_serializer=of_tasks):
        assert chord(echo.s(value) for value in PLAIN)(collect.s()).get(timeout=SECONDS) == [PLAIN]
        if of_tasks == "msgpack":
            # There, Celery's signatures look like lists of pairs if there are groups in chains.
            return
        header = [add.s(1, 1) | group(add.s(1), add.s(2)), add.s(5, 5)]
        assert chord(header)(collect.s()).get(timeout=SECONDS) == [[[3, 4], 10]]
        assert chord(adds(3))(tsum.s() | add.s(1)).get(timeout=SECONDS) == 7


@pytest.mark.parametrize("of_bodies", SERIALIZERS)
def test_serializers_of_bodies(worker: Worker, of_results: str, of_bodies: str) -> None:
    with worker.client():
        body = collect.s("more").set(serializer=of_bodies)
        assert chord(echo.s(value) for value in PLAIN)(body).get(timeout=SECONDS) == [PLAIN, "more"]


def test_a_body_that_only_its_own_serializer_can_hold(worker: Worker, of_results: str) -> None:
    with worker.client():
        header = [add.s(number, number).set(serializer="pickle") for number in range(3)]
        body = shown.s(more={1, 2}).set(serializer="pickle")
        assert chord(header)(body).get(timeout=SECONDS) == ["0", "2", "4", "{1, 2}"]


@pytest.mark.parametrize("of_bodies", SERIALIZERS)
def test_values_with_special_encodings(worker: Worker, of_results: str, of_bodies: str) -> None:
    """The body gets the same values as a client."""
    if of_bodies not in {of_results, "pickle"}:
        pytest.skip("what the one can hold the other cannot")
    values = TYPED[of_results]
    with worker.client():
        header = [typed.s(of_results, index) for index in range(len(values))]
        result = chord(header)(shown.s().set(serializer=of_bodies))
        assert result.get(timeout=SECONDS) == [repr(value) for value in values]
        assert result.parent.get(timeout=SECONDS) == values


def test_results_that_the_bodys_serializer_cannot_encode(worker: Worker, of_results: str) -> None:
    if of_results != "pickle":
        pytest.skip("of results in pickle")
    with worker.client():
        header = [typed.s("pickle", index) for index in range(len(TYPED["pickle"]))]
        result = chord(header)(shown.s().set(serializer="msgpack"))
        with pytest.raises(Exception, match=r"Callback error: .*EncodeError"):
            result.get(timeout=SECONDS)
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6


# -- messages


def test_compression(node: Node) -> None:
    conf = {
        "task_compression": "gzip",
        "result_compression": "zlib",
        "result_backend_transport_options": {"namespace": "compressed"},
    }
    with Worker(node.url, pool="threads", **conf) as worker, worker.client():
        assert chord(adds(10))(collect.s()).get(timeout=SECONDS) == [sums(10)]
        result = chord([echo.s("x" * 100_000)] * 3)(collect.s())
        assert result.get(timeout=SECONDS) == [["x" * 100_000] * 3]


def test_where_bodies_are_sent(node: Node) -> None:
    """As for any task: routes, queues, priorities and delays."""
    names = {name: f"{name}-{uuid()}" for name in ("own", "routed", "asked")}
    conf = {
        "task_default_queue": names["own"],
        "task_routes": {"proj.delivery": {"queue": names["routed"]}},
        "result_backend_transport_options": {"namespace": "routed"},
    }
    arguments = f"-Q {','.join(names.values())}"
    with Worker(node.url, pool="threads", arguments=arguments, **conf) as worker, worker.client():
        for options, queue, priority in (
            ({}, names["routed"], 0),
            ({"queue": names["asked"]}, names["asked"], 0),
            ({"priority": 5}, names["routed"], 5),
            ({"queue": names["asked"], "priority": 3, "countdown": 0.2}, names["asked"], 3),
        ):
            told = chord(adds(2))(delivery.s().set(**options)).get(timeout=SECONDS)
            assert told == {"values": [0, 2], "queue": queue, "priority": priority}, options
        # A route that only the sender has does not change the body's own queue.
        told = chord(adds(2))(chain(collect.s(), delivery.s())).get(timeout=SECONDS)
        assert (told["queue"], told["values"]) == (names["routed"], [[0, 2]])
        inner = chord(adds(2), delivery.s().set(queue=names["asked"]))
        (told,) = chord([inner, add.s(1, 1)])(collect.s()).get(timeout=SECONDS)
        assert told[0]["queue"] == names["asked"]


def test_a_queue_that_only_the_joiner_declares(node: Node) -> None:
    name = f"new-{uuid()}"
    options = {"namespace": "declares"}
    with Worker(node.url, pool="threads", result_backend_transport_options=options) as worker, worker.client():
        chord(adds(2))(collect.s().set(queue=name))
        until(lambda: node.queues().get(name) == 1, SECONDS, 0.2)


# -- kept results


@pytest.fixture(scope="module")
def unkept(node: Node) -> Iterator[Worker]:
    options = {"namespace": "unkept", "keep_chord_results": False}
    with Worker(node.url, pool="threads", result_backend_transport_options=options) as worker:
        yield worker


def test_chords_declare_no_queue_where_results_are_not_kept(unkept: Worker, node: Node) -> None:
    with unkept.client():
        assert chord(adds(2))(tsum.s()).get(timeout=SECONDS) == 2
        before = set(node.queues())
        ended = [chord(adds(3))(silent.s()) for _ in range(10)]
        ended += [chord([chord(adds(2), tsum.s()), add.s(1, 1)])(silent.s()) for _ in range(5)]
        ids = [result.id for result in ended]
        until(lambda: all(f"[{task_id}] succeeded" in unkept.log() for task_id in ids), SECONDS)
        assert set(node.queues()) <= before


def test_chords_whose_results_are_not_kept(unkept: Worker) -> None:
    with unkept.client():
        assert chord(adds(10))(collect.s()).get(timeout=SECONDS) == [sums(10)]
        assert chord([chord(adds(3), tsum.s()), add.s(1, 1)])(collect.s()).get(timeout=SECONDS) == [[6, 2]]
        header = [add.s(1, 1) | group(add.s(1), add.s(2)), add.s(5, 5)]
        assert chord(header)(collect.s()).get(timeout=SECONDS) == [[[3, 4], 10]]
        result = group(chord(adds(3), tsum.s()), add.s(1, 1)).apply_async()
        assert result.get(timeout=SECONDS) == [6, 2], "a body in a group, and a member of it, are kept"


def test_kept_results_are_in_the_headers_queue(node: Node) -> None:
    with Worker(node.url, pool="threads") as worker, worker.client() as app:
        # A smaller header shares its sender's page with the body.
        for count, on_page in ((3, 1), (60, 0)):
            result = chord(adds(count))(tsum.s())
            assert result.get(timeout=SECONDS) == sum(sums(count))
            until(lambda held=result.parent: app.backend.group_progress(held.id) == len(held), SECONDS)
            assert settled(lambda held=result.parent: node.queues()[queue_of(held.id)], COUNTED) == count + on_page


# -- joiners


@pytest.fixture
def without(node: Node) -> Iterator[Worker]:
    """A worker that does not join chords."""
    options = {"namespace": f"elsewhere-{uuid()}", "chord_joiner": False}
    with Worker(node.url, pool="threads", result_backend_transport_options=options) as worker:
        yield worker


def test_a_separate_joiner(without: Worker, node: Node) -> None:
    with without.client() as app:
        result = chord(adds(3))(tsum.s())
        assert result.parent.get(timeout=SECONDS) == sums(3)
        name = app.backend.addresses.chords(0).name
        until(lambda: node.queues()[name] == 4, SECONDS, 0.2, so="size and parts wait for a joiner")
        assert not result.ready()
        options = without.conf["result_backend_transport_options"]
        queue = without.conf["task_default_queue"]
        with JoinerProcess(node.url, task_default_queue=queue, result_backend_transport_options=options):
            assert result.get(timeout=SECONDS) == 6
            assert chord(adds(10))(collect.s()).get(timeout=SECONDS) == [sums(10)]
        until(lambda: node.queues()[name] == 0, SECONDS, 0.2)


def test_the_joiners_shards(node: Node) -> None:
    options: dict[str, Any] = {"namespace": "sharded", "chord_shards": 4}
    conf = {"result_backend_transport_options": options}
    with Worker(node.url, pool="threads", **conf) as worker, worker.client():
        results = [chord(adds(3, number))(tsum.s()) for number in range(20)]
        assert [result.get(timeout=SECONDS) for result in results] == [sum(sums(3, n)) for n in range(20)]
        assert chord([chord(adds(2), tsum.s())] * 5)(collect.s()).get(timeout=SECONDS) == [[2] * 5]
        assert {f"sharded.chords.{number}" for number in range(4)} <= set(node.queues())


def test_a_sender_with_more_shards_than_the_workers(node: Node) -> None:
    """Its chords wait for a joiner with that many shards, and the workers log a warning."""
    options: dict[str, Any] = {"namespace": "more-shards"}
    more = {**options, "chord_shards": 4}
    with (
        Worker(node.url, pool="threads", result_backend_transport_options=options) as worker,
        worker.client(result_backend_transport_options=more) as app,
    ):
        results = [chord(adds(3))(tsum.s()) for _ in range(20)]
        until(lambda: "chord_shards" in worker.log(), SECONDS, so="the worker tells of it")
        shards = app.backend.asker.status(SECONDS)
        assert [shard.joiners for shard in shards] == [1, 0, 0, 0]
        queue = worker.conf["task_default_queue"]
        with JoinerProcess(node.url, task_default_queue=queue, result_backend_transport_options=more):
            assert [result.get(timeout=SECONDS) for result in results] == [6] * 20
        assert worker.log().count("chord_shards") <= 3, "once for each shard"


# -- senders


@pytest.fixture(params=[True, False], ids=["kept", "unkept"])
def upgraded(node: Node, request: pytest.FixtureRequest) -> Iterator[Worker]:
    """An upgraded worker, with clients of an older version."""
    options = {"namespace": f"upgraded-{request.param}", "keep_chord_results": request.param}
    with Worker(node.url, pool="threads", result_backend_transport_options=options) as worker:
        yield worker


def test_chords_of_an_older_sender(upgraded: Worker, node: Node) -> None:
    with client(node.url, "backend_kit:Older+fastres://", **upgraded.conf) as app:
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6
        assert chord(adds(3))(collect.s("more") | echo.s()).get(timeout=SECONDS) == [sums(3), "more"]
        result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s())
        with pytest.raises(ChordError, match="apples"):
            result.get(timeout=SECONDS, follow_parents=False)
        assert upgraded.log().count("Task celery.chord_unlock") >= 3
        (shard,) = app.backend.asker.status(SECONDS)
        assert shard.open is not None
        assert shard.open.count == 0, "the joiner never heard of them"
    # Chords that the upgraded worker sends, and later the upgraded client.
    unlocked = upgraded.log().count("Task celery.chord_unlock")
    with upgraded.client():
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6
    assert upgraded.log().count("Task celery.chord_unlock") == unlocked


def test_chords_that_are_left_to_chord_unlock(upgraded: Worker) -> None:
    """By a client that writes the log, while old workers do not."""
    options = {**upgraded.conf["result_backend_transport_options"], "chord_unlock": True}
    before = upgraded.log().count("Task celery.chord_unlock")
    with upgraded.client(result_backend_transport_options=options) as app:
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6
        assert upgraded.log().count("Task celery.chord_unlock") > before
        (shard,) = app.backend.asker.status(SECONDS)
        assert shard.open is not None
        assert shard.open.count == 0
        with pytest.raises(ImproperlyConfigured, match="and the option chord_unlock off"):
            chord(adds(3))(fastres.settle(tsum.s()))


def test_a_chord_that_a_worker_sends_for_an_older_client(upgraded: Worker, node: Node) -> None:
    with client(node.url, "backend_kit:Older+fastres://", **upgraded.conf):
        chained = chain(add.s(1, 1), group(add.s(1), add.s(2)), tsum.s())
        assert chained.apply_async().get(timeout=SECONDS) == 7
        assert chord([replaced_by_chord.s(3), add.s(1, 1)])(collect.s()).get(timeout=SECONDS) == [[6, 2]]
