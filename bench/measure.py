"""A measured process: prepares, prints "ready", waits for a line, does its job, and prints the cost as JSON."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time

from peers import Job
from sends import peer_of


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    peer = peer_of(job)
    peer.warm_up()
    start = cpu()
    action = peer.prepare()
    prepared = cpu() - start
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()

    forget_peak()
    before = memory("VmRSS")
    start, wall = cpu(), time.perf_counter()
    count = action()
    wall, used = time.perf_counter() - wall, cpu() - start
    held, peak = memory("VmRSS") - before, memory("VmHWM")
    assert count == job.count, f"{count} results instead of {job.count}"
    taken = {
        "count": count, "cpu": used, "wall": wall, "prepare": prepared,
        "peak": peak, "growth": peak - before, "held": held, **peer.taken,
    }  # fmt: skip
    print(json.dumps(taken), flush=True)
    # Skip the deallocation of a million results.
    sys.stdin.readline()
    os._exit(0)


def cpu() -> float:
    """Seconds of CPU that this process has used, in all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory(name: str, pid: int | None = None) -> float:
    """A line of /proc/self/status, or of another process's, in MB."""
    with open(f"/proc/{pid or 'self'}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Begin a new VmHWM."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


if __name__ == "__main__":
    main()
