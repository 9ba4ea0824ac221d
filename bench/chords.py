"""The peers with chords and workers: the measured operations, run in the measured process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import kombu
from celery import Celery, Signature, Task, chain, chord, group
from kombu.utils.json import dumps, loads
from peers import WARM, Action, Fastres, Job, Peer, Redis
from workloads import part_of, request_of, task_ids

import fastres

#: Operations that need a worker.
WORKED = ("chord", "small", "round_trip", "alone", "group", "chains")
#: Operations of chords, or with a worker.
CHORDS = ("part", "fire", "join", "hold", "open", "refer", *WORKED)
#: Tasks in a small chord, and in the first one, which opens the connections of both children.
SMALL, FIRST = 10, 100
#: Calls with a chord and without it take turns by so many.
TURN = 50
#: Seconds between two looks at a queue, and until it times out.
LOOK, TIMEOUT = 0.002, 300
#: Seconds in which a joiner commits merged events.
SETTLING = 1.0


class Chords(Peer):
    """A backend, and an application whose chord bodies have their own queue."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.bodies = f"bench.bodies.{job.oid}"
        self.tasks = f"bench.tasks.{job.oid}"
        queues = [kombu.Queue(name, routing_key=name) for name in (self.tasks, self.bodies)]
        self.app.conf.update(
            task_queues=queues, task_default_queue=self.tasks, broker_connection_retry_on_startup=True
        )
        self.noop, self.count, self.body = register(self.app)
        self._connection: Any = None

    def warm_up(self) -> None:
        """Run a chord first."""
        assert self.job.how in CHORDS
        getattr(self, f"warm_{self.job.how}", lambda: None)()

    def queues(self) -> list[str]:
        """The queues that a run leaves."""
        return [self.tasks, self.bodies]

    # -- one part

    def part(self, group_id: str, count: int) -> Action:
        """Store results with and without chord parts, in turns: the cost of a part."""
        # The chord is never complete.
        requests = list(map(self.begin(group_id, count + 1), range(count)))
        others = task_ids(str(uuid5(NAMESPACE_OID, group_id)), count)
        plain = [request_of(task_id, group=group_id, group_index=0) for task_id in others]
        mark = self.app.backend.mark_as_done

        def store(requests: Iterable[Any]) -> float:
            start = time.process_time()
            for request in requests:
                mark(request.id, part_of(0), request)
            return time.process_time() - start

        def run() -> int:
            turns = [slice(start, min(start + TURN, count)) for start in range(0, count, TURN)]
            times = [(store(requests[turn]), store(plain[turn])) for turn in turns]
            with_part, without = map(sum, zip(*times))
            self.taken = {"part": with_part - without, "stored": without}
            return count

        return run

    def warm_part(self) -> None:
        self.part(self.job.warm_id, WARM)()

    # -- the last part

    def fire(self, group_id: str, count: int) -> Action:
        """All parts but one were sent: the last one, until the body is in its queue."""
        request = self.begin(group_id, count)
        self.gather(group_id, count - 1)
        last = request(count - 1)
        return lambda: self.finish(last, count)

    def warm_fire(self) -> None:
        request = self.begin(self.job.warm_id, WARM)
        for index in range(WARM - 1):
            self.app.backend.on_chord_part_return(request(index), "SUCCESS", part_of(index))
        self.finish(request(WARM - 1), WARM)
        self.channel.queue_purge(self.bodies)

    def finish(self, last: Any, count: int) -> int:
        self.app.backend.on_chord_part_return(last, "SUCCESS", part_of(count - 1))
        self.await_bodies(1)
        return count

    # -- whole chords

    def chord(self, group_id: str, count: int) -> Action:
        """A chord of tasks that do nothing, until the result of its body is there."""
        header = [self.noop.si() for _ in range(count)]

        def run() -> int:
            result = chord(header, app=self.app)(self.count.s())
            # Not with the parents: once a second Celery looks at each result of the header.
            return int(result.get(timeout=TIMEOUT, follow_parents=False))

        return run

    def warm_chord(self) -> None:
        self.chord(self.job.warm_id, FIRST)()

    def small(self, group_id: str, count: int) -> Action:
        """Many small chords, until the bodies of all are in their queue."""
        body = self.body_of_chord()
        headers = [[self.noop.si() for _ in range(SMALL)] for _ in range(count)]

        def run() -> int:
            for header in headers:
                chord(header, app=self.app)(body.clone())
            self.await_bodies(count)
            return count

        return run

    def warm_small(self) -> None:
        self.warm_chord()
        self.small(self.job.warm_id, 1)()
        self.channel.queue_purge(self.bodies)

    # -- tasks without a chord: one opens the connections

    warm_round_trip = warm_alone = warm_group = warm_chains = warm_chord

    def round_trip(self, group_id: str, count: int) -> Action:
        """No-op tasks, each sent after the previous result was read."""

        def run() -> int:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                self.noop.delay().get(timeout=TIMEOUT)
                times.append(time.perf_counter() - start)
            self.taken = {"p50": statistics.median(times)}
            return count

        return run

    def alone(self, group_id: str, count: int) -> Action:
        """Tasks that are sent one by one and read together."""

        def run() -> int:
            ids = [self.noop.delay().id for _ in range(count)]
            return sum(1 for _ in self.app.backend.get_many(ids, timeout=TIMEOUT))

        return run

    def group(self, group_id: str, count: int) -> Action:
        return self._grouped(self.noop.si() for _ in range(count))

    def chains(self, group_id: str, count: int) -> Action:
        """A group of chains of two tasks."""
        return self._grouped(chain(self.noop.si(), self.noop.si()) for _ in range(count))

    def _grouped(self, tasks: Iterable[Signature]) -> Action:
        whole = group(list(tasks), app=self.app)
        return lambda: len(whole.delay().get(timeout=TIMEOUT))

    # -- building blocks

    def begin(self, group_id: str, count: int) -> Callable[[int], Any]:
        """Begin a chord. Returns: a function that gives the request of a header task, as its worker has it."""
        body = self.body_of_chord()
        body.freeze()
        self.app.backend.apply_chord((group_id, []), body)
        self.app.backend.set_chord_size(group_id, count)
        carried, ids = json.loads(dumps(body)), task_ids(group_id, count)
        return lambda index: request_of(ids[index], group=group_id, group_index=index, chord=carried)

    def body_of_chord(self) -> Signature:
        return self.body.s().set(queue=self.bodies)

    def gather(self, group_id: str, count: int) -> None:
        """Wait until the joiner has read this number of parts."""

    @property
    def channel(self) -> Any:
        """A channel to look at queues with."""
        if self._connection is None:
            self._connection = kombu.Connection(self.job.broker)
            for queue in self.app.conf.task_queues:
                queue(self._connection.default_channel).declare()
        return self._connection.default_channel

    def await_bodies(self, count: int) -> None:
        end = time.monotonic() + TIMEOUT
        while (there := self.channel.queue_declare(self.bodies, passive=True).message_count) < count:
            assert time.monotonic() < end, f"{there} bodies instead of {count}"
            time.sleep(LOOK)


class FastresChords(Chords, Fastres):
    kept = True

    def __init__(self, job: Job) -> None:
        # The log of a run is its own.
        self.options = {
            "result_backend_transport_options": {"namespace": f"bench-{job.oid}", "keep_chord_results": self.kept}
        }
        super().__init__(job)

    def queues(self) -> list[str]:
        addresses = self.app.backend.addresses
        groups = [addresses.group(group_id) for group_id in (self.job.group_id, self.job.warm_id)]
        return [*super().queues(), *(address.name for address in (addresses.chords(0), *groups))]

    def gather(self, group_id: str, count: int) -> None:
        end = time.monotonic() + TIMEOUT
        while True:
            [shard] = self.app.backend.asker.status(TIMEOUT)
            there = {chord.id: chord.parts for chord in shard.open.chords} if shard.open else {}
            if there.get(group_id) == count and not shard.waiting:
                break
            assert time.monotonic() < end, f"{there} parts instead of {count}"
            time.sleep(0.2)
        time.sleep(SETTLING)

    # -- a body that gets its header's results by reference

    def body_of_chord(self) -> Signature:
        body = super().body_of_chord()
        return fastres.lazy(body) if self.job.how == "refer" else body

    def refer(self, group_id: str, count: int) -> Action:
        """The last part until the body is in its queue; then the body reads all results."""
        self.app.set_current()
        fire = self.fire(group_id, count)

        def run() -> int:
            start = time.perf_counter()
            fire()
            fired = time.perf_counter()
            message = self.channel.basic_get(self.bodies, no_ack=True)
            [results], *_ = loads(message.body)
            read = sum(1 for _ in results)
            self.taken = {"wall": fired - start, "read": time.perf_counter() - fired}
            return read

        return run

    def warm_refer(self) -> None:
        self.warm_fire()

    # -- only the joiner, in this process

    def join(self, group_id: str, count: int) -> Action:
        """A joiner finds a complete chord, until the body is in its queue."""
        self.begin(group_id, count)
        self.channel  # noqa: B018 - the connection is made here, not when it is timed

        def run() -> int:
            self.app.backend.joiner.start()
            self.await_bodies(1)
            return count

        return run

    def hold(self, group_id: str, count: int) -> Action:
        """A joiner finds a chord that lacks a part."""
        self.begin(group_id, count + 1)

        def run() -> int:
            self.app.backend.joiner.start()
            self.gather(group_id, count)
            return count

        return run

    def warm_join(self) -> None:
        self.app.backend.joiner.start()
        self.warm_fire()
        self.app.backend.joiner.stop()

    def open(self, group_id: str, count: int) -> Action:
        """A joiner finds small chords, of which none is complete before all others lack one part only."""
        body = self.body_of_chord()
        body.freeze()
        for chord_id in task_ids(group_id, count):
            self.app.backend.apply_chord((chord_id, []), body.clone())
            self.app.backend.set_chord_size(chord_id, SMALL)
        self.channel  # noqa: B018 - as above

        def run() -> int:
            self.app.backend.joiner.start()
            self.await_bodies(count)
            return count

        return run

    warm_hold = warm_open = warm_join


class FastresUnkeptChords(FastresChords):
    kept = False


class RedisChords(Chords, Redis):
    pass


def register(app: Celery) -> tuple[Task, Task, Task]:
    """The tasks of the chords."""

    @app.task(name="noop", shared=False)  # type: ignore[untyped-decorator]
    def noop() -> None:
        pass

    @app.task(name="count", shared=False)  # type: ignore[untyped-decorator]
    def count(results: list[Any]) -> int:
        return len(results)

    @app.task(name="body", ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
    def body(results: list[Any]) -> None:
        raise NotImplementedError("its messages are counted, and not consumed")

    return noop, count, body


#: By the name that the tables have.
CHORD_PEERS: dict[str, type[Chords]] = {
    "fastres": FastresChords,
    "fastres, not kept": FastresUnkeptChords,
    "Celery redis": RedisChords,
}
