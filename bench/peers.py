"""The peers: the operations of each backend, run in the measured process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import kombu
from celery import Celery
from celery.result import GroupResult
from workloads import SERIALIZERS, WORKLOADS, lone_ids, request_of, task_ids

#: The timed operation. Returns the number of results that it has read or stored.
Action = Callable[[], int]

#: Results of the first join, which imports modules and connects.
WARM = 20
#: Seconds that a queue of results is kept: Celery's default for result_expires.
DAY = 86_400
#: Operations on lone tasks whose results were stored before.
LONE = ("lone", "done")
#: Operations that store results.
STORES = ("store", "store_lone")
#: Threads that look at the states of tasks.
THREADS = 8
#: The peer that is a C program.
LIMIT = "rabbitmq-c"


@dataclass(frozen=True)
class Job:
    """The job of a measured process."""

    peer: str
    #: The method of Peer that is timed.
    how: str
    workload: str
    serializer: str
    count: int
    group_id: str
    #: The group that is joined first.
    warm_id: str
    #: The client's reply queue.
    oid: str
    broker: str
    redis: str


class Peer:
    """A result backend of Celery."""

    url: str
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, job: Job) -> None:
        self.job = job
        #: Figures that an action has measured itself.
        self.taken: dict[str, float] = {}
        self.app = Celery(
            "bench", broker=job.broker, backend=self.url.format(redis=job.redis), set_as_current=False
        )
        self.app.conf.update(
            result_serializer=job.serializer, result_accept_content=list(SERIALIZERS), **self.options
        )
        self.app._local.oid = job.oid

    def warm_up(self) -> None:
        """Join, or store, a few results."""
        getattr(self, self.job.how)(self.job.warm_id, WARM)()

    def prepare(self) -> Action:
        """Create everything that exists before a join begins. Returns: the join."""
        action: Action = getattr(self, self.job.how)(self.job.group_id, self.job.count)
        return action

    def inbox(self, group_id: str) -> kombu.Queue | None:
        """The queue of a group's results; None if they are not in a broker."""
        return None

    def lone_inbox(self, task_id: str) -> kombu.Queue | None:
        """The queue of a lone task's result."""
        return None

    # -- timed operations

    def get(self, group_id: str, count: int) -> Action:
        ids = task_ids(group_id, count)
        result = GroupResult(group_id, [self.app.AsyncResult(task_id) for task_id in ids], app=self.app)
        return lambda: len(result.get(propagate=False))

    def get_many(self, group_id: str, count: int) -> Action:
        ids = task_ids(group_id, count)
        return lambda: sum(1 for _ in self.app.backend.get_many(ids))

    def lone(self, group_id: str, count: int) -> Action:
        ids = lone_ids(group_id, count)
        return lambda: sum(1 for _ in self.app.backend.get_many(ids))

    def store(self, group_id: str, count: int) -> Action:
        ids = task_ids(group_id, count)
        return self._storing(
            request_of(task_id, group=group_id, group_index=index, reply_to=self.job.oid)
            for index, task_id in enumerate(ids)
        )

    def store_lone(self, group_id: str, count: int) -> Action:
        return self._storing(request_of(task_id, reply_to=self.job.oid) for task_id in lone_ids(group_id, count))

    def done(self, group_id: str, count: int) -> Action:
        """The states of tasks that have ended, each read once, as a web page does."""
        ids = lone_ids(group_id, count)
        random.Random(3).shuffle(ids)
        return lambda: sum(self._state(task_id) == "SUCCESS" for task_id in ids)

    def pending(self, group_id: str, count: int) -> Action:
        """The states of tasks that have not run."""
        ids = lone_ids(group_id, count)
        return lambda: sum(self._state(task_id) == "PENDING" for task_id in ids)

    def pending_threads(self, group_id: str, count: int) -> Action:
        """The same, by several threads."""
        ids = lone_ids(group_id, count)

        def look() -> int:
            with ThreadPoolExecutor(THREADS) as threads:
                return sum(state == "PENDING" for state in threads.map(self._state, ids))

        return look

    def _state(self, task_id: str) -> str:
        return str(self.app.AsyncResult(task_id).state)

    def _storing(self, requests: Iterable[Any]) -> Action:
        backend, result = self.app.backend, WORKLOADS[self.job.workload]
        requests = list(requests)

        def store() -> int:
            for request in requests:
                backend.store_result(request.id, result, "SUCCESS", request=request)
            return len(requests)

        return store


class Fastres(Peer):
    url = "fastres://"

    def inbox(self, group_id: str) -> kombu.Queue:
        addresses = self.app.backend.addresses
        return addresses.queue(addresses.group(group_id))

    def lone_inbox(self, task_id: str) -> kombu.Queue:
        addresses = self.app.backend.addresses
        return addresses.queue(addresses.result(task_id))


class FastresUnconfirmed(Fastres):
    options = {"result_backend_transport_options": {"confirm": False}}  # noqa: RUF012


class Rpc(Peer):
    url = "rpc://"

    def inbox(self, group_id: str) -> kombu.Queue:
        return self.app.backend.binding


class FastresRpc(Rpc):
    url = "fastres-rpc://"

    def sent(self, group_id: str, ids: list[str]) -> None:
        for task_id in ids:
            self.app.backend.on_task_call(None, task_id)


class Redis(Peer):
    url = "{redis}"


class CeleryAmqpBackend(Peer):
    url = "celery_amqp_backend.AMQPBackend://"

    def lone_inbox(self, task_id: str) -> kombu.Queue:
        return self.app.backend._create_binding(task_id)


class Bare(Peer):
    """A queue and a client without Celery."""

    url = "disabled://"

    def inbox(self, group_id: str) -> kombu.Queue:
        return kombu.Queue(f"bench.{group_id}", durable=True, expires=DAY)


class KombuConsumer(Bare):
    """kombu alone: decoded bodies, without waits."""

    def get_many(self, group_id: str, count: int) -> Action:
        connection = self.app.connection_for_read()
        queue = self.inbox(group_id)
        queue.no_declare = True
        taken = 0

        def take(body: Any, message: Any) -> None:
            nonlocal taken
            taken += 1

        def consume() -> int:
            with kombu.Consumer(
                connection.default_channel, [queue], callbacks=[take], no_ack=True, accept=SERIALIZERS
            ):
                while taken < count:
                    connection.drain_events()
            return taken

        # Connect here, outside the timed part.
        connection.default_channel  # noqa: B018
        return consume


#: By the name in the tables.
PEERS: dict[str, type[Peer]] = {
    "fastres": Fastres,
    "fastres (Python)": Fastres,
    "fastres, no confirm": FastresUnconfirmed,
    "fastres-rpc": FastresRpc,
    "Celery rpc": Rpc,
    "Celery redis": Redis,
    "celery-amqp-backend": CeleryAmqpBackend,
    "kombu Consumer": KombuConsumer,
    LIMIT: Bare,
    "rabbitmq-c, acknowledging": Bare,
}
