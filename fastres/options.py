"""The options of ``result_backend_transport_options``, with defaults and units."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from celery.exceptions import ImproperlyConfigured

__all__ = ("Options",)

#: Options with a fixed set of values.
CHOICES = {
    "task_ids": ("fastres", "celery"),
    "take": ("joins", "always", "never"),
    "queue_type": ("classic", "quorum"),
}
#: The keys of ``retry_policy``.
RETRY = ("max_retries", "interval_start", "interval_step", "interval_max", "timeout")
NUMBER = (int, float)
#: Names that begin with "amq." are the broker's; the names of queues end 255 bytes from here.
NAMESPACE = re.compile(r"(?!amq\.)[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Options:
    """The options of a backend.

    Raises:
        celery.exceptions.ImproperlyConfigured: an option is unknown, or its value is invalid.
    """

    #: Put before every queue name, so that several applications can share a virtual host.
    namespace: str | None = None
    #: Wait for the broker's confirm of every result (of large ones in any case).
    confirm: bool = True
    #: Without: how many messages may wait for their confirm on a connection, kept to be sent again if it breaks.
    confirm_window: int = 1000
    #: Seconds that the broker may take to confirm a result.
    confirm_timeout: float = 60
    #: The generator of task ids: "fastres" gives ids of one kin to tasks whose results are read together; with
    #: "celery", every task has an id and a queue of its own.
    task_ids: str = "fastres"
    #: Which reads take results out of their queue: "joins" of several results, "always", "never".
    take: str = "joins"
    #: The type of all queues: "quorum" replicates them over the nodes of a cluster.
    queue_type: str = "classic"
    #: Leave the results of a chord's header in their queue after the chord is joined.
    keep_chord_results: bool = True
    #: The number of queues that the chords are spread over. Each can have a joiner of its own.
    chord_shards: int = 1
    #: Whether workers join chords; ``celery fastres joiner`` does it too.
    chord_joiner: bool = True
    #: Leave the chords that this process sends to ``celery.chord_unlock``: while there are workers that do not
    #: know the log.
    chord_unlock: bool = False
    #: Seconds after which the events of an open chord are renewed: well below RabbitMQ's consumer timeout.
    chord_renewal: int = 600
    #: How many results of a group the broker sends ahead of their acknowledgement.
    prefetch: int = 2000
    #: Largest size of a compressed result once unpacked, in bytes.
    max_unpacked_size: int = 1 << 30
    #: How long to seek a broker that cannot be reached, over the defaults: ``max_retries``, ``interval_start``,
    #: ``interval_step``, ``interval_max`` and ``timeout`` (seconds in all), as for Celery's Redis backend.
    retry_policy: Mapping[str, Any] | None = field(default=None, hash=False)
    #: TLS settings of a ``fastress://`` connection, as ``broker_use_ssl`` takes them.
    ssl: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        expected: dict[str, Any] = {
            "namespace": str, "confirm": bool, "task_ids": str, "take": str, "queue_type": str,
            "keep_chord_results": bool,
            "confirm_window": int, "confirm_timeout": NUMBER, "prefetch": int,
            "max_unpacked_size": int, "ssl": Mapping,
            "retry_policy": Mapping, "chord_shards": int, "chord_joiner": bool, "chord_renewal": int,
            "chord_unlock": bool,
        }  # fmt: skip
        for name, kind in expected.items():
            value = getattr(self, name)
            if value is None and name in ("namespace", "ssl", "retry_policy"):
                continue
            number = kind in (int, NUMBER)
            if not isinstance(value, kind) or (number and (isinstance(value, bool) or value <= 0)):
                what = {int: "a positive int", NUMBER: "a positive number"}.get(kind)
                what = what or f"a {kind.__name__.lower()}"
                raise ImproperlyConfigured(
                    f"result_backend_transport_options: {name} must be {what}, not {value!r}"
                )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ImproperlyConfigured(
                    f"result_backend_transport_options: {name} is one of {', '.join(map(repr, choices))}, "
                    f"not {getattr(self, name)!r}"
                )
        if self.namespace is not None and not NAMESPACE.fullmatch(self.namespace):
            raise ImproperlyConfigured(
                "result_backend_transport_options: namespace has 1 to 100 letters, digits, '.', '_' or '-', "
                f"and does not begin with 'amq.', not {self.namespace!r}"
            )
        for name, value in (self.retry_policy or {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
            if name not in RETRY or not number:
                raise ImproperlyConfigured(
                    "result_backend_transport_options: retry_policy has numbers from 0 on for "
                    f"{', '.join(RETRY)}, not {name!r}: {value!r}"
                )
        for name, limit in (("prefetch", 65535), ("max_unpacked_size", sys.maxsize)):
            if getattr(self, name) > limit:
                raise ImproperlyConfigured(
                    f"result_backend_transport_options: {name} is at most {limit}, not {getattr(self, name)}"
                )

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        known = [option.name for option in fields(cls)]
        for name in given or {}:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ImproperlyConfigured(
                    f"result_backend_transport_options: fastres has no option {name!r}.{hint}"
                    f" It has: {', '.join(sorted(known))}."
                )
        return cls(**(given or {}))
