"""Routes of the tasks that follow a chord: those of the worker that ran the last part, not those of the joiner.

Two applications that share a virtual host and a namespace join each other's chords. Each part contains the queues of
its application, and the joiner sends the body and the errbacks there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.app.routes import MapRoute
from kombu import Queue
from kombu.utils.functional import LRUCache, maybe_list

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("ROUTES", "Routes", "redirected")

#: The number of tasks whose routes are remembered.
REMEMBERED = 1000
#: The fields of a part's context that contain routes.
ROUTES = ("queue", "queues")
#: The options of a signature that determine its route.
DESTINATION = ("queue", "exchange", "routing_key")


class Routes:
    """The routes of an application, as parts contain them.

    Args:
        app: the application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._known = LRUCache(limit=REMEMBERED)

    @property
    def default(self) -> str:
        """The default queue of the application's tasks."""
        return str(self._app.conf.task_default_queue)

    def of(self, body: Any) -> dict[str, Any]:
        """``queue``: the default queue; ``queues``: other queues, by task name.

        Empty if a router of the user's needs the arguments, or does not know a queue.

        Args:
            body: a chord's body, as the tasks of its header carry it.
        """
        if not all(isinstance(router, MapRoute) for router in self._app.amqp.router.routes):
            return {}
        default = self.default
        routes: dict[str, Any] = {"queue": default}
        queues: dict[str, str | None] = {}
        try:
            for name, queue in self._tasks(body):
                # If two tasks of one name go to different queues, the joiner's routes apply.
                queues[name] = queue if queues.get(name, queue) == queue else None
        except Exception:
            # The joiner, which sends the tasks, reports the same error.
            return {}
        others = {name: queue for name, queue in queues.items() if queue not in (None, default)}
        if others:
            routes["queues"] = others
        return routes

    def _tasks(self, body: Any) -> Iterator[tuple[str, str | None]]:
        """The tasks that are sent with a body, or instead of it, and the queue of each."""
        options = body.get("options") or {}
        for errback in maybe_list(options.get("link_error")) or ():
            yield from self._tasks(errback)
        kwargs = body.get("kwargs") or {}
        kind = body.get("subtask_type")
        if kind == "chain":
            yield from self._tasks(kwargs["tasks"][0])
        elif kind == "group":
            for task in kwargs["tasks"]:
                yield from self._tasks(task)
        elif kind == "chord":
            header = kwargs["header"]
            for task in (header,) if isinstance(header, dict) else header:
                yield from self._tasks(task)
            yield from self._tasks(kwargs["body"])
        else:
            said = {key: options[key] for key in DESTINATION if options.get(key) is not None}
            yield body["task"], self._queue_of(body["task"], said)

    def _queue_of(self, name: str, said: dict[str, Any]) -> str | None:
        """The name of a task's queue; None: an exchange decides."""
        if "exchange" in said or "routing_key" in said:
            return None
        queue = said.get("queue")
        if queue is not None:
            return str(getattr(queue, "name", queue))
        if name not in self._known:
            task = self._app.tasks.get(name)
            declared = {key: each for key in DESTINATION if (each := getattr(task, key, None)) is not None}
            route = self._app.amqp.router.route(declared, name)
            direct = "exchange" in route or "routing_key" in route
            queue = route.get("queue")
            self._known[name] = None if direct or queue is None else str(getattr(queue, "name", queue))
        known: str | None = self._known[name]
        return known


def redirected(
    name: str, options: dict[str, Any], context: dict[str, Any], report: Callable[[str, str, str], object]
) -> dict[str, Any]:
    """The options to send a task with, after the joiner's application has routed it.

    Args:
        name: the task's.
        options: as that application would send it.
        context: the context of the chord's last part, perhaps with ``queue`` and ``queues``.
        report: called with the task's name, this application's queue and the one that is used, if they differ.
    """
    ours, default = options.get("queue"), context.get("queue")
    if ours is None or default is None:
        return options
    theirs = (context.get("queues") or {}).get(name, default)
    own_name = getattr(ours, "name", ours)
    if theirs == own_name:
        return options
    report(name, own_name, theirs)
    # Its own application declares the queue, and knows the arguments.
    return {**options, "queue": Queue(theirs), "declare": []}
