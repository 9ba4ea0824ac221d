"""Celery's own integration suite, of the installed version, with Redis and with fastres as its result backend.

TESTS are files of the suite, or tests: test_canvas.py::test_chord; all of three files by default.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import redis
from celery_suite import Outcome, Outcomes, SuiteError, fetch, run
from rabbitmq_node import Node, Redis, StartError
from verdicts import WORDS, Verdict, read_known, report

import fastres

HERE = Path(__file__).parent
#: The folder of the sdist and of the last run; git ignores it.
BUILD = HERE.parent.parent / "build" / "conformance"
LAST = BUILD / "last.json"

BACKENDS = ("Redis", "fastres")
PACKAGES = ("celery", "kombu", "amqp", "redis", "pytest")

INTRODUCTION = """\
Celery's own integration suite on RabbitMQ, with Redis and with fastres as the result backend, both at once. Each
file has a process and a worker of its own: the prefork worker that the suite starts in a thread of that process. A
test, or subtest, that takes more than {timeout:g} seconds has failed, and the next one has a new worker. The suite
gives many of its tests six tries; here one that failed is tried once more, alone. Many tests skip themselves
where Redis is not the result backend, most as they count in it: both runs have a Redis for that, and {guards} such
guards are lifted. Reasons are those of [known.toml](known.toml), which must not have one for a test that passes.

`{command}`, {day}: {minutes:.0f} minutes on {cores} cores.
{versions}; fastres is the implementation in {implementation}."""


@click.command(help=__doc__)
@click.argument("tests", nargs=-1)
@click.option("--report", "write", is_flag=True, help="Write tests/conformance/REPORT.md.")
@click.option("--judge", is_flag=True, help="Run nothing: judge the last run again.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds that a test, or a subtest, may take.")
def main(tests: tuple[str, ...], write: bool, judge: bool, timeout: float) -> None:
    # Handle SIGTERM like Ctrl-C, which stops everything that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not judge:
        try:
            LAST.write_text(json.dumps(measure(tests, timeout), indent=1))
        except (StartError, SuiteError) as error:
            raise click.ClickException(str(error)) from error
    last = json.loads(LAST.read_text())

    runs = [{test: Outcome(**outcome) for test, outcome in last["runs"][backend].items()} for backend in BACKENDS]
    verdict = Verdict(*runs, read_known())
    text = report(verdict, INTRODUCTION.format(**last))
    click.echo(text)
    if write:
        (HERE / "REPORT.md").write_text(text, "utf-8")
    # Names of tests that do not exist are found only in a complete run.
    faults = verdict.faults + ([] if last["tests"] else verdict.nameless)
    if faults:
        raise click.ClickException("\n".join([f"{len(faults)} are not as known.toml has them:", *faults]))


def measure(tests: tuple[str, ...], timeout: float) -> dict[str, Any]:
    """Run the tests with both backends at once, each with a Redis of its own to count in."""
    started = time.monotonic()
    suite = fetch(BUILD)
    ids = suite.collect(tests)
    with Node() as node, Redis() as redis_, Redis() as other:
        runs = {
            "Redis": in_thread(run, suite, ids, redis_.url, node, redis_, timeout, partial(tell, "Redis")),
            "fastres": in_thread(run, suite, ids, "fastres://", node, other, timeout, partial(tell, "fastres")),
        }
        return {
            "runs": {
                backend: {test: asdict(outcome) for test, outcome in future.result().items()}
                for backend, future in runs.items()
            },
            "tests": tests,
            "timeout": timeout,
            "guards": suite.guards,
            "command": " ".join(["ci/conformance", *tests]),
            "day": str(date.today()),
            "minutes": (time.monotonic() - started) / 60,
            "cores": os.cpu_count(),
            "versions": ", ".join(f"{name} {number}" for name, number in versions(node, redis_)),
            "implementation": "C" if fastres.__impl__ == "c" else "Python",
        }


def in_thread(function: Callable[..., Outcomes], *args: Any) -> Future[Outcomes]:
    """Call a function in a thread that does not keep this process alive, so that Ctrl-C ends its programs too."""
    future: Future[Outcomes] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def tell(backend: str, test: str, outcome: Outcome) -> None:
    """Print a line for a test that has ended."""
    click.echo(f"{backend:8}{WORDS[outcome.word]:8}{test}  {outcome.reason}".rstrip(), err=True)


def versions(node: Node, store: Redis) -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for name in PACKAGES:
        yield "redis-py" if name == "redis" else name, version(name)
    yield "RabbitMQ", node.ctl("version").strip()
    with closing(redis.Redis.from_url(store.url)) as client:
        yield "Redis", str(client.info("server")["redis_version"])


if __name__ == "__main__":
    main()
