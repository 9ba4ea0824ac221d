"""A broker that closes channels, refuses, or stands still: no wait hangs, and each error says why."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    ids_of,
    member_ids,
    new_ids,
    page_ids,
    queue_of,
    store,
    store_group,
    store_member,
    until,
)
from celery import Celery, group
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid
from proj import add, gated
from rabbitmq_node import Node
from workers import Worker

import fastres

#: The impatient broker's limit for unacknowledged messages in seconds, and until it has surely checked it.
HELD, NOTICED = 2, 5


@pytest.fixture(scope="module")
def impatient() -> Iterator[Node]:
    with Node({"consumer_timeout": f"{HELD}000"}, advanced={"channel_tick_interval": "1000"}) as node:
        yield node


@pytest.fixture
def slow(impatient: Node, make_app: MakeApp) -> Celery:
    """An application whose broker has a short limit for acknowledgements."""
    return make_app(impatient.url)


def wait_in_thread(get: Any) -> tuple[threading.Thread, list[Any]]:
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(get())
        except Exception as exc:
            got.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


# -- messages that are held for longer than the broker allows


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("no_ack", [True, False], ids=["taken", "left"])
def test_a_slow_loop_over_results(slow: Celery, make_app: MakeApp, impatient: Node, no_ack: bool) -> None:
    held = group_of(slow, 5)
    store_group(make_app(impatient.url), held)
    found = []
    for _, meta in slow.backend.get_many(ids_of(held), timeout=ENOUGH, no_ack=no_ack):
        if not found:
            # Meanwhile this thread reads nothing: the broker closes the channel before the next acknowledgement.
            time.sleep(NOTICED)
        found.append(meta["result"])
    assert sorted(found) == list(range(5))
    again = group_of(slow, 2)
    store_group(slow, again)
    assert again.get(timeout=ENOUGH) == [0, 1]
    assert impatient.queues().get(queue_of(held.id), 0) == (0 if no_ack else 5)


@pytest.mark.usefixtures("both")
def test_a_state_of_a_long_task(slow: Celery, impatient: Node, make_app: MakeApp) -> None:
    """It is held until a later one arrives, which does not affect another thread's wait."""
    worker, held, (lone,) = make_app(impatient.url), group_of(slow), page_ids(1)
    told: list[str] = []
    waits = [
        wait_in_thread(lambda: held.get(timeout=30, on_message=lambda meta: told.append(meta["status"]))),
        wait_in_thread(lambda: slow.AsyncResult(lone).get(timeout=30)),
    ]
    store_member(worker, held, 0, {"step": 1}, "PROGRESS")
    time.sleep(NOTICED)
    store_member(worker, held, 0, {"step": 2}, "PROGRESS")
    time.sleep(NOTICED)
    store_group(worker, held)
    store(worker, lone, "lone")
    for thread, _ in waits:
        thread.join(ENOUGH)
    assert [got for _, got in waits] == [[[0, 1, 2]], ["lone"]]
    assert told.count("SUCCESS") == 3
    assert told[0] == "PROGRESS"


@pytest.mark.usefixtures("both")
def test_a_slow_body_with_results_by_reference(slow: Celery) -> None:
    held = group_of(slow, 8)
    store_group(slow, held)
    found = []
    for meta in slow.backend.iter_header(held.id, 8):
        if len(found) in (0, 5):
            time.sleep(NOTICED)
        found.append(meta["result"])
    assert sorted(found) == list(range(8))


@pytest.mark.usefixtures("both")
def test_a_mailbox_that_nobody_reads_for_long(impatient: Node, make_app: MakeApp) -> None:
    app = make_app(impatient.url, backend="fastres-rpc://")
    worker = make_app(impatient.url, backend="fastres-rpc://")
    for _ in range(2):
        first, second = new_ids(2)
        app.backend.on_task_call(None, first)
        store(worker, first, 1, reply_to=app.thread_oid)
        time.sleep(NOTICED)
        assert app.AsyncResult(first).get(timeout=ENOUGH) == 1
        app.backend.on_task_call(None, second)
        store(worker, second, 2, reply_to=app.thread_oid)
        assert app.AsyncResult(second).get(timeout=ENOUGH) == 2


# -- permissions

#: A user's permissions: configure, write, read.
NOTHING, ALL = "^$", ".*"
LACKING = {
    "configure": (NOTHING, ALL, ALL),
    "write": (ALL, NOTHING, ALL),
    "read": (ALL, ALL, NOTHING),
}


@pytest.fixture(params=LACKING)
def lacking(request: pytest.FixtureRequest, node: Node) -> Iterator[tuple[str, str, str]]:
    """The permission that a user lacks, the user's name, and the URL."""
    name = f"user-{uuid()}"
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, *LACKING[request.param])
    yield request.param, name, node.url.replace("guest:guest", f"{name}:secret")
    node.ctl("delete_user", name)


def refused(call: Any) -> None:
    """Check that a call raises at once, with the reason."""
    start = time.monotonic()
    with pytest.raises(fastres.AccessRefused, match=r"user 'user-.*set_permissions") as raised:
        call()
    assert isinstance(raised.value, fastres.Error)
    assert "secret" not in str(raised.value)
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("both")
def test_a_missing_permission(
    lacking: tuple[str, str, str], make_app: MakeApp, node: Node, broker: Broker
) -> None:
    which, user, url = lacking
    app, worker = make_app(url), make_app()
    (there,) = page_ids(1)
    store(worker, there, "there")
    (pending,) = page_ids(1)
    held = group_of(app)
    store_group(worker, held)
    gets = [
        lambda: app.AsyncResult(pending).get(timeout=30),
        lambda: app.AsyncResult(pending).get(),
        lambda: app.AsyncResult(there).get(timeout=30),
        lambda: held.get(timeout=30),
        lambda: list(app.backend.get_many(ids_of(held))),
    ]
    if which == "write":
        for _ in range(2):
            refused(lambda: store(app, new_ids(1)[0], 1))
        assert [app.AsyncResult(there).get(timeout=ENOUGH), held.get(timeout=ENOUGH)] == ["there", [0, 1, 2]]
        return
    for get in gets * 2:
        refused(get)
    if which == "read":
        refused(lambda: app.AsyncResult(there).state)
    else:
        # A look declares nothing, but storing a result does.
        assert app.AsyncResult(there).state == "SUCCESS"
        refused(lambda: store(app, new_ids(1)[0], 1))
    node.ctl("set_permissions", user, ALL, ALL, ALL)
    assert app.AsyncResult(there).get(timeout=ENOUGH) == "there"
    assert held.get(timeout=ENOUGH) == [0, 1, 2]


def test_the_least_permissions(node: Node, make_app: MakeApp) -> None:
    """Those of docs/operate.md."""
    name = f"user-{uuid()}"
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, r"^fastres\.", r"^amq\.default$", r"^fastres\.")
    app = make_app(node.url.replace("guest:guest", f"{name}:secret"))
    ids = [*page_ids(2), "mine", *new_ids(1)]
    for task_id in ids:
        store(app, task_id, {"step": 1}, "PROGRESS")
        assert app.AsyncResult(task_id).state == "PROGRESS"
        store(app, task_id, task_id)
        assert app.AsyncResult(task_id).state == "SUCCESS"
        assert app.AsyncResult(task_id).get(timeout=ENOUGH) == task_id
        app.AsyncResult(task_id).forget()
    held = group_of(app)
    held.save()
    store_group(app, held)
    assert app.backend.group_progress(held.id) == 3
    assert held.get(timeout=ENOUGH) == [0, 1, 2]
    held.delete()
    joiner = app.backend.joiner
    joiner.start()
    # The waiting messages may be another test's.
    assert len(app.backend.asker.status(ENOUGH)) == 1
    joiner.stop()
    node.ctl("delete_user", name)


@pytest.mark.usefixtures("both")
def test_a_permission_that_is_taken_away_while_somebody_waits(node: Node, make_app: MakeApp) -> None:
    name = f"user-{uuid()}"
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, ALL, ALL, ALL)
    app = make_app(node.url.replace("guest:guest", f"{name}:secret"))
    held = group_of(app)
    thread, got = wait_in_thread(lambda: held.get(timeout=30))
    time.sleep(0.5)
    node.ctl("set_permissions", name, ALL, ALL, NOTHING)
    node.ctl("close_all_user_connections", name, "test")
    thread.join(ENOUGH)
    assert isinstance(got[0], fastres.AccessRefused)
    node.ctl("delete_user", name)


@pytest.mark.parametrize("lacking", ["configure", "read"], indirect=True)
def test_a_mailbox_without_a_permission(lacking: tuple[str, str, str], make_app: MakeApp) -> None:
    app = make_app(lacking[2], backend="fastres-rpc://")
    for _ in range(2):
        refused(lambda: app.AsyncResult(new_ids(1)[0]).get(timeout=30))


# -- a broker that stands still


@pytest.mark.timeout(180)
def test_results_without_confirms_survive_a_broker_that_stands_still(make_app: MakeApp) -> None:
    count, pause = 40_000, 3.0
    with Node() as node, contextlib.closing(Broker(node.url)) as broker:
        app = make_app(node.url, result_backend_transport_options={"confirm": False})
        group_id = uuid()
        ids = member_ids(group_id, count)
        store(app, ids[0], 0, group=group_id)
        pid = int(node.ctl("eval", "os:getpid().").strip().strip('"'))

        def stand_still() -> None:
            for _ in range(2):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(pause)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)

        standing = threading.Thread(target=stand_still)
        standing.start()
        for number, task_id in enumerate(ids[1:], 1):
            store(app, task_id, number, group=group_id)
        standing.join()
        until(lambda: broker.messages(queue_of(group_id)) == count, 60)


@pytest.mark.parametrize("alarm", ["memory", "disk"])
@pytest.mark.parametrize("confirm", [True, False])
def test_an_alarm_holds_results_back_until_it_is_over(
    own_node: Node, tmp_path: Path, confirm: bool, alarm: str
) -> None:
    """No result is lost, and reads go on meanwhile."""
    raised, over = {
        "memory": (("set_vm_memory_high_watermark", "0.00000001"), ("set_vm_memory_high_watermark", "0.6")),
        "disk": (("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "1MB")),
    }[alarm]
    # The broker has given the reason, so the wait is longer.
    options = {"confirm": confirm, "confirm_timeout": 1}
    worker = Worker(own_node.url, concurrency=1, result_backend_transport_options=options)
    with worker, worker.client():
        assert add.delay(1, 1).get(timeout=ENOUGH) == 2
        gate = tmp_path / "gate"
        sent = group(gated.s(str(gate), number) for number in range(50)).apply_async()
        own_node.ctl(*raised)
        gate.touch()
        with pytest.raises(fastres.ResultsMissing, match="has nothing more"):
            sent.get(timeout=3)
        own_node.ctl(*over)
        assert sent.get(timeout=ENOUGH) == list(range(50))
        assert add.delay(1, 2).get(timeout=ENOUGH) == 3


def test_a_broker_that_stands_still_is_waited_for_until_an_end(
    own_node: Node, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastres.amqp.browse.REPLY_TIMEOUT", 1.0)
    app = make_app(own_node.url, result_backend_transport_options={"confirm_timeout": 1})
    there, later = page_ids(2)
    store(app, there, "there")
    assert app.AsyncResult(there).state == "SUCCESS"
    pid = int(own_node.ctl("eval", "os:getpid().").strip().strip('"'))
    os.kill(pid, signal.SIGSTOP)
    try:
        for call in (lambda: app.AsyncResult(later).state, lambda: store(app, later, "later")):
            start = time.monotonic()
            # A new connection for each, which gets no handshake, has its own time limit.
            with pytest.raises(fastres.BrokerUnreachable, match="has not"):
                call()
            assert time.monotonic() - start < 3
            os.kill(pid, signal.SIGCONT)
            store(app, there, "there")
            os.kill(pid, signal.SIGSTOP)
    finally:
        os.kill(pid, signal.SIGCONT)
    store(app, later, "later")
    assert app.AsyncResult(later).get(timeout=ENOUGH) == "later"


@pytest.mark.parametrize("policy", [{"max_retries": 1}, {"timeout": 0.5}], ids=str)
def test_the_time_to_reconnect_is_an_option(make_app: MakeApp, policy: dict[str, float]) -> None:
    app = make_app("amqp://guest:secret@127.0.0.1:1//", result_backend_transport_options={"retry_policy": policy})
    for call in (
        lambda: app.AsyncResult(new_ids(1)[0]).state,
        lambda: app.AsyncResult(new_ids(1)[0]).get(),
        lambda: store(app, new_ids(1)[0], 1),
    ):
        start = time.monotonic()
        with pytest.raises(fastres.BrokerUnreachable, match=r"127\.0\.0\.1:1"):
            call()
        assert time.monotonic() - start < 5


# -- messages of timeouts


def test_a_timeout_names_the_reason(make_app: MakeApp) -> None:
    app = make_app()
    held = group_of(app)
    store_group(app, held, [1])
    with pytest.raises(fastres.ResultsMissing, match=r"2 results are missing of 3 .* has nothing more"):
        held.get(timeout=0.5)
    away = make_app("amqp://guest:secret@127.0.0.1:1//")
    with pytest.raises(
        fastres.ResultsMissing, match=r"cannot reach the broker .*127\.0\.0\.1:1.*refused"
    ) as unreachable:
        away.AsyncResult(new_ids(1)[0]).get(timeout=1)
    assert "secret" not in str(unreachable.value)
    with pytest.raises(OperationalError):
        away.backend.store_result(new_ids(1)[0], 1, "SUCCESS")


def test_a_worker_says_at_its_start_that_results_cannot_be_stored(node: Node) -> None:
    """In one log line, before any task has run."""
    name = f"user-{uuid()}"
    node.ctl("add_user", name, "secret")
    node.ctl("set_permissions", name, ALL, r"^(?!amq\.default$)", ALL)
    told = "Results of tasks cannot be stored"
    with Worker(node.url.replace("guest:guest", f"{name}:secret")) as worker:
        until(lambda: told in worker.log())
        (line,) = [line for line in worker.log().splitlines() if told in line]
        assert "set_permissions" in line
        assert name in line
    with Worker(node.url) as worker, worker.client():
        assert add.delay(1, 1).get(timeout=ENOUGH) == 2
        assert told not in worker.log()
    node.ctl("delete_user", name)
