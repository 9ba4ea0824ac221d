"""The progress of groups and chords."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from celery import current_app, states
from celery.exceptions import ImproperlyConfigured
from celery.result import AsyncResult, GroupResult, ResultSet

from fastres.groups import leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Progress", "line_of", "progress", "track", "watched")

#: Seconds for a joiner to answer.
TIMEOUT = 5.0
#: Characters of a bar.
WIDTH = 30


class Progress(NamedTuple):
    """How many tasks of a group or a chord have ended. ``None``: unknown."""

    #: Tasks that succeeded, failed or were revoked.
    ready: int
    #: All tasks.
    total: int | None
    succeeded: int | None = None
    failed: int | None = None
    revoked: int | None = None
    #: Whether this is a chord whose body was not called yet.
    is_open: bool = False


def progress(group: Any, *, app: Any = None, timeout: float = TIMEOUT) -> Progress:
    """Return the progress of a group or a chord.

    The cost does not depend on the number of tasks. A chord costs one question to its joiner. A group costs one
    passive declaration of its queue, which tells the number of results but not their states.

    Args:
        group: a ``GroupResult``, the ``AsyncResult`` of a chord, or the id of a group or of a chord's header.
        app: the application of an id; default: the current application.
        timeout: seconds to wait for the answer of a joiner. Without an answer, a chord is treated as a group.

    Raises:
        fastres.BrokerUnreachable: the broker could not be reached.
    """
    if isinstance(group, AsyncResult):
        if not isinstance(group.parent, GroupResult):
            state = group.state
            return Progress(
                int(state in states.READY_STATES), 1, int(state == states.SUCCESS),
                int(state == states.FAILURE), int(state == states.REVOKED),
            )  # fmt: skip
        header = group.parent
        known = _of_chord(header.app.backend, header.id, timeout)
        if known is not None:
            return known
        ready = len(header) if group.state in states.READY_STATES else _ready(header.app.backend, header.id)
        return Progress(ready, len(header))
    if isinstance(group, GroupResult):
        return Progress(min(len(group), _ready(group.app.backend, group.id)), len(group))
    backend = (app or current_app).backend
    return _of_chord(backend, group, timeout) or Progress(_ready(backend, group), None)


def _of_chord(backend: Any, chord_id: str, timeout: float) -> Progress | None:
    if getattr(backend, "joiner", None) is None:
        return None
    known = backend.asker.chord(chord_id, timeout)
    if known is None:
        return None
    succeeded = known.parts - known.failed - known.revoked
    return Progress(known.parts, known.total, succeeded, known.failed, known.revoked, True)


def _ready(backend: Any, group_id: str) -> int:
    ask = getattr(backend, "group_progress", None)
    if ask is None:
        raise ImproperlyConfigured("progress() needs a result backend of fastres")
    return int(ask(group_id))


def watched(group_id: str, total: int | None, interval: float, app: Any) -> Iterator[dict[str, Any]]:
    """Yield the progress of a group or a chord at intervals, as a dict for display, until it is complete.

    Args:
        total: the number of tasks; None: ask the joiner.
    """
    was_open = False
    start, first = time.monotonic(), None
    while True:
        found = progress(group_id, app=app)
        total = total if found.total is None else found.total
        # A joiner forgets a chord when it has called the body.
        complete = (was_open and not found.is_open) or (total is not None and found.ready >= total)
        was_open = was_open or found.is_open
        ready = total if complete and total is not None else found.ready
        first = ready if first is None else first
        seconds = time.monotonic() - start
        rate = (ready - first) / seconds if seconds > 0 else 0.0
        left = None if total is None or not rate else (total - ready) / rate
        yield {
            "id": group_id, "ready": ready, "total": total, "failed": found.failed, "revoked": found.revoked,
            "rate": round(rate, 1), "left": left if left is None else round(left, 1), "complete": complete,
        }  # fmt: skip
        if complete:
            return
        time.sleep(interval)


def line_of(shown: dict[str, Any]) -> str:
    """The progress as a line of text; on a terminal, it begins with a carriage return."""
    ready, total = shown["ready"], shown["total"]
    parts = [f"{ready:,}" if total is None else f"{ready:,} of {total:,} ({ready / max(total, 1):.0%})"]
    parts += [f"{shown[name]:,} {name}" for name in ("failed", "revoked") if shown[name]]
    if shown["complete"]:
        parts.append("complete")
    else:
        parts.append(f"{shown['rate']:,.1f} a second")
        if shown["left"] is not None:
            parts.append(f"{timedelta(seconds=round(shown['left']))} left")
    line = ", ".join(parts)
    if not sys.stdout.isatty():
        return line
    done = 0 if not total else round(WIDTH * min(1.0, ready / total))
    return f"\r[{'#' * done}{'-' * (WIDTH - done)}] {line}\x1b[K"


def track(
    results: ResultSet, *, label: str | None = None, timeout: float | None = None, propagate: bool = True
) -> Iterator[Any]:
    """The values of a group's tasks as they end, with a progress bar on a terminal's standard error.

    Args:
        results: a ``GroupResult`` or ``ResultSet``. The results of groups inside it are included.
        label: the text before the bar.
        timeout: seconds for all tasks; None: no limit.
        propagate: raise the exception of a failed task. If False, the exception is its value.

    Raises:
        fastres.ResultsMissing: not all results arrived before the timeout.
        Exception: the exception of a task.
    """
    members = list(leaves(results.results))
    if not members:
        return
    ids = list(dict.fromkeys(member.id for member in members))
    arriving = members[0].backend.get_many(ids, timeout=timeout)
    with contextlib.closing(arriving), bar(len(ids), label) as shown:
        for _, meta in arriving:
            shown.update(1)
            if propagate and meta["status"] in states.PROPAGATE_STATES:
                raise meta["result"]
            yield meta["result"]


def bar(length: int, label: str | None) -> Any:
    """A progress bar on standard error."""
    return click.progressbar(length=length, label=label, show_pos=True, show_eta=True, file=sys.stderr)
