"""Counters of a process. They always count; ``fastres.metrics`` exports them."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

__all__ = ("BOUNDS", "Counts", "JoinerCounts", "Latency")

#: Seconds: the upper bounds of the buckets of a latency, the last is everything else.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Latency(msgspec.Struct):
    """A histogram of durations."""

    #: The number of durations in each bucket, and the sum of all durations in seconds.
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class JoinerCounts(msgspec.Struct):
    """The counters of a joiner."""

    #: From a write of bodies or events to the broker's answer.
    commits: Latency = msgspec.field(default_factory=Latency)
    #: The numbers of called bodies and of failed chords.
    bodies: int = 0
    failed: int = 0


class Counts(msgspec.Struct):
    """The counters of a backend in one process. Threads that count at the same moment may lose an increment."""

    #: Messages that were published: results, states, parts of chords.
    published: int = 0
    #: Results that were handed to a wait.
    joined: int = 0
    #: From a write to the broker to the last confirm for it.
    confirms: Latency = msgspec.field(default_factory=Latency)
    #: Opened connections by use. More than one are reconnections, or connections of other threads.
    connections: dict[str, int] = msgspec.field(default_factory=dict)
    joiner: JoinerCounts = msgspec.field(default_factory=JoinerCounts)
    #: How many shards the joiner reads.
    shards: int = 0

    def connected(self, use: str) -> None:
        """Count an opened connection."""
        self.connections[use] = self.connections.get(use, 0) + 1
