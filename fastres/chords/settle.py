"""Chords whose body is called although tasks have failed, or before all tasks have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from celery import current_app
from celery.canvas import maybe_signature
from celery.exceptions import ImproperlyConfigured
from kombu.utils.json import register_type

from fastres.chords.events import Terms
from fastres.chords.lazy import mark_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("Failure", "allowed_of", "checked", "failure_json", "refusal_of_terms", "settle", "terms_of")

#: The header of a body's signature that has the terms of its chord.
SETTLE = "fastres-settle"
#: The type of an exception in JSON.
FAILURE = "fastres.failure"


class Failure:
    """Serializes an exception among the results of a header. The body receives the exception.

    Args:
        error: the exception of the task.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _itself, (self.error,)


def _itself(error: BaseException) -> BaseException:
    return error


register_type(
    Failure,
    FAILURE,
    lambda failure: current_app.backend.prepare_exception(failure.error, "json"),
    lambda known: current_app.backend.exception_to_python(known),
)


def failure_json(result: bytes) -> bytes:
    """JSON of a failure, from that of its result."""
    return b'{"__type__":"%b","__value__":%b}' % (FAILURE.encode(), result)


def settle(
    body: Any,
    *,
    tolerate: float | None = None,
    first: int | None = None,
    deadline: float | None = None,
    revoke: bool = False,
) -> Any:
    """Return a signature of a chord's body that is called even if tasks of the header fail.

    ``chord(header)(fastres.settle(body))`` calls the body with a list in the order of the header: the value of each
    task that succeeded, and the exception of each task that failed or was revoked. Combines with
    :func:`fastres.lazy`.

    Args:
        body: the signature of a task or a group.
        tolerate: how many tasks may fail, as a number, or as a share of the header (a float below 1). More failures
            fail the chord. None: all tasks may fail.
        first: call the body when this number of tasks has succeeded, with the results that have arrived by then.
            The chord fails if all tasks have ended and fewer have succeeded.
        deadline: seconds after sending, precise to about two, at which the body is called with the results that have
            arrived, unless more tasks have failed than ``tolerate`` allows.
        revoke: when ``first`` or ``deadline`` ends the chord, cancel the tasks that have not begun. If False, they
            run, and their results are dropped.

    Raises:
        ValueError: an argument is out of range.
    """
    terms = checked(tolerate=tolerate, first=first, deadline=deadline, revoke=revoke)
    # Fields with their defaults are left out.
    given = msgspec.to_builtins(terms)
    body = maybe_signature(body).clone()
    return body.set(headers={**(body.options.get("headers") or {}), SETTLE: given})


def checked(*, tolerate: float | None, first: int | None, deadline: float | None, revoke: bool = False) -> Terms:
    """Make terms of the arguments of a user.

    Raises: ValueError: one of these is out of its range.
    """
    if tolerate is not None and (tolerate < 0 or (tolerate > 1 and tolerate != int(tolerate))):
        raise ValueError(f"tolerate={tolerate!r}: a number of tasks, or a share of them below 1")
    if first is not None and (first < 1 or first != int(first)):
        raise ValueError(f"first={first!r}: a number of tasks, 1 or more")
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline={deadline!r}: seconds, more than 0")
    return Terms(tolerate, first, deadline, bool(revoke))


def allowed_of(terms: Terms, total: int) -> int | None:
    """The number of tasks that may fail; None: all."""
    if terms.tolerate is None:
        return None
    is_share = isinstance(terms.tolerate, float) and terms.tolerate < 1
    return int(terms.tolerate * total) if is_share else int(terms.tolerate)


def terms_of(body: Mapping[str, Any]) -> Terms | None:
    """The terms of the chord with this body, as :func:`settle` took them; None: it has none.

    Raises: celery.exceptions.ImproperlyConfigured: the header was not written by :func:`settle`.
    """
    terms = mark_of(body, SETTLE)
    if terms is None:
        return None
    try:
        return Terms(**terms)
    except TypeError as exc:
        raise ImproperlyConfigured(f"the terms of a chord are those of fastres.settle(), not {terms!r}") from exc


def refusal_of_terms(terms: Terms, succeeded: int, failed: int, total: int, closed: bool) -> str | None:
    """Why a chord fails on these terms; None: it does not.

    Args:
        succeeded: the number of tasks that succeeded.
        failed: the number of tasks that failed or were revoked.
        total: the number of tasks.
        closed: whether its deadline has passed.
    """
    allowed = allowed_of(terms, total)
    if allowed is not None and failed > allowed:
        return f"{failed} of {total} tasks have failed, {allowed} of them may"
    if terms.first is not None and succeeded < terms.first and not closed:
        return f"{succeeded} of {total} tasks have succeeded, {terms.first} of them are to"
    return None
