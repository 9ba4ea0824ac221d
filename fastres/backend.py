"""``AMQPBackend``: the public API, as in Celery 3.1 and as Celery 5 expects it of a result backend."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from celery import current_app, states
from celery.backends.base import Backend
from celery.exceptions import ImproperlyConfigured
from celery.result import GroupResult, result_from_tuple
from kombu.utils.functional import LRUCache
from kombu.utils.url import maybe_sanitize_url

from fastres import canvas, worker
from fastres._impl import Decoder
from fastres._protocols import KEEP, SENT_AT, Meta
from fastres.addresses import Addresses
from fastres.amqp.connection import Link
from fastres.amqp.connector import Connector
from fastres.chords.asker import Asker
from fastres.chords.joiner import Joiner
from fastres.chords.lazy import wants_reference
from fastres.chords.log import Log
from fastres.chords.settle import terms_of
from fastres.compat import Celery31
from fastres.counts import Counts
from fastres.groups import Groups
from fastres.layout import Layout, SharedQueues
from fastres.logs import Reports
from fastres.options import Options
from fastres.processes import notify_of_process
from fastres.read.join import CACHED
from fastres.read.look import Looks
from fastres.read.loop_reader import LoopReader
from fastres.read.pending import Pending
from fastres.read.reader import Reader
from fastres.read.wait import Waits
from fastres.waiting import Waiting
from fastres.write.messages import Encoder, plain_meta
from fastres.write.publisher import Publisher

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ("AMQPBackend",)

worker.connect_signals()


class AMQPBackend(Waiting, Celery31, Backend):  # type: ignore[misc]
    """A result backend that keeps results as messages. The id of a task names the queue of its result.

    The API is that of ``celery.backends.amqp.AMQPBackend`` of Celery 3.1, on Celery 5.5 and later.

    Args:
        app: the Celery application.
        connection: a ``kombu.Connection`` to the broker of the results; default: the URL's, or the application's.
        exchange: the exchange that carries results; default: ``result_exchange``, where Celery's default means
            the default exchange, which routes by queue name.
        exchange_type: ``direct`` or ``topic``; default: ``result_exchange_type``.
        persistent: whether results survive a restart of the broker; default: ``result_persistent``, or True.
        serializer: default: ``result_serializer``.
        auto_delete: delete a queue when all its results were taken. (Queues are not declared with AMQP's
            ``auto-delete``, which would lose results that arrive while no consumer is there.)
        expires: seconds or timedelta, default: ``result_expires``.
        url: as in ``result_backend``.

    Raises:
        celery.exceptions.ImproperlyConfigured: an option in ``result_backend_transport_options`` is unknown or
            wrong, or the exchange type cannot carry results.
    """

    persistent = True
    supports_autoexpire = True
    supports_native_join = True
    supports_result_compression = True
    supports_failure_expires = True

    _scheme = "fastres"
    _layout_class: ClassVar[Any] = SharedQueues

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
        self._encoder = Encoder(self.serializer, conf.get("result_compression"), self.delivery_mode)
        if (kwargs.get("max_cached_results") or conf.result_cache_max) == -1:
            self._cache = LRUCache(limit=CACHED)
        self._connection = connection
        self.connector = Connector(app, self.url, connection, self.options)
        #: Seconds for which the result of a failed task is kept.
        self.failure_expires = self._failure_expires()
        kept = (self.expires, self.failure_expires)
        #: Seconds for which a queue is kept: as long as any result in it. None: for ever.
        self._lifetime = max(kept) if all(kept) else None
        is_quorum = self.options.queue_type == "quorum" and self.connector.is_amqp
        self.addresses = Addresses(
            self.options.namespace,
            getattr(exchange, "name", exchange) or conf.result_exchange,
            exchange_type or getattr(exchange, "type", None) or conf.result_exchange_type,
            self._lifetime,
            "quorum" if is_quorum else "classic",
            self.Queue,
            self.Exchange,
        )
        self.exchange = self.addresses.exchange
        # An attribute of the class in Celery 3.1, which subclasses may set.
        self.retry_policy = {**self.retry_policy, **(self.options.retry_policy or {})}  # type: ignore[misc]
        #: The counters of this process: see fastres.metrics.
        self.counts = Counts()
        limit = conf.broker_pool_limit or 10
        self._publisher = Publisher(
            self.connector.open, self.addresses, self.retry_policy, self.options, limit, self.counts
        )
        self._link = Link(self.connector.open, self.retry_policy, conf.broker_heartbeat or 0, self.counts)
        decoder = Decoder(self.accept, self.options.max_unpacked_size)
        #: Metas that a thread has looked up together: see many_at_once.
        self._known = threading.local()
        looks = Looks(self._publisher, self.addresses, decoder, self.reports, auto_delete)
        reader = Reader(
            self._link, self.addresses, decoder, looks, self.reports, self.options.prefetch, auto_delete
        )
        #: Where results are.
        self.layout: Layout = self._layout_class(app, self.addresses, reader, looks, self.options)
        self._waits = Waits(
            self.layout, reader, self._cache, self.meta_from_decoded, self.EXCEPTION_STATES, self.counts
        )
        self._pending = Pending()
        #: Reads for event loops, where the id of a task names the queue of its result.
        self.loop_reader = LoopReader(self._waits, self._link) if self.layout.declares else None
        self._groups = Groups(self._publisher, self._encoder, looks, self.addresses, decoder, self.reports)
        #: Sends the events of chords.
        self.chords = Log(self, self._publisher, self.addresses, self.options.chord_shards)
        #: Asks joiners about chords.
        self.asker = Asker(self)
        #: Joins chords, once it is started.
        self.joiner = Joiner(self) if self.layout.joins_chords else None
        if self.layout.declares and self.options.task_ids == "fastres":
            canvas.install(app, self.expires, pages=self.connector.is_amqp)
        notify_of_process(self)

    # -- writing

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        """Called when a task is sent."""
        self.layout.sent(task_id)
        return {}

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Publish a task's state and result, and wait for the broker's confirm unless the option ``confirm`` is off.

        Raises:
            fastres.ResultTooLarge: the message exceeds the broker's limit.
            kombu.exceptions.EncodeError: the result cannot be serialized.
            fastres.BrokerUnreachable: the broker could not be reached within ``retry_policy``.
        """
        address = self.layout.outbox(task_id, state, request)
        if address is None:
            return result
        meta = self._get_result_meta(
            result=self.encode_result(result, state), state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        if self.addresses.is_quorum and state not in self.READY_STATES:
            meta[SENT_AT] = time.time()
        chord = getattr(request, "chord", None)
        by_reference = bool(chord) and wants_reference(chord)
        if by_reference:
            meta["group_index"] = request.group_index
        keep = self.options.keep_chord_results and chord and not by_reference
        correlation_id = getattr(request, "correlation_id", None) or task_id
        message = self._encoder.encode(
            meta, correlation_id, {KEEP: True} if keep else None, self._expiration(state)
        )
        self._publisher.publish(address, message, declare=self.layout.declares)
        return result

    def _failure_expires(self) -> float | None:
        seconds = self.app.conf.get("result_failure_expires") if self.supports_failure_expires else None
        kept: float | None = self.expires if seconds is None else self.prepare_expires(seconds)
        return kept

    def _expiration(self, state: str) -> float | None:
        """Seconds after which the broker drops a result of this state, None: when its queue expires."""
        seconds = self.failure_expires if state == states.FAILURE else self.expires
        return None if not seconds or seconds == self._lifetime else seconds

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, **more: Any) -> None:
        """As in Celery, but store nothing for a task that was cancelled with its group."""
        if not worker.is_notified_already():
            super().mark_as_revoked(task_id, reason, request, **more)

    def put_notice(self, meta: Meta) -> None:
        """Publish a notice of cancellation to the queue of the result of its ``task_id``."""
        message = self._encoder.encode(meta, meta["task_id"], {KEEP: True})
        self._publisher.publish(self.addresses.result(meta["task_id"]), message, declare=True)

    def in_one_write(self) -> contextlib.AbstractContextManager[None]:
        """A context. At its end, this thread's results and chord events are published together."""
        return self._publisher.together()

    def unconfirmed(self) -> int:
        """The number of messages of this process that the broker has not confirmed."""
        return self._publisher.unconfirmed()

    def check_writing(self) -> None:
        """Check connection and permissions for storing results, without storing one.

        Raises:
            Exception: as :meth:`store_result`.
        """
        self._publisher.check(self.addresses.chords(0) if self.layout.declares else None)

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """As in Celery. The result of a chord's header task and its part are published in one write."""
        together = self.in_one_write() if request and request.chord else contextlib.nullcontext()
        with together:
            super().mark_as_done(task_id, result, request, store_result, state)

    def _get_result_meta(
        self, result: Any, state: str, traceback: Any, request: Any, format_date: bool = True, encode: bool = False
    ) -> Meta:
        """As in Celery, where looking up ``result_extended`` and formatting the date take longer than all the rest."""
        if self._extended or not format_date:
            meta: Meta = super()._get_result_meta(result, state, traceback, request, format_date, encode)
            return meta
        children = self.current_task_children(request)
        return plain_meta(result, state, traceback, request, children, self.app.timezone)

    # -- looking

    def get_task_meta(self, task_id: str, backlog_limit: int = 1000, cache: bool = True) -> Meta:
        """Return the latest state of a task, and leave it in its queue.

        Raises:
            BacklogLimitExceeded: a queue that fastres did not make has more than ``backlog_limit`` states.
        """
        self._ensure_not_eager()
        meta = self._waits.cached(task_id, states.READY_STATES) if cache else None
        if meta is None:
            known = getattr(self._known, "metas", {})
            meta = known[task_id] if task_id in known else self.layout.look(task_id, backlog_limit)
            if meta is None:
                return {"status": states.PENDING, "result": None}
            self._waits.to_python(meta)
            if meta["status"] == states.SUCCESS:
                # As in Celery's own backends: a state that is not final may change.
                self._cache[task_id] = meta
        return meta

    @contextlib.contextmanager
    def many_at_once(self, task_ids: Collection[str]) -> Iterator[None]:
        """A context that looks up many tasks at its start, and stores their states in one write at its end."""
        self._known.metas = self.layout.look_at_all(task_ids)
        try:
            with self.in_one_write():
                yield
        finally:
            del self._known.metas

    #: Celery 3.1's name for it.
    poll = get_task_meta

    def _get_task_meta_for(self, task_id: str) -> Meta:
        return self.get_task_meta(task_id, cache=False)

    def task_result_exists(self, task_id: str) -> bool:
        """Whether the broker has a state of this task."""
        return bool(self.get_task_meta(task_id)["status"] != states.PENDING)

    def reload_task_result(self, task_id: str) -> None:
        """Read a task's state again, even if it has been read before."""
        self._cache[task_id] = self.get_task_meta(task_id, cache=False)

    def group_progress(self, group_id: str) -> int:
        """Return the number of results of a group that have arrived, by one passive declaration."""
        return self.layout.progress(group_id)

    # -- groups

    def _save_group(self, group_id: str, result: GroupResult) -> GroupResult:
        return self._groups.save(group_id, result)

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        saved = self._groups.restore(group_id)
        return None if saved is None else {"result": result_from_tuple(tuple(saved), self.app)}

    def _delete_group(self, group_id: str) -> None:
        self._groups.delete(group_id)

    def _forget(self, task_id: str) -> None:
        self.layout.forget(task_id)

    # -- chords

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> Any:
        """Called by Celery before the header of a chord is sent: announces the chord to the joiners."""
        self.ensure_chords_allowed()
        chord_id, results = header_result_args
        if not self.options.chord_unlock and self.chords.supported():
            self.chords.begin(chord_id, body, results)
        elif terms_of(body) is not None:
            raise ImproperlyConfigured(
                "fastres.settle() needs a broker with single active consumers, RabbitMQ 3.8 or later, or LavinMQ, "
                "and the option chord_unlock off: celery.chord_unlock joins chords that succeed as a whole"
            )
        else:
            super().apply_chord(header_result_args, body, **kwargs)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Called by Celery before the last task of a chord's header is sent."""
        self.chords.size(group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Called by a header task of a chord before it sends another header task.

        Raises:
            NotImplementedError: ``celery.chord_unlock`` joins this chord.
        """
        if not self.layout.joins_chords:
            super().add_to_chord(chord_id, result)
        self.chords.add(chord_id, result.id)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Called by Celery when a header task of a chord has ended: publishes its part."""
        self.chords.part(request, state, result)

    # -- the rest

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL of the results' broker, without the password unless ``include_password`` is true."""
        url: str = self.url or f"{self._scheme}://"
        if include_password:
            return url
        shown: str = maybe_sanitize_url(url)
        # Celery appends a slash to a URL without a host.
        return shown[:-1] if shown.endswith(":///") else shown

    def revive(self, channel: Any) -> None:
        """Close the connections; the next call opens new ones. For API compatibility with Celery 3.1."""
        self.close()

    def close(self) -> None:
        """Close this process's connections. Results stay in their queues."""
        self._link.reset()
        self.asker.close()
        self._publisher.close()

    def after_fork(self) -> None:
        """Called in a forked child: abandon the parent's connections and its state."""
        self._link.abandon()
        self._publisher.abandon()
        self.asker.abandon()
        if self.joiner is not None:
            self.joiner.abandon()
        self.layout.forget_all()
        self._cache.clear()
        self._pending.clear()

    def at_exit(self) -> None:
        """Called at the end of the process: wait for outstanding confirms, then close."""
        self._publisher.close()

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
