"""A Celery result backend that keeps results as AMQP messages, for joins of 10,000 to 1,000,000 tasks."""

from __future__ import annotations

from fastres._impl import impl as __impl__
from fastres.backend import AMQPBackend
from fastres.cancelling import cancel
from fastres.chords.lazy import HeaderResults, lazy
from fastres.chords.settle import settle
from fastres.errors import (
    AccessRefused,
    BacklogLimitExceeded,
    BrokerUnreachable,
    ConsumerTimeout,
    Error,
    MalformedEvent,
    MalformedResult,
    MessageRefused,
    OversizedResult,
    QueueGone,
    ResultsGone,
    ResultsMissing,
    ResultTooLarge,
    TasksNotSent,
)
from fastres.joining import join
from fastres.rpc import RPCBackend
from fastres.sending import apply_many
from fastres.watching import Progress, progress, track

__all__ = (
    "AMQPBackend",
    "AccessRefused",
    "BacklogLimitExceeded",
    "BrokerUnreachable",
    "ConsumerTimeout",
    "Error",
    "HeaderResults",
    "MalformedEvent",
    "MalformedResult",
    "MessageRefused",
    "OversizedResult",
    "Progress",
    "QueueGone",
    "RPCBackend",
    "ResultTooLarge",
    "ResultsGone",
    "ResultsMissing",
    "TasksNotSent",
    "__impl__",
    "__version__",
    "apply_many",
    "cancel",
    "join",
    "lazy",
    "progress",
    "settle",
    "track",
)

__version__ = "0.1.0"
