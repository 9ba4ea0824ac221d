"""The workloads: results as Celery's worker writes them, and the numbers of results."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple

from celery import Celery
from celery.app.task import Context
from celery.backends.base import Backend
from kombu.serialization import dumps

from fastres.canvas import PAGE_SIZE

SERIALIZERS = ("json", "msgpack", "pickle")

#: Placeholder for a task's id in a body that is made once for all results of a run; as long as an id.
ANY_ID = "00000000-0000-0000-0000-000000000000"

TRACEBACK = "Traceback (most recent call last):\n" + "".join(
    f'  File "/srv/app/proj/steps.py", line {depth * 17}, in step_{depth}\n    return step_{depth + 1}(order)\n'
    for depth in range(12)
)

#: The result of a task by name of the workload; of a failed task it is the exception.
WORKLOADS: dict[str, Any] = {
    "int": 7,
    # With Celery's fields it is 320 bytes of JSON.
    "dict": {"order": 48_213, "total": 129.95, "paid": True, "currency": "EUR", "customer": "A. N. Other, Ghent"},
    "str": "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz ", k=4_096)),
    "bytes": random.Random(2).randbytes(65_536),
    "failure": ValueError("no such order: 48213"),
}


@dataclass(frozen=True)
class Size:
    """The numbers of results and of repetitions."""

    #: Results of the joins of all peers, and of the two joins that show growth.
    joins: tuple[int, ...]
    scale: tuple[int, int]
    #: Results for each pair of a workload and a serializer, 0: left out.
    matrix: int
    #: Lone tasks, looks from several threads, stored results, results while system calls are counted.
    lone: int
    looks: int
    stored: int
    traced: int
    #: Parts of chords: of two that are fired, of one that is joined, of two that wait, and those that are stored.
    fired: tuple[int, int]
    joined: int
    held: tuple[int, int]
    parts: int
    #: Small chords that are open at once; none is complete before all others lack only one part.
    open: tuple[int, int]
    #: Parts of a chord whose body gets them by reference.
    referred: int
    #: Tasks of a whole chord, small chords, tasks that are awaited one by one, and those whose queues are counted.
    tasks: int
    chords: int
    single: int
    counted: int
    #: Tasks that are sent in bulk, by all and by fastres.
    sent: tuple[int, int]
    #: Repetitions of cases that take a second, and of those that take ten.
    fast: int
    slow: int


SIZES = {
    "tiny": Size(
        joins=(60,), scale=(60, 120), matrix=3, lone=3, looks=8, stored=20, traced=60,
        fired=(20, 40), joined=60, held=(20, 40), open=(2, 4), parts=100, referred=50, tasks=10, chords=2,
        single=5, counted=20, sent=(20, 40), fast=1, slow=1,
    ),
    "short": Size(
        joins=(50_000,), scale=(10_000, 100_000), matrix=0, lone=500, looks=200, stored=5_000, traced=2_000,
        fired=(10_000, 100_000), joined=50_000, held=(30_000, 100_000), open=(500, 5_000), parts=1_000,
        referred=100_000, tasks=2_000, chords=100, single=300, counted=2_000, sent=(10_000, 100_000), fast=2, slow=1,
    ),
    "full": Size(
        joins=(10_000, 100_000, 1_000_000), scale=(10_000, 1_000_000), matrix=10_000, lone=2_000, looks=200,
        stored=20_000, traced=10_000,
        fired=(10_000, 100_000), joined=100_000, held=(100_000, 300_000), open=(2_500, 25_000), parts=5_000,
        referred=1_000_000, tasks=10_000, chords=1_000, single=2_000, counted=10_000, sent=(100_000, 1_000_000),
        fast=5, slow=3,
    ),
}  # fmt: skip


class Body(NamedTuple):
    """A result as a worker sends it, with ANY_ID where the task's id belongs."""

    content_type: str
    content_encoding: str
    data: bytes

    def of(self, task_id: str) -> bytes:
        return self.data.replace(ANY_ID.encode(), task_id.encode())


def new_group() -> str:
    return str(uuid.uuid4())


def task_ids(group_id: str, count: int) -> list[str]:
    """The ids of a group's members, which the group's id determines."""
    return [f"{group_id[:14]}8{group_id[15:18]}-8000-{index:012x}" for index in range(count)]


def lone_ids(group_id: str, count: int) -> list[str]:
    """Ids like those of lone tasks that one process sends one after the other."""
    return [f"{group_id[:14]}8{index // PAGE_SIZE:03x}-a000-{index:012x}" for index in range(count)]


def part_of(index: int) -> str:
    """The result of a chord's part: 100 bytes of JSON, which differ."""
    return f"{index:098d}"


def request_of(task_id: str, **fields: Any) -> Context:
    """The request of a task, as in its worker."""
    delivery = {"exchange": "", "routing_key": "celery", "priority": 0, "redelivered": False}
    return Context({"id": task_id, "correlation_id": task_id, "delivery_info": delivery, **fields})


def body_of(workload: str, serializer: str, group_id: str | None) -> Body:
    """A worker's message for a task with the result, or the exception, of a workload."""
    result = WORKLOADS[workload]
    failed = isinstance(result, Exception)
    backend = Backend(Celery(set_as_current=False), serializer=serializer)
    group = {"group": group_id, "group_index": 0} if group_id else {}
    meta = backend._get_result_meta(
        result=backend.encode_result(result, "FAILURE" if failed else "SUCCESS"),
        state="FAILURE" if failed else "SUCCESS",
        traceback=TRACEBACK if failed else None,
        request=request_of(ANY_ID, **group),
    )
    meta["task_id"] = ANY_ID
    content_type, content_encoding, data = dumps(meta, serializer=serializer)
    return Body(content_type, content_encoding, data.encode() if isinstance(data, str) else data)
