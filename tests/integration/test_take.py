"""When results are removed from their queue: the three values of the option ``take``, and ``no_ack``."""

from __future__ import annotations

from typing import Any

import pytest
from backend_kit import (
    ENOUGH,
    Broker,
    MakeApp,
    group_of,
    held_by,
    ids_of,
    new_ids,
    page_ids,
    queue_of,
    store,
    store_group,
    until,
)
from celery.exceptions import TimeoutError

from fastres.ids import queue_name

WAIT = 0.3


def make(make_app: MakeApp, take: str) -> Any:
    return make_app(result_backend_transport_options={"take": take})


def is_there(broker: Broker, task_id: str) -> bool:
    return bool(broker.messages(queue_name(task_id)))


@pytest.mark.parametrize("take", ["joins", "always", "never"])
@pytest.mark.parametrize("kind", ["of its own", "page", "member"])
@pytest.mark.usefixtures("both")
def test_a_result_that_is_read_by_itself(make_app: MakeApp, broker: Broker, take: str, kind: str) -> None:
    app, other = make(make_app, take), make(make_app, take)
    (task_id,) = {"of its own": new_ids, "page": page_ids, "member": lambda n: ids_of(group_of(app, n))}[kind](1)
    store(app, task_id, 5)
    assert app.AsyncResult(task_id).get(timeout=ENOUGH) == 5
    # A process can return a result again that it has read.
    assert app.AsyncResult(task_id).get(timeout=ENOUGH) == 5
    assert is_there(broker, task_id) is (take != "always")
    if take == "always":
        with pytest.raises(TimeoutError):
            other.AsyncResult(task_id).get(timeout=WAIT)
        assert other.AsyncResult(task_id).state == "PENDING"
    else:
        assert other.AsyncResult(task_id).get(timeout=ENOUGH) == 5
        assert other.AsyncResult(task_id).state == "SUCCESS"


@pytest.mark.parametrize("take", ["joins", "always", "never"])
@pytest.mark.usefixtures("both")
def test_a_join(make_app: MakeApp, broker: Broker, take: str) -> None:
    app, other = make(make_app, take), make(make_app, take)
    held = group_of(app, 5)
    store_group(app, held)
    assert held.get(timeout=ENOUGH) == [0, 1, 2, 3, 4]
    if take == "never":
        assert held_by(other, held).get(timeout=ENOUGH) == [0, 1, 2, 3, 4]
        assert broker.messages(queue_of(held.id)) == 5
    else:
        broker.wait_until_gone(queue_of(held.id))
        with pytest.raises(TimeoutError):
            held_by(other, held).get(timeout=WAIT)


@pytest.mark.parametrize("take", ["joins", "always", "never"])
@pytest.mark.usefixtures("both")
def test_a_join_of_lone_tasks_on_a_page_with_others(make_app: MakeApp, broker: Broker, take: str) -> None:
    app = make(make_app, take)
    ids = page_ids(6)
    for number, task_id in enumerate(ids):
        store(app, task_id, number)
    found = dict(app.backend.get_many(ids[1:5], timeout=ENOUGH))
    assert {task_id: meta["result"] for task_id, meta in found.items()} == dict(zip(ids[1:5], range(1, 5)))
    left = 6 if take == "never" else 2
    until(lambda: broker.messages(queue_name(ids[0])) == left)
    other = make(make_app, take)
    assert other.AsyncResult(ids[0]).get(timeout=ENOUGH) == 0
    assert other.AsyncResult(ids[5]).state == ("SUCCESS")


@pytest.mark.parametrize("take", ["joins", "always"])
def test_an_explicit_no_ack_false_never_takes(make_app: MakeApp, broker: Broker, take: str) -> None:
    app, other = make(make_app, take), make(make_app, take)
    held = group_of(app, 3)
    store_group(app, held)
    (lone,) = page_ids(1)
    store(app, lone, 7)
    for reader in (app, other):
        assert held_by(reader, held).get(timeout=ENOUGH, no_ack=False) == [0, 1, 2]
        assert reader.AsyncResult(lone).get(timeout=ENOUGH, no_ack=False) == 7
        assert len(list(reader.backend.get_many(ids_of(held), timeout=ENOUGH, no_ack=False))) == 3
    assert broker.messages(queue_of(held.id)) == 3
    assert is_there(broker, lone)


@pytest.mark.usefixtures("both")
def test_a_join_of_some_members_leaves_the_others(make_app: MakeApp, broker: Broker) -> None:
    """The first message that another reader may want turns it into a wait; no result is lost."""
    app, other = make_app(), make_app()
    held = group_of(app, 3000)
    store_group(app, held, range(3000))
    ids = ids_of(held)
    assert len(dict(app.backend.get_many(ids[:1000], timeout=ENOUGH))) == 1000
    until(lambda: broker.messages(queue_of(held.id)) == 2000, so="what was read is taken")
    assert other.AsyncResult(ids[1500]).get(timeout=ENOUGH) == 1500
    assert len(dict(other.backend.get_many(ids[1000:], timeout=ENOUGH))) == 2000
    until(lambda: not broker.messages(queue_of(held.id)))


def test_two_waits_on_one_page(make_app: MakeApp) -> None:
    """Each gets its own results, whichever of the two the broker sends them to."""
    apps = [make_app() for _ in range(3)]
    writer = make_app()
    ids = page_ids(30)
    results = [apps[number % 3].AsyncResult(task_id) for number, task_id in enumerate(ids)]
    from backend_kit import in_thread

    got: dict[int, Any] = {}
    threads = [
        in_thread(lambda n=number: got.__setitem__(n, results[n].get(timeout=ENOUGH))) for number in range(30)
    ]
    for number, task_id in enumerate(ids):
        store(writer, task_id, number)
    for thread in threads:
        thread.join()
    assert got == dict(enumerate(range(30)))
