"""Chords at the limits of RabbitMQ: the size of a message, and how long one may stay unacknowledged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_kit import Broker, MakeApp, group_of, store, until
from celery import Celery, chord, group, uuid
from celery.exceptions import ChordError, ImproperlyConfigured
from chord_kit import Unrun, finish
from proj import add, big, chord_errback, collect, count_lazily, tsum
from rabbitmq_node import Node
from workers import JoinerProcess, Worker, adds, client, sums

import fastres

SECONDS = 20
LIMIT = 200_000


# -- the size of a message


@pytest.fixture(scope="module")
def small() -> Iterator[Node]:
    with Node(config={"max_message_size": str(LIMIT)}) as node:
        yield node


@pytest.fixture(scope="module")
def worker(small: Node) -> Iterator[Worker]:
    with Worker(small.url, pool="threads", concurrency=4) as worker:
        yield worker


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with worker.client() as app:
        yield app


def test_a_body_over_the_limit_fails_the_chord(app: Celery, tmp_path: Path) -> None:
    errback = chord_errback.s(folder=str(tmp_path))
    result = chord([big.s(50_000)] * 6)(collect.s().on_error(errback))
    with pytest.raises(ChordError, match=rf"size 3\d+ is larger than .* {LIMIT}.*fastres.lazy\(body\)"):
        result.get(timeout=SECONDS, follow_parents=False)
    assert result.state == "FAILURE"
    until((tmp_path / f"told-{result.id}").exists, SECONDS)
    assert [len(value) for value in result.parent.get(timeout=SECONDS)] == [50_000] * 6
    assert chord(adds(3))(tsum.s()).get(timeout=SECONDS) == 6


def test_a_body_over_the_limit_among_others(app: Celery) -> None:
    """Several chords are fired in one commit, which the broker refuses as a whole."""
    results = []
    for number in range(12):
        header = [big.s(50_000)] * 6 if number in (3, 8) else adds(4, number)
        results.append(chord(header)(collect.s()))
    for number, result in enumerate(results):
        if number in (3, 8):
            with pytest.raises(ChordError, match="max_message_size"):
                result.get(timeout=SECONDS, follow_parents=False)
        else:
            assert result.get(timeout=SECONDS) == [sums(4, number)]


def test_a_lazy_body_has_no_limit(app: Celery) -> None:
    result = chord([big.s(50_000 + number) for number in range(6)])(fastres.lazy(count_lazily.s()))
    assert result.get(timeout=SECONDS) == [6, 6 * 50_000 + 15, 50_005]
    again = chord([big.s(10), big.s(20)], fastres.lazy(count_lazily.s()) | collect.s())
    assert again.apply_async().get(timeout=SECONDS) == [[2, 30, 20]]


def test_a_lazy_body_of_a_header_with_groups(app: Celery) -> None:
    header = [add.s(1, 1) | group(big.si(10), big.si(20)), big.s(30)]
    assert chord(header)(fastres.lazy(count_lazily.s())).get(timeout=SECONDS) == [3, 60, 30]


def test_results_by_reference_whose_tasks_have_the_same_place(make_app: MakeApp) -> None:
    """Celery 5.5 gives tasks of a group in a header's chain the places of other tasks."""
    app = make_app()
    held, body = group_of(app, 3), fastres.lazy(tsum.s())
    for member, place in ((0, 0), (0, 0), (1, 0), (2, 1), (1, 0)):
        store(app, held[member].id, f"of {member}", group=held.id, group_index=place, chord=body)
    results = [meta["result"] for meta in app.backend.iter_header(held.id, 3)]
    assert sorted(results) == ["of 0", "of 1", "of 2"]


def test_a_lazy_body_of_a_header_that_fails(app: Celery) -> None:
    result = chord([big.s(10), big.s("no number")])(fastres.lazy(count_lazily.s()))
    with pytest.raises(ChordError, match="TypeError"):
        result.get(timeout=SECONDS, follow_parents=False)


def test_a_lazy_body_needs_results_that_are_kept(worker: Worker) -> None:
    options = {"keep_chord_results": False}
    with (
        worker.client(result_backend_transport_options=options),
        pytest.raises(ImproperlyConfigured, match="lazy"),
    ):
        chord(adds(2))(fastres.lazy(collect.s()))


def test_merged_events_stay_below_the_limit(small: Node) -> None:
    """A thousand parts are merged into one message if they fit."""
    options = {"namespace": uuid(), "keep_chord_results": False}
    with (
        client(small.url, result_backend_transport_options=options) as app,
        contextlib.closing(Broker(small.url)) as broker,
        JoinerProcess(small.url, result_backend_transport_options=options) as joiner,
    ):
        unrun = Unrun(app, broker)
        requests = unrun.begin(2100)
        finish(unrun, requests[1:], ["x" * 500] * 2099)
        # Larger batches are written as several messages, once.
        until(lambda: app.backend.addresses and small.queues()[f"{options['namespace']}.chords.0"] < 1100, 60, 0.5)
        finish(unrun, requests[:1], ["x" * 500])
        body = requests[0].chord["options"]["task_id"]
        with pytest.raises(ChordError, match="max_message_size"):
            app.AsyncResult(body).get(timeout=SECONDS)
        finish(unrun, unrun.begin(2, "another"))
        assert unrun.wait(1) == [("another", [0, 1])]
        assert joiner.log().count("Traceback") < 5


# -- how long a message may stay unacknowledged


@pytest.fixture(scope="module")
def impatient() -> Iterator[Node]:
    """A broker that closes a channel after three seconds without acknowledgement; the default is half an hour."""
    with Node(config={"consumer_timeout": "3000"}, advanced={"channel_tick_interval": "1000"}) as node:
        yield node


@pytest.mark.timeout(180)
def test_chords_that_run_for_longer_than_the_brokers_timeout(impatient: Node) -> None:
    renewing = {"namespace": "renewing", "keep_chord_results": False, "chord_renewal": 1}
    if tuple(map(int, impatient.ctl("version").split(".")[:2])) >= (4, 3):
        pytest.skip("classic queues have no consumer timeout since RabbitMQ 4.3")
    # A joiner that does not know the short timeout.
    unaware = {"namespace": "unaware", "keep_chord_results": False}
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(contextlib.closing(Broker(impatient.url)))
        joiners, unruns, requests = [], [], []
        for options in (renewing, unaware):
            how = {"result_backend_transport_options": options}
            joiners.append(stack.enter_context(JoinerProcess(impatient.url, **how)))
            unruns.append(Unrun(stack.enter_context(client(impatient.url, **how)), broker))
            requests.append(unruns[-1].begin(3) + unruns[-1].begin(1200, "large"))
        begin = time.monotonic()
        for unrun, its in zip(unruns, requests):
            finish(unrun, its[:2] + its[4:])
        time.sleep(max(0.0, begin + 15 - time.monotonic()))
        for joiner, unrun, its in zip(joiners, unruns, requests):
            assert unrun.called() == []
            finish(unrun, its[2:4])
            assert sorted(unrun.wait(2, 60)) == [("body", [0, 1, 2]), ("large", list(range(1200)))]
            assert "Traceback" not in joiner.log()
        assert "lost the broker" not in joiners[0].log(), "what it held was never too old"
        assert "lost the broker" in joiners[1].log(), "the broker is as impatient as this test has it"
