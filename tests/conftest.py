"""Fixtures: a real RabbitMQ, applications on it, and both implementations in one process."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from amqp.transport import TCPTransport
from backend_kit import CELERY, Broker, MakeApp, Reports, close
from celery import Celery, uuid
from proj import conf_of_run
from rabbitmq_node import Node, Redis

import fastres
from fastres import _impl

IMPLEMENTATIONS = ("python", "c")
CHOSEN = {
    name: getattr(_impl, name)
    for name in (
        "Aggregate",
        "Decoder",
        "Delivery",
        "Frames",
        "encode",
        "fulfil",
        "in_order",
        "listed",
        "publication",
    )
}


def pytest_report_header() -> str:
    return f"fastres {fastres.__version__} from {fastres.__file__}, implementation: {fastres.__impl__}"


def pytest_configure(config: pytest.Config) -> None:
    # Without the compiled modules half of the tests would silently not run.
    if importlib.util.find_spec("fastres_ext") is None:
        raise pytest.UsageError("the tests run on both implementations: fastres_ext is not installed")
    if CELERY < (5, 7):
        # The producers of its own backends are left to the garbage collector.
        config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")
        # Its Redis backend calls what newer clients of Redis warn of.
        config.addinivalue_line("filterwarnings", "ignore:Call to deprecated setex:DeprecationWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timing"):
        item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """What a test has left to the garbage collector is complained about there, if at all, and not later."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Python looks for modules where it is started: a child must find the installed fastres, not the source."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The modules of an implementation: ``impl["decode"].Decoder``."""
    return _impl.load(request.param)


@pytest.fixture
def both(impl: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on the backend with each of the implementations."""
    # A process chooses one when it imports fastres: here the names that hold its choice are given the other's.
    classes = {name: getattr(module, name) for module in impl.values() for name in vars(module) if name in CHOSEN}
    for path, module in list(sys.modules.items()):
        if path.startswith("fastres.") and not path.startswith("fastres._py"):
            for name, chosen in CHOSEN.items():
                if vars(module).get(name) is chosen:
                    monkeypatch.setattr(module, name, classes[name])


class GivenNode:
    """An existing broker: tests that need more than its URL are skipped."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port or 5672

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"takes a broker that the tests have started (node.{name}), and AMQP_URL is set")


@pytest.fixture(scope="session")
def node() -> Iterator[Any]:
    """The broker of the tests that leave it as it is: the one at ``AMQP_URL``, if that is set."""
    if given := os.environ.get("AMQP_URL"):
        yield GivenNode(given)
        return
    with Node() as node:
        yield node


@pytest.fixture(scope="session")
def redis() -> Redis:
    """What the same scripts do with Celery's Redis backend. It ends with this process: results hold on to it."""
    redis = Redis().start()
    atexit.register(redis.stop)
    return redis


@pytest.fixture(scope="module")
def own_node() -> Iterator[Node]:
    """A broker for the tests of a module alone, which may end it."""
    if os.environ.get("AMQP_URL"):
        pytest.skip("takes a broker of its own, and AMQP_URL is set")
    with Node() as node:
        yield node


@pytest.fixture(scope="module")
def broker(node: Node) -> Iterator[Broker]:
    """The same broker, without fastres."""
    broker = Broker(node.url)
    yield broker
    broker.close()


@pytest.fixture
def make_app(node: Node) -> Iterator[MakeApp]:
    """Makes applications on the broker: ``make_app(result_expires=60)``; their connections end with the test."""
    apps: list[Celery] = []

    def make(broker: str | None = None, backend: str = "fastres://", **conf: Any) -> Celery:
        app = Celery(f"test{len(apps)}", broker=broker or node.url, backend=backend, set_as_current=False)
        app.conf.update(conf_of_run(backend, conf))
        apps.append(app)
        return app

    yield make
    for app in apps:
        close(app)


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return make_app()


@pytest.fixture
def quiet(node: Node, make_app: MakeApp) -> Celery:
    """An application whose tasks no worker runs."""
    return make_app(node.url, task_default_queue=f"quiet-{uuid()}")


@pytest.fixture
def other(make_app: MakeApp) -> Celery:
    """An application that shares nothing with ``app`` but the broker: another process, as far as results go."""
    return make_app()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is written to the sockets of connections that are made from now on, write by write."""
    writes: list[bytes] = []
    setup = TCPTransport._setup_transport

    def setup_and_listen(transport: Any) -> None:
        setup(transport)
        send = transport._write

        def write(data: bytes) -> None:
            writes.append(bytes(data))
            send(data)

        transport._write = write

    monkeypatch.setattr(TCPTransport, "_setup_transport", setup_and_listen)
    return writes


@pytest.fixture(autouse=True)
def nothing_ignored(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """An exception that Python could only print fails the test that it was printed in."""
    yield
    gc.collect(0)
    printed = capfd.readouterr().err
    assert "Exception ignored" not in printed, printed


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Reports:
    """The warnings that fastres has logged."""
    caplog.set_level(logging.WARNING, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("fastres")]
