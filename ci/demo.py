"""The demo: a broker and a worker of its own, a group of 10,000 tasks, and what joining their results costs."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celery import group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import TimeoutError
from demo_app import add, app
from rabbitmq_node import Leashed, Node, StartError, installed
from tqdm import tqdm

import fastres

PATIENCE = 60  # seconds without a result before the demo gives up


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/demo", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many to run (%(default)s)")
    parser.add_argument("--in-memory", action="store_true", help="kombu's in-memory broker instead of RabbitMQ")
    args = parser.parse_args()
    # A `kill` takes the same way out as Ctrl-C, on which everything is stopped that was started.
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
    """The demo did not do what it is there to show."""


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
        return True  # the result of the first task will tell


@contextmanager
def rabbitmq() -> Iterator[Worker]:
    """A private RabbitMQ and a worker, each in processes of its own."""
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


def run(tasks: int, worker: Worker | None) -> None:
    """Send the tasks, join their results, print what it took. Raises DemoError."""
    last = time.monotonic()

    def check() -> None:
        if worker is not None and not worker.running():
            raise DemoError("the worker has ended")
        if time.monotonic() - last > PATIENCE:
            raise DemoError(f"no result came for {PATIENCE} seconds")

    try:  # one task first: then the worker is up and the connections are open
        add.delay(1, 1).get(timeout=PATIENCE, on_interval=check)
    except TimeoutError as error:
        raise DemoError(f"the first task had no result after {PATIENCE} seconds") from error

    say(f"Sending {tasks:,} tasks ...")
    start = time.perf_counter()
    result = group(add.s(i, i) for i in range(tasks)).apply_async()
    sent = time.perf_counter()

    expected = {child.id: i + i for i, child in enumerate(result.children)}
    last = time.monotonic()
    cpu = time.process_time()
    # disable=None: no progress bar where nobody looks, in a file or a pipe.
    for task_id, meta in tqdm(
        result.iter_native(on_interval=check), "Joining", total=tasks, unit=" results", disable=None
    ):
        last = time.monotonic()
        if meta["result"] != expected.pop(task_id):
            raise DemoError(f"task {task_id} has the wrong result {meta['result']!r} and state {meta['status']}")
    cpu = time.process_time() - cpu
    joined = time.perf_counter()
    if expected:
        raise DemoError(f"{len(expected):,} results are missing")

    print(
        f"\nAll {tasks:,} results are there, and right.\n\n"
        f"tasks                   {tasks:,}\n"
        f"sending                 {sent - start:.1f} s\n"
        f"joining                 {joined - sent:.1f} s, while the worker still runs tasks\n"
        f"results per second      {tasks / (joined - start):,.0f}, from the first task sent to the last result\n"
        f"client CPU per result   {cpu / tasks * 1e6:.0f} us, of joining alone\n"
        f"implementation          {fastres.__impl__}\n"
        f"broker                  {broker_name()}"
    )


def broker_name() -> str:
    with app.connection_for_read() as connection:
        connection.connect()
        properties = getattr(connection.connection, "server_properties", None)
    return f"RabbitMQ {properties['version']}" if properties else "in-memory"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
