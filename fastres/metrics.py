"""Collectors for Prometheus, which need ``pip install fastres[metrics]``."""

from __future__ import annotations

import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from celery import current_app
from celery.exceptions import ImproperlyConfigured
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from fastres.counts import BOUNDS
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from fastres.chords.status import ShardStatus
    from fastres.counts import JoinerCounts, Latency

__all__ = ("ChordCollector", "ProcessCollector", "serve")

#: Seconds for a joiner to answer.
TIMEOUT = 2.0


def _backend_of(app: Any) -> Any:
    backend = (app or current_app).backend
    if not hasattr(backend, "counts"):
        raise ImproperlyConfigured(f"result_backend is {backend!r}, and not one of fastres")
    return backend


class ProcessCollector:
    """A collector for ``prometheus_client``: the counters of this process since its start.

    ``REGISTRY.register(ProcessCollector(app))`` in a client or a worker; in the children of a prefork pool, each
    of which has numbers of its own, on the signal ``worker_process_init``, with a port of its own.

    Args:
        app: the application; default: the current one.

    Raises: celery.exceptions.ImproperlyConfigured: its result backend is not one of fastres.
    """

    def __init__(self, app: Any = None) -> None:
        self._backend = _backend_of(app)

    def collect(self) -> Iterator[Metric]:
        backend = self._backend
        counts = backend.counts
        yield _counter("published", "Messages published: results, states, parts of chords.", counts.published)
        yield _counter("joined", "Results that a wait was handed.", counts.joined)
        refused = CounterMetricFamily(
            "fastres_refused_messages", "Messages that are no result for anybody, by reason.", labels=["reason"]
        )
        for reason, count in list(backend.reports.counts.items()):
            refused.add_metric([reason], count)
        yield refused
        yield _histogram("confirm", "From a write until the broker has confirmed all of it.", counts.confirms)
        yield GaugeMetricFamily(
            "fastres_unconfirmed_messages", "Messages that wait for the broker's confirm.", backend.unconfirmed()
        )
        connections = CounterMetricFamily(
            "fastres_connections_opened", "Connections that were opened, by what for.", labels=["use"]
        )
        for use, count in list(counts.connections.items()):
            connections.add_metric([use], count)
        yield connections
        yield from _of_joiner(counts.joiner, None)
        yield GaugeMetricFamily(
            "fastres_joiner_shards", "Shards of the chords' log that this process reads.", counts.shards
        )


class ChordCollector:
    """A collector for ``prometheus_client``: open chords and joiners. Each scrape asks the broker and the joiners.

    Args: those of ``ProcessCollector``.
    """

    def __init__(self, app: Any = None) -> None:
        self._backend = _backend_of(app)

    def collect(self) -> Iterator[Metric]:
        """Without a broker, ``fastres_up`` is 0 and there is nothing else."""
        shards: list[ShardStatus] = []
        try:
            shards = self._backend.asker.status(TIMEOUT)
        except Exception as exc:
            logger.warning("The broker cannot be asked about chords: %r", exc)
        yield GaugeMetricFamily("fastres_up", "Whether the broker could be asked.", int(bool(shards)))
        if not shards:
            return
        yield _gauge("joiners", "Joiners that read the log or stand by.", ((s, s.joiners) for s in shards))
        yield _gauge("events_waiting", "Events that nobody has read.", ((s, s.waiting) for s in shards))
        answered = [(shard, shard.open) for shard in shards if shard.open is not None]
        yield _gauge(
            "joiner_answers", "Whether the joiner has answered.", ((s, int(s.open is not None)) for s in shards)
        )
        yield _gauge("open_chords", "Chords that are not complete.", ((s, o.count) for s, o in answered))
        yield _gauge("open_chord_parts", "Parts of them that have come.", ((s, o.parts) for s, o in answered))
        yield _gauge("open_chord_parts_missing", "Parts that are to come.", ((s, o.missing) for s, o in answered))
        now = time.time()
        ages = [(s, max(0.0, now - min((c.since for c in o.chords), default=now))) for s, o in answered]
        yield _gauge("oldest_open_chord_age_seconds", "The age of the oldest of them.", ages)
        yield _gauge(
            "joiner_start_time_seconds", "When the joiner started.", ((s, o.running_since) for s, o in answered)
        )
        for shard, known in answered:
            if known.counts is not None:
                yield from _of_joiner(known.counts, shard.queue)


def _of_joiner(counts: JoinerCounts, queue: str | None) -> Iterator[Metric]:
    labels = {} if queue is None else {"queue": queue}
    yield _counter("chord_bodies", "Bodies of chords that the joiner has called.", counts.bodies, labels)
    yield _counter("failed_chords", "Chords whose errbacks it has called.", counts.failed, labels)
    yield _histogram("commit", "From a write of bodies or events to the broker's answer.", counts.commits, labels)


def _counter(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    metric = CounterMetricFamily(f"fastres_{name}", text, labels=list(labels or {}))
    metric.add_metric(list((labels or {}).values()), value)
    return metric


def _gauge(name: str, text: str, values: Iterable[tuple[ShardStatus, float]]) -> Metric:
    metric = GaugeMetricFamily(f"fastres_{name}", text, labels=["queue"])
    for shard, value in values:
        metric.add_metric([shard.queue], value)
    return metric


def _histogram(name: str, text: str, latency: Latency, labels: dict[str, str] | None = None) -> Metric:
    metric = HistogramMetricFamily(f"fastres_{name}_seconds", text, labels=list(labels or {}))
    below = list(accumulate(latency.buckets))
    buckets = [*((str(bound), count) for bound, count in zip(BOUNDS, below)), ("+Inf", below[-1])]
    metric.add_metric(list((labels or {}).values()), buckets, latency.seconds)
    return metric


def serve(app: Any, address: str, port: int) -> Any:
    """Serve the numbers of an application's chords over HTTP, in threads of this process.

    Returns: the server; ``server.server_port`` is its port, ``shutdown()`` stops it.

    Raises: OSError: the port cannot be had.
    """
    from prometheus_client import start_http_server
    from prometheus_client.registry import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(ChordCollector(app))
    server, _ = start_http_server(port, address, registry=registry)
    return server
