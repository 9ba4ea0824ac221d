"""Runs a process that is measured with a worker, or a joiner, beside it."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from chords import CHORD_PEERS, CHORDS, SMALL, TIMEOUT, WORKED, Chords, FastresChords
from filler import fill_redis_chord
from kombu.utils.json import loads
from measure import memory
from rabbitmq_node import Leashed
from runs import Bench, Case, Process, Run, environment
from send_runs import SendRun
from sends import SENDS
from workloads import body_of, part_of

HERE = Path(__file__).parent
#: The program beside the measured process, as arguments of `celery`.
WORKER = "worker -c 2 -Q {tasks} -l WARNING --without-gossip --without-mingle --without-heartbeat"
JOINER = "fastres joiner"
#: Cases in which the last part is stored; cases in which queues are counted.
FIRED = ("fire", "refer")
COUNTED = ("small", "alone", "group", "chains")


def run_of(bench: Bench, case: Case) -> Run:
    if case.how in SENDS:
        return SendRun(bench, case)
    return (ChordRun if case.how in CHORDS else Run)(bench, case)


class ChordRun(Run):
    """One measured process, ready when it is made."""

    peer: Chords

    def prepare(self) -> Process:
        case = self.case
        self.peer = CHORD_PEERS[case.peer](self.job)
        self._beside: Beside | None = None
        arguments = None
        if case.how in WORKED:
            arguments = WORKER.format(tasks=self.peer.tasks)
        elif case.how in FIRED and isinstance(self.peer, FastresChords):
            arguments = JOINER
        if arguments:
            self._beside = Beside(self, arguments).start()
        if case.how == "refer":
            self.peer.app.backend.asker.status(TIMEOUT)
            self._joiner_before = self._joiner_memory("VmRSS")
            self._fill_header()
        if case.how in FIRED:
            self._fill(case.count - 1)
        process = Process(self.command(), environment(case.peer))
        # A joiner has warmed up, and has left.
        if case.how in ("join", "hold"):
            self._fill(case.count)
        if case.how == "open":
            self.bench.broker.fill_chords(self._log(), self.job.group_id, case.count, SMALL)
        return process

    def _log(self) -> Any:
        """The queue of the chords' events."""
        addresses = self.peer.app.backend.addresses
        return addresses.queue(addresses.chords(0))

    def _fill(self, count: int) -> None:
        backend = self.peer.app.backend
        if isinstance(self.peer, FastresChords):
            self.bench.broker.fill_log(
                self._log(), self.job.group_id, count, by_reference=self.case.how == "refer"
            )
        else:
            fill_redis_chord(backend, self.job.group_id, count)

    def _fill_header(self) -> None:
        addresses, group_id = self.peer.app.backend.addresses, self.job.group_id
        body = body_of(self.case.workload, self.case.serializer, group_id)
        self.bench.broker.fill_header(addresses.queue(addresses.group(group_id)), group_id, self.case.count, body)

    def _joiner_memory(self, name: str) -> float:
        assert self._beside is not None
        return memory(name, self._beside.process.pid)

    def go(self) -> dict[str, float]:
        if self.case.how not in COUNTED or not isinstance(self.peer, FastresChords):
            taken = super().go()
            if self.case.how in ("fire", "join"):
                self._check_body()
            if self.case.how == "refer":
                taken["joiner"] = self._joiner_memory("VmHWM") - self._joiner_before
            return taken
        before = self._created()
        taken = super().go()
        return {**taken, "queues": self._created() - before}

    def _check_body(self) -> None:
        """The body has all results, in order."""
        message = self.bench.broker.channel.basic_get(self.peer.bodies, no_ack=True)
        [results], *_ = loads(message.body)
        assert results == [part_of(index) for index in range(self.case.count)]

    def _created(self) -> int:
        """The number of queues that the node has created since its start."""
        rows = self.bench.node.ctl("eval", "ets:tab2list(connection_churn_metrics).")
        *_, created, _ = re.findall(r"\b\d+\b", rows.partition(",")[2])
        return int(created)

    def close(self) -> None:
        if self._beside is not None:
            self._beside.stop()
        # Listing all queues takes seconds. The queues of most runs are known.
        if self.case.how in COUNTED:
            self.queues.update(name for name in self.bench.node.queues() if self.job.oid in name)
        else:
            self.queues.update(self.peer.queues())
        super().close()


class Beside(Leashed):
    """`celery` with the application of a run."""

    name = "celery"

    def __init__(self, run: ChordRun, arguments: str) -> None:
        super().__init__()
        self._run = run
        self._arguments = arguments

    def shell_line(self, folder: Path) -> str:
        return f"exec '{sys.executable}' -m celery -A chord_app {self._arguments}"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return True  # the first chord shows whether it works

    @property
    def envvars(self) -> dict[str, str]:
        job = json.dumps(dataclasses.asdict(self._run.job))
        own = {"FASTRES_BENCH_JOB": job, "PYTHONPATH": str(HERE)}
        return {**super().envvars, **environment(self._run.case.peer), **own}
