"""Makes the message of a chord's body, with the results of the header as an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from amqp.exceptions import NotFound
from kombu import Producer, Queue
from kombu.exceptions import OperationalError
from kombu.serialization import registry
from kombu.utils.json import dumps as kombu_json_dumps
from kombu.utils.json import loads as kombu_json_loads
from kombu.utils.uuid import uuid

from fastres._impl import listed
from fastres.amqp.publishing import Publishing
from fastres.amqp.session import is_missing_queue
from fastres.chords.events import JSON, UTF8

__all__ = ("BodyProducer", "NodeDown", "Values", "filled", "is_kombus_json")

#: The number of results that the representation of a body's arguments shows.
SHOWN = 3
#: Seconds after which a broker that does not confirm a body is considered unreachable.
CONFIRM_TIMEOUT = 30.0


class NodeDown(Exception):
    """The queue of a body is on a node that is down. The body is sent when the node is back."""


class Values(Sequence[Any]):
    """The results of a header as an argument of the body. They stay serialized until code reads them.

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
    """Publishes tasks, and copies the serialized results of a header into their arguments.

    Args:
        channel: a channel.
        publishings: a list for messages, which are then not published. Queues are declared in any case.
        is_classic: returns whether a queue exists and is certainly a classic one.
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
        #: Whether queues are classic, by name.
        self._classic: dict[str, bool] = {}
        #: The exception of a connection that broke while publishing: not an exception of the user's code.
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
            # Nothing was sent yet: the joiner tries again.
            options["retry"] = False
        else:
            options["confirm_timeout"] = CONFIRM_TIMEOUT
        try:
            return super().publish(body, **options)
        except self._breaks as exc:
            self.broken = exc
            raise
        except NotFound as exc:
            # Noted here, not by its type later: users' tasks and signals may raise the same types.
            if not is_missing_queue(exc):
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
        # A transaction succeeds even if a full quorum queue has dropped the message.
        queue = next((entity for entity in declare or () if _leads_to(entity, exchange, routing_key)), None)
        confirm = queue is None or not self._knows_as_classic(queue)
        self.publishings.append(Publishing(message, exchange, routing_key, confirm=confirm))
        return None

    def _knows_as_classic(self, queue: Queue) -> bool:
        known = self._classic.get(queue.name)
        if known is None:
            known = self._classic[queue.name] = self._is_classic(queue)
        return known


def _leads_to(entity: Any, exchange: str, routing_key: str) -> bool:
    """Whether the application knows that this queue receives messages with this route."""
    if not isinstance(entity, Queue):
        return False
    if not exchange:
        return bool(entity.name == routing_key)
    where = entity.exchange.name, entity.exchange.type, entity.routing_key
    return where == (exchange, "direct", routing_key)


def is_kombus_json() -> bool:
    encoder = registry._encoders.get("json")
    return encoder is not None and encoder[2] is kombu_json_dumps


def filled(tree: list[Any], of: Callable[[str], Any]) -> list[Any]:
    """A tree of task ids in which each id is replaced."""
    return [filled(item, of) if isinstance(item, list) else of(item) for item in tree]
