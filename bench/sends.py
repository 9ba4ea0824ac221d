"""Sends tasks in bulk, with Celery and with fastres, until the last one is in its queue. No worker runs."""

from __future__ import annotations

import time
from collections.abc import Iterator

from celery import chord, group
from chords import CHORD_PEERS, CHORDS, TIMEOUT, Chords, FastresChords, RedisChords
from peers import LIMIT, PEERS, WARM, Action, Job, Peer

import fastres

#: ``send``: fastres.apply_many, or rabbitmq-c with the same bytes; the others are done by Celery too.
SENDS = ("send", "send_group", "send_chord")
#: Seconds between two looks at the queue of the tasks.
LOOK = 0.01


class Sends(Chords):
    """Sends tasks of two small arguments, as Celery does."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)

        @self.app.task(name="pair", shared=False)  # type: ignore[untyped-decorator]
        def pair(number: int, text: str) -> int:
            return number

        self.pair = pair

    def warm_up(self) -> None:
        getattr(self, self.job.how)(self.job.warm_id, WARM)()
        self.channel.queue_purge(self.tasks)

    def send_group(self, group_id: str, count: int) -> Action:
        def send() -> int:
            group(self.pair.s(*pair) for pair in pairs(count)).apply_async()
            return self.await_tasks(count)

        return send

    def send_chord(self, group_id: str, count: int) -> Action:
        def send() -> int:
            chord((self.pair.s(*pair) for pair in pairs(count)), app=self.app)(self.body_of_chord())
            return self.await_tasks(count)

        return send

    def await_tasks(self, count: int) -> int:
        end = time.monotonic() + TIMEOUT
        while (there := self.channel.queue_declare(self.tasks, passive=True).message_count) < count:
            assert time.monotonic() < end, f"{there} tasks instead of {count}"
            time.sleep(LOOK)
        return int(there)


class FastresSends(Sends, FastresChords):
    """The same with ``fastres.apply_many``, from an iterator."""

    def send(self, group_id: str, count: int) -> Action:
        def send() -> int:
            fastres.apply_many(self.pair, pairs(count))
            return self.await_tasks(count)

        return send

    def send_chord(self, group_id: str, count: int) -> Action:
        def send() -> int:
            fastres.apply_many(self.pair, pairs(count), body=self.body_of_chord())
            return self.await_tasks(count)

        return send


class RedisSends(Sends, RedisChords):
    pass


#: By the name in the tables.
SEND_PEERS: dict[str, type[Sends]] = {
    "fastres": FastresSends,
    "Celery redis": RedisSends,
    # Publishes the message of fastres.
    LIMIT: FastresSends,
}


def peer_of(job: Job) -> Peer:
    if job.how in SENDS:
        return SEND_PEERS[job.peer](job)
    return (CHORD_PEERS if job.how in CHORDS else PEERS)[job.peer](job)


def pairs(count: int) -> Iterator[tuple[int, str]]:
    return ((number, "x" * 20) for number in range(count))
