"""From Celery's backends to these: by changing the alias, or worker by worker."""

from __future__ import annotations

import json
from typing import Any

import pytest
from backend_kit import CELERY, ENOUGH, Broker, MakeApp, reply, send, until
from celery import Celery, group, states, uuid
from proj import OutOfStockError, add, fail
from rabbitmq_node import Node
from workers import Worker, adds, client, python, sums

SECONDS = 15


# -- workers


SCRIPT = """
    from celery import chain, group
    from celery.exceptions import TimeoutError
    r = add.delay(1, 2)
    print(r.get(timeout=20), r.state, r.status, r.ready(), r.successful(), r.failed(), r.result, r.traceback)
    print(r.get(timeout=20), r.children)
    r = fail.delay("apples", 3)
    print(repr(r.get(timeout=20, propagate=False)), r.state, r.failed(), r.traceback.splitlines()[-1])
    try:
        r.get(timeout=20)
    except OutOfStockError as exc:
        print("raised", exc.item, exc.left)
    try:
        add.apply_async((1, 2), countdown=30).get(timeout=0.2)
    except TimeoutError:
        print("timeout")
    g = group(add.s(n, n) for n in range(50)).apply_async()
    print(g.get(timeout=20), g.completed_count(), g.ready(), g.successful(), g.failed())
    print(g.join(timeout=20), [m.state for m in g][-1])
    g = group(add.s(n, n) for n in range(5)).apply_async()
    print([m.get(timeout=20) for m in g], g.get(timeout=20))
    g = group(add.s(1, 1), fail.s("pears"), add.s(2, 2)).apply_async()
    print(g.get(timeout=20, propagate=False), g.failed())
    c = chain(add.s(1, 2), add.s(10), group(add.s(1), add.s(2))).apply_async()
    print(c.get(timeout=20), c.parent.get(timeout=20), c.parent.parent.get(timeout=20))
    seen = []
    p = progress.delay(3, 0.1)
    print(p.get(timeout=20, on_message=lambda m: seen.append(m["status"])), seen)
    got = []
    r = add.delay(3, 4)
    r.then(lambda result: got.append(result.result))
    print(r.get(timeout=20), got)
    print(retried.delay(2).get(timeout=20), silent.delay(1).get(timeout=20))
    print(echo.delay({"a": [1, None, "ü"]}).get(timeout=20))
    rs = app.ResultSet([add.delay(n, 1) for n in range(10)])
    print(rs.get(timeout=20), rs.completed_count())
    print(app.backend.supports_native_join, app.backend.supports_autoexpire, app.backend.persistent)
"""


@pytest.mark.parametrize(("old", "new"), [("rpc://", "fastres-rpc://"), ("amqp://", "fastres://")])
def test_only_the_alias_changes(node: Node, old: str, new: str) -> None:
    said = []
    for backend in (old, new):
        with Worker(node.url, backend) as worker, worker.client() as app:
            said.append(python(SCRIPT, app).splitlines())
    assert said[0] == said[1]
    assert len(said[0]) == 16


@pytest.mark.parametrize(("writes", "reads"), [("rpc://", "fastres-rpc://"), ("fastres-rpc://", "rpc://")])
def test_a_fleet_is_rolled_over(node: Node, writes: str, reads: str) -> None:
    """Clients with one backend read results of workers with the other."""
    with Worker(node.url, writes) as worker, client(node.url, reads, **worker.conf) as app:
        own_reply_queue(app)
        assert add.delay(1, 2).get(timeout=SECONDS) == 3
        assert group(adds(20)).apply_async().get(timeout=SECONDS) == sums(20)
        with pytest.raises(OutOfStockError):
            fail.delay("apples", 1).get(timeout=SECONDS)


def own_reply_queue(app: Celery) -> Celery:
    """Celery names it by the application's address in memory, which an earlier application may have had."""
    app._local.oid = uuid()
    return app


# -- RPCBackend and Celery's own, each reading the other's results


@pytest.fixture
def celery_rpc(make_app: MakeApp) -> Celery:
    """An application on Celery's own backend."""
    return own_reply_queue(make_app(backend="rpc://"))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
def test_reads_results_of_celerys_workers(make_app: MakeApp, serializer: str) -> None:
    conf = {"result_serializer": serializer, "result_accept_content": [serializer], "result_extended": True}
    client, worker = make_app(backend="fastres-rpc://", **conf), make_app(backend="rpc://", **conf)
    good, bad = send(client), send(client)
    reply(worker, client, good.id, [1, {"a": None}], task="add", args=[1])
    reply(worker, client, bad.id, ValueError("no"), states.FAILURE)
    assert good.get(timeout=ENOUGH) == [1, {"a": None}]
    if CELERY >= (5, 7):
        # Before, rpc had no result_extended.
        assert (good.name, good.args) == ("add", [1])
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)


@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
def test_celerys_clients_read_its_results(make_app: MakeApp, celery_rpc: Celery, serializer: str) -> None:
    celery_rpc.conf.update(result_serializer=serializer, result_accept_content=[serializer])
    worker = make_app(backend="fastres-rpc://", result_serializer=serializer, result_accept_content=[serializer])
    polled, good, bad = (send(celery_rpc) for _ in range(3))
    reply(worker, celery_rpc, polled.id, {"percent": 5}, "PROGRESS")
    assert (polled.state, polled.info) == ("PROGRESS", {"percent": 5})
    reply(worker, celery_rpc, polled.id, 1)
    reply(worker, celery_rpc, good.id, [1, {"a": None}])
    reply(worker, celery_rpc, bad.id, ValueError("no"), states.FAILURE)
    assert polled.get(timeout=ENOUGH) == 1
    assert good.get(timeout=ENOUGH) == [1, {"a": None}]
    with pytest.raises(ValueError, match="no"):
        bad.get(timeout=ENOUGH)


@pytest.mark.parametrize("fields", [{}, {"group": "g", "group_index": 0}], ids=["lone", "member"])
def test_the_wire_format_is_celerys_own(
    make_app: MakeApp, celery_rpc: Celery, broker: Broker, fields: dict[str, Any]
) -> None:
    """Same body, same properties; before Celery 5.7 rpc had fewer fields."""
    written: list[Any] = []
    for app in (make_app(backend="fastres-rpc://"), celery_rpc):
        mailbox, task_id = uuid(), "0f8fad5b-d9cb-469f-a165-70867728950e"
        broker.declare(mailbox)
        reply(app, mailbox, task_id, {"a": [1]}, **fields)
        # Celery's rpc does not wait for confirms.
        until(lambda mailbox=mailbox: broker.messages(mailbox))
        message = broker.look(mailbox)
        meta = json.loads(message.body)
        assert meta.pop("date_done", None) or (app is celery_rpc and CELERY < (5, 7))
        properties = {name: value for name, value in message.properties.items() if value}
        written.append((meta, properties, message.delivery_info["exchange"]))
    (ours, *how), (theirs, *theirs_how) = written
    if CELERY < (5, 7):
        ours = {field: ours[field] for field in theirs}
    assert (ours, how) == (theirs, theirs_how)


def test_a_client_that_is_rolled_over(make_app: MakeApp, celery_rpc: Celery) -> None:
    """Celery's reply queue is transient and auto-delete: the same process declares its own only once."""
    result = send(celery_rpc)
    client = make_app(backend="fastres-rpc://")
    mine = send(client)
    reply(client, celery_rpc, result.id, "to the old one")
    reply(celery_rpc, client, mine.id, "to the new one")
    assert (result.get(timeout=ENOUGH), mine.get(timeout=ENOUGH)) == ("to the old one", "to the new one")
