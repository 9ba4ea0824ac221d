"""Sending in bulk: refused messages, broken connections, threads, slow iterables."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import ENOUGH, Broker, MakeApp, cuts_greetings, until
from celery import Celery, group, uuid
from proxy import Proxy
from rabbitmq_node import Node
from sending_kit import args_of, nobodys, sent
from workers import client

import fastres

SECONDS = 30


def test_arguments_that_cannot_be_sent(quiet: Celery, broker: Broker) -> None:
    queue = quiet.conf.task_default_queue

    @quiet.task(name="tests.strict", shared=False)
    def strict(first: int, second: int) -> None: ...

    for bad, error in (
        ((1,), "task 3: .*second"),
        ((1, object()), "task 3: .*not JSON serializable|task 3: Object"),
        (5, "task 3 must be a list or tuple"),
    ):
        with pytest.raises(Exception, match=error):
            fastres.apply_many(strict, [(1, 1), (2, 2), (3, 3), bad, (4, 4)])
        # Those before it are sent.
        assert [args_of(each) for each in sent(broker, queue)] == [[1, 1], [2, 2], [3, 3]]

    def breaks() -> Iterator[tuple[int, int]]:
        yield from [(1, 1), (2, 2), (3, 3)]
        raise LookupError("theirs")

    with pytest.raises(LookupError, match="theirs"):
        fastres.apply_many(strict, breaks())
    assert broker.messages(queue) == 3
    for option in ("task_id", "group_id", "chord"):
        with pytest.raises(TypeError, match=option):
            fastres.apply_many(strict, [], **{option: "x"})
    with pytest.raises(TypeError, match="group"):
        fastres.apply_many(group(strict.s(1, 1)), [])


def test_a_queue_that_is_full(quiet: Celery, broker: Broker) -> None:
    queue = quiet.conf.task_default_queue
    broker.declare(queue, {"x-max-length": 10, "x-overflow": "reject-publish", "x-queue-type": "classic"})
    quiet.amqp.queues[queue].queue_arguments = {
        "x-max-length": 10, "x-overflow": "reject-publish", "x-queue-type": "classic",
    }  # fmt: skip
    with pytest.raises(fastres.TasksNotSent, match=r"90 of 100 tasks .* number 10: .* full") as caught:
        fastres.apply_many(nobodys(quiet), [(number,) for number in range(100)])
    assert sorted(caught.value.refused) == list(range(10, 100))
    assert len(caught.value.result) == 100
    assert broker.messages(queue) == 10


def test_messages_without_a_queue(quiet: Celery, broker: Broker) -> None:
    broker.channel().exchange_declare("tests.nowhere", "topic", durable=True, auto_delete=False)
    task = nobodys(quiet)
    where = {"exchange": "tests.nowhere", "routing_key": "nobody"}
    with pytest.raises(
        fastres.TasksNotSent, match=r"no queue gets what is sent to exchange 'tests\.nowhere'"
    ) as caught:
        fastres.apply_many(task, [(number,) for number in range(10)], **where)
    assert sorted(caught.value.refused) == list(range(10))
    # As with Celery, which does not ask.
    assert len(fastres.apply_many(task, [(number,) for number in range(10)], confirm=False, **where)) == 10
    with pytest.raises(Exception, match=r"no exchange 'tests\.none'"):
        fastres.apply_many(task, [(number,) for number in range(10)], exchange="tests.none", routing_key="x")
    # The connection can be used again.
    assert len(fastres.apply_many(task, [(1,)] * 5)) == 5


@cuts_greetings
def test_connections_that_break_meanwhile(node: Node, broker: Broker) -> None:
    """Unconfirmed messages are sent again: each task is sent at least once."""
    queue, count = f"cut-{uuid()}", 6000
    with Proxy(node.port) as proxy, client(proxy.url, task_default_queue=queue) as app:

        def arguments() -> Iterator[tuple[int]]:
            for number in range(count):
                if number % 2000 == 1000:
                    proxy.cut()
                yield (number,)

        result = fastres.apply_many(nobodys(app), arguments())
        found: dict[str, int] = {}
        for message in sent(broker, queue):
            found[message.headers["id"]] = message.headers["group_index"]
        assert [found[each.id] for each in result] == list(range(count))


@cuts_greetings
def test_a_broker_that_is_down(node: Node) -> None:
    policy = {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1}
    with Proxy(node.port) as proxy, client(proxy.url, task_publish_retry_policy=policy) as app:
        task = nobodys(app)

        def arguments() -> Iterator[tuple[int]]:
            for number in range(10_000):
                if number == 5_000:
                    proxy.refuse()
                    proxy.cut()
                yield (number,)

        with pytest.raises(fastres.BrokerUnreachable, match="has confirmed the first"):
            fastres.apply_many(task, arguments(), queue=f"away-{uuid()}")


def test_a_broker_that_takes_nothing_is_waited_for(make_app: MakeApp) -> None:
    """For longer than for a silent broker."""
    with Node() as own, client(own.url, result_backend_transport_options={"confirm_timeout": 1}) as app:
        task, queue, broker = nobodys(app), f"blocked-{uuid()}", Broker(own.url)
        fastres.apply_many(task, [(1,)] * 3, queue=queue)
        usual = own.ctl("eval", "vm_memory_monitor:get_vm_memory_high_watermark().").strip()
        own.ctl("set_vm_memory_high_watermark", "0.000001")
        got: list[Any] = []
        sender = threading.Thread(
            target=lambda: got.append(
                fastres.apply_many(task, ((number, "x" * 500) for number in range(20_000)), queue=queue)
            )
        )
        sender.start()
        sender.join(4)
        assert sender.is_alive()
        own.ctl("set_vm_memory_high_watermark", usual)
        sender.join(60)
        assert len(got[0]) == 20_000
        # More if a confirm takes longer than a second on a busy machine: each task is sent at least once.
        assert broker.messages(queue) >= 20_003
        broker.close()


def test_the_error_can_be_stored() -> None:
    error = pickle.loads(pickle.dumps(fastres.TasksNotSent("two", {1: "full"}, None)))
    assert str(error) == "two"


def test_tasks_of_a_slow_iterable_are_sent_at_once(quiet: Celery, broker: Broker) -> None:
    goes_on = threading.Event()

    def arguments() -> Iterator[tuple[int]]:
        for number in range(6):
            yield (number,)
            time.sleep(0.05)
        assert goes_on.wait(ENOUGH)
        yield (6,)

    task, queue = nobodys(quiet), quiet.conf.task_default_queue
    sender = threading.Thread(target=fastres.apply_many, args=(task, arguments()))
    sender.start()
    try:
        until(lambda: broker.messages(queue) == 6)
    finally:
        goes_on.set()
        sender.join(ENOUGH)
    assert broker.messages(queue) == 7


def test_without_confirms(quiet: Celery, broker: Broker) -> None:
    result = fastres.apply_many(nobodys(quiet), ((number,) for number in range(5000)), confirm=False)
    found = sent(broker, quiet.conf.task_default_queue)
    assert [each.headers["id"] for each in found] == [each.id for each in result]


def test_threads_that_send_at_once(quiet: Celery, broker: Broker) -> None:
    task = nobodys(quiet)
    threads = [
        threading.Thread(target=fastres.apply_many, args=(task, [(number,) for number in range(2000)]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    found = sent(broker, quiet.conf.task_default_queue)
    assert len({each.headers["id"] for each in found}) == len(found) == 8 * 2000
