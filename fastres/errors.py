"""The exceptions of fastres. A leaf module, so that both implementations raise the same classes."""

from __future__ import annotations

from typing import Any

import amqp.exceptions
from celery.exceptions import TimeoutError
from kombu.exceptions import DecodeError, EncodeError, OperationalError

__all__ = (
    "AccessRefused",
    "BacklogLimitExceeded",
    "BrokerUnreachable",
    "ConsumerTimeout",
    "Error",
    "MalformedEvent",
    "MalformedResult",
    "MessageRefused",
    "NewerEvent",
    "OversizedResult",
    "QueueGone",
    "ResultTooLarge",
    "ResultsGone",
    "ResultsMissing",
    "TasksNotSent",
    "refusal",
)


#: How RabbitMQ words that: "delivery acknowledgement on channel 1 timed out".
TIMED_OUT = "delivery acknowledgement"


class Error(Exception):
    """The base of all exceptions of fastres. Each is also an instance of what Celery, kombu or py-amqp raise."""


class BrokerUnreachable(Error, OperationalError):  # type: ignore[misc]
    """The broker could not be reached, or did not respond, within the given time."""


class AccessRefused(Error, amqp.exceptions.AccessRefused):  # type: ignore[misc]
    """The user lacks a permission at the broker."""


class ConsumerTimeout(Error, amqp.exceptions.PreconditionFailed):  # type: ignore[misc]
    """Messages were unacknowledged for longer than the broker's ``consumer_timeout``."""


class QueueGone(Error, OperationalError):  # type: ignore[misc]
    """A queue was deleted again each time that it was declared."""


class MessageRefused(Error, amqp.exceptions.MessageNacked):  # type: ignore[misc]
    """The broker has refused a message."""


class TasksNotSent(Error, OperationalError):  # type: ignore[misc]
    """The broker has refused some of the tasks of ``fastres.apply_many``, or had no queue for them.

    Args:
        text: the message.
        refused: why, by their place in the group.
        result: the ``GroupResult`` of all of them.
    """

    def __init__(self, text: str, refused: dict[int, str] | None = None, result: Any = None) -> None:
        super().__init__(text)
        self.refused = refused or {}
        self.result = result


class ResultsMissing(Error, TimeoutError):  # type: ignore[misc]
    """Not all results arrived before the timeout. The message says what is known about the reason."""


class ResultsGone(Error, LookupError):
    """Results that can be read once are not in their queue: they expired, or were read before."""


class BacklogLimitExceeded(Error):
    """Too much state history to fast-forward (Celery 3.1)."""


class MalformedResult(Error, DecodeError):  # type: ignore[misc]
    """A message that can be decoded, but lacks a field that every Celery result has."""


class MalformedEvent(Error, DecodeError):  # type: ignore[misc]
    """A message in the log of the chords is not an event."""


class NewerEvent(Error):
    """An event in the log of the chords was published by a newer fastres."""


class OversizedResult(Error, DecodeError):  # type: ignore[misc]
    """A compressed result decompresses to more than the limit."""


class ResultTooLarge(Error, EncodeError):  # type: ignore[misc]
    """The broker refused a result because of its size.

    An ``EncodeError``, so that Celery's worker turns it into the failure of the task.
    """


def refusal(exc: Exception, broker: str) -> Exception:
    """The exception for a refusal of the broker, with advice, as it is raised or logged.

    Args:
        broker: its URL, without the password.
    """
    if isinstance(exc, Error):
        return exc
    if isinstance(exc, amqp.exceptions.AccessRefused):
        # The broker names the queue and the user.
        return AccessRefused(
            f"the broker {broker} says: {exc.reply_text}. `celery -A proj fastres doctor` prints the "
            "permissions that clients and workers need, for `rabbitmqctl set_permissions`"
        )
    if isinstance(exc, amqp.exceptions.PreconditionFailed) and TIMED_OUT in (exc.reply_text or ""):
        return ConsumerTimeout(
            f"the broker {broker} says: {exc.reply_text}. Results were held for longer than its consumer_timeout "
            "allows, by a slow loop over them, say"
        )
    return exc
