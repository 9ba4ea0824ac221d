"""Fixtures: a real RabbitMQ, applications on it, and both implementations in one process."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from celery import Celery
from rabbitmq_node import Node

import fastres
from fastres import _impl, backend, join, native, transport

IMPLEMENTATIONS = ("python", "c")


def pytest_report_header() -> str:
    return f"fastres {fastres.__version__} from {fastres.__file__}, implementation: {fastres.__impl__}"


def pytest_configure(config: pytest.Config) -> None:
    # Without the compiled modules half of the tests would not run, and nobody would notice.
    if importlib.util.find_spec("fastres_ext") is None:
        raise pytest.UsageError("the tests run on both implementations: fastres_ext is not installed")


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
    monkeypatch.setattr(backend, "Decoder", impl["decode"].Decoder)
    monkeypatch.setattr(join, "Aggregate", impl["aggregate"].Aggregate)
    monkeypatch.setattr(transport, "Delivery", impl["frames"].Delivery)
    monkeypatch.setattr(native, "Frames", impl["frames"].Frames)
    monkeypatch.setattr(native, "publication", impl["frames"].publication)


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The broker of the tests that leave it as it is."""
    with Node() as node:
        yield node


MakeApp = Callable[..., Celery]


@pytest.fixture
def make_app(node: Node) -> Iterator[MakeApp]:
    """Makes applications on the broker: ``make_app(result_expires=60)``; their connections end with the test."""
    apps: list[Celery] = []

    def make(broker: str | None = None, backend: str = "fastres://", **conf: Any) -> Celery:
        app = Celery(f"test{len(apps)}", broker=broker or node.url, backend=backend, set_as_current=False)
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        made = app._backend
        if isinstance(made, fastres.AMQPBackend):
            made.close()
        app.close()


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return make_app()


@pytest.fixture(autouse=True)
def nothing_ignored(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """An exception that Python could only print fails the test that it was printed in."""
    yield
    gc.collect(0)
    printed = capfd.readouterr().err
    assert "Exception ignored" not in printed, printed


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What fastres has logged as warnings."""
    caplog.set_level(logging.WARNING, logger="fastres")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("fastres")]
