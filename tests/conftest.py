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
    # Without the compiled modules, half of the tests would not run, silently.
    if importlib.util.find_spec("fastres_ext") is None:
        raise pytest.UsageError("the tests run on both implementations: fastres_ext is not installed")
    if CELERY < (5, 7):
        # Celery leaves its own backends' producers to the garbage collector.
        config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")
        # Celery's Redis backend calls deprecated methods of newer Redis clients.
        config.addinivalue_line("filterwarnings", "ignore:Call to deprecated setex:DeprecationWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timing"):
        item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Collect garbage after each test, so that warnings about leftovers appear in the test that left them."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start child processes in another folder: Python would import the source tree instead of the installed fastres."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The modules of an implementation: ``impl["decode"].Decoder``."""
    return _impl.load(request.param)


@pytest.fixture
def both(impl: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test of the backend with each implementation."""
    # A process chooses an implementation when it imports fastres; here the imported names are replaced.
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
    """The shared broker, which no test stops or configures; the one at ``AMQP_URL``, if set."""
    if given := os.environ.get("AMQP_URL"):
        yield GivenNode(given)
        return
    with Node() as node:
        yield node


@pytest.fixture(scope="session")
def redis() -> Redis:
    """A Redis for Celery's Redis backend. It ends with this process, because results keep their connection."""
    redis = Redis().start()
    atexit.register(redis.stop)
    return redis


@pytest.fixture(scope="module")
def own_node() -> Iterator[Node]:
    """A broker for one module, whose tests may stop it."""
    if os.environ.get("AMQP_URL"):
        pytest.skip("takes a broker of its own, and AMQP_URL is set")
    with Node() as node:
        yield node


@pytest.fixture(scope="module")
def broker(node: Node) -> Iterator[Broker]:
    """Direct access to the same broker."""
    broker = Broker(node.url)
    yield broker
    broker.close()


@pytest.fixture
def make_app(node: Node) -> Iterator[MakeApp]:
    """Creates applications: ``make_app(result_expires=60)``; their connections are closed after the test."""
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
    """An application that shares only the broker with ``app``: for results, it is another process."""
    return make_app()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The writes to the sockets of all later connections."""
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
    """Fails a test in which Python could only print an exception."""
    yield
    gc.collect(0)
    printed = capfd.readouterr().err
    assert "Exception ignored" not in printed, printed


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Reports:
    """The warnings that fastres has logged."""
    caplog.set_level(logging.WARNING, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("fastres")]
