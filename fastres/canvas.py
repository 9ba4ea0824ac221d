"""Hooks that generate the ids of Celery's tasks, so that results that are read together are in one queue.

Celery decides a task's id in two places: ``Signature.freeze`` (canvas) and ``Celery.send_task`` (tasks that are
sent by themselves). The hooks put ids there (see ``fastres.ids``), for the applications they are installed for:

| task                                            | its id is kin to                                        |
| ----------------------------------------------- | ------------------------------------------------------- |
| member of a group, part of a chord's header     | the id of the innermost group that is being frozen      |
| task inside of a member's chain                 | the same, as a step                                     |
| any other                                       | the sender's current page                               |
| the group of a small header                     | the sender's current page, and so its members           |

Correctness does not depend on them: every id determines the queue of its result. The hooks are installed when Celery
creates the backend, after it has generated the id of the process's first task: that task has a queue of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from celery import canvas

from fastres.chords.lazy import wants_reference
from fastres.ids import Kind, kin_of, new_id, new_kin, parse
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("PAGE_SIZE", "TaskIds", "install")

#: The number of ids on a page. Larger pages save declarations of queues; with smaller ones, a wait for one result reads
#: fewer others.
PAGE_SIZE = 50
#: Seconds for which a page is used: at most ``PAGE_SECONDS``, and at most this share of ``result_expires``.
PAGE_SECONDS, PAGE_PART = 300.0, 0.1
#: The attribute of an application that has its :class:`TaskIds`.
ATTRIBUTE = "fastres_task_ids"


class _Frozen(threading.local):
    """The group or chord that is being frozen around a signature."""

    #: The id of the innermost group.
    group_id: str | None = None


_frozen = _Frozen()
_all: WeakSet[TaskIds] = WeakSet()


class TaskIds:
    """Generates the ids of the tasks that a process sends with one application.

    Args:
        expires: ``result_expires`` in seconds; None: no limit.
        pages: whether single tasks share queues. False for transports that cannot read a queue without hiding its
            messages from other readers; a queue costs less there.
    """

    def __init__(self, expires: float | None, pages: bool = True) -> None:
        self.pages = pages
        self._seconds = min(PAGE_SECONDS, expires * PAGE_PART) if expires else PAGE_SECONDS
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """In a forked child: the page is the parent's."""
        # A signal handler that interrupts this may send a task.
        self._lock = threading.RLock()
        self._page = 0
        self._left = 0
        self._until = 0.0

    def on_page(self, count: int = 1) -> str:
        """A new id on the current page, with room for ``count`` ids: a header is never split over two pages."""
        with self._lock:
            now = time.monotonic()
            if self._left <= 0 or now > self._until:
                self._page, self._left, self._until = new_kin(), PAGE_SIZE, now + self._seconds
            self._left = self._left - count if self.pages else 0
            return new_id(self._page, Kind.PAGE)

    @staticmethod
    def of_group(group_id: str, kind: Kind = Kind.MEMBER) -> str:
        """A new id in the queue of a group. The members of a group on a page are on that page."""
        of_group = parse(group_id)
        if of_group is not None and of_group.kind == Kind.PAGE:
            kind = Kind.PAGE
        return new_id(kin_of(group_id), kind)


def install(app: Any, expires: float | None, pages: bool = True) -> None:
    """Generate the ids of an application's tasks; ``expires`` and ``pages`` as for :class:`TaskIds`."""
    if getattr(app, ATTRIBUTE, None) is not None:
        return
    task_ids = TaskIds(expires, pages)
    setattr(app, ATTRIBUTE, task_ids)
    send_task = app.send_task

    def with_id(
        name: str, args: Any = None, kwargs: Any = None, countdown: Any = None, eta: Any = None,
        task_id: Any = None, *more: Any, **options: Any,
    ) -> Any:  # fmt: skip
        return send_task(name, args, kwargs, countdown, eta, task_id or task_ids.on_page(), *more, **options)

    with_id.__wrapped__ = send_task  # type: ignore[attr-defined]
    app.send_task = with_id
    _install_once()


def _forget_in_child() -> None:
    _frozen.group_id = None
    for task_ids in list(_all):
        task_ids.forget()


os.register_at_fork(after_in_child=_forget_in_child)
_lock = threading.Lock()
_installed = False


def _install_once() -> None:
    """Hook Celery's classes. For applications without :class:`TaskIds` nothing changes."""
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
        hooks: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
            (canvas.Signature, "freeze", _with_id),
            (canvas.group, "_freeze_group_tasks", _with_small_header),
            (canvas.group, "_freeze_unroll", _in_group),
            (canvas.group, "_freeze_tasks", _in_group),
            (canvas._chain, "freeze", _in_chain),
            (canvas._chord, "run", _with_body_id),
        )
        for cls, name, hook in hooks:
            if name not in vars(cls):
                logger.warning(
                    "Celery's %s has no %s: ids of tasks in a canvas may lie apart, each in a queue of its own",
                    cls.__name__, name,
                )  # fmt: skip
                continue
            setattr(cls, name, hook(getattr(cls, name)))
        # Celery keeps the method under another name, for applications that override it.
        canvas.Signature._freeze = canvas.Signature.freeze


def _task_ids(signature: Any) -> TaskIds | None:
    return getattr(signature.app, ATTRIBUTE, None)


def _with_id(freeze: Any) -> Any:
    def frozen(
        self: Any, _id: Any = None, group_id: Any = None, chord: Any = None, root_id: Any = None,
        parent_id: Any = None, group_index: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        options = self.options
        if _id is None and "task_id" not in options and (task_ids := _task_ids(self)) is not None:
            _id = _choose(task_ids, options, group_id, chord, group_index)
        return freeze(self, _id, group_id, chord, root_id, parent_id, group_index, **more)

    return frozen


def _choose(task_ids: TaskIds, options: Any, group_id: Any, chord: Any, group_index: Any) -> str:
    """A new id for a signature with these options that is frozen with these arguments."""
    around = _frozen.group_id
    # Celery gives a chord's body the id of its header as its group. Its group is the one around the chord.
    own_group = around if around is not None else group_id or options.get("group_id")
    has_index = group_index is not None or options.get("group_index") is not None
    # A task that is added to a chord has no index in its header.
    if own_group and (has_index or (group_id and (chord or options.get("chord")))):
        return task_ids.of_group(own_group)
    return task_ids.on_page() if around is None else task_ids.of_group(around, Kind.STEP)


def _with_small_header(freeze_group_tasks: Any) -> Any:
    def frozen(self: Any, *args: Any, **options: Any) -> Any:
        _place(self, options.get("chord"))
        return freeze_group_tasks(self, *args, **options)

    return frozen


def _place(header: Any, body: Any) -> None:
    """Put a small header that has no id yet onto the page."""
    if body and "task_id" not in header.options and isinstance(header.tasks, (list, tuple)):
        count = len(header.tasks)
        task_ids = _task_ids(header)
        if task_ids is not None and task_ids.pages and 0 < count <= PAGE_SIZE and not wants_reference(body):
            header.options["task_id"] = task_ids.on_page(count)


def _in_group(frozen_tasks: Any) -> Any:
    def in_group(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        results = frozen_tasks(self, *args, **options)
        group_id = self.options["task_id"]
        while True:
            # The caller may freeze anything between two members.
            before, _frozen.group_id = _frozen.group_id, group_id
            try:
                result = next(results)
            except StopIteration:
                return
            finally:
                _frozen.group_id = before
            yield result

    return in_group


def _in_chain(freeze: Any) -> Any:
    def frozen(
        self: Any, _id: Any = None, group_id: Any = None, chord: Any = None, root_id: Any = None,
        parent_id: Any = None, group_index: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        before = _frozen.group_id
        own_group = group_id or self.options.get("group_id")
        if before is None and own_group and (group_index is not None or "group_index" in self.options):
            _frozen.group_id = own_group
        try:
            return freeze(self, _id, group_id, chord, root_id, parent_id, group_index, **more)
        finally:
            _frozen.group_id = before

    return frozen


def _with_body_id(run: Any) -> Any:
    def running(self: Any, header: Any, body: Any, *args: Any, **options: Any) -> Any:
        task_ids = _task_ids(body)
        if task_ids is not None:
            if not isinstance(self.tasks, canvas.group) and "task_id" not in self.options:
                # Celery has just generated one.
                header.options.pop("task_id", None)
            _place(header, body)
            if options.get("task_id") is None:
                options["task_id"] = body.options.get("task_id") or task_ids.on_page()
        return run(self, header, body, *args, **options)

    return running
