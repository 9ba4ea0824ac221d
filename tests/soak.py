"""Injects every kind of fault for some minutes, and checks that no result is lost: see ci/soak."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
from celery import Celery, chord, group
from celery.exceptions import TimeoutError
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from proj import add, echo, tsum
from proxy import Proxy
from rabbitmq_node import Node
from workers import Worker, client

#: Tasks run again if their worker is killed; sends are confirmed.
CONF: dict[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "broker_transport_options": {"confirm_publish": True},
    "worker_prefetch_multiplier": 4,
    "task_default_queue": "soak",
    "result_expires": 24 * 3600,
}
#: Seconds between two faults of a kind, and for which an alarm lasts.
KILLS, CUTS, RESTARTS, ALARMS, ALARM = 15, 4, 70, 45, 5
#: Seconds that the last results may take.
REST = 120
#: The outcome of a task or a chord.
HANDED_OVER, LATER, WRONG, MISSING = "handed over", "read at the end", "wrong", "missing"
#: Errors of sending while the broker is down: it is unknown whether the tasks were sent, so they do not count.
AWAY = (OperationalError, OSError)


class Account:
    """The tasks that were sent, and their outcomes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.expected: dict[str, Any] = {}
        self.handed_over: dict[str, Any] = {}
        self.events: Counter[str] = Counter()

    def sent(self, results: list[tuple[AsyncResult, Any]]) -> None:
        with self._lock:
            self.expected.update({result.id: value for result, value in results})

    def came(self, task_id: str, value: Any) -> None:
        with self._lock:
            self.handed_over[task_id] = value

    def note(self, event: str) -> None:
        with self._lock:
            self.events[event] += 1

    def close(self, app: Celery) -> Counter[str]:
        """Read the outcomes that were not read."""
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + REST
        for task_id, value in self.expected.items():
            outcome = HANDED_OVER
            if task_id not in self.handed_over:
                try:
                    self.came(task_id, app.AsyncResult(task_id).get(timeout=max(1.0, end - time.monotonic())))
                    outcome = LATER
                except Exception as exc:
                    click.echo(f"{task_id}: {exc!r}", err=True)
                    outcome = MISSING
            if outcome != MISSING and self.handed_over[task_id] != value:
                outcome = WRONG
            outcomes[outcome] += 1
        return outcomes


def send(account: Account, results: Callable[[], list[tuple[AsyncResult, Any]]]) -> list[tuple[AsyncResult, Any]]:
    """Send tasks, and record them."""
    try:
        sent = results()
    except AWAY:
        account.note("not sent: the broker was away")
        return []
    account.sent(sent)
    return sent


def wait(account: Account, result: AsyncResult, timeout: float) -> None:
    try:
        account.came(result.id, result.get(timeout=timeout))
        account.note("waits")
    except TimeoutError:
        account.note("timeouts")
    except AWAY:
        account.note("errors that said so: the broker was away")


def lone(account: Account, chance: random.Random) -> None:
    """Wait for tasks, with long and short timeouts."""
    number = chance.randrange(1000)
    for result, _ in send(account, lambda: [(echo.delay(number), number)]):
        wait(account, result, chance.choice([0.05, 1, 30]))
        if result.id not in account.handed_over and chance.random() < 0.5:
            wait(account, result, 30)


def polled(account: Account, chance: random.Random) -> None:
    """Look for the states of tasks."""
    for result, _ in send(account, lambda: [(add.delay(number, 1), number + 1) for number in range(5)]):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            account.note("looks")
            try:
                if result.state == "SUCCESS":
                    account.came(result.id, result.result)
                    break
            except AWAY:
                account.note("errors that said so: the broker was away")
            time.sleep(0.1)


def joined(account: Account, chance: random.Random) -> None:
    """Join groups, some of them in two attempts."""
    count = chance.choice([2, 20, 200])

    def begin() -> list[tuple[AsyncResult, Any]]:
        held = group(add.s(number, number) for number in range(count))()
        return [(member, 2 * number) for number, member in enumerate(held.results)]

    sent = send(account, begin)
    left = {result.id: result for result, _ in sent}
    for timeout in (chance.choice([0.2, 60]), 60):
        if left:
            try:
                for task_id, meta in echo.app.backend.get_many(list(left), timeout=timeout):
                    account.came(task_id, meta["result"])
                    del left[task_id]
                account.note("joins")
            except TimeoutError:
                account.note("timeouts")
            except AWAY:
                account.note("errors that said so: the broker was away")


def chords(account: Account, chance: random.Random) -> None:
    """Wait for the bodies of chords."""
    count = chance.choice([2, 30])
    header = [add.s(number, 0) for number in range(count)]
    for result, _ in send(account, lambda: [(chord(header)(tsum.s()), sum(range(count)))]):
        wait(account, result, 60)
        account.note("chords")


def trouble(
    node: Node,
    proxy: Proxy,
    workers: list[Worker],
    account: Account,
    over: Callable[[], bool],
    chance: random.Random,
) -> None:
    """Inject one fault after the other."""
    due = {fault: time.monotonic() + chance.uniform(0, every) for fault, every in EVERY.items()}
    while not over():
        time.sleep(0.2)
        for fault, every in EVERY.items():
            if time.monotonic() < due[fault]:
                continue
            due[fault] = time.monotonic() + every
            account.note(fault)
            if fault == "workers killed":
                worker = chance.choice(workers)
                worker.kill()
                worker.start()
            elif fault == "connections cut":
                proxy.cut()
            elif fault == "restarts of the broker":
                node.restart()
            else:
                node.ctl("set_vm_memory_high_watermark", "0.00000001")
                time.sleep(ALARM)
                node.ctl("set_vm_memory_high_watermark", "0.6")


EVERY = {
    "workers killed": KILLS,
    "connections cut": CUTS,
    "restarts of the broker": RESTARTS,
    "alarms": ALARMS,
}


def keep_doing(
    act: Callable[[Account, random.Random], None], account: Account, over: Callable[[], bool], seed: int
) -> None:
    chance = random.Random(seed)
    while not over():
        try:
            act(account, chance)
        except Exception as exc:
            # An unexpected exception is an outcome too.
            account.note(f"{act.__name__}: {exc!r}"[:200])


@click.command()
@click.argument("seconds", type=float, default=600)
@click.option("--seed", type=int, default=1)
def soak(seconds: float, seed: int) -> None:
    """Inject faults for SECONDS; the exit code is 1 if a result is missing or wrong."""
    logging.disable(logging.CRITICAL)
    account, start = Account(), time.monotonic()

    def over() -> bool:
        return time.monotonic() > start + seconds

    with Node() as node, Proxy(node.port) as proxy:
        workers = [Worker(proxy.url, concurrency=2, **CONF) for _ in range(2)]
        with workers[0], workers[1], client(proxy.url, **CONF) as app:
            acts = [lone, lone, polled, joined, joined, chords]
            threads = [
                threading.Thread(target=keep_doing, args=(act, account, over, seed + number), daemon=True)
                for number, act in enumerate(acts)
            ]
            for thread in threads:
                thread.start()
            trouble(node, proxy, workers, account, over, random.Random(seed))
            for thread in threads:
                thread.join(REST)
                if thread.is_alive():
                    account.note("a client that hangs")
            outcomes = account.close(app)
    for event, count in sorted(account.events.items()):
        click.echo(f"{count:>8,} {event}")
    click.echo(f"{len(account.expected):>8,} tasks and chords sent, of which")
    for outcome in (HANDED_OVER, LATER, WRONG, MISSING):
        click.echo(f"{outcomes[outcome]:>8,} {outcome}")
    strange = [event for event in account.events if ":" in event and "the broker was away" not in event]
    sys.exit(int(bool(outcomes[WRONG] or outcomes[MISSING] or strange or account.events["a client that hangs"])))


if __name__ == "__main__":
    soak()
