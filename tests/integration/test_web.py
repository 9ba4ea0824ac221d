"""A FastAPI application under uvicorn whose requests wait for tasks, with fastres and with Redis."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rabbitmq_node import Leashed, Node, Redis, free_ports
from workers import Worker, environment

#: The number of simultaneous requests, the seconds of each one's task, and the number of tasks that run at once.
REQUESTS, SECONDS, RUNNING = 200, 1.0, 100


class Web(Leashed):
    """``uvicorn web:api`` with the settings of a worker."""

    name = "uvicorn"
    hint = "The log above says why."

    def __init__(self, worker: Worker) -> None:
        self.port = free_ports(1).pop()
        super().__init__(envvars=environment(worker.broker, worker.backend, **worker.conf))

    def shell_line(self, folder: Path) -> str:
        return f"exec {sys.executable} -m uvicorn web:api --port {self.port} --log-level warning"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        try:
            self.get("threads")
        except OSError:
            return False
        return True

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as response:
            return json.load(response)

    def take(self, requests: int) -> float:
        """The seconds for so many simultaneous requests, each of which waits for a task."""
        with ThreadPoolExecutor(requests) as threads:
            start = time.monotonic()
            values = list(threads.map(lambda n: self.get(f"slow?seconds={SECONDS}&value={n}"), range(requests)))
            taken = time.monotonic() - start
        assert values == list(range(requests))
        return taken


def worker(node: Node, backend: str) -> AbstractContextManager[Worker]:
    return Worker(node.url, backend=backend, pool="threads", concurrency=RUNNING)


def test_requests_that_wait(node: Node, redis: Redis) -> None:
    taken = {}
    for name, backend in (("redis", redis.url), ("fastres", "fastres://")):
        with worker(node, backend) as running, Web(running) as web:
            web.take(5)
            threads, connections = web.get("threads"), connections_of(node, web)
            taken[name] = web.take(REQUESTS)
            if name == "fastres":
                assert sorted(web.get("threads")) == sorted(threads)
                assert connections_of(node, web) == connections <= 2, "one that sends, and one that reads"
                assert threads.count("fastres-loop-reader") == 1
    print({name: round(seconds, 2) for name, seconds in taken.items()})
    assert taken["fastres"] < 1.5 * taken["redis"]


def connections_of(node: Node, web: Web) -> int:
    """The number of a process's connections to the broker."""
    sockets = {link.readlink().name for link in Path(f"/proc/{web.process.pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # Columns of proc(5): the peer's address, the state (1: established), the inode.
    there = [f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{node.port:04X}") and row[3] == "01"]
    return len(sockets.intersection(there))
