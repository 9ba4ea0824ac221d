"""A million messages through the drain take no more memory than a hundred thousand."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

#: Bytes by which the process may grow after the first messages, which fill its caches.
LIMIT = 1 << 20
FIRST = 100_000

#: Reads, decodes and sorts a stream of 1,000 messages repeatedly; prints the growth of the process.
DRAIN = """
import ctypes, gc, os, sys
import wire
from fastres import _impl

# A page of 2 MB that the kernel puts in the place of small ones would look like growth.
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
impl, first, count, planted = _impl.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ids = [f"task-{number}" for number in range(1000)]
json = {"content_type": "application/json", "content_encoding": "utf-8"}
messages = [
    wire.delivery(
        1, b'{"task_id": "%s", "status": "SUCCESS", "result": "%s"}' % (task_id.encode(), b"x" * (number % 300)),
        # Every kind of way through: in parts, compressed, with headers, refused, of another channel.
        part=100 if number % 10 == 0 else 131_064, correlation_id=task_id, delivery_tag=number + 1,
        **({} if number % 50 == 0 else json),
        **({"application_headers": {"fastres-keep": True, "n": number}} if number % 7 == 0 else {}),
    )
    for number, task_id in enumerate(ids)
]
stream = b"".join(b"".join(frames) for frames in messages) + wire.HEARTBEAT
chunks = [stream[start : start + 65_537] for start in range(0, len(stream), 65_537)]
frames = impl["frames"].Frames(131_072)
frames.own(1)
decoder = impl["decode"].Decoder(["application/json"], 1 << 20)
kept = []


def drain():
    aggregate = impl["aggregate"].Aggregate(ids, ["SUCCESS"])
    refused = 0
    for chunk in chunks:
        deliveries, others = frames.feed(chunk)
        arrivals, bad = decoder.decode_all(deliveries)
        refused += len(bad)
        aggregate.feed(arrivals)
        if planted:
            kept.extend(arrivals[:5])
    assert (len(aggregate), refused) == (20, 20), (len(aggregate), refused)
    frames.feed(chunks[0][:10_000])
    frames.unused()


def size():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def least():
    sizes = []
    for round in range(10):
        drain()
        sizes.append(size())
    return min(sizes)


for round in range(count // 1000):
    if round == first // 1000:
        before = least()
    drain()
print(least() - before)
"""


def grown(impl: str, count: int, planted: str = "") -> int:
    command = [sys.executable, "-c", textwrap.dedent(DRAIN), impl, str(FIRST), str(count), planted]
    # Python's own allocator takes and returns whole megabytes, as much as is allowed here; the C library's has
    # smaller steps.
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin", "PYTHONMALLOC": "malloc"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# The reference takes twenty times as long, so it reads fewer messages.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("impl", "count"), [("c", 1_000_000), ("python", 200_000)])
def test_messages_leave_nothing_behind(impl: str, count: int) -> None:
    assert grown(impl, count) <= LIMIT


def test_a_leak_is_detected() -> None:
    """A few messages of every thousand are kept."""
    assert grown("c", 200_000, "planted") > LIMIT
