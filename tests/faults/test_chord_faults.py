"""Joiners are killed, brokers restarted, connections cut: every body is sent once, with all results in order."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_kit import Broker, until
from celery import Celery, chord, uuid
from celery.app.task import Context
from celery.exceptions import ChordError
from chord_kit import Unrun, begun, finish, results_of, wait_for_joiners
from proj import dies_once, fail, late, patient_errback, tsum
from proxy import Proxy
from rabbitmq_node import Node
from workers import JoinerProcess, Worker, client, start_python

#: The number of chords that are sent while joiners are killed; 20 times as many on demand.
CHORDS = 500 * (20 if os.environ.get("FASTRES_MILLION") else 1)
#: The timeout of each test, in seconds.
LONG = 60 * (20 if os.environ.get("FASTRES_MILLION") else 1)


@pytest.fixture
def alive(own_node: Node) -> Node:
    """A broker that tests stop and kill, started again if an earlier test has stopped it."""
    return own_node.start()


@pytest.fixture
def broker(alive: Node) -> Iterator[Broker]:
    with contextlib.closing(Broker(alive.url)) as broker:
        yield broker


@pytest.fixture
def options() -> dict[str, Any]:
    """Chords of this test only, whose results are not kept."""
    return {"namespace": uuid(), "keep_chord_results": False}


@pytest.fixture
def app(alive: Node, options: dict[str, Any]) -> Iterator[Celery]:
    with client(alive.url, result_backend_transport_options=options) as app:
        yield app


@pytest.fixture
def unconfirmed(options: dict[str, Any]) -> None:
    """Without confirms, to send many parts quickly: the broker is not stopped."""
    options["confirm"] = False


@pytest.fixture
def unrun(app: Celery, broker: Broker) -> Unrun:
    return Unrun(app, broker)


def shard(app: Celery) -> str:
    return app.backend.addresses.chords(0).name


def nothing_is_open(app: Celery) -> None:
    """Whether the joiner holds only late parts."""
    # After a cut it may be reconnecting.
    until(lambda: app.backend.asker.status(20)[0].open is not None)
    (status,) = app.backend.asker.status(20)
    assert status.open is not None
    assert [each for each in status.open.chords if each.total is not None] == []


# -- joiners

#: Joiners, one after the other, each killed after a random time; once a file exists, one that is not killed.
KILLED = """
    import ctypes, os, random, signal, time
    from fastres.chords.joiner import Joiner

    DIES_WITH_ITS_PARENT = 1, signal.SIGKILL
    rng = random.Random({seed})
    app.backend, app.amqp, app.tasks
    while True:
        child = os.fork()
        if not child:
            ctypes.CDLL(None).prctl(*DIES_WITH_ITS_PARENT)
            Joiner(app.backend).run()
        end = time.monotonic() + rng.uniform(0.05, {longest})
        while time.monotonic() < end or os.path.exists({stop!r}):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
"""


@contextlib.contextmanager
def killed_joiners(app: Celery, folder: Path, longest: float = 0.8) -> Iterator[Callable[[], None]]:
    """Kills joiners until the yielded function is called; the current one is then spared."""
    stop = folder / "stop"
    seed = random.randrange(1 << 32)
    # pytest shows printed output if a test fails.
    print("seed", seed)
    process = start_python(KILLED.format(seed=seed, stop=str(stop), longest=longest), app)
    killed = ""
    try:
        assert process.stdout
        killed = process.stdout.readline()
        yield stop.touch
    finally:
        process.kill()
        more, err = process.communicate()
        killed += more
        print(killed.count("killed"), "joiners were killed", err)
    assert killed.count("killed") >= 5, err


def finish_in(seconds: float, unrun: Unrun, requests: list[Context]) -> None:
    """Finish the tasks one after the other, in so many seconds."""
    begin = time.monotonic()
    for done, request in enumerate(requests):
        finish(unrun, [request])
        time.sleep(max(0.0, begin + seconds * done / len(requests) - time.monotonic()))


@pytest.mark.timeout(3 * LONG)
@pytest.mark.usefixtures("unconfirmed")
def test_joiners_are_killed_at_random_moments(app: Celery, unrun: Unrun, tmp_path: Path) -> None:
    sizes = [random.choice([2, 3, 4, 8]) if number % 250 else 1500 for number in range(CHORDS)]
    requests = begun(unrun, sizes)
    # Some tasks run twice, some of these after their chord has fired.
    requests += random.sample(requests, len(requests) // 50)
    order = sorted(range(len(requests)), key=lambda at: at + random.uniform(0, 300))
    with killed_joiners(app, tmp_path) as spare:
        finish_in(LONG / 4, unrun, [requests[at] for at in order])
        spare()
        assert sorted(unrun.wait(CHORDS, LONG)) == results_of(sizes)
        nothing_is_open(app)
        assert unrun.called() == [], "no body was sent twice"


@pytest.mark.usefixtures("unconfirmed")
def test_joiners_are_killed_while_they_merge(app: Celery, unrun: Unrun, tmp_path: Path) -> None:
    """Chords of many parts, which go through several generations of merged events."""
    sizes = [4000, 1001, 1000, 999]
    requests = begun(unrun, sizes)
    random.shuffle(requests)
    with killed_joiners(app, tmp_path, longest=0.5) as spare:
        finish_in(LONG / 10, unrun, requests)
        spare()
        assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
        nothing_is_open(app)
        assert unrun.called() == []


def test_a_standby_takes_over(alive: Node, app: Celery, unrun: Unrun, options: dict[str, Any]) -> None:
    joiners = [JoinerProcess(alive.url, result_backend_transport_options=options) for _ in range(2)]
    with joiners[0] as active, contextlib.ExitStack() as stack:
        until(lambda: app.backend.asker.status(20)[0].joiners == 1)
        stack.enter_context(joiners[1])
        wait_for_joiners(app, alive, 2)
        requests = begun(unrun, [3] * 20)
        finish(unrun, requests[: 3 * 10 + 1])
        assert sorted(unrun.wait(10)) == results_of([3] * 10)
        active.kill()
        finish(unrun, requests[3 * 10 + 1 :])
        assert sorted(unrun.wait(10)) == results_of([3] * 20)[10:]
        nothing_is_open(app)


def test_a_joiner_that_ends_hands_over_to_the_other(
    alive: Node, app: Celery, unrun: Unrun, options: dict[str, Any]
) -> None:
    joiners = [JoinerProcess(alive.url, result_backend_transport_options=options) for _ in range(2)]
    with joiners[0] as active, joiners[1]:
        wait_for_joiners(app, alive, 2)
        requests = begun(unrun, [3] * 20)
        for at, request in enumerate(requests):
            finish(unrun, [request])
            if at == 20:
                assert active.process is not None
                active.process.terminate()
        assert sorted(unrun.wait(20)) == results_of([3] * 20)
        until(lambda: not active.running())
        assert "Traceback" not in active.log()


# -- workers


def chord_of_late(unrun: Unrun, number: int, size: int) -> Any:
    """Tasks that run again when their worker is lost, and a body that no worker runs."""
    body = unrun.task.s(name=number).set(queue=unrun.bodies)
    return chord([late.s(0.02, value) for value in range(size)])(body)


def test_whole_workers_are_killed(alive: Node, broker: Broker, options: dict[str, Any]) -> None:
    conf = {"result_backend_transport_options": options, "task_default_queue": f"tasks-{uuid()}"}
    sizes = [random.choice([2, 5, 10]) for _ in range(60)]
    workers = [Worker(alive.url, worker_prefetch_multiplier=2, **conf) for _ in range(2)]
    with workers[0], workers[1], workers[0].client() as app:
        unrun = Unrun(app, broker)
        for number, size in enumerate(sizes):
            chord_of_late(unrun, number, size)
            if number in (15, 35, 55):
                victim = workers[number % 2]
                victim.kill()
                victim.start()
        assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
        nothing_is_open(app)
        assert unrun.called() == []


def test_one_of_two_workers_leaves(alive: Node, broker: Broker, options: dict[str, Any]) -> None:
    conf = {"result_backend_transport_options": options, "task_default_queue": f"tasks-{uuid()}"}
    sizes = [5] * 40
    workers = [Worker(alive.url, pool="threads", **conf) for _ in range(2)]
    with workers[0] as leaving, workers[1], workers[0].client() as app:
        unrun = Unrun(app, broker)
        for number, size in enumerate(sizes):
            chord_of_late(unrun, number, size)
            if number == 20:
                assert leaving.process is not None
                leaving.process.terminate()
        assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
        until(lambda: not leaving.running(), LONG)
        assert "Traceback" not in leaving.log()
        nothing_is_open(app)
        assert unrun.called() == []


def test_processes_of_a_pool_are_killed(
    alive: Node, broker: Broker, options: dict[str, Any], tmp_path: Path
) -> None:
    """Their tasks run again, and the joiner beside the pool goes on."""
    with Worker(alive.url, result_backend_transport_options=options) as worker, worker.client() as app:
        unrun = Unrun(app, broker)
        for number in range(8):
            body = unrun.task.s(name=number).set(queue=unrun.bodies)
            header = [dies_once.s(str(tmp_path), 10 * number + at) for at in range(2)]
            chord([*header, late.s(0, "lives")])(body)
        expected = [(number, [10 * number, 10 * number + 1, "lives"]) for number in range(8)]
        assert sorted(unrun.wait(8, LONG)) == expected
        nothing_is_open(app)
        assert unrun.called() == []


def test_every_task_runs_in_a_new_process(alive: Node, broker: Broker, options: dict[str, Any]) -> None:
    """The pool forks all the time beside the joiner: no child inherits a held lock."""
    # Celery checks every 0.8 seconds whether to start processes.
    sizes = [4] * 20
    with (
        Worker(
            alive.url, concurrency=8, worker_max_tasks_per_child=1, result_backend_transport_options=options
        ) as worker,
        worker.client() as app,
    ):
        unrun = Unrun(app, broker)
        for number, size in enumerate(sizes):
            chord_of_late(unrun, number, size)
        assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
        assert unrun.called() == []


def test_processes_are_started_during_a_slow_errback(alive: Node, options: dict[str, Any], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        Worker(
            alive.url, concurrency=4, worker_max_tasks_per_child=1, result_backend_transport_options=options
        ) as worker,
        worker.client(),
    ):
        errback = patient_errback.s(path=str(gate))
        failing = chord([late.s(0, 1), fail.s("apples")])(tsum.s().on_error(errback))
        until((tmp_path / "gate-waiting").exists, LONG)
        # Before, the pool waited for each of the processes.
        assert chord([late.s(0, 1)] * 12)(tsum.s()).get(timeout=30) == 12
        gate.touch()
        with pytest.raises(ChordError):
            failing.get(timeout=LONG, follow_parents=False)


# -- the broker and the network


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_the_broker_is_stopped_and_started(
    alive: Node, app: Celery, unrun: Unrun, options: dict[str, Any], end: str
) -> None:
    sizes = [2, 5, 1200, 10, 3]
    with JoinerProcess(alive.url, result_backend_transport_options=options):
        until(lambda: app.backend.asker.status(20)[0].joiners == 1)
        requests = begun(unrun, sizes)
        random.shuffle(requests)
        finish(unrun, requests[:-400])
        before = unrun.called()
        if end == "restart":
            alive.restart()
        else:
            # A queue may be lost in its first two seconds: see Node.
            time.sleep(2.5)
            alive.kill()
            alive.start()
        unrun.reconnect()
        finish(unrun, requests[-400:])
        assert sorted(before + unrun.wait(len(sizes) - len(before), LONG)) == results_of(sizes)
        nothing_is_open(app)
        assert unrun.called() == []


def test_connections_of_the_joiner_are_cut(
    alive: Node, app: Celery, unrun: Unrun, options: dict[str, Any]
) -> None:
    """At many points: while it starts, while it receives events, and before the answer of a commit."""
    sizes = [3] * 100
    cuts = tuple(range(700, 9000, 397))
    with Proxy(alive.port, cuts) as proxy:
        with JoinerProcess(proxy.url, result_backend_transport_options=options):
            requests = begun(unrun, sizes)
            finish_in(8, unrun, requests)
            assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
            nothing_is_open(app)
            assert unrun.called() == []
        assert proxy.cut_count > 5


def test_connections_of_the_joiner_are_cut_at_any_time(
    alive: Node, app: Celery, unrun: Unrun, options: dict[str, Any]
) -> None:
    sizes = [random.choice([2, 5, 20]) for _ in range(60)]
    with Proxy(alive.port) as proxy, JoinerProcess(proxy.url, result_backend_transport_options=options):
        requests = begun(unrun, sizes)
        for done, request in enumerate(requests):
            finish(unrun, [request])
            if done % 40 == 0:
                time.sleep(random.uniform(0.0, 0.6))
                proxy.cut()
        assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
        nothing_is_open(app)
        assert unrun.called() == []


def test_connections_of_workers_and_joiners_are_cut(alive: Node, broker: Broker, options: dict[str, Any]) -> None:
    """All connections except those of the tasks.

    If Celery 5.7 loses one of these while it acknowledges a task, it does not set up its event loop again, and
    acknowledges nothing from then on.
    """
    sizes = [random.choice([2, 5, 10]) for _ in range(40)]
    with Proxy(alive.port) as proxy:
        joiner = JoinerProcess(proxy.url, result_backend_transport_options=options)
        worker = Worker(
            alive.url, backend=proxy.url.replace("amqp", "fastres", 1), pool="threads",
            result_backend_transport_options={**options, "chord_joiner": False},
        )  # fmt: skip
        with joiner, worker, client(alive.url, **worker.conf) as app:
            unrun = Unrun(app, broker)
            for number, size in enumerate(sizes):
                chord_of_late(unrun, number, size)
                if number % 10 == 5:
                    time.sleep(0.5)
                    proxy.cut()
            assert sorted(unrun.wait(len(sizes), LONG)) == results_of(sizes)
            nothing_is_open(app)
            assert unrun.called() == []
