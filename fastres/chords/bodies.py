"""What a joined chord goes on with: its body's messages, or the failure that its errbacks are told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from hashlib import sha1
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound
from celery import states
from celery._state import _task_stack
from celery.app.task import Context
from celery.canvas import _chain, chord, group, maybe_signature
from celery.exceptions import ChordError
from kombu import Producer, Queue
from kombu.exceptions import DecodeError, OperationalError
from kombu.serialization import loads, prepare_accept_content, registry
from kombu.utils.encoding import safe_repr
from kombu.utils.functional import maybe_list
from kombu.utils.json import dumps as kombu_json_dumps
from kombu.utils.json import loads as kombu_json_loads
from kombu.utils.uuid import uuid

from fastres._impl import in_order, listed
from fastres.amqp.publishing import Publishing
from fastres.amqp.session import says_no_queue
from fastres.chords.events import JSON, REFERENCE, UTF8, Part, pack_part, unpack_part, unpack_plan
from fastres.chords.lazy import HeaderResults, wants_reference
from fastres.chords.reducer import id_of
from fastres.chords.routes import ROUTES, redirected
from fastres.chords.settle import Failure, failure_json, refusal_of_terms
from fastres.chords.tracing import continued
from fastres.compression import unpack
from fastres.ids import expand
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres.chords.reducer import Chord

__all__ = ("Away", "Bodies", "BodyProducer", "Failed")

#: How many results the representation of a body's arguments shows.
SHOWN = 3
#: What is raised by what is the user's, and ends nothing but a chord: ``SystemExit`` is raised by tasks too.
USERS = (Exception, SystemExit, KeyboardInterrupt)
#: Seconds after which a broker that does not confirm a body is taken to be gone.
PATIENCE = 30.0


class Failed(Exception):
    """A chord whose body cannot be called: the error that its errbacks are told."""

    def __init__(self, body: Any, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.body = body
        self.error = ChordError(message)
        self.error.__cause__ = cause


class Away(Exception):
    """The queue of a body is on a node that is down: the body is sent when it is back."""


class Values(Sequence[Any]):
    """The results of a header as its body's argument: serialized as they came, decoded only if somebody looks.

    Args:
        tree: packed parts whose results are JSON, and lists of such.
    """

    def __init__(self, tree: list[Any]) -> None:
        self._tree = tree
        #: Stands for the results, while a message is serialized, until their own bytes are put in its place.
        self._token: str | None = None

    def __len__(self) -> int:
        return len(self._tree)

    def __getitem__(self, index: Any) -> Any:
        return self._value(self._tree[index])

    def _value(self, item: Any) -> Any:
        return (
            [self._value(inner) for inner in item] if isinstance(item, list) else kombu_json_loads(listed([item]))
        )

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, islice(self, SHOWN)))
        return f"[{shown}]" if len(self) <= SHOWN else f"[{shown}, ... {len(self)} results]"

    def __json__(self) -> Any:
        return self._token or list(self)

    def __reduce__(self) -> Any:
        return list, (list(self),)

    def serialize(self, body: Any) -> bytes:
        """A message's body, which may hold these results, as JSON."""
        self._token = uuid()
        token = f'"{self._token}"'
        try:
            text: str = kombu_json_dumps(body)
        finally:
            self._token = None
        around = text.replace(token, f"[{token}]").encode().split(token.encode())
        return self._json(self._tree).join(around) if len(around) > 1 else around[0]

    def _json(self, tree: list[Any]) -> bytes:
        """JSON of a list, without its brackets."""
        try:
            flat: bytes = listed(tree)
        except TypeError:
            # There are lists in it.
            items = (b"[%b]" % self._json(item) if isinstance(item, list) else listed([item]) for item in tree)
            return b",".join(items)
        return flat


class BodyProducer(Producer):  # type: ignore[misc]
    """Publishes tasks; the results of a header are put into their arguments as they are.

    Args:
        channel: a channel.
        publishings: where messages are put instead of being published; what they need is declared all the same.
        is_classic: whether a queue that is there is known to be a classic one.
    """

    values: Values | None = None

    def __init__(
        self,
        channel: Any,
        publishings: list[Publishing] | None = None,
        is_classic: Callable[[Any], bool] = lambda queue: False,
    ) -> None:
        super().__init__(channel, auto_declare=False)
        self.publishings = publishings
        self._is_classic = is_classic
        #: Queues of which it is known, by their name.
        self._classic: dict[str, bool] = {}
        #: What the connection broke with, while something was to be published: no error of the user's.
        self.broken: Exception | None = None
        self._breaks = (*channel.connection.client.recoverable_connection_errors, OperationalError)

    def _prepare(
        self, body: Any, serializer: Any = None, content_type: Any = None, content_encoding: Any = None,
        compression: Any = None, headers: Any = None,
    ) -> Any:  # fmt: skip
        if self.values is not None and not content_type:
            if serializer == "json" and is_kombus_json():
                body = self.values.serialize(body)
                content_type, content_encoding = JSON, UTF8
            else:
                body = self._with_list(body)
        return super()._prepare(body, serializer, content_type, content_encoding, compression, headers)

    def _with_list(self, body: Any) -> Any:
        """The body of a task's message, with a list where the results are."""

        def plain(args: Any) -> list[Any]:
            return [list(arg) if isinstance(arg, Values) else arg for arg in args]

        if isinstance(body, dict):
            return {**body, "args": plain(body["args"])}
        args, *rest = body
        return (plain(args), *rest)

    def publish(self, body: Any, **options: Any) -> Any:
        if self.publishings is not None:
            # Nothing is sent yet: there is nothing to try again.
            options["retry"] = False
        else:
            options["confirm_timeout"] = PATIENCE
        try:
            return super().publish(body, **options)
        except self._breaks as exc:
            self.broken = exc
            raise
        except NotFound as exc:
            # Seen here and not by its type later: tasks and signals of users may raise the same.
            if not says_no_queue(exc):
                self.broken = exc
            raise

    def _publish(
        self, body: Any, priority: Any, content_type: Any, content_encoding: Any, headers: Any, properties: Any,
        routing_key: Any, mandatory: Any, immediate: Any, exchange: Any, declare: Any, *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        if self.publishings is None:
            return super()._publish(
                body, priority, content_type, content_encoding, headers, properties, routing_key, mandatory,
                immediate, exchange, declare, *rest, **more,
            )  # fmt: skip
        for entity in declare or ():
            self.maybe_declare(entity)
        message = self.channel.prepare_message(body, priority, content_type, content_encoding, headers, properties)
        # A transaction on a quorum queue ends well when the queue is full and has dropped the message.
        queue = next((entity for entity in declare or () if _leads_to(entity, exchange, routing_key)), None)
        confirm = queue is None or not self._knows_as_classic(queue)
        self.publishings.append(Publishing(message, exchange, routing_key, confirm=confirm))
        return None

    def _knows_as_classic(self, queue: Queue) -> bool:
        known = self._classic.get(queue.name)
        if known is None:
            known = self._classic[queue.name] = self._is_classic(queue)
        return known


class Bodies:
    """Calls the bodies of chords, and their errbacks.

    Args:
        backend: the backend of the chords.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._app = backend.app
        #: Of a thread that sends what follows a chord: ``publisher``, which Celery's own is replaced with if it is
        #: there, and ``context``, that of the chord's last part.
        self._sending = threading.local()
        #: Tasks, our queue and theirs, that were told of.
        self._redirected: set[tuple[str, str, str]] = set()
        self._intercept(self._app.amqp)

    def _intercept(self, amqp: Any) -> None:
        """A chain and a chord do not pass the producer on that they are given."""
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
        """What a thread sends in here follows a chord."""
        sending = self._sending
        sending.context = chord.context
        if publisher is not None:
            sending.publisher = publisher
        try:
            yield
        finally:
            sending.__dict__.clear()

    def plan(self, chord: Chord) -> tuple[Any, list[Any] | None]:
        """The body's signature, and the structure of the header where there are groups in it.

        Raises:
            Exception: what is told of them cannot be read.
        """
        plan = unpack_plan(chord.plan)
        accept = prepare_accept_content(self._app.conf.accept_content)
        body, tree = loads(plan.content, plan.content_type, plan.content_encoding, accept=accept)
        return maybe_signature(body, app=self._app), tree

    def call(self, chord: Chord, publisher: BodyProducer) -> None:
        """Publish what a complete chord goes on with.

        Raises:
            Failed: its errbacks are to be notified.
            Exception: its plan cannot be read: there is no body that could be notified.
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
            return Values(_filled(tree, lambda task_id: pack_part(_as_value(parts[task_id]))))
        return _filled(tree, lambda task_id: self._decode_value(task_id, parts[task_id]))

    def _decode_value(self, task_id: str, part: Part) -> Any:
        value = self._decode(task_id, part)
        return Failure(value) if part.state in states.PROPAGATE_STATES else value

    def _check_terms(self, body: Any, chord: Chord, parts: dict[str, Part]) -> None:
        """Whether a chord with terms of its own goes on.

        Args:
            parts: those of it that have failed, and any others.

        Raises: Failed: it does not.
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
        # There may be a million, and as a rule they are all the same.
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
        """Tell a chord's errbacks, everybody who waits for its body, and the chord that it is a part of.

        Celery links the errbacks of a chord to the chords in its header too: each is told once.
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
        """Raises: DecodeError: it cannot be made a value."""
        try:
            value = loads(part.result, part.content_type, part.content_encoding, accept=self._backend.accept)
            return self._backend.exception_to_python(value) if part.state in states.EXCEPTION_STATES else value
        except Exception as exc:
            raise DecodeError(f"the result of task {id_of(task_id)} cannot be decoded: {safe_repr(exc)}") from exc


def _as_value(part: Part) -> Part:
    """A part of JSON as a value for the body: what was raised is one too, on the terms of its chord."""
    if part.state not in states.PROPAGATE_STATES:
        return part
    return part._replace(state=states.SUCCESS, result=failure_json(part.result))


def _pruned(tree: list[Any], parts: dict[str, Part]) -> list[Any]:
    """Without the tasks that have not come."""
    return [
        _pruned(each, parts) if isinstance(each, list) else each
        for each in tree
        if isinstance(each, list) or each in parts
    ]


def _leads_to(entity: Any, exchange: str, routing_key: str) -> bool:
    """Whether this is the queue that gets what is published like that, as far as the application knows."""
    if not isinstance(entity, Queue):
        return False
    if not exchange:
        return bool(entity.name == routing_key)
    where = entity.exchange.name, entity.exchange.type, entity.routing_key
    return where == (exchange, "direct", routing_key)


def _tasks_of(body: Any) -> Iterator[Any]:
    """A body, and the tasks in it if it is a group: what errbacks may be linked to."""
    yield body
    if isinstance(body, group):
        for task in body.tasks:
            yield from _tasks_of(task)


def _ends_of(body: Any) -> Iterator[Any]:
    """The tasks that a body has returned with."""
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
    """Tells errbacks apart, and is the same for copies of one."""
    what = errback["task"], tuple(errback["args"]), sorted(errback["kwargs"].items())
    return sha1(repr(what).encode()).hexdigest()[:16]


def is_kombus_json() -> bool:
    encoder = registry._encoders.get("json")
    return encoder is not None and encoder[2] is kombu_json_dumps


def _in_order(parts: dict[str, Part]) -> list[str]:
    """Task ids by their place in the header, those that were added without one behind."""
    return sorted(parts, key=lambda task_id: (parts[task_id].place is None, parts[task_id].place or 0))


def _leaves(tree: list[Any]) -> Iterator[str]:
    for item in tree:
        if isinstance(item, list):
            yield from _leaves(item)
        else:
            yield item


def _filled(tree: list[Any], of: Callable[[str], Any]) -> list[Any]:
    """A tree of task ids with something else in the place of each."""
    return [_filled(item, of) if isinstance(item, list) else of(item) for item in tree]


@contextlib.contextmanager
def _as_part(chord: Chord) -> Iterator[None]:
    """What is published in here comes from the part that came last, which Celery makes the parent of the body."""
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
