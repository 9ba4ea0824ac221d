"""Metrics for Prometheus: over HTTP from the exporter, and of the own process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from backend_kit import MakeApp, group_of, store_group, until
from celery import Celery, chord, group
from celery.exceptions import ImproperlyConfigured
from proj import add, fail, tsum
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from rabbitmq_node import Leashed, Node
from workers import Worker, adds, environment

from fastres.metrics import ChordCollector, ProcessCollector

SECONDS = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker(node: Node) -> Iterator[Worker]:
    with Worker(
        node.url, pool="threads", concurrency=2, result_backend_transport_options={"namespace": "metrics"}
    ) as worker:
        yield worker


class Exporter(Leashed):
    """``celery fastres exporter`` at a free port."""

    name = "exporter"
    hint = "The log above says why."

    def __init__(self, broker: str, arguments: str = "--port 0", **conf: object) -> None:
        self.arguments = arguments
        super().__init__(envvars=environment(broker, **conf))

    def shell_line(self, folder: Path) -> str:
        return f"exec {sys.executable} -m celery -A proj fastres exporter {self.arguments}"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return "Metrics at" in self.log()

    def log(self) -> str:
        return (self.folder / "output.log").read_text("utf-8", "replace") if self.folder else ""

    def scrape(self) -> dict[str, float]:
        url = re.search(r"http://\S+", self.log())
        assert url is not None
        with urllib.request.urlopen(url[0], timeout=SECONDS) as answer:
            return numbers_in(answer.read().decode())


def numbers_in(text: str) -> dict[str, float]:
    return {
        sample.name
        + "".join(f"{{{value}}}" for name, value in sample.labels.items() if name != "queue"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def own_numbers(app: Celery) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(ProcessCollector(app))
    from prometheus_client import generate_latest

    return numbers_in(generate_latest(registry).decode())


@contextmanager
def exporter_of(worker: Worker) -> Iterator[Exporter]:
    with Exporter(worker.broker, **worker.conf) as exporter:
        yield exporter


def test_chords_over_http(worker: Worker, tmp_path: Path) -> None:
    with worker.client() as app, exporter_of(worker) as exporter:
        before = exporter.scrape()
        assert before["fastres_up"] == before["fastres_joiner_answers"] == 1
        assert before["fastres_joiners"] == 1
        assert before["fastres_open_chords"] == before["fastres_oldest_open_chord_age_seconds"] == 0
        for _ in range(3):
            assert chord(adds(4))(tsum.s()).get(timeout=SECONDS) == 12
        failing = chord([add.s(1, 1), fail.s("apples")])(tsum.s())
        until(lambda: app.AsyncResult(failing.id).state == "FAILURE")
        # The last parts of two chords never arrive.
        group_of_nobody = [add.s(1, 1), add.s(1, 1).set(queue="nobody")]
        for _ in range(2):
            chord(group_of_nobody)(tsum.s())
        until(lambda: exporter.scrape()["fastres_open_chord_parts"] == 2)
        after = exporter.scrape()
        assert after["fastres_open_chords"] == after["fastres_open_chord_parts_missing"] == 2
        assert 0 < after["fastres_oldest_open_chord_age_seconds"] < SECONDS
        assert after["fastres_chord_bodies_total"] - before["fastres_chord_bodies_total"] == 3
        assert after["fastres_failed_chords_total"] - before["fastres_failed_chords_total"] == 1
        assert after["fastres_commit_seconds_count"] >= before["fastres_commit_seconds_count"] + 4
        assert after["fastres_commit_seconds_bucket{+Inf}"] == after["fastres_commit_seconds_count"]
        assert after["fastres_commit_seconds_sum"] > 0
        assert after["fastres_joiner_start_time_seconds"] > 0


def test_metrics_of_the_own_process(make_app: MakeApp) -> None:
    app = make_app()
    assert own_numbers(app)["fastres_published_total"] == 0
    held = group_of(app, 7)
    store_group(app, held, range(7))
    assert held.get(timeout=SECONDS) == list(range(7))
    app.backend.reports.add("malformed", "queue", "task", 1, "for the test", 1)
    told = own_numbers(app)
    assert told["fastres_published_total"] == 7
    assert told["fastres_joined_total"] == 7
    assert told["fastres_confirm_seconds_count"] == 7
    assert told["fastres_refused_messages_total{malformed}"] == 1
    assert told["fastres_unconfirmed_messages"] == told["fastres_joiner_shards"] == 0
    assert (
        told["fastres_connections_opened_total{reader}"] == told["fastres_connections_opened_total{writer}"] == 1
    )


def test_the_window_of_a_process_that_does_not_wait(make_app: MakeApp) -> None:
    app = make_app(result_backend_transport_options={"confirm": False})
    held = group_of(app, 50)
    store_group(app, held, range(50))
    until(lambda: own_numbers(app)["fastres_unconfirmed_messages"] == 0)
    assert own_numbers(app)["fastres_published_total"] == 50


def test_the_exporter_answers_without_a_broker() -> None:
    with Exporter("amqp://guest:guest@127.0.0.1:1//") as exporter:
        assert exporter.scrape() == {"fastres_up": 0}
        assert "cannot be asked about chords" in exporter.log()


def test_the_exporter_does_not_wait_for_a_broker_that_stands_still(own_node: Node) -> None:
    with Exporter(own_node.url) as exporter:
        assert exporter.scrape()["fastres_up"] == 1
        pid = int(own_node.ctl("eval", "os:getpid().").strip().strip('"'))
        os.kill(pid, signal.SIGSTOP)
        try:
            assert exporter.scrape() == {"fastres_up": 0}
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: exporter.scrape()["fastres_up"] == 1)


def test_a_signal_handler_asks_during_another_question(worker: Worker) -> None:
    joiners: list[int] = []
    with worker.client() as app:

        def ask(*_: object) -> None:
            joiners.append(app.backend.asker.status(SECONDS)[0].joiners)

        before = signal.signal(signal.SIGUSR1, ask)
        try:
            for number in range(20):
                timer = threading.Timer(number / 2000, os.kill, (os.getpid(), signal.SIGUSR1))
                timer.start()
                ask()
                timer.join()
            until(lambda: len(joiners) == 40)
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert joiners == [1] * 40


def test_a_port_that_is_taken_and_a_signal(worker: Worker) -> None:
    with exporter_of(worker) as exporter:
        port = re.search(r":(\d+)/metrics", exporter.log())
        assert port is not None
        command = [sys.executable, "-m", "celery", "-A", "proj", "fastres", "exporter", "--port", port[1]]
        again = subprocess.run(
            command, env=environment(worker.broker, **worker.conf), capture_output=True, text=True, timeout=SECONDS
        )
        assert again.returncode == 1
        assert re.search(r"cannot listen at 127.0.0.1:\d+: .*in use", again.stderr + again.stdout)
        exporter.process.send_signal(signal.SIGTERM)
        assert exporter.process.wait(SECONDS) == 0


@pytest.mark.parametrize("collector", [ProcessCollector, ChordCollector])
def test_other_backends_have_no_such_numbers(collector: type) -> None:
    with pytest.raises(ImproperlyConfigured, match="not one of fastres"):
        collector(Celery(backend="cache+memory://"))


def test_the_dashboard_uses_existing_metrics(worker: Worker) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    with worker.client() as app, exporter_of(worker) as exporter:
        group(adds(3)).apply_async().get(timeout=SECONDS)
        chord(adds(3))(tsum.s()).get(timeout=SECONDS)
        known = {re.split(r"\{", name)[0] for name in {**exporter.scrape(), **own_numbers(app)}}
        known |= {"fastres_refused_messages_total"}
    for expression in expressions:
        for name in re.findall(r"fastres_\w+", expression):
            assert name in known, expression
