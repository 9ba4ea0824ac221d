"""``AMQPBackend``: the public API, that of Celery 3.1's class and of Celery 5's backends."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any, Callable, ClassVar
from weakref import WeakSet

import kombu
from celery import current_app, states
from celery._state import get_current_task
from celery.backends.base import Backend
from celery.exceptions import ImproperlyConfigured, TimeoutError
from celery.result import AsyncResult, GroupResult, result_from_tuple
from celery.signals import worker_process_shutdown
from kombu.compression import compress
from kombu.compression import encoders as compression_encoders
from kombu.compression import get_encoder as get_compression_encoder
from kombu.utils.functional import LRUCache
from kombu.utils.url import maybe_sanitize_url

from fastres import canvas, ids
from fastres._impl import Decoder, encode, fulfil
from fastres._protocols import COMPRESSION, KEEP, Meta
from fastres.addresses import Address, Addresses
from fastres.amqp.connection import Link
from fastres.amqp.connector import Connector
from fastres.amqp.session import Message
from fastres.chords.joiner import Joiner
from fastres.chords.lazy import wants_reference
from fastres.chords.log import Log, shard_of
from fastres.errors import BacklogLimitExceeded, BrokerUnreachable
from fastres.groups import Groups, leaves
from fastres.logs import Reports
from fastres.options import Options
from fastres.read.join import Join
from fastres.read.look import Looks
from fastres.read.pending import Pending
from fastres.read.reader import Reader
from fastres.worker import attend
from fastres.write.publisher import Publisher

__all__ = ("AMQPBackend",)

#: Results that this process has read and can be asked for again: Celery 3.1's default for result_cache_max.
CACHED = 100
#: Characters of a correlation id at most: a property has 255 bytes, and a character up to 4.
LONGEST_CORRELATION_ID = 63
#: State and task id of a meta.
FIELDS = itemgetter("status", "task_id")

_backends: WeakSet[AMQPBackend] = WeakSet()


def _after_fork_in_child() -> None:
    for backend in list(_backends):
        backend._after_fork()


def _at_exit(**kwargs: Any) -> None:
    """The end of a process: what it has published is confirmed before."""
    for backend in list(_backends):
        backend._publisher.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
# The children of Celery's pool end without it, those of multiprocessing's have finalizers of their own.
worker_process_shutdown.connect(_at_exit, weak=False, dispatch_uid="fastres-confirms")
multiprocessing.util.register_after_fork(
    _at_exit, lambda at_exit: multiprocessing.util.Finalize(None, at_exit, exitpriority=0)
)
attend()


class AMQPBackend(Backend):  # type: ignore[misc]
    """Results as messages, for any process to read: the id of a task says which queue its result is in.

    The API is that of ``celery.backends.amqp.AMQPBackend`` of Celery 3.1, on Celery 5.5 and later.

    Args:
        app: the Celery application.
        connection: a ``kombu.Connection`` to the broker of the results; default: the URL's, or the application's.
        exchange: the exchange that carries results; default: ``result_exchange``, where Celery's default means
            the default exchange, which routes by queue name.
        exchange_type: ``direct`` or ``topic``; default: ``result_exchange_type``.
        persistent: whether messages survive a restart of the broker; default: ``result_persistent``, or True.
        serializer: default: ``result_serializer``.
        auto_delete: delete a queue when all its results were taken. (Queues are not declared auto-delete, which
            would lose results that come while nobody consumes.)
        expires: seconds or timedelta, default: ``result_expires``.
        url: as in ``result_backend``.

    Raises:
        celery.exceptions.ImproperlyConfigured: an option in ``result_backend_transport_options`` is unknown or
            wrong, or the exchange type cannot carry results.
    """

    class Consumer(kombu.Consumer):  # type: ignore[misc]
        """Consumer that does not declare queues by itself."""

        auto_declare = False

    class Queue(kombu.Queue):  # type: ignore[misc]
        """Queue that never caches its declaration."""

        can_cache_declaration = False

    Exchange = kombu.Exchange
    Producer = kombu.Producer

    #: Raised when there are too many messages for a task id.
    BacklogLimitExceeded = BacklogLimitExceeded

    persistent = True
    supports_autoexpire = True
    supports_native_join = True
    supports_result_compression = True

    retry_policy: ClassVar[dict[str, Any]] = {
        "max_retries": 20,
        "interval_start": 0,
        "interval_step": 1,
        "interval_max": 1,
    }

    _scheme = "fastres"

    def __init__(
        self,
        app: Any,
        connection: Any = None,
        exchange: Any = None,
        exchange_type: str | None = None,
        persistent: bool | None = None,
        serializer: str | None = None,
        auto_delete: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(app, serializer=serializer, **kwargs)
        conf = app.conf
        #: One backend, and one consuming connection, for all threads of a process.
        self.thread_safe = True
        self.persistent = self.prepare_persistent(persistent)
        self.delivery_mode = 2 if self.persistent else 1
        self.auto_delete = auto_delete
        self.options = Options.parse(conf.result_backend_transport_options)
        self.reports = Reports()
        self._extended = bool(conf.result_extended)
        self._compression = self._prepare_compression(conf.get("result_compression"))
        if (kwargs.get("max_cached_results") or conf.result_cache_max) == -1:
            self._cache = LRUCache(limit=CACHED)
        self._connection = connection
        self.addresses = Addresses(
            self.options.namespace,
            getattr(exchange, "name", exchange) or conf.result_exchange,
            exchange_type or getattr(exchange, "type", None) or conf.result_exchange_type,
            self.expires,
            self.Queue,
            self.Exchange,
        )
        self.exchange = self.addresses.exchange
        # An attribute of the class in Celery 3.1, which subclasses may set.
        self.retry_policy = {**self.retry_policy, **(self.options.retry_policy or {})}  # type: ignore[misc]
        self.connector = Connector(app, self.url, connection, self.options)
        self._publisher = Publisher(
            self.connector.open,
            self.addresses,
            self.retry_policy,
            self.options.confirm,
            self.options.confirm_window,
            conf.broker_pool_limit or 10,
        )
        self._link = Link(self.connector.open, self.retry_policy, conf.broker_heartbeat or 0)
        decoder = Decoder(self.accept, self.options.max_unpacked_size)
        self._looks = Looks(self._publisher, self.addresses, decoder, self.reports, auto_delete)
        self._reader = Reader(
            self._link,
            self.addresses,
            decoder,
            self._looks,
            self.reports,
            self.options.prefetch,
            auto_delete,
        )
        self._pending = Pending()
        self._groups = Groups(self._publisher, self._send, self._looks, self.addresses, decoder, self.reports)
        self._chords = Log(self, self._publisher, self.addresses, self.options.chord_shards)
        #: Joins the chords, where it is started.
        self.joiner = Joiner(self) if self._joins else None
        if self._declares and self.options.task_ids == "fastres":
            canvas.install(app, self.expires, pages=self.connector.is_amqp)
        _backends.add(self)

    # -- where a result goes

    def rkey(self, task_id: str) -> str:
        """The name of the queue of a task's result."""
        return self.addresses.rkey(task_id)

    def destination_for(self, task_id: str, request: Any) -> tuple[str, str]:
        """Routing key and correlation id of a task's result."""
        correlation_id = getattr(request, "correlation_id", None) or task_id
        return self.rkey(task_id), correlation_id

    def on_reply_declare(self, task_id: str) -> list[Any]:
        """The queues that are declared before a task's result is sent."""
        return [self.addresses.queue(self.addresses.result(task_id))]

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        """Called when a task is sent: there is nothing to prepare, the worker declares what it sends to."""
        return {}

    # -- writing

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Send a task's state and result; waits for the broker's confirm unless ``confirm`` is off.

        Raises:
            fastres.errors.ResultTooLarge: the broker does not take a message of this size.
            kombu.exceptions.EncodeError: the result cannot be serialized.
            fastres.BrokerUnreachable: the broker could not be reached within ``retry_policy``.
        """
        address = self._outbox(task_id, state, request)
        if address is None:
            return result
        meta = self._get_result_meta(
            result=self.encode_result(result, state), state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        chord = getattr(request, "chord", None)
        by_reference = bool(chord) and wants_reference(chord)
        if by_reference:
            meta["group_index"] = request.group_index
        keep = self.options.keep_chord_results and chord and not by_reference
        correlation_id = getattr(request, "correlation_id", None) or task_id
        self._send(address, meta, correlation_id, {KEEP: True} if keep else {}, self._declares)
        return result

    def check_writing(self) -> None:
        """Do what storing a result takes, without one.

        Raises: what :meth:`store_result` would.
        """
        # One that exists where chords are joined.
        self._publisher.check(self.addresses.chords(0) if self._declares else None)

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """As in Celery; the result of a chord's part is sent to its group and to its chord in one write."""
        together = self._publisher.together() if request and request.chord else contextlib.nullcontext()
        with together:
            super().mark_as_done(task_id, result, request, store_result, state)

    def _get_result_meta(
        self, result: Any, state: str, traceback: Any, request: Any, format_date: bool = True, encode: bool = False
    ) -> Meta:
        """As in Celery, where looking up ``result_extended`` and the date take longer than all the rest."""
        if self._extended or not format_date:
            meta: Meta = super()._get_result_meta(result, state, traceback, request, format_date, encode)
            return meta
        done = datetime.now(timezone.utc).astimezone(self.app.timezone) if state in self.READY_STATES else None
        meta = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": self.current_task_children(request),
            "date_done": None if done is None else done.isoformat(),
        }
        for field, of_request in (("group_id", "group"), ("parent_id", "parent_id")):
            value = getattr(request, of_request, None)
            if value:
                meta[field] = value
        return meta

    #: Whether the queues that results are sent to are this process's to declare.
    _declares = True
    #: Whether chords are joined from a log.
    _joins = True

    def _outbox(self, task_id: str, state: str, request: Any) -> Address | None:
        """Where a state is sent, None: nobody wants it."""
        if not self.options.keep_chord_results and shard_of(getattr(request, "chord", None)) is not None:
            return None
        addresses = self.addresses
        return addresses.result(task_id) if state in states.READY_STATES else addresses.states(task_id)

    def _send(
        self,
        address: Address,
        meta: Meta,
        correlation_id: str,
        headers: dict[str, Any] | None = None,
        declare: bool = True,
    ) -> None:
        content_type, content_encoding, body = encode(meta, self.serializer)
        if self._compression:
            body, compression = compress(body, self._compression)
            headers = {**(headers or {}), COMPRESSION: compression}
        # Only the body has room for any id.
        if len(correlation_id) > LONGEST_CORRELATION_ID or not correlation_id.isprintable():
            correlation_id = ""
        message = Message(body, content_type, content_encoding, correlation_id, self.delivery_mode, headers or {})
        self._publisher.publish(address, message, declare=declare)

    def _prepare_compression(self, compression: str | None) -> str | None:
        if not compression:
            return None
        try:
            get_compression_encoder(compression)
        except KeyError:
            raise ImproperlyConfigured(
                f"result_compression={compression!r}: there is no such method; "
                f"there are {', '.join(sorted(compression_encoders()))}"
            ) from None
        return compression

    # -- waiting

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        cache: bool = True,
        propagate: bool = True,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
        READY_STATES: frozenset[str] = states.READY_STATES,
        PROPAGATE_STATES: frozenset[str] = states.PROPAGATE_STATES,
        **kwargs: Any,
    ) -> Any:
        """Wait for a task and return its result.

        Args:
            timeout: seconds, None: for ever.
            cache: take the result from this process's cache if it is there.
            propagate: raise the exception of a failed task.
            no_ack: False: leave the result for others even where the option ``take`` is ``"always"``.
            on_interval: called about once a second.

        Raises:
            celery.exceptions.TimeoutError: it did not come in time.
            Exception: what the task raised, with ``propagate``.
        """
        meta = self._cached(task_id, READY_STATES) if cache else None
        if meta is None:
            meta = self._wait_for_meta(task_id, timeout, no_ack, on_interval, None, READY_STATES)
        if propagate and meta["status"] in PROPAGATE_STATES:
            raise meta["result"]
        return meta["result"]

    def consume(
        self,
        task_id: str,
        timeout: float | None = None,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> Meta:
        """Wait for a task and return its meta: ``status``, ``result``, ``traceback`` and the rest.

        Raises:
            socket.timeout: it did not come in ``timeout`` seconds.
        """
        try:
            return self._wait_for_meta(task_id, timeout, no_ack, on_interval, None, states.READY_STATES)
        except TimeoutError as exc:
            raise socket.timeout(str(exc)) from exc

    def drain_events(
        self,
        connection: Any,
        consumer: Any,
        timeout: float | None = None,
        on_interval: Callable[[], Any] | None = None,
        now: Callable[[], float] = time.time,
        wait: Callable[..., Any] | None = None,
    ) -> dict[str, Meta]:
        """Drain a connection until final results come to a consumer, and return them by task id.

        Args:
            connection: a ``kombu.Connection``.
            consumer: a ``Consumer`` on it; its callbacks are replaced.
            timeout: seconds, None: for ever.
            on_interval: called after each event, and about once a second.
            now: the clock, in seconds.
            wait: drains one event, default ``connection.drain_events``.

        Raises:
            socket.timeout: none came in time.
        """
        wait = wait or connection.drain_events
        results: dict[str, Meta] = {}

        def on_result(meta: Meta, message: Any) -> None:
            if meta["status"] in states.READY_STATES:
                results[meta["task_id"]] = self._to_python(meta)

        consumer.callbacks[:] = [on_result]
        start = now()
        while not results:
            left = None if timeout is None else timeout - (now() - start)
            if left is not None and left <= 0:
                raise socket.timeout(f"no result came within {timeout} seconds")
            # That one look ends without an event is no news; the time limit is ours.
            with contextlib.suppress(socket.timeout):
                wait(timeout=1.0 if left is None else min(1.0, left))
            if on_interval is not None:
                on_interval()
        self._cache.update(results)
        return results

    def _wait_for_meta(
        self,
        task_id: str,
        timeout: float | None,
        no_ack: bool,
        on_interval: Callable[[], Any] | None,
        on_message: Callable[[Meta], Any] | None,
        ready_states: Iterable[str],
    ) -> Meta:
        join = Join([task_id], ready_states, timeout)
        take = self._takes(no_ack, alone=True)
        results = self._results(join, take, ready_states, on_interval=on_interval, on_message=on_message)
        with contextlib.closing(results):
            _, meta = next(results)
        # As Celery's other backends do after each message: AsyncResult.get looks at the parents there, and raises
        # what made a chord's header fail instead of the ChordError of its body. Not before the end of the wait:
        # the parents' results may be in the same queue.
        if on_interval is not None:
            on_interval()
        return meta

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        no_ack: bool = True,
        now: Callable[[], float] = time.time,
        getfields: Callable[[Meta], tuple[str, str]] = FIELDS,
        READY_STATES: frozenset[str] = states.READY_STATES,
        PROPAGATE_STATES: frozenset[str] = states.PROPAGATE_STATES,
        *,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, Meta]]:
        """Yield ``(task_id, meta)`` of many tasks as they become ready; nothing of it is kept here.

        Args:
            timeout: seconds for all of them, None: for ever.
            no_ack: False: leave the results for others, whatever the option ``take`` is.
            now: the clock that the timeout is measured with, in seconds.
            getfields: state and task id of a meta.
            READY_STATES: the states that are final.
            on_message: called with every meta that comes, those of states that are not final too.
            on_interval: called about once a second, and after each batch.
            max_iterations: how often to look, None: until all are there.

        Raises:
            celery.exceptions.TimeoutError: not all came in time.
        """
        join = Join(task_ids, READY_STATES, timeout, now)
        known = [task_id for task_id in list(self._cache.keys()) if task_id in join.aggregate]
        cached = {task_id: meta for task_id in known if (meta := self._cached(task_id, READY_STATES))}
        join.aggregate.feed([(None, task_id, meta) for task_id, meta in cached.items()])
        yield from cached.items()
        results = self._results(
            join,
            self._takes(no_ack),
            READY_STATES,
            on_message=on_message,
            on_interval=on_interval,
            rounds=max_iterations,
        )
        if getfields is FIELDS:
            yield from results
        else:
            for _, meta in results:
                yield getfields(meta)[1], meta

    def iter_native(
        self,
        result: Any,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, Any]]:
        """Yield ``(task_id, meta)`` of a group's members as they become ready, then ``(group_id, results)`` of the
        groups in it: what ``ResultSet.join_native`` joins.
        """
        self._ensure_not_eager()
        nested = [child for child in result.results if isinstance(child, GroupResult)]
        # Without groups in it, all that comes is the group's own.
        direct = {child.id for child in result.results if not isinstance(child, GroupResult)} if nested else None
        waiting: dict[str, AsyncResult] = {}
        # A result may be in the group more than once.
        again: dict[str, list[AsyncResult]] = {}
        for child in leaves(result.results) if nested else result.results:
            if child._cache is not None:
                if direct is None or child.id in direct:
                    yield child.id, child._cache
            elif waiting.setdefault(child.id, child) is not child:
                again.setdefault(child.id, []).append(child)
        join = Join(waiting, timeout=timeout)
        results = self._results(
            join, self._takes(no_ack), on_message=on_message, on_interval=on_interval, waiting=waiting
        )
        for pair in results:
            task_id, meta = pair
            if again:
                for child in again.get(task_id, ()):
                    fulfil(child, meta)
            if direct is None or task_id in direct:
                yield pair
        for child in nested:
            yield child.id, child.results

    def _results(
        self,
        join: Join,
        take: bool,
        ready_states: Iterable[str] = states.READY_STATES,
        *,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        rounds: int | None = None,
        waiting: dict[str, AsyncResult] | None = None,
    ) -> Generator[tuple[str, Meta], None, None]:
        """Final results of tasks as they come, each handed over when the next one is asked for.

        Args:
            waiting: by task id, what is to hold each result before it counts as handed over: whoever iterates may
                be interrupted before it has done anything with it.
        """
        if not join.aggregate:
            return
        few = len(join.aggregate) <= CACHED
        failures = self.EXCEPTION_STATES
        # A look or two, as ResultSet._iter_meta asks for, takes nothing.
        take = take and rounds is None
        try:
            with_states = on_message is not None or not states.READY_STATES.issuperset(ready_states)
            self._open_inboxes(join, take, with_states)
            for batch in self._reader.wait(join, on_interval=on_interval, rounds=rounds):
                handed = 0
                try:
                    for _, task_id, meta in batch.arrivals:
                        if on_message is not None:
                            on_message(meta)
                        if batch.final:
                            failed = meta["status"] in failures
                            if failed:
                                self._to_python(meta)
                            # What is not in its queue any more can be asked for again.
                            if (few and not failed) or (failed and take):
                                self._cache[task_id] = meta
                            if waiting is not None:
                                fulfil(waiting[task_id], meta)
                            handed += 1
                            yield task_id, meta
                finally:
                    self._reader.handed_over(join, handed, take)
        except BrokerUnreachable as exc:
            if join.left() > 0:
                raise
            raise self._reader.time_is_over(join, exc) from exc
        finally:
            # Outside of the method: a signal may come before its first line.
            try:
                self._reader.leave(join)
            except BaseException:
                self._reader.abandon(join)
                raise

    def iter_header(self, group_id: str, count: int) -> Iterator[Meta]:
        """The metas of so many results of a group, whichever tasks they are of, as they come; each is taken.

        Raises: fastres.ResultsGone: some of them are not there.
        """
        for _, _, meta in self._reader.stream(self.addresses.group(group_id), count):
            yield self._to_python(meta) if meta["status"] in self.EXCEPTION_STATES else meta

    def _takes(self, no_ack: bool, alone: bool = False) -> bool:
        """Whether the reader of one result, or of several, takes what it reads."""
        return no_ack and self.options.take in (("always",) if alone else ("joins", "always"))

    def _open_inboxes(self, join: Join, take: bool, with_states: bool) -> None:
        """Subscribe to wherever the results come."""
        addresses, others = self.addresses, []
        for task_ids in addresses.by_result(join.aggregate.missing()).values():
            first = task_ids[0]
            results, states_ = addresses.result(first), addresses.states(first)
            # What was reported on the way is told before the result.
            consumed = [states_, results] if with_states else [results]
            kin = ids.parse(first)
            if take and kin is not None and kin.kind == ids.Kind.MEMBER and not join.alone:
                self._reader.group(join, consumed, [] if with_states else [states_])
            else:
                others += consumed
        if others:
            self._reader.tasks(join, others, take, declares=not (join.alone and others[0].of_task is not None))

    def _cached(self, task_id: str, ready_states: Iterable[str]) -> Meta | None:
        meta: Meta | None = self._cache.get(task_id)
        return meta if meta is not None and meta["status"] in ready_states else None

    def _to_python(self, meta: Meta) -> Meta:
        """Make a failure's result an exception; one that cannot be made is that failure's result."""
        try:
            self.meta_from_decoded(meta)
        except Exception as exc:
            meta["result"] = exc
        return meta

    # -- looking

    def get_task_meta(self, task_id: str, backlog_limit: int = 1000, cache: bool = True) -> Meta:
        """The latest state of a task, which stays in its queue.

        Raises:
            BacklogLimitExceeded: a queue that fastres did not make has more than ``backlog_limit`` states.
        """
        self._ensure_not_eager()
        meta = self._cached(task_id, states.READY_STATES) if cache else None
        if meta is None:
            meta = self._look(task_id, backlog_limit)
            if meta is None:
                return {"status": states.PENDING, "result": None}
            self._to_python(meta)
            if meta["status"] == states.SUCCESS:
                # As Celery's own backends: anything else may change.
                self._cache[task_id] = meta
        return meta

    poll = get_task_meta

    def _get_task_meta_for(self, task_id: str) -> Meta:
        return self.get_task_meta(task_id, cache=False)

    def _look(self, task_id: str, backlog_limit: int) -> Meta | None:
        feed = self._reader.feed_of(self.addresses.result(task_id))
        # What this process holds nobody else can see.
        held = None if feed is None else feed.peek(task_id)
        return held or self._looks.task(task_id, backlog_limit, waits_too=feed is not None)

    def task_result_exists(self, task_id: str) -> bool:
        """Whether there is any state of this task."""
        return bool(self.get_task_meta(task_id)["status"] != states.PENDING)

    def reload_task_result(self, task_id: str) -> None:
        """Read a task's state again, even if it has been read before."""
        self._cache[task_id] = self.get_task_meta(task_id, cache=False)

    def group_progress(self, group_id: str) -> int:
        """How many results of a group have come: one passive declare."""
        return self._looks.progress(group_id, self._reader.progress)

    # -- groups

    def _save_group(self, group_id: str, result: GroupResult) -> GroupResult:
        self._groups.save(group_id, result)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        saved = self._groups.restore(group_id)
        return None if saved is None else {"result": result_from_tuple(tuple(saved), self.app)}

    def _delete_group(self, group_id: str) -> None:
        self._groups.delete(group_id)

    def _forget(self, task_id: str) -> None:
        self._looks.forget(task_id)

    # -- Celery's own way to wait

    @property
    def is_async(self) -> bool:
        return True

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Called when somebody may wait for a result: a callback added with ``then`` fires when it is read."""
        self._pending.add(result)
        if result._cache is not None and not result.on_ready.ready:
            result.on_ready(result)
        return result

    def add_pending_results(self, results: Iterable[Any], weak: bool = False) -> list[Any]:
        return [self.add_pending_result(result, weak) for result in results]

    def remove_pending_result(self, result: Any) -> Any:
        """Called when a result is ready, forgotten, or no longer referred to: it is held by a weak reference."""
        self._pending.remove(result)
        return result

    def on_result_fulfilled(self, result: Any) -> None:
        """Called by Celery when nobody waits for a result any more."""

    def wait_for_pending(
        self,
        result: Any,
        callback: Callable[[str, Any], Any] | None = None,
        propagate: bool = True,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
        on_message: Callable[[Meta], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Wait for an ``AsyncResult``, and return or raise what the task did."""
        self._ensure_not_eager()
        if result._cache is None:
            meta = self._cached(result.id, states.READY_STATES)
            if meta is None:
                meta = self._wait_for_meta(
                    result.id, timeout, no_ack, on_interval, on_message, states.READY_STATES
                )
            result._maybe_set_cache(meta)
            self._pending.fulfil(result.id, meta)
        return result.maybe_throw(callback=callback, propagate=propagate)

    # -- chords

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> Any:
        """Called before the header of a chord is sent: a joiner will join it, or ``celery.chord_unlock``."""
        self.ensure_chords_allowed()
        chord_id, results = header_result_args
        if self._chords.supported():
            self._chords.begin(chord_id, body, results)
        else:
            super().apply_chord(header_result_args, body, **kwargs)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Called before the last task of a chord's header is sent."""
        self._chords.size(group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Called by a task of a chord's header before it sends another one.

        Raises: NotImplementedError: ``celery.chord_unlock`` joins this chord.
        """
        if not self._joins:
            super().add_to_chord(chord_id, result)
        task = get_current_task()
        self._chords.add(chord_id, result.id, getattr(task and task.request, "chord", None))

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Called when a task of a chord's header has returned or raised, or was revoked."""
        self._chords.part(request, state, result)

    def fail_part(self, request: Any, exc: Exception, told: list[str]) -> None:
        """A chord in the header of a chord has failed; ``told`` are errbacks that know."""
        self._chords.part(request, states.FAILURE, exc, told)

    # -- the rest

    def as_uri(self, include_password: bool = False) -> str:
        """The URL of the results' broker; the password is hidden unless asked for."""
        url: str = self.url or f"{self._scheme}://"
        if include_password:
            return url
        shown: str = maybe_sanitize_url(url)
        # It puts a slash behind a URL that names no host.
        return shown[:-1] if shown.endswith(":///") else shown

    def revive(self, channel: Any) -> None:
        """Start again after a connection was lost: the next use opens a new one."""
        self.close()

    def close(self) -> None:
        """Close this process's connections; results that nobody has taken stay in their queues."""
        self._link.reset()
        self._publisher.close()

    def _after_fork(self) -> None:
        """In a forked child: the connections, and what came over them, are the parent's."""
        self._link.abandon()
        self._publisher.abandon()
        if self.joiner is not None:
            self.joiner.abandon()
        self._reader.forget_all()
        self._looks.forget_all()
        self._cache.clear()
        self._pending.clear()

    def __reduce__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(
            kwargs or {},
            exchange=self.exchange.name or None,
            exchange_type=self.exchange.type,
            persistent=self.persistent,
            serializer=self.serializer,
            auto_delete=self.auto_delete,
            expires=self.expires,
            url=self.url,
            connection=self._connection,
            accept=self.accept,
        )
        return _unpickle, (type(self), args, kwargs)


def _unpickle(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The application's own backend if it is this one: results that were unpickled share its connection."""
    app = current_app._get_current_object()
    if app.conf.result_backend and isinstance(app.backend, cls):
        own = app.backend
        if own.__reduce__(args)[1][2] == kwargs:
            return own
    return cls(*args, app=app, **kwargs)
