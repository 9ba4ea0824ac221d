"""Sending a group or a chord of many tasks: Celery's own messages, made from one of them.

Celery makes the messages of the first two tasks. If these differ in ids, places in the group and arguments only,
the first message is the template of all others. If other code may look at each task (an override of
``Task.apply_async``, a receiver of ``before_task_publish``, a router of the user's), Celery sends the tasks one by
one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import celery.app.amqp
import celery.app.base
import celery.app.task
import kombu.messaging
from celery import canvas, signals
from celery.app.routes import MapRoute
from celery.canvas import Signature, chord, group, maybe_signature
from celery.exceptions import ImproperlyConfigured
from kombu.utils.encoding import safe_repr
from kombu.utils.uuid import uuid
from vine import barrier

from fastres.amqp.session import is_open
from fastres.backend import AMQPBackend
from fastres.canvas import ATTRIBUTE
from fastres.errors import BrokerUnreachable, TasksNotSent, refusal
from fastres.ids import new_id, parse
from fastres.logs import logger
from fastres.write.bulk import AT_ONCE, Bulk
from fastres.write.template import Sample, Sampler, Template

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery.result import AsyncResult, GroupResult


__all__ = ("apply_many",)

#: Options that a group sets for each of its tasks.
GROUP_OPTIONS = ("chord", "connection", "group_id", "group_index", "producer", "publisher", "task_id")
#: Options that depend on the time of sending, and the seconds for which a template with one of them is used.
TIMED_OPTIONS, TEMPLATE_SECONDS = ("countdown", "expires"), 1.0
#: Seconds after which pending messages are written, if a slow iterable yields no more.
FLUSH_INTERVAL = 0.02
#: The number of random ids that are generated at once.
IDS = 512


def apply_many(
    task: Any,
    args_iterable: Iterable[Any],
    *,
    kwargs: dict[str, Any] | None = None,
    body: Any = None,
    app: Any = None,
    confirm: bool = True,
    **options: Any,
) -> Any:
    """Send a group or a chord of many tasks at the broker's pace.

    Sends what ``group(task.s(*args) for args in args_iterable).apply_async(**options)`` sends. The tasks are sent while
    ``args_iterable`` is consumed, in bounded memory.

    Args:
        task: a task, a signature of a task, or the name of a task.
        args_iterable: the positional arguments of each task, as tuples or lists.
        kwargs: keyword arguments of all tasks.
        body: the signature of a chord's body, which gets the results of the tasks.
        app: the application; default: that of the task.
        confirm: wait until the broker has confirmed all tasks.
        options: options of ``Task.apply_async`` for all tasks: ``queue``, ``priority``, ``expires``, ``countdown``,
            ``headers``, ``serializer``, ``ignore_result`` and the others.

    Returns:
        The ``GroupResult``. With ``body``, the ``AsyncResult`` of the body, whose ``parent`` is the ``GroupResult``.

    Raises:
        fastres.TasksNotSent: the broker refused some tasks, or had no queue for them. The others are sent. A chord
            fails: its errbacks are called.
        fastres.BrokerUnreachable: the broker could not be reached within ``task_publish_retry_policy``.
        kombu.exceptions.EncodeError: the arguments of a task cannot be serialized. The tasks before it are sent, and a
            chord fails. The same holds for an exception of ``args_iterable``.
        TypeError: a task does not take its arguments, or an option is one that the group sets itself.
    """
    for name in GROUP_OPTIONS:
        if options.get(name) is not None:
            raise TypeError(f"apply_many() decides on {name} itself")
    signature = _signature_of(task, app)
    app = app or signature.app
    if not isinstance(app.backend, AMQPBackend):
        raise ImproperlyConfigured(
            f"apply_many() needs a result backend of fastres, and this application has {app.conf.result_backend!r}"
        )
    signature = signature.clone(kwargs=kwargs or {}, **options)
    signature._app = app
    arguments = iter(args_iterable)
    if body is None:
        return _Sending(app, signature, None, confirm).send(arguments)
    body = maybe_signature(body, app=app).clone()
    if app.conf.task_always_eager or not app.backend.chords.supported():
        return chord([signature.clone(_checked(args, place)) for place, args in enumerate(arguments)], body)()
    return _send_chord(app, signature, body, arguments, confirm)


def _signature_of(task: Any, app: Any) -> Any:
    if isinstance(task, str):
        if app is None:
            raise TypeError(f"the application of task {task!r} is to be given: app=")
        return app.signature(task)
    if isinstance(task, dict):
        signature = maybe_signature(task, app=app)
        if type(signature) is not Signature:
            raise TypeError(f"apply_many() sends tasks of one kind, and this is a {signature.subtask_type}")
        return signature.clone()
    return task.s()


def _checked(args: Any, place: int) -> tuple[Any, ...]:
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"the arguments of task {place} must be a list or tuple, not {args!r:.100}")
    return tuple(args)


def _send_chord(app: Any, signature: Any, body: Any, arguments: Iterator[Any], confirm: bool) -> AsyncResult:
    """As ``_chord.run`` does."""
    backend = app.backend
    sending = _Sending(app, signature, body, confirm)
    if isinstance(body, canvas._chain) and hasattr(body, "_unroll_chords"):
        body._unroll_chords(app)
    task_ids = getattr(app, ATTRIBUTE, None)
    body_id = body.options.get("task_id") or (uuid() if task_ids is None else task_ids.on_page())
    body_result = body.freeze(body_id, group_id=sending.group_id, root_id=body.options.get("root_id"))
    strip = getattr(canvas, "_strip_chord_header_links", None)
    if strip is not None:
        strip(body)
    first = list(islice(arguments, 1))
    if not first:
        body.delay([])
        body_result.parent = app.GroupResult(sending.group_id, [])
        return body_result
    backend.apply_chord((sending.group_id, ()), body, interval=None, countdown=1, max_retries=None)
    body_result.parent = sending.send(chain(first, arguments))
    return body_result


class _Sending:
    """A group that is being sent.

    Args:
        app: the application.
        signature: of its tasks, without their arguments.
        body: the body of its chord; None: the group is not the header of a chord.
        confirm: wait for the broker's confirms.
    """

    def __init__(self, app: Any, signature: Any, body: Any, confirm: bool) -> None:
        self._app = app
        self._signature = signature
        self._body = body
        self._confirm = confirm
        self.group_id = uuid()

    def send(self, arguments: Iterator[Any]) -> GroupResult:
        app = self._app
        if app.conf.task_always_eager:
            tasks = [self._signature.clone(_checked(args, place)) for place, args in enumerate(arguments)]
            return group(tasks, app=app).apply_async()
        first = [_checked(args, place) for place, args in enumerate(islice(arguments, 2))]
        if not first:
            return app.GroupResult(self.group_id, [])
        ids = _Ids()
        try:
            refused = self._send_all(first, arguments, ids)
        except BrokerUnreachable:
            raise
        except Exception as exc:
            self._fail(f"the task after {len(ids)} tasks of its header could not be sent: {safe_repr(exc)}", ids)
            raise
        result = _group_result(app, self.group_id, ids)
        if refused:
            place, why = min(refused.items())
            self._fail(f"{len(refused)} of {len(ids)} tasks of its header could not be sent: {why}", ids)
            raise TasksNotSent(
                f"{len(refused)} of {len(ids)} tasks were not kept, the first is number {place}: {why}",
                refused,
                result,
            )
        if self._body is not None:
            app.backend.set_chord_size(self.group_id, len(ids))
        parent = app.current_worker_task
        if parent and self._signature.options.get("add_to_parent", True):
            parent.add_trail(result)
        return result

    def _send_all(self, first: list[tuple[Any, ...]], rest: Iterator[Any], ids: _Ids) -> dict[int, str]:
        """Send tasks, and add their ids. Returns: the reasons of refusals, by place in the group."""
        refused: dict[int, str] | None = None
        if len(first) == 2 and _is_plain(self._app, self._signature):
            refused = self._send_in_bulk(first, rest, ids)
        if refused is None:
            with self._app.producer_or_acquire(None) as producer:
                for place, args in enumerate(chain(first, rest)):
                    ids.append(self._send_one(producer, _checked(args, place), place))
        return refused or {}

    def _fail(self, why: str, ids: _Ids) -> None:
        """Fail the chord, which lacks tasks: its errbacks are called."""
        if self._body is None:
            return
        try:
            self._app.backend.chords.size(self.group_id, len(ids), failed=why)
        except Exception as exc:
            # The exception of the call says more.
            logger.warning("Chord %s lacks tasks, and could not be failed: %r", self.group_id, exc)

    def _send_one(self, producer: Any, args: tuple[Any, ...], place: int) -> str:
        """Send a task as a group does."""
        task = self._signature.clone(args)
        result = task.freeze(group_id=self.group_id, group_index=place)
        task.apply_async(producer=producer, add_to_parent=False, chord=self._body)
        return str(result.id)

    def _send_in_bulk(self, first: list[tuple[Any, ...]], rest: Iterator[Any], ids: _Ids) -> dict[int, str] | None:
        """Send tasks made from a template, and add their ids.

        Returns: the reasons of refusals, by place in the group; None: nothing was sent, no template fits these tasks.
        """
        app = self._app
        with app.pool.acquire(block=True) as connection:
            if connection.transport.driver_name != "py-amqp":
                return None
            confirm_timeout = app.backend.options.confirm_timeout
            try:
                with Bulk(connection, self._confirm, confirm_timeout, _retry_policy(app)) as bulk:
                    sampler = Sampler(bulk.session.channel())
                    samples = [self._sample(sampler, args, place) for place, args in enumerate(first)]
                    template = Template(app, bulk, self._signature, samples[0], self._confirm)
                    alike = template.makes(samples[1])
                    if alike:
                        ids.begin(samples[0].id)
                        self._write(bulk, template, sampler, chain(first, rest), ids)
                    bulk.finish()
                    sampler.channel.close()
                    return bulk.refused if alike else None
            except connection.channel_errors as exc:
                error = refusal(exc, connection.as_uri())
                raise error from (None if error is exc else exc)

    def _sample(self, sampler: Sampler, args: tuple[Any, ...], place: int) -> Sample:
        self._send_one(sampler, args, place)
        return sampler.take(args, place)

    def _write(
        self, bulk: Bulk, template: Template, sampler: Sampler, arguments: Iterator[Any], ids: _Ids
    ) -> None:
        timed = any(self._signature.options.get(name) is not None for name in TIMED_OPTIONS)
        made = flushed = time.monotonic()
        count = 0

        def flush() -> None:
            nonlocal count, flushed
            frames, messages, count = template.take(), count, 0
            flushed = time.monotonic()
            if messages:
                bulk.write(frames, messages)

        for place, args in enumerate(self._until_it_fails(arguments, bulk, flush)):
            if timed and flushed - made > TEMPLATE_SECONDS:
                flush()
                made = flushed
                if not is_open(sampler.channel):
                    # It was lost with its connection.
                    sampler = Sampler(bulk.session.channel())
                sample = self._sample(sampler, _checked(args, place), place)
                template = Template(self._app, bulk, self._signature, sample, self._confirm)
            id_ = ids.new()
            try:
                template.add(id_, place, _checked(args, place))
            except Exception:
                self._end(bulk, flush)
                raise
            count += 1
            if template.size() >= AT_ONCE or time.monotonic() - flushed > FLUSH_INTERVAL:
                flush()
        flush()

    def _until_it_fails(self, arguments: Iterator[Any], bulk: Bulk, flush: Callable[[], None]) -> Iterator[Any]:
        try:
            yield from arguments
        except Exception:
            self._end(bulk, flush)
            raise

    @staticmethod
    def _end(bulk: Bulk, flush: Callable[[], None]) -> None:
        """Send the tasks before one that cannot be sent, as Celery does."""
        flush()
        bulk.finish()


class _Ids:
    """The ids of a group's tasks, at 8 bytes for each id of one kin."""

    def __init__(self) -> None:
        self._others: list[str] = []
        #: The common begin of the ids of a kin, and 15 digits of each as 8 bytes.
        self._begin = ""
        self._digits = bytearray()
        self._random = ""
        self._at = 0

    def begin(self, sample: str) -> None:
        """Give new ids the kin of this id, if it has one."""
        kin = parse(sample)
        if kin is not None:
            self._begin = new_id(kin.kin, kin.kind)[:20]

    def new(self) -> bytes:
        if not self._begin:
            id_ = uuid()
            self._others.append(id_)
            return str(id_).encode()
        at = self._at
        if at == len(self._random):
            random = os.urandom(8 * IDS)
            self._random, at = random.hex(), 0
        digits = self._random[at : at + 16]
        self._at = at + 16
        self._digits += bytes.fromhex(digits)
        return f"{self._begin}{digits[:3]}-{digits[3:15]}".encode()

    def append(self, id_: str) -> None:
        self._others.append(id_)

    def __len__(self) -> int:
        return len(self._others) + len(self._digits) // 8

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        for start in range(0, len(self._digits), 8):
            digits = self._digits[start : start + 8].hex()
            yield f"{self._begin}{digits[:3]}-{digits[3:15]}"


def _group_result(app: Any, group_id: str, ids: _Ids) -> GroupResult:
    """The result of a group. The results of its tasks are made on demand: there may be a million."""
    kind: Any = app.GroupResult

    class GroupResult(kind):  # type: ignore[misc]
        __module__ = kind.__module__

        _made: list[Any] | None = None

        @property
        def results(self) -> list[Any]:
            if self._made is None:
                self._made = made = [app.AsyncResult(id_) for id_ in ids]
                full = self._on_full
                for result in made:
                    full.size += 1
                    result.then(full, weak=True)
                full.finalize()
            return self._made

        @results.setter
        def results(self, results: Any) -> None:
            if results is not None:
                self._made = results

        @property
        def task_ids(self) -> list[str]:
            return list(ids)

        def __len__(self) -> int:
            return len(ids) if self._made is None else len(self._made)

        def __reduce__(self) -> Any:
            return app.GroupResult(self.id, self.results, parent=self.parent).__reduce__()

    return GroupResult(group_id, None, ready_barrier=barrier())


def _retry_policy(app: Any) -> dict[str, Any]:
    policy = dict(app.conf.task_publish_retry_policy or {})
    return policy if app.conf.task_publish_retry else {**policy, "max_retries": 0}


def _is_plain(app: Any, signature: Any) -> bool:
    """Whether only code of Celery and fastres handles this application's tasks while they are sent."""
    task = app.tasks.get(signature.task)
    amqp_ = app.amqp
    of_app, of_task, of_amqp, of_canvas, of_kombu = (
        module.__dict__ for module in (celery.app.base, celery.app.task, celery.app.amqp, canvas, kombu.messaging)
    )
    ours = [(amqp_.create_task_message, of_amqp), (amqp_.send_task_message, of_amqp), (app.send_task, of_app)]
    ours += [(getattr(kombu.messaging.Producer, name), of_kombu) for name in ("publish", "_publish", "_prepare")]
    ours += [(Signature.apply_async, of_canvas), (Signature.clone, of_canvas)]
    if task is not None:
        ours += [(getattr(task, name), of_task) for name in ("apply_async", "shadow_name", "_get_exec_options")]
        if getattr(task, "__self__", None) is not None:
            return False
    return (
        all(_is_from(method, module) for method, module in ours)
        and app.conf.task_protocol == 2
        and not app.conf.task_send_sent_event
        and "router" not in signature.options
        and issubclass(kombu.messaging.Producer, amqp_.Producer)
        and all(isinstance(router, MapRoute) for router in amqp_.router.routes)
        and not any(
            signal.has_listeners(signature.task)
            for signal in (signals.before_task_publish, signals.after_task_publish, signals.task_sent)
        )
    )


def _is_from(method: Any, module: dict[str, Any]) -> bool:
    """Whether a method is that of a module, or fastres's wrapper of it."""
    while True:
        own = getattr(getattr(method, "__func__", method), "__globals__", {})
        if not str(own.get("__name__")).startswith("fastres."):
            return own is module
        method = getattr(method, "__wrapped__", None)
