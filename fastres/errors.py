"""The exceptions of fastres: one leaf module, so that both implementations raise the same ones."""

from __future__ import annotations

from kombu.exceptions import DecodeError, EncodeError

__all__ = ("BacklogLimitExceeded", "MalformedEvent", "MalformedResult", "OversizedResult", "ResultTooLarge")


class BacklogLimitExceeded(Exception):
    """Too much state history to fast-forward (Celery 3.1)."""


class MalformedResult(DecodeError):  # type: ignore[misc]
    """A message that decodes, but is no result: it lacks a field that every Celery result has."""


class MalformedEvent(DecodeError):  # type: ignore[misc]
    """A message in the log of the chords that is no event of a chord."""


class OversizedResult(DecodeError):  # type: ignore[misc]
    """A compressed result that unpacks to more than the limit."""


class ResultTooLarge(EncodeError):  # type: ignore[misc]
    """The broker refused a result because of its size.

    An ``EncodeError``, so that Celery's worker turns it into the failure of the task.
    """
