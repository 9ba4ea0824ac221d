"""The demo: a private broker and worker, 10,000 tasks as a group and as a chord, and the cost of their joins."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import TimeoutError
from demo_app import add, app, total
from rabbitmq_node import Leashed, Node, StartError, installed
from tqdm import tqdm

import fastres

TIMEOUT = 60  # seconds without a result before the demo gives up


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/demo", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many to run (%(default)s)")
    parser.add_argument("--in-memory", action="store_true", help="kombu's in-memory broker instead of RabbitMQ")
    args = parser.parse_args()
    # Handle SIGTERM like Ctrl-C, which stops everything that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with in_memory() if args.in_memory or not installed() else rabbitmq() as worker:
            run(args.tasks, worker)
    except KeyboardInterrupt:
        say("\nInterrupted: everything is stopped.")
        return 128 + signal.SIGINT
    except (StartError, DemoError) as error:
        say(f"\nThe demo failed: {error}")
        return 1
    return 0


class DemoError(Exception):
    """The demo failed."""


class Worker(Leashed):
    """`celery worker` with two processes."""

    name = "worker"

    def shell_line(self, folder: Path) -> str:
        return (
            f"PYTHONPATH='{Path(__file__).parent}' exec '{sys.executable}' -m celery -A demo_app "
            f"-b {app.conf.broker_url} worker --concurrency 2 --loglevel WARNING"
        )

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return True  # the first task's result shows whether it works


@contextmanager
def rabbitmq() -> Iterator[Worker]:
    """A private RabbitMQ and a worker, in separate processes."""
    say("Starting a private RabbitMQ and a Celery worker with two processes ...")
    with Node() as node:
        app.conf.broker_url = node.url
        with Worker() as worker:
            try:
                yield worker
            except DemoError as error:
                raise DemoError(f"{error}\nThe worker's log:\n{worker.log_tail() or '(empty)'}") from None


@contextmanager
def in_memory() -> Iterator[None]:
    """The in-memory broker, and a worker in a thread of this process."""
    say("RabbitMQ is not used: this is kombu's in-memory broker, with the worker in a thread of this process.")
    say("It shows that fastres works, not how fast it is.")
    app.conf.update(broker_url="memory://", broker_connection_retry_on_startup=True)
    with start_worker(app, pool="solo", perform_ping_check=False, loglevel="ERROR"):
        yield


@dataclass
class Taken:
    """The cost of sending tasks and joining their results: seconds, and seconds of this process's CPU."""

    sending: float
    joining: float
    cpu: float


def run(tasks: int, worker: Worker | None) -> None:
    """Send the tasks, join their results, print the cost. Raises DemoError."""
    watch = Watch(worker)
    try:  # one task first: then the worker is up and the connections are open
        add.delay(1, 1).get(timeout=TIMEOUT, on_interval=watch)
    except TimeoutError as error:
        raise DemoError(f"the first task had no result after {TIMEOUT} seconds") from error
    columns = [run_group(tasks, watch), run_chord(tasks, watch)]

    def row(name: str, cell: Callable[[Taken], str], comment: str = "") -> str:
        return f"{name:<22}{cell(columns[0]):>10}{cell(columns[1]):>10}   {comment}".rstrip()

    rows = [
        f"{'':<22}{'group':>10}{'chord':>10}",
        row("tasks", lambda taken: f"{tasks:,}", "and the chord's body"),
        row(
            "sending",
            lambda taken: f"{taken.sending:.1f} s",
            "the group by Celery, the chord by apply_many",
        ),
        row("joining", lambda taken: f"{taken.joining:.1f} s", "while the worker still runs tasks"),
        row(
            "tasks per second",
            lambda taken: f"{tasks / (taken.sending + taken.joining):,.0f}",
            "from the first task sent to the last result, or the body's",
        ),
        row("client CPU per result", lambda taken: f"{taken.cpu / tasks * 1e6:.0f} us", "of joining alone"),
    ]
    print(
        f"\nAll {tasks:,} results are there, twice, and right.\n\n" + "\n".join(rows) + "\n\n"
        f"implementation  {fastres.__impl__}\n"
        f"broker          {broker_name()}"
    )


class Watch:
    """Called while waiting for results: raises DemoError when no more can arrive."""

    def __init__(self, worker: Worker | None) -> None:
        self._worker = worker
        self.alive()

    def alive(self) -> None:
        """A result has arrived."""
        self._last = time.monotonic()

    def __call__(self, *args: Any) -> None:
        if self._worker is not None and not self._worker.running():
            raise DemoError("the worker has ended")
        if time.monotonic() - self._last > TIMEOUT:
            raise DemoError(f"no result came for {TIMEOUT} seconds")


def run_group(tasks: int, watch: Watch) -> Taken:
    """A group: this process joins the results."""
    say(f"Sending a group of {tasks:,} tasks ...")
    start = time.perf_counter()
    result = group(add.s(i, i) for i in range(tasks)).apply_async()
    sent = time.perf_counter()

    expected = {child.id: i + i for i, child in enumerate(result.children)}
    watch.alive()
    cpu = time.process_time()
    for task_id, meta in bar(result.iter_native(on_interval=watch), tasks):
        watch.alive()
        if meta["result"] != expected.pop(task_id):
            raise DemoError(f"task {task_id} has the wrong result {meta['result']!r} and state {meta['status']}")
    cpu = time.process_time() - cpu
    joined = time.perf_counter()
    if expected:
        raise DemoError(f"{len(expected):,} results are missing")
    return Taken(sent - start, joined - sent, cpu)


def run_chord(tasks: int, watch: Watch) -> Taken:
    """A chord, sent in bulk: the worker joins the results, and runs the body with them."""
    say(f"Sending a chord of {tasks:,} tasks ...")
    start = time.perf_counter()
    result = fastres.apply_many(add, ((i, i) for i in range(tasks)), body=total.s())
    sent = time.perf_counter()

    there = 0

    def look(*args: Any) -> None:
        nonlocal there
        # The header's results are kept too, and can be counted.
        before, there = there, app.backend.group_progress(result.parent.id)
        if there > before:
            watch.alive()
        watch()

    watch.alive()
    cpu = time.process_time()
    # With its parents, Celery would poll each result of the header once a second.
    value = result.get(on_interval=look, follow_parents=False)
    cpu = time.process_time() - cpu
    joined = time.perf_counter()
    if value != tasks * (tasks - 1):
        raise DemoError(f"the chord's body has the wrong result {value!r}")
    return Taken(sent - start, joined - sent, cpu)


def bar(results: Iterable[Any], tasks: int) -> Iterable[Any]:
    # disable=None: no progress bar in a file or a pipe.
    return tqdm(results, "Joining", total=tasks, unit=" results", disable=None)


def broker_name() -> str:
    with app.connection_for_read() as connection:
        connection.connect()
        properties = getattr(connection.connection, "server_properties", None)
    return f"RabbitMQ {properties['version']}" if properties else "in-memory"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
