"""What it costs to send tasks in bulk: Celery's group and fastres.apply_many on one broker, in turns.

``python bench/sending.py [TASKS]`` prints microseconds a task; ``--memory TASKS`` the resident megabytes of a
process that has sent so many from a generator.
"""

from __future__ import annotations

import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "ci"))

from celery import Celery, group
from rabbitmq_node import Node

import fastres

QUEUE = "bench"
ROUNDS = 3


def app_at(url: str) -> Celery:
    app = Celery("bench", broker=url, backend="fastres://")
    app.conf.task_default_queue = QUEUE
    return app


def task_of(app: Celery) -> Any:
    @app.task(name="bench.task", shared=False)
    def task(number: int, text: str) -> int:
        return number

    return task


def measured(app: Celery, send: Callable[[], Any], count: int) -> tuple[float, float]:
    """Microseconds of CPU and of wall time for each task."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    send()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        until = time.monotonic() + 60
        while channel.queue_declare(QUEUE, passive=True).message_count < count and time.monotonic() < until:
            time.sleep(0.05)
        taken = channel.queue_purge(QUEUE)
    assert taken == count, f"{taken} of {count} tasks are in the queue"
    return cpu / count * 1e6, wall / count * 1e6


def main() -> None:
    count = int(sys.argv[-1]) if len(sys.argv) > 1 else 100_000
    if "--memory-of" in sys.argv:
        fastres.apply_many(task_of(app_at(sys.argv[2])), ((number, "x" * 20) for number in range(count)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with Node() as node:
        if "--memory" in sys.argv:
            for tasks in (10_000, count):
                command = [sys.executable, __file__, "--memory-of", node.url, str(tasks)]
                print(f"{tasks:>9,} tasks {float(subprocess.check_output(command)):.1f} MB")
            return
        app = app_at(node.url)
        task = task_of(app)
        runs: dict[str, list[tuple[float, float]]] = {"group": [], "apply_many": []}
        for _ in range(ROUNDS):
            runs["group"].append(
                measured(app, group(task.s(number, "x" * 20) for number in range(count)).apply_async, count)
            )
            runs["apply_many"].append(
                measured(app, lambda: fastres.apply_many(task, ((n, "x" * 20) for n in range(count))), count)
            )
        for name, costs in runs.items():
            cpu, wall = (statistics.median(each) for each in zip(*costs))
            print(f"{name:>10}: {cpu:.1f} us of CPU, {wall:.1f} us of wall time a task")
        for what, number in (("CPU", 0), ("wall", 1)):
            ratios = [a[number] / b[number] for a, b in zip(runs["group"], runs["apply_many"])]
            print(f"{what} ratio: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
