"""Calls the bodies of joined chords, and the errbacks of failed ones."""

from __future__ import annotations

import contextlib
import threading
from hashlib import sha1
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery import states
from celery._state import _task_stack
from celery.app.task import Context
from celery.canvas import _chain, chord, group, maybe_signature
from celery.exceptions import ChordError
from kombu.exceptions import DecodeError
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.encoding import safe_repr
from kombu.utils.functional import maybe_list

from fastres._impl import expand, in_order
from fastres.chords.events import JSON, REFERENCE, UTF8, Part, pack_part, unpack_part, unpack_plan
from fastres.chords.lazy import HeaderResults, wants_reference
from fastres.chords.producer import Values, filled
from fastres.chords.reducer import id_of
from fastres.chords.routes import ROUTES, redirected
from fastres.chords.settle import Failure, failure_json, refusal_of_terms
from fastres.chords.tracing import continued
from fastres.compression import unpack
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.chords.producer import BodyProducer
    from fastres.chords.reducer import Chord

__all__ = ("Bodies", "Failed")

#: Exceptions of users' code, which fail one chord only. Tasks raise ``SystemExit`` too.
USERS = (Exception, SystemExit, KeyboardInterrupt)


class Failed(Exception):
    """A chord failed: the error with which its errbacks are called."""

    def __init__(self, body: Any, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.body = body
        self.error = ChordError(message)
        self.error.__cause__ = cause


class Bodies:
    """Calls the bodies of chords, and their errbacks.

    Args:
        backend: the backend of the chords.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._app = backend.app
        #: Of a thread that sends body or errbacks: ``publisher``, the producer that replaces Celery's, if there is
        #: one, and ``context``, the context of the chord's last part.
        self._sending = threading.local()
        #: Redirected tasks that were logged: name, queue of this application, queue of the other one.
        self._redirected: set[tuple[str, str, str]] = set()
        self._intercept(self._app.amqp)

    def _intercept(self, amqp: Any) -> None:
        """Replace the producer where tasks are published: chains and chords do not pass on the one they are given."""
        send = amqp.send_task_message

        def send_task_message(producer: Any, name: str, *args: Any, **options: Any) -> Any:
            context = getattr(self._sending, "context", None)
            if context is not None:
                options = redirected(name, options, context, self._report_redirected)
            return send(getattr(self._sending, "publisher", producer), name, *args, **options)

        send_task_message.__wrapped__ = send  # type: ignore[attr-defined]
        amqp.send_task_message = send_task_message

    def _report_redirected(self, name: str, ours: str, theirs: str) -> None:
        if (name, ours, theirs) not in self._redirected:
            self._redirected.add((name, ours, theirs))
            logger.warning(
                "%s, which follows a chord, is sent to queue %r, as the worker of the chord's last task does, and "
                "not to %r, as this one does. If these are two applications, give each a `namespace` of its own.",
                name, theirs, ours,
            )  # fmt: skip

    @contextlib.contextmanager
    def _following(self, chord: Chord, publisher: BodyProducer | None = None) -> Iterator[None]:
        """A context in which this thread sends the body or the errbacks of a chord."""
        sending = self._sending
        sending.context = chord.context
        if publisher is not None:
            sending.publisher = publisher
        try:
            yield
        finally:
            sending.__dict__.clear()

    def plan(self, chord: Chord) -> tuple[Any, list[Any] | None]:
        """Return the body's signature, and the structure of the header if there are groups in it.

        Raises:
            Exception: the plan of the chord cannot be decoded.
        """
        plan = unpack_plan(chord.plan)
        accept = prepare_accept_content(self._app.conf.accept_content)
        body, tree = loads(plan.content, plan.content_type, plan.content_encoding, accept=accept)
        return maybe_signature(body, app=self._app), tree

    def call(self, chord: Chord, publisher: BodyProducer) -> None:
        """Publish the body of a complete chord.

        Raises:
            Failed: the chord failed, and its errbacks are to be called.
            Exception: the plan cannot be decoded, so that neither body nor errbacks are known.
        """
        body, tree = self.plan(chord)
        if chord.failed:
            raise Failed(body, chord.failed)
        try:
            simple = tree is None and chord.terms is None and not wants_reference(body)
            parts = in_order(list(chord.parts.values())) if simple else None
            arguments = self._arguments(body, chord, tree) if parts is None else Values(parts)
        except Failed:
            raise
        except Exception as exc:
            raise Failed(body, f"Join error: {safe_repr(exc)}", exc) from exc
        publisher.values = arguments if isinstance(arguments, Values) else None
        try:
            with self._following(chord, publisher), _as_part(chord):
                body.apply_async((arguments,))
        except USERS as exc:
            raise Failed(body, f"Callback error: {safe_repr(exc)}", exc) from exc
        finally:
            publisher.values = None

    def _arguments(self, body: Any, chord: Chord, tree: list[Any] | None) -> Any:
        if wants_reference(body):
            return self._by_reference(body, chord)
        results = chord.results()
        parts = {task_id: self._unpacked(packed) for task_id, packed in results.items()}
        if tree is None:
            tree = _in_order(parts)
        if chord.terms is None:
            for task_id in _leaves(tree):
                self._check(body, chord, task_id, parts.get(task_id))
        else:
            self._check_terms(body, chord, parts)
            tree = _pruned(tree, parts)
        if all(part.content_type == JSON and part.content_encoding == UTF8 for part in parts.values()):
            return Values(filled(tree, lambda task_id: pack_part(_as_value(parts[task_id]))))
        return filled(tree, lambda task_id: self._decode_value(task_id, parts[task_id]))

    def _decode_value(self, task_id: str, part: Part) -> Any:
        value = self._decode(task_id, part)
        return Failure(value) if part.state in states.PROPAGATE_STATES else value

    def _check_terms(self, body: Any, chord: Chord, parts: dict[str, Part]) -> None:
        """Check the terms of a chord.

        Args:
            parts: the failed parts of the chord, and any others.

        Raises: Failed: the terms are not met.
        """
        assert chord.terms is not None
        failed = [task_id for task_id, part in parts.items() if part.state in states.PROPAGATE_STATES]
        succeeded = len(chord.parts) - len(failed)
        refusal = refusal_of_terms(chord.terms, succeeded, len(failed), chord.total or 0, chord.closed)
        if refusal is not None:
            cause = self._decode(failed[0], parts[failed[0]]) if failed else None
            example = f"; {id_of(failed[0])} raised {safe_repr(cause)}" if failed else ""
            raise Failed(body, f"Chord {chord.id}: {refusal}{example}", cause)

    def _unpacked(self, packed: bytes) -> Part:
        part = unpack_part(packed)
        if not part.compression:
            return part
        result = unpack(part.result, part.compression, self._backend.options.max_unpacked_size)
        return part._replace(result=result, compression="")

    def _by_reference(self, body: Any, chord: Chord) -> HeaderResults:
        elsewhere: list[str] = []
        packed = list(chord.parts.values())
        parts: dict[str, Part] = {}
        # There may be a million, and usually all are references.
        if packed.count(REFERENCE) < len(packed):
            addresses = self._backend.addresses
            header = addresses.group(chord.id).name
            for key, each in chord.parts.items():
                if each == REFERENCE:
                    continue
                name, task_id = expand(key), id_of(key)
                parts[name] = self._unpacked(each)
                if chord.terms is None:
                    self._check(body, chord, task_id, parts[name])
                if addresses.result(task_id).name != header:
                    elsewhere.append(task_id)
        if chord.terms is not None:
            self._check_terms(body, chord, parts)
        return HeaderResults(chord.id, len(packed), elsewhere)

    def fail(self, chord: Chord, failed: Failed) -> None:
        """Call the errbacks of a failed chord, store the failure of its body, and fail the chord that it is a part of.

        Celery also links the errbacks of a chord to the chords in its header. Each errback is called once.
        """
        body = failed.body
        notified = set(chord.notified)
        for task in _tasks_of(body):
            errbacks = maybe_list(task.options.get("link_error")) or []
            left = [errback for errback in errbacks if _fingerprint(errback) not in chord.notified]
            notified.update(map(_fingerprint, left))
            if len(left) < len(errbacks):
                task.options["link_error"] = left
        try:
            # Celery wants the traceback of an exception that is being handled.
            raise failed.error
        except ChordError as error:
            with self._following(chord):
                self._backend.chord_error_from_stack(body, exc=error)
            for task in _ends_of(body):
                part = Context(task.options)
                if part.chord:
                    part.update(id=task.options.get("task_id"), group=task.options.get("group_id"))
                    self._backend.chords.part(part, states.FAILURE, error, sorted(notified))

    def _check(self, body: Any, chord: Chord, task_id: str, part: Part | None) -> None:
        if part is None:
            raise Failed(body, f"Join error: chord {chord.id} has no result of task {task_id}")
        if part.state in states.PROPAGATE_STATES:
            exc = self._decode(task_id, part)
            raise Failed(body, f"Dependency {id_of(task_id)} raised {safe_repr(exc)}", exc)

    def _decode(self, task_id: str, part: Part) -> Any:
        """Raises: DecodeError: the result cannot be decoded."""
        try:
            value = loads(part.result, part.content_type, part.content_encoding, accept=self._backend.accept)
            return self._backend.exception_to_python(value) if part.state in states.EXCEPTION_STATES else value
        except Exception as exc:
            raise DecodeError(f"the result of task {id_of(task_id)} cannot be decoded: {safe_repr(exc)}") from exc


def _as_value(part: Part) -> Part:
    """A JSON part as a value for the body. With ``settle``, an exception is a value too."""
    if part.state not in states.PROPAGATE_STATES:
        return part
    return part._replace(state=states.SUCCESS, result=failure_json(part.result))


def _pruned(tree: list[Any], parts: dict[str, Part]) -> list[Any]:
    """The tree without the tasks whose parts are missing."""
    return [
        _pruned(each, parts) if isinstance(each, list) else each
        for each in tree
        if isinstance(each, list) or each in parts
    ]


def _tasks_of(body: Any) -> Iterator[Any]:
    """Yield the body, and the tasks in it if it is a group: the signatures to which errbacks are linked."""
    yield body
    if isinstance(body, group):
        for task in body.tasks:
            yield from _tasks_of(task)


def _ends_of(body: Any) -> Iterator[Any]:
    """The tasks of a body whose results are the result of the body."""
    if isinstance(body, group):
        for task in body.tasks:
            yield from _ends_of(task)
    elif isinstance(body, _chain):
        yield from _ends_of(body.tasks[-1])
    elif isinstance(body, chord):
        yield from _ends_of(body.body)
    else:
        yield body


def _fingerprint(errback: Any) -> str:
    """Identifies an errback: equal for copies of the same errback."""
    identity = errback["task"], tuple(errback["args"]), sorted(errback["kwargs"].items())
    return sha1(repr(identity).encode()).hexdigest()[:16]


def _in_order(parts: dict[str, Part]) -> list[str]:
    """Task ids by their places in the header; added tasks, which have no place, come last."""
    return sorted(parts, key=lambda task_id: (parts[task_id].place is None, parts[task_id].place or 0))


def _leaves(tree: list[Any]) -> Iterator[str]:
    for item in tree:
        if isinstance(item, list):
            yield from _leaves(item)
        else:
            yield item


@contextlib.contextmanager
def _as_part(chord: Chord) -> Iterator[None]:
    """A context that publishes as the task of the last part, which Celery makes the parent of the body."""
    context = {key: value for key, value in chord.context.items() if key not in ROUTES}
    custom = context.pop("custom", None)
    request = Context(
        {
            **(custom or {}), "correlation_id": chord.last, "delivery_info": {}, "headers": custom, **context,
            "id": chord.last, "root_id": chord.root or chord.last, "group": chord.id, "chord": None,
            "called_directly": False, "is_eager": False,
        }
    )  # fmt: skip
    _task_stack.push(SimpleNamespace(name="celery.chord", request=request, add_trail=lambda result: result))
    try:
        attributes = {"fastres.chord.id": chord.id, "fastres.chord.parts": len(chord.parts)}
        with continued(request.headers or {}, attributes):
            yield
    finally:
        _task_stack.pop()
