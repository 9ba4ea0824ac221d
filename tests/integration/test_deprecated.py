"""fastres uses no deprecated feature of RabbitMQ, according to the broker."""

from __future__ import annotations

import contextlib

import pytest
from backend_kit import ENOUGH, Broker, MakeApp, group_of, new_ids, page_ids, store, store_group
from celery import uuid
from celery.result import GroupResult
from chord_kit import Unrun, finish
from rabbitmq_node import Node
from workers import JoinerProcess


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_no_deprecated_feature_is_in_use(own_node: Node, make_app: MakeApp, queue_type: str) -> None:
    if int(own_node.ctl("version").split(".")[0]) < 4:
        pytest.skip("RabbitMQ keeps this account since version 4")
    options = {"queue_type": queue_type, "namespace": uuid()}
    app = make_app(own_node.url, result_backend_transport_options=options)
    for task_id in (*page_ids(2), *new_ids(1)):
        store(app, task_id, 1)
        store(app, task_id, {"step": 1}, "PROGRESS")
        assert app.AsyncResult(task_id).get(timeout=ENOUGH) == 1
    held = group_of(app, 5)
    store_group(app, held)
    held.save()
    assert GroupResult.restore(held.id, app=app) is not None
    assert app.backend.group_progress(held.id) == 5
    assert held.get(timeout=ENOUGH) == list(range(5))
    client = make_app(own_node.url, backend="fastres-rpc://")
    (task_id,) = new_ids(1)
    client.backend.on_task_call(None, task_id)
    store(client, task_id, 2, reply_to=client.thread_oid)
    assert client.AsyncResult(task_id).get(timeout=ENOUGH) == 2
    with contextlib.closing(Broker(own_node.url)) as broker:
        unrun = Unrun(app, broker)
        with JoinerProcess(own_node.url, result_backend_transport_options=options):
            finish(unrun, unrun.begin(3))
            assert unrun.wait(1) == [("body", [0, 1, 2])]
            assert app.backend.asker.status(ENOUGH)[0].joiners == 1
    used = own_node.ctl("list_deprecated_features", "--used", "--formatter", "json")
    assert "global_qos" not in used
    assert "transient_nonexcl_queues" not in used
    assert "queue_master_locator" not in used
