"""Runs a measured process: fills its queues, starts it, waits for it, cleans up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filler import Broker, empty_redis, fill_redis
from peers import LIMIT, LONE, PEERS, STORES, WARM, Job
from rabbitmq_node import Node, Redis
from workloads import body_of, lone_ids, new_group, task_ids

HERE = Path(__file__).parent
LIMIT_MODES = {LIMIT: "no-ack", "rabbitmq-c, acknowledging": "ack"}
#: Operations on results that were stored before.
FILLED = ("get", "get_many", *LONE)
#: Seconds that strace may take to begin.
ATTACH_TIMEOUT = 10


class Unavailable(Exception):
    """Something that a run needs is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to measure."""

    peer: str
    how: str
    count: int
    repetitions: int = 1
    workload: str = "dict"
    serializer: str = "json"
    traced: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.peer, self.how, self.workload, self.serializer, str(self.count)]).replace(" ", "")


class Bench:
    """The servers of a benchmark."""

    def __init__(self, node: Node, redis: Redis, limit: Path | None) -> None:
        self.node = node
        self.redis = redis
        self.limit = limit
        self.broker = Broker(node.url)

    def close(self) -> None:
        self.broker.close()


class Run:
    """One measured process, ready when it is made."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench = bench
        self.case = case
        self.job = Job(
            case.peer, case.how, case.workload, case.serializer, case.count,
            new_group(), new_group(), new_group(), bench.node.url, bench.redis.url,
        )  # fmt: skip
        if case.peer == "celery-amqp-backend" and find_spec("celery_amqp_backend") is None:
            raise Unavailable("celery-amqp-backend is not installed")
        #: To be deleted.
        self.queues: set[str] = set()
        self._process = self.prepare()

    def prepare(self) -> Process:
        """Fill the queues, and start the process."""
        self._peer = PEERS[self.case.peer](self.job)
        if self.case.how == "store":
            self._declare(self.job.warm_id)
            self._declare(self.job.group_id)
        elif self.case.how in FILLED:
            self._store(self.job.warm_id, WARM)
            self._store(self.job.group_id, self.case.count)
        return Process(self.command(), environment(self.case.peer))

    def go(self) -> dict[str, float]:
        """Have the process do its job. Returns: the cost."""
        taken = self._go()
        if self.case.how in STORES:
            self._check()
        return taken

    def _go(self) -> dict[str, float]:
        if not self.case.traced:
            return self._process.go()
        with tempfile.NamedTemporaryFile("r") as summary:
            with _traced(self._process.pid, summary.name):
                taken = self._process.go()
            return {**taken, "calls": _calls(summary.read())}

    def close(self) -> None:
        self._process.close()
        self.bench.broker.delete(self.queues)
        empty_redis(self.bench.redis.url)

    def command(self) -> list[str]:
        mode = LIMIT_MODES.get(self.case.peer)
        if mode is None:
            return [sys.executable, str(HERE / "measure.py"), json.dumps(dataclasses.asdict(self.job))]
        if self.bench.limit is None:
            raise Unavailable("bench/limit.c is not built: gcc or librabbitmq-dev is missing")
        queue = self._peer.inbox(self.job.group_id)
        return [str(self.bench.limit), str(self.bench.node.port), queue.name, str(self.case.count), mode]

    def _store(self, group_id: str, count: int) -> None:
        broker, lone = self.bench.broker, self.case.how in LONE
        ids = lone_ids(group_id, count) if lone else task_ids(group_id, count)
        body = body_of(self.case.workload, self.case.serializer, None if lone else group_id)
        if issubclass(PEERS[self.case.peer], PEERS["Celery redis"]):
            fill_redis(self.bench.redis.url, ids, body)
        elif lone:
            for task_id in ids:
                self._send(broker, self._peer.lone_inbox(task_id), [task_id], body)
        else:
            self._send(broker, self._peer.inbox(group_id), ids, body)

    def _send(self, broker: Broker, queue: Any, ids: Iterable[str], body: Any) -> None:
        self.queues.add(queue.name)
        broker.fill(queue, ids, body)

    def _declare(self, group_id: str) -> None:
        queue = self._peer.inbox(group_id)
        if queue is not None:
            self.queues.add(queue.name)
            queue(self.bench.broker.channel).declare()

    def _check(self) -> None:
        """Check that the results are stored. The first ones may be in the same queue or in another."""
        broker, job = self.bench.broker, self.job
        if self.case.how == "store_lone":
            for group_id, count in ((job.warm_id, WARM), (job.group_id, job.count)):
                queues = filter(None, map(self._peer.lone_inbox, lone_ids(group_id, count)))
                for name, expected in Counter(queue.name for queue in queues).items():
                    self.queues.add(name)
                    broker.wait_for(name, expected)
        elif (queue := self._peer.inbox(job.group_id)) is not None:
            before = WARM if len(self.queues) == 1 else 0
            broker.wait_for(queue.name, before + job.count)


class Process:
    """A program that prints "ready", and starts its job when it receives a line."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints,
        )  # fmt: skip
        try:
            self._hear("ready")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def go(self) -> dict[str, float]:
        self._say()
        taken: dict[str, float] = json.loads(self._hear("{"))
        return taken

    def close(self) -> None:
        if not self._complaints.closed:
            with contextlib.suppress(BrokenPipeError):
                self._say()
            try:
                self._process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._complaints.close()

    def _say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def _hear(self, beginning: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(beginning):
            self._complaints.seek(0)
            raise RuntimeError(f"{self._process.args}: {line}{self._complaints.read()}")
        return line


def environment(peer: str) -> dict[str, str]:
    """The environment of a measured process: `FASTRES_IMPL=python ci/bench` shows that the gate can fail."""
    implementation = "python" if peer == "fastres (Python)" else os.environ.get("FASTRES_IMPL", "c")
    return {**os.environ, "FASTRES_IMPL": implementation, "PYTHONWARNINGS": "ignore"}


@contextlib.contextmanager
def _traced(pid: int, summary: str) -> Iterator[None]:
    """Count the system calls of a process during the block. Raises Unavailable."""
    strace = shutil.which("strace")
    if strace is None:
        raise Unavailable("strace is not installed")
    command = [strace, "-f", "-c", "-U", "name,calls", "-o", summary, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        first = tracer.stderr.readline()
        if "attached" not in first:
            raise Unavailable(f"strace may not look at other processes here: {first.strip()}")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=ATTACH_TIMEOUT)


def _calls(summary: str) -> int:
    """The total in the output of `strace -c -U name,calls`."""
    return next(int(line.split()[1]) for line in summary.splitlines() if line.startswith("total"))
