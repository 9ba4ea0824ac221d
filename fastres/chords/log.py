"""Publishes the events of chords: size and body, parts, and tasks that are added."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec
from celery import states
from celery._state import get_current_task
from celery.app.task import Context
from celery.canvas import _regen
from celery.exceptions import ImproperlyConfigured
from celery.result import GroupResult
from kombu.compression import compress
from kombu.exceptions import EncodeError
from kombu.serialization import dumps
from kombu.utils.functional import LRUCache
from kombu.utils.uuid import uuid

from fastres._impl import encode
from fastres.addresses import Address
from fastres.amqp.publishing import Message
from fastres.chords.events import (
    CONTENT_TYPE,
    PERSISTENT,
    REFERENCE,
    WITH_TERMS,
    Event,
    Part,
    Plan,
    pack_part,
    pack_plan,
    write_event,
)
from fastres.chords.lazy import wants_reference
from fastres.chords.routes import Routes
from fastres.chords.settle import terms_of
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastres.addresses import Addresses
    from fastres.write.publisher import Publisher

__all__ = ("Log", "shard_of")

#: The header of a body's signature with the number of the chord's shard: the sender and the workers may be set to
#: different numbers of shards.
SHARD = "fastres-shard"
#: The fields of a request of Celery.
CELERY_FIELDS = frozenset((*vars(Context), "argsrepr", "compression", "kwargsrepr", "lang", "on_failure", "task"))
#: The number of chords that were sent without a size yet whose plans are kept.
MAX_PLANS = 10_000


class Log:
    """Publishes the events of chords.

    Args:
        backend: the backend of the chords.
        publisher: publishes them.
        addresses: the backend's addresses.
        shards: the number of shards.
    """

    def __init__(self, backend: Any, publisher: Publisher, addresses: Addresses, shards: int) -> None:
        self._backend = backend
        self._publisher = publisher
        self._addresses = addresses
        self._shards = shards
        self._compression: str | None = backend.app.conf.get("result_compression")
        #: Shard, packed plan and terms by chord id.
        self._plans = LRUCache(limit=MAX_PLANS)
        self._routes = Routes(backend.app)
        self._supported: bool | None = None
        #: Shards that joiners with this process's settings do not consume, and that were logged.
        self._unread: set[int] = set()

    def supported(self) -> bool:
        """Whether the broker has single active consumers, which shards need."""
        if self._supported is None:
            self._supported = self._publisher.run(lambda writer: writer.connect().single_active_consumer)
        return self._supported

    def begin(self, chord_id: str, body: Any, results: Any) -> None:
        """Register the body and the header's results of a chord that is about to be sent.

        Raises:
            celery.exceptions.ImproperlyConfigured, kombu.exceptions.EncodeError: it cannot be sent like this.
        """
        if wants_reference(body) and not self._backend.options.keep_chord_results:
            raise ImproperlyConfigured(
                "the body of this chord is to get the results of its header by reference (fastres.lazy): "
                "they are not kept where keep_chord_results is off"
            )
        terms = terms_of(body)
        shard = self.shard(chord_id)
        # The tasks of the header carry this signature.
        body.options["headers"] = {**(body.options.get("headers") or {}), SHARD: shard}
        content_type, content_encoding, content = self._serialize(body, _structure(results))
        content = content.encode(content_encoding) if isinstance(content, str) else content
        self._plans[chord_id] = shard, pack_plan(Plan(content_type, content_encoding, content)), terms

    def _serialize(self, body: Any, structure: list[Any] | None) -> Any:
        """Serialize the body like the tasks of the header. Its own serializer may not accept a signature."""
        try:
            return dumps((body, structure), self._backend.app.conf.task_serializer)
        except EncodeError:
            own = body.options.get("serializer")
            if not own:
                raise
            return dumps((body, structure), own)

    def size(self, chord_id: str, size: int, failed: str = "") -> None:
        """Publish the number of parts of a chord that was registered with :meth:`begin`.

        Args:
            failed: why it fails, although its parts may all arrive: in one event, or the joiner might call the body.
        """
        try:
            shard, plan, terms = self._plans.pop(chord_id)
        except KeyError:
            # A group inside a header: its parts are the chord's.
            return
        event = Event(chord_id, at=time.time(), size=size, run=uuid(), plan=len(plan))
        if terms is not None:
            event.version, event.terms = WITH_TERMS, terms
            if terms.deadline is not None:
                event.terms = msgspec.structs.replace(terms, deadline=event.at + terms.deadline)
        if failed:
            event.version, event.failed = WITH_TERMS, failed
        self._send(shard, chord_id, write_event(event, plan))

    def part(self, request: Any, state: str, result: Any, notified: list[str] | None = None) -> None:
        """Publish the part of a header task that has returned or raised, or was revoked.

        Args:
            notified: errbacks that were called already.
        """
        shard = shard_of(request.chord)
        chord_id, task_id = request.group, request.id
        if shard is None or not chord_id or not task_id:
            return
        if shard >= self._shards and shard not in self._unread and self._backend.options.chord_joiner:
            self._unread.add(shard)
            logger.warning(
                "Chord %s is joined in shard %d, which workers with chord_shards=%d do not read: it was sent with "
                "more of them, which the workers must have first.", chord_id, shard, self._shards,
            )  # fmt: skip
        packed = self._pack(request, state, result)
        root = request.root_id
        event = Event(
            chord_id,
            at=time.time(),
            part=task_id,
            root=root if root and root != task_id else "",
            context={**context_of(request), **self._routes.of(request.chord)},
        )
        if notified:
            event.notified = notified
        self._send(shard, task_id, write_event(event, parts=(packed,)))

    def _pack(self, request: Any, state: str, result: Any) -> bytes:
        place = request.group_index
        if wants_reference(request.chord) and state not in states.EXCEPTION_STATES:
            # The body reads it from the queue of the results.
            if self._addresses.result(request.id).name == self._addresses.group(request.group).name:
                return REFERENCE
            result = None
        content_type, content_encoding, body = encode(
            self._backend.encode_result(result, state), self._backend.serializer
        )
        compression = ""
        if self._compression:
            body, compression = compress(body, self._compression)
        return pack_part(Part(place, state, content_type, content_encoding, body, compression))

    def add(self, chord_id: str, task_id: str) -> None:
        """Add a task to a chord. Called by the running task of its header."""
        task = get_current_task()
        body = getattr(task and task.request, "chord", None)
        shard = shard_of(body) if body else self.shard(chord_id)
        if shard is None:
            raise NotImplementedError(
                f"chord {chord_id} is joined by celery.chord_unlock, which takes no more tasks"
            )
        self._send(shard, task_id, write_event(Event(chord_id, at=time.time(), added=[task_id])))

    def fail(self, chord_id: str, why: str) -> None:
        """Fail an open chord: its errbacks are called."""
        event = Event(chord_id, at=time.time(), failed=why, version=WITH_TERMS)
        self._send(self.shard(chord_id), chord_id, write_event(event))

    def put_back(self, name: str, bodies: list[bytes]) -> None:
        """Publish events to a shard again that were acknowledged there, and wait for the broker's confirm."""
        for body in bodies:
            message = Message(body, CONTENT_TYPE, "binary", "", PERSISTENT, {})
            self._publisher.publish(Address(name), message, declare=False)
        self._publisher.wait_for_confirms()

    def shard(self, chord_id: str) -> int:
        """The shard of a chord, with the settings of this process."""
        return crc32(chord_id.encode()) % self._shards

    def _send(self, shard: int, correlation_id: str, body: bytes) -> None:
        message = Message(body, CONTENT_TYPE, "binary", correlation_id, PERSISTENT, {})
        self._publisher.publish(self._addresses.chords(shard), message, declare=True)


def context_of(request: Any) -> dict[str, Any]:
    """The fields of the last part's request that the body, and receivers of signals, may use.

    Only values that JSON can hold. For most requests this is only the name of the worker.
    """
    context: dict[str, Any] = {}
    if request.hostname:
        context["hostname"] = request.hostname
    if request.correlation_id and request.correlation_id != request.id:
        context["correlation_id"] = request.correlation_id
    priority = (request.delivery_info or {}).get("priority")
    if priority:
        context["delivery_info"] = {"priority": priority}
    # Headers of clients are beside Celery's. SDKs put theirs into a header named "headers" too.
    custom = {key: value for key, value in vars(request).items() if key not in CELERY_FIELDS}
    for name, value in (("custom", custom), ("headers", request.headers), ("stamps", request.stamps)):
        if value and (name != "headers" or value != custom):
            shown = {str(key): each for key, each in value.items() if _is_json(each)}
            if shown:
                context[name] = shown
    if request.stamped_headers and _is_json(request.stamped_headers):
        context["stamped_headers"] = request.stamped_headers
    return context


def _is_json(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True


def shard_of(body: Any) -> int | None:
    """The shard in which the chord of a body is joined; None: no body, or not joined from the log."""
    if not body:
        return None
    shard = ((body.get("options") or {}).get("headers") or {}).get(SHARD)
    return shard if isinstance(shard, int) else None


def _structure(results: Any) -> list[Any] | None:
    """Task ids, nested like the groups in a header; None if there are no groups in it."""
    if isinstance(results, _regen) or not any(isinstance(result, GroupResult) for result in results):
        return None

    def ids(results: Iterable[Any]) -> list[Any]:
        return [ids(result.results) if isinstance(result, GroupResult) else result.id for result in results]

    return ids(results)
