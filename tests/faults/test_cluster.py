"""A cluster with one node down: results on it are waited for, results on others arrive."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import amqp
import pytest
from backend_kit import (
    CUT_GREETINGS,
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    held_by,
    in_thread,
    new_ids,
    on_classic_queues,
    store,
    store_group,
    store_member,
    until,
)
from celery import uuid
from celery.result import GroupResult
from chord_kit import BODIES_COME_ONCE, Unrun, begun, finish, results_of
from rabbitmq_node import Node
from workers import JoinerProcess

import fastres

pytestmark = CUT_GREETINGS

#: RabbitMQ 3.10's error for a queue whose node is down; RabbitMQ 4 answers only after a minute.
DOWN = "down or inaccessible|has not answered|due to timeout|timed out"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """A cluster of three: with two, RabbitMQ 4.3 would have no majority after the loss of one."""
    # One after the other: two at once may form another cluster.
    majority = {"cluster_partition_handling": "pause_minority"}
    with (
        Node(majority) as first,
        Node(majority, peer=first) as second,
        Node(majority, peer=first) as third,
    ):
        yield [first, second, third]


def group_on(node: Node, make_app: MakeApp) -> GroupResult:
    """A group of three whose queue is on a node, with one result."""
    app = make_app(node.url)
    held = group_of(app)
    store_group(app, held, range(1))
    return held


@on_classic_queues("live on, see below")
@pytest.mark.timeout(300)
def test_the_node_of_a_queue_is_down(
    nodes: list[Node], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastres.amqp.browse.REPLY_TIMEOUT", 5.0)
    first, second = nodes[0].start(), nodes[1].start()
    here, there = group_on(first, make_app), group_on(second, make_app)
    lone = new_ids(1)[0]
    store(make_app(second.url), lone, "there")
    app = make_app(first.url)
    impatient = make_app(
        first.url, result_backend_transport_options={"retry_policy": {"timeout": 1}, "confirm_timeout": 5}
    )
    got: dict[str, Any] = {}

    def wait(name: str, held: GroupResult) -> None:
        got[name] = held_by(app, held).get(timeout=120)

    threads = [in_thread(wait, "there", there), in_thread(wait, "here", here)]
    second.kill()
    # An unreachable queue is not reported as missing.
    for call in (
        lambda: impatient.AsyncResult(lone).state,
        lambda: store_group(impatient, there, range(1, 2), start=1),
    ):
        with pytest.raises(fastres.BrokerUnreachable, match=DOWN):
            call()
    with pytest.raises(fastres.ResultsMissing, match=DOWN):
        held_by(make_app(first.url), there).get(timeout=2)
    store_group(impatient, here, range(1, 3), start=1)
    threads[1].join(ENOUGH)
    assert got == {"here": [0, 1, 2]}
    writing = in_thread(store_group, app, there, range(1, 3), 1)
    second.start()
    for thread in (writing, threads[0]):
        thread.join(90)
    assert got["there"] == [0, 1, 2]
    assert app.AsyncResult(lone).get(timeout=ENOUGH) == "there"


@on_classic_queues("live on, see below")
@pytest.mark.timeout(300)
def test_the_node_of_a_queue_stands_still(
    nodes: list[Node], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for it, or a look at it, does not block queues of other nodes in the same process."""
    monkeypatch.setattr("fastres.amqp.browse.REPLY_TIMEOUT", 8.0)
    first, second = nodes[0].start(), nodes[1].start()
    here, there, soon = group_on(first, make_app), group_on(second, make_app), group_on(first, make_app)
    lone = new_ids(1)[0]
    store(make_app(second.url), lone, "there")
    app, writer = make_app(first.url), make_app(first.url)
    store_group(writer, soon, range(1, 2), start=1)
    got: dict[str, Any] = {}

    def wait(name: str, held: GroupResult) -> None:
        got[name] = held_by(app, held).get(timeout=120)

    def look() -> None:
        with pytest.raises(fastres.BrokerUnreachable, match="has not answered a look"):
            got["lone"] = app.AsyncResult(lone).state

    held_by(app, soon).completed_count()
    with standing_still(second):
        threads = [in_thread(wait, "there", there), in_thread(look)]
        time.sleep(0.5)
        threads.append(in_thread(wait, "soon", soon))
        threads.append(in_thread(wait, "here", here))
        time.sleep(0.5)
        store_group(writer, soon, range(2, 3), start=2)
        store_group(writer, here, range(1, 3), start=1)
        for thread in threads[1:]:
            thread.join(30)
        assert got == {"here": [0, 1, 2], "soon": [0, 1, 2]}
    store_group(writer, there, range(1, 3), start=1)
    threads[0].join(60)
    assert got["there"] == [0, 1, 2]
    assert app.AsyncResult(lone).get(timeout=ENOUGH) == "there"


@pytest.mark.skipif(not BODIES_COME_ONCE, reason="a body in a quorum queue is taken by the majority")
@on_classic_queues("a body is taken by the majority")
@pytest.mark.timeout(420)
def test_the_node_of_a_bodys_queue_stands_still(nodes: list[Node], make_app: MakeApp) -> None:
    """Its chord waits for it; others wait only until the joiner notices."""
    make_whole(nodes)
    first, second = nodes[:2]
    options = {"namespace": uuid()}
    app, other = (make_app(first.url, result_backend_transport_options=options) for _ in range(2))
    here, there = Broker(first.url), Broker(second.url)
    with JoinerProcess(first.url, result_backend_transport_options=options) as joiner:
        stuck, others = Unrun(app, there), Unrun(other, here)
        waiting = stuck.begin(2, name="stuck")
        finish(stuck, waiting[:1])
        with standing_still(second):
            finish(stuck, waiting[1:])
            time.sleep(1)
            for number in range(3):
                finish(others, others.begin(3, name=number))
                # After 30 seconds, the other chords go first.
                assert others.wait(1, 60)[0][0] == number
            assert "other chords go first" in joiner.log()

        def called() -> list[Any]:
            # The nodes notice that one was unreachable, and close their connections.
            with contextlib.suppress(OSError, amqp.AMQPError):
                stuck.reconnect()
                return stuck.called()
            return []

        # A node that stood still for longer than the others waited may need a restart to rejoin the cluster.
        make_whole(nodes)
        # The joiner tries again once a minute.
        ((name, _),) = until(called, 150, 0.5, so=joiner.log())
        assert name == "stuck"
    here.close()
    there.close()


# -- three nodes, everything on quorum queues

#: The number of faults, of chords of ten tasks meanwhile, and of the parts of one large chord.
HARMS, CHORDS, LARGE = (
    int(os.environ.get(f"FASTRES_{name}", default))
    for name, default in (("KILLS", 2), ("CHORDS", 40), ("LARGE", 500))
)
RESULTS = 1000


@contextlib.contextmanager
def standing_still(node: Node) -> Iterator[None]:
    pid = int(node.ctl("eval", "os:getpid().").strip().strip('"'))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed(node: Node, nodes: list[Node]) -> Iterator[None]:
    node.kill()
    yield
    node.start()


def make_whole(nodes: list[Node]) -> None:
    """Wait until all nodes run and see each other: one that stood still in an earlier test may not yet."""

    def is_whole() -> bool:
        for node in nodes:
            with contextlib.suppress(RuntimeError):
                status = json.loads(node.ctl("cluster_status", "--formatter", "json"))
                if len(status["running_nodes"]) == len(nodes) and not status["partitions"]:
                    continue
            return False
        return True

    for node in nodes:
        node.start()
    try:
        until(is_whole, 60, 1)
    except AssertionError:
        for node in nodes[1:]:
            node.kill()
            node.start()
        until(is_whole, 60, 1)


@contextlib.contextmanager
def cut_off(node: Node, nodes: list[Node]) -> Iterator[None]:
    """Cut a node off from the other nodes, but not from its clients."""
    others = ", ".join(f"'{other.name_in_cluster}'" for other in nodes if other is not node)

    def share(cookie: str, then: str) -> None:
        # On all nodes at once: RabbitMQ handles partial partitions in its own way.
        node.ctl(
            "eval",
            f"[F(N) || F <- [fun(N) -> erlang:set_cookie(N, '{cookie}') end, fun {then}/1], N <- [{others}]].",
        )

    share("of nobody", "erlang:disconnect_node")
    yield
    share(node.cookie, "net_kernel:connect_node")


@pytest.mark.timeout(300 + 60 * HARMS)
@pytest.mark.parametrize("harm", [killed, cut_off])
def test_a_node_of_three_is_lost_and_nothing_else(nodes: list[Node], make_app: MakeApp, harm: Any) -> None:
    """No result, part or body is lost, and no body is sent twice, although faults last as long as the chords."""
    options = {"queue_type": "quorum", "namespace": uuid(), "keep_chord_results": False}
    urls = ";".join(node.url for node in nodes)
    moments = random.Random(4)
    app = make_app(urls, result_backend_transport_options=options)
    reader = make_app(urls, result_backend_transport_options=options)
    with JoinerProcess(urls, result_backend_transport_options=options):
        make_whole(nodes)
        broker = Broker(nodes[0].url)
        # Its queues are on the first node, which stays up.
        unrun = Unrun(app, broker)
        sizes = [10] * CHORDS + [LARGE]
        requests = begun(unrun, sizes)
        moments.shuffle(requests)
        held = group_of(app, RESULTS)

        def work(number: int) -> None:
            for request in requests[number::HARMS]:
                unrun.part(request, request.group_index)
            for index in range(number, RESULTS, HARMS):
                store_member(app, held, index, index)

        for number in range(HARMS):
            victim = moments.choice(nodes[1:])
            working = in_thread(work, number)
            time.sleep(moments.uniform(0.1, 2.0))
            with harm(victim, nodes):
                time.sleep(moments.uniform(0, 5))
            working.join(180)
            assert not working.is_alive()
        found = unrun.wait(len(sizes), 90)
        assert sorted(found) == results_of(sizes)
        assert held_by(reader, held).get(timeout=60) == list(range(RESULTS))
        time.sleep(2)
        assert unrun.called() == []
        broker.close()
