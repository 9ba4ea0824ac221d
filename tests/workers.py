"""Real workers (``celery -A proj worker``) in processes of their own, and clients of them in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import proj
from backend_kit import close
from celery import Celery, _state
from rabbitmq_node import Leashed

TESTS = Path(__file__).parent


class Worker(Leashed):
    """A worker that is ready when started, and ends with all its processes; a context manager.

    Args:
        pool: ``prefork``, ``threads``, ``solo``, ``gevent`` or ``eventlet``.
        arguments: more of the command line.
        conf: Celery's settings, with JSON values only.
    """

    name = "worker"
    hint = "The log above says why."

    def __init__(
        self,
        broker: str,
        backend: str = "fastres://",
        pool: str = "prefork",
        concurrency: int = 2,
        arguments: str = "",
        **conf: Any,
    ) -> None:
        # Its own queue: this worker must not run tasks of other tests.
        conf.setdefault("task_default_queue", f"proj-{uuid4()}")
        self.broker, self.backend, self.conf = broker, backend, conf
        self.pool = pool
        self._line = (
            f"exec {sys.executable} -m celery -A proj worker -P {pool} -c {concurrency} -l INFO "
            f"-n {uuid4()}@%h --without-gossip --without-mingle {arguments}"
        )
        super().__init__(envvars=environment(broker, backend, **conf))

    def shell_line(self, folder: Path) -> str:
        # Look for "ready" behind the log of the previous start.
        (folder / "output.log").write_text("")
        return self._line

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return " ready." in self.log()

    def log(self) -> str:
        """All that the worker has logged since its start."""
        return (self.folder / "output.log").read_text("utf-8", "replace") if self.folder else ""

    @contextmanager
    def client(self, **conf: Any) -> Iterator[Celery]:
        """An application of this process with the worker's settings; `conf` overrides."""
        with client(self.broker, self.backend, **{**self.conf, **conf}) as app:
            yield app


class JoinerProcess(Leashed):
    """``celery -A proj fastres joiner``: joins chords and runs no tasks; a context manager.

    It may take a moment from its start until it reads: until ``broker.wait_for_consumer()`` of a shard's queue.

    Args:
        conf: Celery's settings, with JSON values only.
    """

    name = "joiner"
    hint = "The log above says why."

    def __init__(self, broker: str, backend: str = "fastres://", **conf: Any) -> None:
        super().__init__(envvars=environment(broker, backend, **conf))

    def shell_line(self, folder: Path) -> str:
        (folder / "output.log").write_text("")
        return f"exec {sys.executable} -m celery -A proj fastres joiner"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return "Joining the chords" in self.log()

    def log(self) -> str:
        """All that it has logged since its start."""
        return (self.folder / "output.log").read_text("utf-8", "replace") if self.folder else ""


def adds(count: int, start: int = 0) -> list[Any]:
    """Tasks; ``sums`` are their results."""
    return [proj.add.s(number, number) for number in range(start, start + count)]


def sums(count: int, start: int = 0) -> list[int]:
    return [2 * number for number in range(start, start + count)]


def environment(broker: str, backend: str = "fastres://", **conf: Any) -> dict[str, str]:
    """The environment of a process that imports ``proj`` with these settings."""
    return {
        "PROJ_BROKER": broker,
        "PROJ_BACKEND": backend,
        "PROJ_CONF": json.dumps(conf),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "ci")]),
        "C_FORCE_ROOT": "1",
    }


@contextmanager
def client(broker: str, backend: str = "fastres://", **conf: Any) -> Iterator[Celery]:
    """Make the current application of this process, like a program that sends tasks to workers."""
    # Celery cannot unset the current application.
    before = _state.default_app, _state._tls.current_app
    app = proj.make_app(broker, backend, conf, current=True)
    # Otherwise the first id would precede the backend: tests/unit/test_canvas.py tests that.
    assert app.backend
    try:
        yield app
    finally:
        _state.default_app, _state._tls.current_app = before
        close(app)


def python(code: str, app: Celery, timeout: float = 60, before: str = "") -> str:
    """Run code in a new process that has imported all of ``proj``, with a client's settings. Returns: its output.

    Raises AssertionError, with its standard error, when it fails.
    """
    process = start_python(code, app, before)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert "Exception ignored" not in err, err
    return out.strip()


def start_python(code: str, app: Celery, before: str = "") -> subprocess.Popen[str]:
    """As python(), without waiting for its end; `before` runs before anything is imported."""
    broker, backend, conf = app.made_with
    return subprocess.Popen(
        [sys.executable, "-c", before + "\nfrom proj import *\n" + textwrap.dedent(code)],
        env={**os.environ, **environment(broker, backend, **conf)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
