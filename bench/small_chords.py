"""Prints where the CPU of small chords goes: by process, and in RabbitMQ by message.

On demand, beside nothing else, in the environment of ``ci/bench``:
``PYTHONPATH=ci:tests .venv/bin/python bench/small_chords.py [CHORDS [ROUNDS]]``
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import amqp
from amqp.serialization import dumps
from celery import chord
from proj import add, collect
from rabbitmq_node import Node, Redis
from workers import Worker

from fastres._impl import publication

TICKS = os.sysconf("SC_CLK_TCK")
SIZE = 10
#: A result and a part of 100 bytes, about as workers send them.
RESULT = b'{"status": "SUCCESS", "result": "%s", "traceback": null, "children": []}' % (b"x" * 100)
PART = b'{"chord": "%s", "at": 1796128618.7, "part": "%s"}\n1\n"%s"' % (b"c" * 36, b"p" * 36, b"x" * 100)
MESSAGES = 2000


def is_worker(line: str) -> bool:
    """Whether a command line is a worker's, and not that of the shell that has started it."""
    return "celery -A proj worker" in line and "python" in line.partition(" ")[0]


def cpu_by_role() -> Counter[str]:
    """Seconds of CPU of this process, the workers, RabbitMQ and Redis."""
    processes: dict[int, tuple[int, int, str]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            line = Path("/proc", entry, "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        processes[int(entry)] = int(stat[1]), int(stat[11]) + int(stat[12]), line
    found: Counter[str] = Counter()
    for pid, (parent, ticks, line) in processes.items():
        if pid == os.getpid():
            role = "client"
        elif "beam.smp" in line:
            role = "RabbitMQ"
        elif "redis-server" in line:
            role = "Redis"
        elif is_worker(line):
            parent_line = processes[parent][2] if parent in processes else ""
            role = "children" if is_worker(parent_line) else "worker"
        else:
            continue
        found[role] += ticks / TICKS
    return found


def chords(node: Node, redis: Redis, count: int, turn: int) -> None:
    """Chords of no-op tasks, whose bodies are awaited."""
    for name, url, options in (
        ("Celery redis", redis.url, {}),
        ("fastres", "fastres://", {}),
        ("fastres, not kept", "fastres://", {"keep_chord_results": False}),
    ):
        conf: dict[str, Any] = {}
        if options or url == "fastres://":
            conf = {"result_backend_transport_options": {**options, "namespace": f"small-{turn}-{len(options)}"}}
        with Worker(node.url, url, arguments="--without-heartbeat", **conf) as worker, worker.client():
            headers = [[add.si(1, 1) for _ in range(SIZE)] for _ in range(count)]
            chord(headers[0])(collect.si(1)).get(timeout=60, follow_parents=False)
            before, start = cpu_by_role(), time.perf_counter()
            for result in [chord(header)(collect.si(1)) for header in headers]:
                result.get(timeout=60, follow_parents=False)
            wall, spent = time.perf_counter() - start, cpu_by_role()
            spent.subtract(before)
            shown = ", ".join(f"{role} {seconds / count * 1e3:.1f}" for role, seconds in sorted(spent.items()))
            print(f"{name}: {wall / count * 1e3:.1f} ms a chord; ms of CPU: {shown}", flush=True)


class Publisher:
    """Publishes persistent messages with confirms, with a number of writes on the way."""

    def __init__(self, node: Node) -> None:
        self._connection = amqp.Connection(f"127.0.0.1:{node.port}", "guest", "guest")
        self._connection.connect()
        self._channel = self._connection.channel()
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        for queue in ("results", "log"):
            self._channel.queue_declare(queue, durable=True, auto_delete=False)
        self._sent = self._confirmed = 0

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._confirmed = tag

    def frames(self, queue: str, body: bytes, headers: bytes = b"") -> bytes:
        return publication(
            self._channel.channel_id, self._connection.frame_max, "", queue, False, body, "application/json", "utf-8",
            headers, 2, "00000000-0000-0000-0000-000000000000",
        )  # fmt: skip

    def run(self, write: bytes, messages: int, window: int) -> None:
        for queue in ("results", "log"):
            self._channel.queue_purge(queue)
        for _ in range(MESSAGES):
            self._connection.transport.write(write)
            self._sent += messages
            while self._sent - self._confirmed > (window - 1) * messages:
                self._connection.drain_events(timeout=30)
        while self._sent > self._confirmed:
            self._connection.drain_events(timeout=30)


def messages(node: Node) -> None:
    """A result and a part, in one write of two messages, or as one message with a ``CC`` header; a part alone."""
    publisher = Publisher(node)
    both = publisher.frames("results", RESULT) + publisher.frames("log", PART)
    copied = publisher.frames("results", RESULT, dumps("F", ({"CC": ["log"]},)))
    writes = {
        "a result and a part": (both, 2),
        "one message for both, with CC": (copied, 1),
        "a part": (publisher.frames("log", PART), 1),
    }
    cases = {(name, window): (*write, window) for window in (1, 50) for name, write in writes.items()}
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(5):
        for case, arguments in cases.items():
            before = cpu_by_role()["RabbitMQ"]
            publisher.run(*arguments)
            taken.setdefault(case, []).append((cpu_by_role()["RabbitMQ"] - before) / MESSAGES * 1e6)
    for (name, window), spent in taken.items():
        print(f"{name}, {window} on the way: {statistics.median(spent):.0f} us of RabbitMQ's CPU", flush=True)


def main() -> None:
    count, rounds = (int(given) for given in (*sys.argv[1:], *("200", "3")[len(sys.argv) - 1 :]))
    with Node() as node, Redis() as redis:
        messages(node)
        for turn in range(rounds):
            chords(node, redis, count, turn)


if __name__ == "__main__":
    main()
