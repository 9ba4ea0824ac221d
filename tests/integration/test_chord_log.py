"""A chord's events in a real RabbitMQ: repeated, late, malformed, expired, and the joiner's reports."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from backend_kit import COUNTED, Broker, MakeApp, Reports, settled, until
from celery import Celery, chord, uuid
from chord_kit import Unrun, finish
from rabbitmq_node import Node
from workers import JoinerProcess

from fastres.chords.status import ShardStatus

SECONDS = 15
NAMESPACE = "of-the-log"
SHARD = f"{NAMESPACE}.chords.0"


@pytest.fixture(scope="module")
def joiner(node: Node, broker: Broker) -> Iterator[JoinerProcess]:
    with JoinerProcess(node.url, result_backend_transport_options={"namespace": NAMESPACE}) as joiner:
        broker.wait_for_consumer(SHARD)
        yield joiner


@pytest.fixture
def app(make_app: MakeApp, joiner: JoinerProcess) -> Celery:
    return make_app(result_backend_transport_options={"namespace": NAMESPACE})


@pytest.fixture
def unrun(app: Celery, broker: Broker) -> Unrun:
    return Unrun(app, broker)


def status(app: Celery) -> ShardStatus:
    (shard,) = app.backend.asker.status(SECONDS)
    assert shard.open is not None, "the joiner does not answer"
    return shard


def parts_of(app: Celery, chord_id: str) -> tuple[int, int | None] | None:
    """The number of parts of an open chord that have arrived, and their total."""
    told = status(app).open
    assert told is not None
    found = [each for each in told.chords if each.id == chord_id]
    return (found[0].parts, found[0].total) if found else None


# -- repetitions and order


def test_the_body_is_sent_when_the_last_part_has_come(app: Celery, unrun: Unrun) -> None:
    result = unrun.send(3)
    first, *rest = unrun.requests(3)
    finish(unrun, rest)
    assert parts_of(app, result.parent.id) == (2, 3)
    assert unrun.called() == []
    finish(unrun, [first])
    assert unrun.wait(1) == [("body", [0, 1, 2])]
    assert parts_of(app, result.parent.id) is None


def test_a_part_that_comes_twice_counts_once(app: Celery, unrun: Unrun) -> None:
    result = unrun.send(3)
    requests = unrun.requests(3)
    finish(unrun, requests[:2])
    finish(unrun, requests[:2], ["again", "again"])
    assert parts_of(app, result.parent.id) == (2, 3)
    assert unrun.called() == []
    finish(unrun, requests[2:])
    assert unrun.wait(1) == [("body", [0, 1, 2])]


def test_a_late_part_is_ignored(app: Celery, unrun: Unrun) -> None:
    unrun.send(2)
    requests = unrun.requests(2)
    finish(unrun, requests)
    assert unrun.wait(1) == [("body", [0, 1])]
    finish(unrun, requests, ["late", "late"])
    # Later chords are not disturbed.
    unrun.send(2, "another")
    finish(unrun, unrun.requests(2))
    assert unrun.wait(1) == [("another", [0, 1])]


def test_chords_with_the_same_body_id_do_not_mix(unrun: Unrun) -> None:
    task_id = uuid()
    for name in ("one", "two"):
        unrun.send(2, name, task_id=task_id)
    a0, a1, b0, b1 = unrun.requests(4)
    assert (a0.chord["options"]["task_id"], b0.chord["options"]["task_id"]) == (task_id, task_id)
    finish(unrun, [a0, b1], ["a0", "b1"])
    assert unrun.called() == []
    finish(unrun, [b0], ["b0"])
    assert unrun.wait(1) == [("two", ["b0", "b1"])]
    finish(unrun, [a1], ["a1"])
    assert unrun.wait(1) == [("one", ["a0", "a1"])]


def test_a_chord_of_many_parts_is_held_in_few_messages(app: Celery, unrun: Unrun, node: Node) -> None:
    count = 2500
    before = settled(lambda: node.queues()[SHARD], COUNTED)
    result = unrun.send(count)
    requests = unrun.requests(count)
    finish(unrun, requests[1:])
    until(lambda: parts_of(app, result.parent.id) == (count - 1, count), SECONDS)
    assert node.queues()[SHARD] < before + 1100
    assert unrun.called() == []
    finish(unrun, requests[:1])
    assert unrun.wait(1) == [("body", list(range(count)))]
    until(lambda: node.queues()[SHARD] <= before, SECONDS, 0.2, so="nothing of it is left")


# -- messages that are not events


@pytest.mark.parametrize("garbage", [b"", b"garbage", b'{"chord":"c","parts":[["t",5]]}\nx', b"\xff\n"])
def test_garbage_is_set_aside_and_reported(
    app: Celery, unrun: Unrun, broker: Broker, joiner: JoinerProcess, garbage: bytes
) -> None:
    refused = f"{NAMESPACE}.chords.refused"
    before = broker.messages(refused) or 0
    unrun.send(2)
    first, second = unrun.requests(2)
    finish(unrun, [first])
    broker.put(SHARD, garbage, content_type="application/x-thing")
    finish(unrun, [second])
    assert unrun.wait(1) == [("body", [0, 1])]
    until(lambda: broker.messages(refused) == before + 1, SECONDS)
    assert refused in joiner.log()
    while (message := broker.channel().basic_get(refused, no_ack=True)) is not None:
        body = message.body
    assert (body.encode() if isinstance(body, str) else body) == garbage
    assert message is None


# -- status


def test_status(app: Celery, unrun: Unrun) -> None:
    begin = time.time()
    results = [unrun.send(size) for size in (2, 3)]
    requests = unrun.requests(5)
    finish(unrun, requests[2:4])
    until(lambda: parts_of(app, results[1].parent.id) == (2, 3))
    shard = status(app)
    assert (shard.queue, shard.joiners) == (SHARD, 1)
    assert shard.open is not None
    told = {each.id: each for each in shard.open.chords}
    assert [(told[each.parent.id].parts, told[each.parent.id].total) for each in results] == [(0, 2), (2, 3)]
    for each in (told[result.parent.id] for result in results):
        assert begin - 1 <= each.since <= each.last <= time.time() + 1
    finish(unrun, [*requests[:2], requests[4]])
    assert sorted(unrun.wait(2)) == [("body", [0, 1]), ("body", [0, 1, 2])]
    for result in results:
        assert parts_of(app, result.parent.id) is None


def test_status_without_a_joiner(make_app: MakeApp) -> None:
    app = make_app(result_backend_transport_options={"namespace": uuid(), "chord_shards": 2})
    shards = app.backend.asker.status(0.5)
    assert [(shard.joiners, shard.waiting, shard.open) for shard in shards] == [(0, 0, None)] * 2


# -- expiry


@pytest.fixture
def short_lived(node: Node, broker: Broker) -> Iterator[JoinerProcess]:
    options = {"namespace": "short-lived"}
    with JoinerProcess(node.url, result_expires=3, result_backend_transport_options=options) as joiner:
        broker.wait_for_consumer("short-lived.chords.0")
        yield joiner


def test_a_chord_that_never_completes_expires(
    make_app: MakeApp, short_lived: JoinerProcess, broker: Broker, node: Node
) -> None:
    app = make_app(result_expires=3, result_backend_transport_options={"namespace": "short-lived"})
    unrun = Unrun(app, broker)
    result = unrun.send(3)
    requests = unrun.requests(3)
    finish(unrun, requests[:2])
    assert parts_of(app, result.parent.id) == (2, 3)
    until(lambda: parts_of(app, result.parent.id) is None, SECONDS, 0.2)
    (line,) = [line for line in short_lived.log().splitlines() if "has expired" in line]
    assert f"Chord {result.parent.id} has expired: 2 of 3 parts came" in line
    until(lambda: node.queues()["short-lived.chords.0"] == 0, SECONDS, 0.2)
    finish(unrun, requests[2:])
    time.sleep(1)  # there is no notice that a body is not sent
    assert unrun.called() == []
    # The joiner and its shard go on.
    unrun.send(2, "another")
    finish(unrun, unrun.requests(2), ["a", "b"])
    assert unrun.wait(1) == [("another", ["a", "b"])]


def test_a_chord_whose_parts_keep_arriving_does_not_expire(
    make_app: MakeApp, short_lived: JoinerProcess, broker: Broker
) -> None:
    app = make_app(result_expires=3, result_backend_transport_options={"namespace": "short-lived"})
    unrun = Unrun(app, broker)
    unrun.send(5)
    for request in unrun.requests(5):
        time.sleep(1.2)
        finish(unrun, [request])
    assert unrun.wait(1) == [("body", [0, 1, 2, 3, 4])]


# -- joiners


def test_shards(make_app: MakeApp, node: Node, broker: Broker) -> None:
    options = {"namespace": "many-shards", "chord_shards": 4}
    app = make_app(result_backend_transport_options=options)
    unrun = Unrun(app, broker)
    with JoinerProcess(node.url, result_backend_transport_options=options):
        names = [f"many-shards.chords.{number}" for number in range(4)]
        broker.wait_for_consumer(*names)
        for number in range(40):
            unrun.send(2, number)
        requests = unrun.requests(80)
        finish(unrun, requests[::2])
        until(
            lambda: sum(shard.open.count for shard in app.backend.asker.status(SECONDS) if shard.open) == 40,
            SECONDS,
        )
        assert all(shard.open and shard.open.count for shard in app.backend.asker.status(SECONDS)), "all are used"
        finish(unrun, requests[1::2])
        assert sorted(unrun.wait(40)) == [(number, [0, 1]) for number in range(40)]


def test_a_sender_with_fewer_shards_than_the_joiner(make_app: MakeApp, node: Node, broker: Broker) -> None:
    options = {"namespace": "fewer-shards", "chord_shards": 4}
    app = make_app(result_backend_transport_options={"namespace": "fewer-shards"})
    unrun = Unrun(app, broker)
    with JoinerProcess(node.url, result_backend_transport_options=options):
        for number in range(5):
            unrun.send(2, number)
        finish(unrun, unrun.requests(10))
        assert sorted(unrun.wait(5)) == [(number, [0, 1]) for number in range(5)]


def test_a_shard_without_single_active_consumer(
    make_app: MakeApp, node: Node, broker: Broker, reports: Reports
) -> None:
    """Two joiners that read at once would each have half of a chord."""
    options = {"namespace": "another-way"}
    broker.declare("another-way.chords.0", {"x-expires": 600_000})
    app = make_app(result_backend_transport_options=options)
    unrun = Unrun(app, broker)
    with JoinerProcess(node.url, result_backend_transport_options=options) as joiner:
        unrun.send(2)
        finish(unrun, unrun.requests(2))
        until(lambda: "without x-single-active-consumer" in joiner.log(), SECONDS)
        assert unrun.called() == []
        # The operator follows the advice.
        broker.channel().queue_delete("another-way.chords.0")
        broker.wait_for_consumer("another-way.chords.0")
        unrun.send(2, "after")
        finish(unrun, unrun.requests(2))
        assert unrun.wait(1) == [("after", [0, 1])]
    assert any("other arguments" in line for line in reports())


def test_tasks_are_sent_to_another_broker_than_results(make_app: MakeApp, node: Node, own_node: Node) -> None:
    """Then the body and the acknowledgement of its parts cannot be one transaction."""
    url = own_node.url.replace("amqp://", "fastres://")
    app = make_app(backend=url)
    tasks = Broker(node.url)
    try:
        unrun = Unrun(app, tasks)
        with JoinerProcess(node.url, url):
            for number in range(5):
                unrun.send(3, number)
            requests = unrun.requests(15)
            finish(unrun, requests)
            assert sorted(unrun.wait(5)) == [(number, [0, 1, 2]) for number in range(5)]
        assert "fastres.chords.0" in own_node.queues()
    finally:
        tasks.close()


def test_a_header_of_strings_that_look_like_json(unrun: Unrun) -> None:
    """Results are copied into the body's message as bytes."""
    values = ['"', "\\", "]", "\u2028", '{"a": [', "", "null"]
    unrun.send(len(values))
    finish(unrun, unrun.requests(len(values)), values)
    assert unrun.wait(1) == [("body", values)]


def test_a_body_with_arguments(app: Celery, unrun: Unrun) -> None:
    task = unrun.task
    header = [task.s().set(queue=unrun.header) for _ in range(2)]
    chord(header, app=app)(task.s(name={"of": ["its", "own"], "date": None}).set(queue=unrun.bodies))
    finish(unrun, unrun.requests(2), [[], {}])
    assert unrun.wait(1) == [({"of": ["its", "own"], "date": None}, [[], {}])]
