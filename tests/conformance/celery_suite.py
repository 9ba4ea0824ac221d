"""Celery's own integration suite: the sources of the installed version, run with a result backend."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import celery
import redis
from rabbitmq_node import HOST, Leashed, Node, Redis

FOLDER = "t/integration/"
FILES = ("test_canvas.py", "test_tasks.py", "test_group_chains.py")

# Tests that count in Redis skip themselves unless the result backend is Redis, and a few unless it is a key/value
# store. Here they always have a Redis; their checks of a backend apply to others too, or are in known.toml.
GUARD = re.compile(
    r"if not (\w+(\.app)?\.conf\.result_backend\.startswith\(.+\)"
    r"|isinstance\(manager\.app\.backend, BaseKeyValueStoreBackend\)):"
)

STARTUP = 60  # extra seconds for the first test of a process, which imports, connects and starts its worker

#: The suite's own limits, up to six tries of 300 seconds for many tests, are not used.
#: Start the worker for tests that rely on an earlier test for it.
PYTEST = (
    "pytest -q -p celery.contrib.pytest -p no:timeout -p no:rerunfailures -p no:cacheprovider -p no:benchmark "
    "-p no:hypothesispytest -o addopts= -o usefixtures=celery_session_worker"
)


class SuiteError(RuntimeError):
    """The suite could not be fetched or collected."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test: `word` is passed, failed, skipped or xfailed (failed, as the suite expects)."""

    word: str
    reason: str = ""
    #: The reason of an earlier failure, if it passes now.
    again: bool = False

    @property
    def passed(self) -> bool:
        return self.word == "passed"


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Suite:
    """The suite, unpacked: run from `root`, where `t` is a package and celery is the installed one."""

    root: Path
    #: The number of removed guards.
    guards: int

    def collect(self, selection: Sequence[str]) -> list[str]:
        """Ids of the tests, such as test_canvas.py::test_chain::test_simple_chain; of FILES by default."""
        chosen = selection or [name for name in FILES if (self.root / FOLDER / name).exists()]
        done = subprocess.run(
            [sys.executable, "-m", *PYTEST.split(), "--collect-only", *(FOLDER + name for name in chosen)],
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SuiteError(f"The suite cannot be collected:\n{done.stdout}{done.stderr}")
        return [line[len(FOLDER) :] for line in done.stdout.splitlines() if line.startswith(FOLDER)]


def fetch(folder: Path) -> Suite:
    """Download the sdist of the installed Celery and unpack its integration suite. Raises SuiteError."""
    name = f"celery-{celery.__version__}"
    sdist = folder / f"{name}.tar.gz"
    if not sdist.exists():
        pip = "pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest"
        command = [sys.executable, "-m", *pip.split(), str(folder), f"celery=={celery.__version__}"]
        if subprocess.run(command).returncode or not sdist.exists():
            raise SuiteError(f"{sdist.name}, the sources of the installed Celery, could not be downloaded")
    root = folder / name
    with tarfile.open(sdist) as tar:
        wanted = ("t/__init__.py", "t/canvas_helpers.py", "t/skip.py", FOLDER, "pyproject.toml", "PKG-INFO")
        for member in tar:
            if member.isfile() and member.name.startswith(tuple(f"{name}/{path}" for path in wanted)):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                target.write_bytes(source.read() if source else b"")
    if f"\nVersion: {celery.__version__}\n" not in (root / "PKG-INFO").read_text("utf-8"):
        raise SuiteError(f"{sdist} is not of the installed Celery, {celery.__version__}")
    guards = 0
    for path in (root / FOLDER).glob("test_*.py"):
        text, count = GUARD.subn("if False:", path.read_text("utf-8"))
        path.write_text(text, "utf-8")
        guards += count
    return Suite(root, guards)


def run(
    suite: Suite,
    tests: Sequence[str],
    backend: str,
    node: Node,
    store: Redis,
    timeout: float,
    told: Callable[[str, Outcome], None],
) -> Outcomes:
    """Run tests file by file, and each failed test once more alone.

    Args:
        backend: URL of the result backend.
        node: the broker.
        store: the Redis in which the tests count.
        timeout: seconds that a test, or a subtest, may take; after that it has failed, and the next has a new worker.
        told: called with each test that has ended.
    """
    outcomes: Outcomes = {}

    def ended(test: str, outcome: Outcome) -> None:
        outcomes[test] = outcome
        told(test, outcome)

    for file in dict.fromkeys(test.partition("::")[0] for test in tests):
        waiting = [test for test in tests if test.startswith(f"{file}::")]
        while waiting:
            with _process(suite, waiting, backend, node, store) as process:
                for test, outcome in _follow(process, waiting, timeout):
                    ended(test, outcome)
            waiting = [test for test in waiting if test not in outcomes]
    for test in [test for test in tests if outcomes[test].word == "failed"]:
        with _process(suite, [test], backend, node, store) as process:
            for _, outcome in _follow(process, [test], timeout):
                ended(test, Outcome(outcome.word, outcome.reason or outcomes[test].reason, again=True))
    return outcomes


class _Pytest(Leashed):
    """A process that runs some tests, with the suite's worker in it."""

    name = "pytest"

    def __init__(self, root: Path, tests: Sequence[str], environment: dict[str, str]) -> None:
        self._root, self._tests = root, tests
        super().__init__(envvars=environment)

    def shell_line(self, folder: Path) -> str:
        (folder / "tests").write_text("".join(f"{FOLDER}{test}\n" for test in self._tests))
        (folder / "reports").touch()
        command = f"{sys.executable} -m {PYTEST} --report-log {folder}/reports @{folder}/tests"
        return f"cd {shlex.quote(str(self._root))} && exec {command}"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return True

    @contextmanager
    def reports(self) -> Iterator[IO[str]]:
        if self.folder is None:
            raise RuntimeError("reports are there once it is started")
        with (self.folder / "reports").open(encoding="utf-8") as file:
            yield file


@contextmanager
def _process(suite: Suite, tests: Sequence[str], backend: str, node: Node, store: Redis) -> Iterator[_Pytest]:
    """A process on its own virtual host: its worker must not read messages of other tests."""
    vhost = f"suite-{time.time_ns()}"
    node.ctl("add_vhost", vhost)
    node.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    with closing(redis.Redis.from_url(store.url)) as client:
        client.flushall()
    environment = {
        "TEST_BROKER": f"amqp://guest:guest@{HOST}:{node.port}/{vhost}",
        "TEST_BACKEND": backend,
        "WORKER_LOGLEVEL": "INFO",  # some tests read its log
        "REDIS_HOST": HOST,
        "REDIS_PORT": str(store.port),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    try:
        with _Pytest(suite.root, tests, environment) as process:
            yield process
    finally:
        node.ctl("delete_vhost", vhost)


def _follow(process: _Pytest, tests: Sequence[str], timeout: float) -> Iterator[tuple[str, Outcome]]:
    """Yield tests with their outcomes as they end; the last one if it times out, or if the process ends."""
    left = list(tests)
    word, messages = "passed", []
    for report in _reports(process, timeout):
        word, messages = _judge(report, word, messages)
        if _is_end(report):
            test = report["nodeid"][len(FOLDER) :]
            left.remove(test)
            yield test, Outcome(word, "; ".join(dict.fromkeys(messages)))
            word, messages = "passed", []
    if left:
        why = (
            f"no end in {timeout:g} seconds" if process.running() else f"the process ended: {process.log_tail(3)}"
        )
        yield left[0], Outcome("failed", "; ".join([why, *dict.fromkeys(messages)]))


def _reports(process: _Pytest, timeout: float) -> Iterator[dict[str, Any]]:
    """Yield pytest's reports of the phases of tests, until it ends or is silent for too long."""
    limit = time.monotonic() + STARTUP + timeout
    with process.reports() as file:
        line = ""
        while time.monotonic() < limit:
            running = process.running()  # asked first, so that its last reports are read
            line += file.readline()
            if line.endswith("\n"):
                report, line = json.loads(line), ""
                if "outcome" in report and "when" in report:
                    limit = time.monotonic() + timeout
                    yield report
            elif running:
                time.sleep(0.1)
            else:
                return


def _is_end(report: dict[str, Any]) -> bool:
    """Whether this is the last report of a test; subtests have another type of report."""
    return report["when"] == "teardown" and report["$report_type"] == "TestReport"


def _judge(report: dict[str, Any], word: str, messages: Iterable[str]) -> tuple[str, list[str]]:
    """The word for a test, and the reason, after one more of its phases or subtests."""
    if report["outcome"] == "failed":
        return "failed", [*messages, _message(report["longrepr"])]
    if report["outcome"] == "skipped" and word == "passed":
        return ("xfailed", [report["wasxfail"]]) if "wasxfail" in report else ("skipped", [report["longrepr"][2]])
    return word, list(messages)


def _message(longrepr: Any) -> str:
    """The first line of a test's error."""
    text = longrepr["reprcrash"]["message"] if isinstance(longrepr, dict) else str(longrepr)
    return text.strip().partition("\n")[0]
