"""What fastres says to a broker, in the words of any kombu transport; ``native.py`` says it to RabbitMQ."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from kombu import Producer

from fastres._impl import Delivery
from fastres._protocols import COMPRESSION, KEEP

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from fastres._protocols import Delivery as DeliveryProtocol

__all__ = ("Busy", "Dialect", "Message", "Post", "QueueState", "all_up_to")

#: Called with deliveries to its consumers, in order.
Receiver = Callable[[list["DeliveryProtocol"]], object]


class QueueState(NamedTuple):
    """What a declaration answers with."""

    messages: int
    consumers: int


class Message(NamedTuple):
    """A message to publish, encoded."""

    body: bytes
    content_type: str
    content_encoding: str
    correlation_id: str
    #: 2: on disk too, 1: in memory.
    delivery_mode: int
    headers: dict[str, Any]


class Post(NamedTuple):
    """A message on its way."""

    message: Message
    exchange: str
    routing_key: str
    #: To be declared before, None: it was.
    queue: Any = None
    #: Whether to have it back if there is no queue for it.
    mandatory: bool = False


class Busy(Exception):
    """Another process reads this queue, and it takes one reader at a time."""


class Dialect:
    """Any transport of kombu, with what its virtual channels offer: one instance per connection."""

    #: Whether the broker confirms what it has stored, and returns what it could not route.
    confirms = False
    #: Whether a queue can have one active consumer, with others standing by.
    single_active_consumer = False

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._declaring: Any = None
        self._publishing: Any = None

    def hand_back(self) -> None:
        """Let the transport read on from here."""

    def channel(self) -> Any:
        return self._connection.channel()

    def _declaring_channel(self) -> Any:
        """The channel for declarations: a refused one closes it, and nothing else suffers."""
        if self._declaring is None or not is_open(self._declaring):
            self._declaring = self.channel()
        return self._declaring

    def declare(self, queue: Any) -> QueueState:
        """Declare a queue, its exchange and the binding between them."""
        channel = self._declaring_channel()
        if queue.exchange.name:
            queue.exchange(channel).declare()
        answer = channel.queue_declare(
            queue.name, durable=True, auto_delete=False, arguments=queue.queue_arguments or None
        )
        if queue.exchange.name:
            queue(channel).queue_bind()
        return QueueState(answer[1], answer[2])

    def inspect(self, name: str) -> QueueState | None:
        """The state of a queue, None where there is none."""
        try:
            answer = self._declaring_channel().queue_declare(name, passive=True)
        except self._connection.channel_errors as exc:
            if str(exc.reply_code) != "404":
                raise
            return None
        return QueueState(answer[1], answer[2])

    def publish(self, posts: Sequence[Post], confirm: bool = False) -> set[str]:
        """Publish messages.

        Args:
            confirm: wait until the broker has stored them, where it tells.

        Returns: the routing keys of those that came back.
        """
        for post in posts:
            if post.queue is not None:
                self.declare(post.queue)
        if self._publishing is None or not is_open(self._publishing):
            self._publishing = self.channel()
        for post in posts:
            properties = post.message._asdict()
            Producer(self._publishing, auto_declare=False).publish(
                properties.pop("body"), exchange=post.exchange, routing_key=post.routing_key, **properties
            )
        return set()

    def purge(self, name: str) -> None:
        """Delete all messages of a queue."""
        self._declaring_channel().queue_purge(name)

    def prefetch(self, channel: Any, count: int) -> None:
        channel.basic_qos(0, count, False)

    def consume(
        self,
        channel: Any,
        name: str,
        tag: str,
        receiver: Receiver,
        on_cancel: Callable[[str], None],
        exclusive: bool = False,
    ) -> None:
        channel.basic_consume(
            name,
            no_ack=False,
            callback=lambda raw: receiver([_delivery(channel.message_to_python(raw), tag)]),
            consumer_tag=tag,
        )

    def subscribe(
        self,
        channel: Any,
        consumers: Sequence[tuple[Any, str]],
        receiver: Receiver,
        on_cancel: Callable[[str], None],
    ) -> bool:
        """Declare queues, and consume from each with its consumer tag.

        Returns: False if that was too much at once: the channel is closed, and they are to be taken one by one.
        """
        for queue, tag in consumers:
            self.declare(queue)
            self.consume(channel, queue.name, tag, receiver, on_cancel)
        return True

    def acknowledge(self, channel: Any, tags: Sequence[Any], all_up_to: int | None) -> None:
        for tag in tags:
            channel.basic_ack(tag)

    def unlimit(self, channel: Any, tags: Sequence[str]) -> None:
        for tag in tags:
            channel.basic_cancel(tag)
        channel.basic_qos(0, 0, False)

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Collection[Any]) -> None:
        if getattr(channel, "closed", False):
            return
        for tag in tags:
            channel.basic_cancel(tag)
        for tag in reversed(list(unacknowledged)):
            channel.basic_reject(tag, requeue=True)
        channel.close()

    def peek(self, channel: Any, name: str) -> tuple[Any | None, int]:
        """The latest message of a queue; the ones before it are acknowledged, there is no history to keep."""
        latest = None
        while True:
            message = channel.basic_get(name)
            if message is None:
                break
            if latest is not None:
                channel.basic_ack(latest.delivery_tag)
            latest = message
        if latest is not None:
            channel.basic_reject(latest.delivery_tag, requeue=True)
        return (None if latest is None else _delivery(latest)), 0

    def glance(self, channel: Any, name: str, seconds: float) -> Any | None:
        """The first message of a queue, trying again for a moment."""
        end = time.monotonic() + seconds
        while True:
            message, _ = self.peek(channel, name)
            if message is not None or time.monotonic() > end:
                return message
            time.sleep(seconds / 4)

    def history(self, channel: Any, name: str, count: int) -> list[Any]:
        """The messages of a queue, which stay there."""
        messages: list[Any] = []
        while len(messages) < count:
            message = channel.basic_get(name)
            if message is None:
                break
            messages.append(message)
        for message in reversed(messages):
            channel.basic_reject(message.delivery_tag, requeue=True)
        return [_delivery(message) for message in messages]

    def read_all(self, name: str, count: int) -> list[Any]:
        channel = self.channel()
        try:
            return self.history(channel, name, count)
        finally:
            channel.close()

    def delete(self, channel: Any, names: Sequence[str]) -> None:
        """Delete queues; nobody waits until it is done."""
        for name in names:
            # Virtual channels delete what is bound; the default exchange binds nothing.
            channel.queue_purge(name)
            channel.queue_delete(name)


def all_up_to(tags: Sequence[Any], waiting: Iterable[Any]) -> Any:
    """The highest of these delivery tags before which nothing else waits: one frame acknowledges so many.

    Args:
        waiting: the other delivery tags that are not acknowledged, in order.
    """
    lowest, highest = next(iter(waiting), None), max(tags)
    if lowest is None or highest < lowest:
        return highest
    return max((tag for tag in tags if tag < lowest), default=None)


def is_open(channel: Any) -> bool:
    """Whether a channel of any transport is open: py-amqp's tell, kombu's virtual ones tell the opposite."""
    return bool(getattr(channel, "is_open", True)) and not getattr(channel, "closed", False)


def make_delivery(
    message: Any, properties: Any, headers: Any, compression: str | None, consumer_tag: str
) -> DeliveryProtocol:
    """A message of py-amqp or of kombu as a delivery."""
    delivery: DeliveryProtocol = Delivery(
        0,
        consumer_tag,
        message.delivery_tag,
        bool(message.delivery_info.get("redelivered")),
        message.body,
        properties.get("content_type"),
        properties.get("content_encoding"),
        properties.get("correlation_id"),
        compression,
        bool(headers.get(KEEP)),
    )
    return delivery


def _delivery(message: Any, consumer_tag: str = "") -> DeliveryProtocol:
    """A message of kombu, which has decompressed the body already if it could, as a delivery."""
    properties = {
        **message.properties,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
    }
    compression = message.headers.get(COMPRESSION) if message.errors else None
    return make_delivery(message, properties, message.headers, compression, consumer_tag)
