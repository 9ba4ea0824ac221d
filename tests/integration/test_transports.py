"""Other brokers than the application's RabbitMQ: memory, Redis, TLS, a broker for results only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from backend_kit import clear_cache, queue_of, takes, until
from celery import Celery, chain, chord, group, uuid
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError, ImproperlyConfigured, TimeoutError
from celery.result import GroupResult
from kombu.exceptions import OperationalError
from proj import OutOfStockError, add, fail, gated, progress, tsum
from rabbitmq_node import Node, Redis
from workers import Worker, adds, client, python, sums

import fastres

SECONDS = 20


# -- kombu's transports


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module")
def redis_worker(redis: Redis) -> Iterator[Worker]:
    with Worker(redis.url) as worker:
        yield worker


@pytest.fixture(scope="module", params=["memory", "redis"])
def app(request: pytest.FixtureRequest) -> Iterator[Celery]:
    """An application whose results go through kombu's drain, with a worker."""
    if request.param == "redis":
        with request.getfixturevalue("redis_worker").client() as app:
            yield app
        return
    # The in-memory broker belongs to this process, so the worker is one of its threads.
    with (
        client("memory://") as app,
        start_worker(app, pool="threads", concurrency=2, perform_ping_check=False, shutdown_timeout=20),
    ):
        yield app


def test_a_lone_task(app: Celery) -> None:
    result = add.delay(2, 3)
    assert result.get(timeout=SECONDS) == 5
    assert result.state == "SUCCESS"


def test_only_rabbitmq_has_quorum_queues() -> None:
    with (
        client("memory://", result_backend_transport_options={"queue_type": "quorum"}) as app,
        start_worker(app, pool="threads", concurrency=2, perform_ping_check=False, shutdown_timeout=20),
    ):
        assert add.delay(2, 3).get(timeout=SECONDS) == 5
        assert group(add.s(number, 1) for number in range(10))().get(timeout=SECONDS) == list(range(1, 11))


def test_a_lone_task_is_polled(app: Celery) -> None:
    result = add.delay(2, 3)
    until(result.ready, SECONDS)
    assert [app.AsyncResult(result.id).result for _ in range(3)] == [5, 5, 5]
    assert result.get(timeout=SECONDS) == 5


def test_states_come_before_the_result(app: Celery) -> None:
    result = progress.delay(1, pause=0.5)
    until(lambda: result.state == "PROGRESS", SECONDS)
    assert result.info == {"step": 0, "of": 1}
    assert result.get(timeout=SECONDS) == 1


def test_a_failure(app: Celery) -> None:
    with pytest.raises(OutOfStockError) as caught:
        fail.delay("apples", 3).get(timeout=SECONDS)
    assert caught.value.args == ("apples", 3)


@pytest.mark.timing
@pytest.mark.parametrize("timeout", [0.3, 1.2])
def test_a_timeout(app: Celery, timeout: float) -> None:
    # kombu's Redis channel closes when its blocking pop of one second is over.
    late = 1.3 if app.conf.broker_url.startswith("redis") else 0.2
    with takes(timeout, late), pytest.raises(TimeoutError):
        app.AsyncResult(uuid()).get(timeout=timeout)


def test_a_group(app: Celery) -> None:
    result = group(adds(50)).apply_async()
    assert result.get(timeout=SECONDS) == sums(50)
    assert result.successful()


def test_a_group_is_polled_and_read_one_by_one(app: Celery, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    result = group([*adds(4), gated.s(str(gate), "last")]).apply_async()
    until(lambda: result.completed_count() == 4, SECONDS, 0.1)
    assert app.backend.group_progress(result.id) == 4
    gate.touch()
    assert [member.get(timeout=SECONDS) for member in result] == [*sums(4), "last"]
    assert result.get(timeout=SECONDS) == [*sums(4), "last"]


def test_reading_without_taking(app: Celery) -> None:
    result = group(adds(10)).apply_async()
    ids = [member.id for member in result]
    for _ in range(2):
        metas = dict(app.backend.get_many(ids, timeout=SECONDS, no_ack=False))
        assert [metas[task_id]["result"] for task_id in ids] == sums(10)
        for task_id in ids:
            clear_cache(app.backend, task_id)


def test_a_chain_and_a_chord(app: Celery) -> None:
    assert chain(add.s(1, 2), group(add.s(1), add.s(2))).apply_async().get(timeout=SECONDS) == [4, 5]
    result = chord(adds(5))(tsum.s())
    assert result.get(timeout=SECONDS) == sum(sums(5))
    assert result.parent.get(timeout=SECONDS) == sums(5)


def test_lone_tasks_do_not_share_queues(app: Celery) -> None:
    """``chord_unlock`` polls a header while a client waits for its body: with one queue they would block each other."""
    rkey = app.backend.rkey
    results = [add.delay(1, 1), add.delay(1, 1), chord(adds(2))(tsum.s())]
    assert len({rkey(result.id) for result in [*results, *results[-1].parent]}) == 4
    for result in results:
        result.get(timeout=SECONDS)


def test_a_failing_chord(app: Celery) -> None:
    result = chord([add.s(1, 1), fail.s("apples", 4)])(tsum.s())
    with pytest.raises(ChordError, match="apples"):
        result.get(timeout=SECONDS, follow_parents=False)


def test_a_saved_group(app: Celery) -> None:
    result = group(adds(5)).apply_async()
    result.save()
    assert GroupResult.restore(result.id).get(timeout=SECONDS) == sums(5)
    result.delete()
    assert GroupResult.restore(result.id) is None


def test_a_saved_group_is_read_by_another_process(redis_worker: Worker) -> None:
    with redis_worker.client() as app:
        result = group(adds(5)).apply_async()
        result.save()
        code = f"""
            from celery.result import GroupResult
            print(GroupResult.restore({result.id!r}).get(timeout=20))
        """
        assert python(code, app) == str(sums(5))


def test_forgotten_results_are_gone(app: Celery) -> None:
    result = add.delay(2, 3)
    until(result.ready, SECONDS)
    result.forget()
    assert app.AsyncResult(result.id).state == "PENDING"


# -- addresses


@pytest.fixture(scope="module")
def tls_node() -> Iterator[Node]:
    with Node(tls=True) as node:
        yield node


def check(worker: Worker) -> None:
    """Check that clients in any process get the worker's results."""
    with worker.client() as app:
        assert add.delay(1, 2).get(timeout=SECONDS) == 3
        result = group(adds(200)).apply_async()
        assert result.get(timeout=SECONDS) == sums(200)
        assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == sum(sums(3))
        lone = add.delay(2, 2)
        assert python(f"print(app.AsyncResult({lone.id!r}).get(timeout=20))", app) == "4"


def test_tls(tls_node: Node, node: Node) -> None:
    """Tasks on one broker, results on another over TLS, whose certificate is checked."""
    url = f"fastress://guest:guest@127.0.0.1:{tls_node.tls_port}//"
    options = {"ssl": {"ca_certs": tls_node.ca_file}}
    with Worker(node.url, url, result_backend_transport_options=options) as worker:
        check(worker)


def test_tls_without_the_authority(tls_node: Node, node: Node) -> None:
    url = f"fastress://guest:guest@127.0.0.1:{tls_node.tls_port}//"
    start = time.monotonic()
    with client(node.url, url) as app, pytest.raises(OperationalError, match=r"is not trusted: .*self-signed"):
        app.backend.store_result("unchecked", 1, "SUCCESS")
    assert time.monotonic() - start < SECONDS / 2, "it was tried again, as if that could help"


@pytest.mark.parametrize("given", [True, {}])
def test_tls_with_the_systems_authorities(tls_node: Node, node: Node, given: Any) -> None:
    url = f"fastress://guest:guest@127.0.0.1:{tls_node.tls_port}//"
    with client(node.url, url) as app:
        app.conf.broker_use_ssl = given
        with pytest.raises(fastres.BrokerUnreachable, match="is not trusted"):
            app.backend.store_result("unchecked", 1, "SUCCESS")


def test_tls_with_a_missing_file(tls_node: Node, node: Node) -> None:
    url = f"fastress://guest:guest@127.0.0.1:{tls_node.tls_port}//"
    options = {"ssl": {"ca_certs": "/nowhere/ca.pem"}}
    with client(node.url, url, result_backend_transport_options=options) as app, takes(0, late=SECONDS / 4):
        for call in (lambda: app.backend.store_result("x", 1, "SUCCESS"), lambda: app.AsyncResult("x").get()):
            with pytest.raises(ImproperlyConfigured, match=r"no file '/nowhere/ca\.pem', which ca_certs names"):
                call()


def test_several_brokers_over_tls(tls_node: Node, node: Node) -> None:
    """The certificate has the name of the connected host."""
    hosts = ("nowhere.invalid:1", f"localhost:{tls_node.tls_port}", f"127.0.0.1:{tls_node.tls_port}")
    for some in (hosts, hosts[::2], hosts[::-1]):
        url = ";".join(f"fastress://guest:guest@{host}//" for host in some)
        with client(
            node.url, url, result_backend_transport_options={"ssl": {"ca_certs": tls_node.ca_file}}
        ) as app:
            task_id = uuid()
            app.backend.store_result(task_id, "there", "SUCCESS")
            assert app.AsyncResult(task_id).get(timeout=SECONDS) == "there"


def test_a_password_that_is_wrong(node: Node) -> None:
    with (
        client(node.url, node.url.replace("amqp://guest:guest", "fastres://guest:secret")) as app,
        takes(0, late=SECONDS / 4),
    ):
        for call in (lambda: app.backend.store_result("x", 1, "SUCCESS"), lambda: app.AsyncResult("x").get()):
            with pytest.raises(fastres.AccessRefused, match=r"guest:\*\*@.*Login was refused"):
                call()


def test_tls_of_a_large_result(tls_node: Node, node: Node) -> None:
    url = f"fastress://guest:guest@localhost:{tls_node.tls_port}//"
    options = {"ssl": {"ca_certs": tls_node.ca_file}}
    with client(node.url, url, result_backend_transport_options=options) as app:
        value = "x" * 3_000_000
        app.backend.store_result("large", value, "SUCCESS")
        assert app.AsyncResult("large").get(timeout=SECONDS) == value


def test_results_on_another_broker(tls_node: Node, node: Node) -> None:
    url = f"fastres://guest:guest@127.0.0.1:{tls_node.port}//"
    before = set(node.queues())
    with Worker(node.url, url) as worker, worker.client() as app:
        check(worker)
        result = group(adds(3)).apply_async()
        until(lambda: app.backend.group_progress(result.id) == 3, SECONDS)
        assert queue_of(result.id) in tls_node.queues()
        assert not [name for name in set(node.queues()) - before if name.startswith("fastres.")]


def test_tasks_on_rabbitmq_and_results_on_redis(node: Node, redis: Redis) -> None:
    with Worker(node.url, f"fastres+{redis.url}") as worker:
        check(worker)


def test_tasks_on_redis_and_results_on_rabbitmq(node: Node, redis: Redis) -> None:
    with Worker(redis.url, f"fastres://guest:guest@127.0.0.1:{node.port}//") as worker:
        check(worker)
