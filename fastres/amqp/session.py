"""Sessions with a broker over any transport of kombu. ``rabbitmq.py`` has the session with RabbitMQ."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from kombu import Producer

from fastres._impl import Delivery
from fastres._protocols import COMPRESSION, KEEP

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from fastres._protocols import Delivery as DeliveryProtocol
    from fastres.addresses import Address
    from fastres.amqp.publishing import Publishing
    from fastres.amqp.window import Window

__all__ = (
    "LARGEST_PREFETCH",
    "Browsed",
    "Busy",
    "QueueState",
    "ReplyTimer",
    "Session",
    "all_up_to",
    "is_missing_queue",
    "is_open",
    "make_delivery",
)

#: The largest number of messages that a consumer can ask to be sent ahead of their acknowledgement.
LARGEST_PREFETCH = 65_535
#: The texts of RabbitMQ and LavinMQ for a missing queue or exchange.
MISSING = re.compile("no (?:queue|exchange)|doesn't exist|not declared", re.IGNORECASE)
#: Called with deliveries to its consumers, in order.
Receiver = Callable[[list["DeliveryProtocol"]], object]


class QueueState(NamedTuple):
    """The reply to a declaration."""

    messages: int
    consumers: int


class Browsed(NamedTuple):
    """The state and the first messages of a queue, which were left in it."""

    state: QueueState
    #: Its first messages.
    deliveries: list[DeliveryProtocol]


class Busy(Exception):
    """The queue has an exclusive consumer, of another process."""


class Session:
    """A session over any transport of kombu, with the operations that its channels offer. One for each connection."""

    #: Whether the broker confirms messages, and returns unroutable ones.
    confirms = False
    #: Whether the broker has single active consumers.
    single_active_consumer = False
    #: Whether the broker has reported an alarm (Connection.Blocked).
    is_blocked = False

    #: Half the seconds of silence after which the broker closes the connection; 0: it never does.
    heartbeat: float = 0

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._declaring: Any = None
        self._publishing: Any = None

    def hand_back(self) -> None:
        """Let the transport continue to read at this position."""

    @property
    def channel_errors(self) -> tuple[type[Exception], ...]:
        """The exceptions of a closed channel."""
        errors: tuple[type[Exception], ...] = self._connection.channel_errors
        return errors

    @property
    def uri(self) -> str:
        """The broker's URL, without the password."""
        return str(self._connection.as_uri())

    def channel(self) -> Any:
        return self._connection.channel()

    def unopened_channel(self) -> Any:
        """A channel for :meth:`subscribe`, which opens it where that saves a round trip."""
        return self.channel()

    def _declaring_channel(self) -> Any:
        """The channel for declarations. A refused declaration closes only this channel."""
        if self._declaring is None or not is_open(self._declaring):
            self._declaring = self.channel()
        return self._declaring

    def declare(self, queue: Any) -> QueueState:
        """Declare a queue, its exchange and the binding between them."""
        channel = self._declaring_channel()
        if queue.exchange.name:
            queue.exchange(channel).declare()
        answer = channel.queue_declare(
            queue.name, durable=True, auto_delete=False, arguments=self.arguments(queue)
        )
        if queue.exchange.name:
            queue(channel).queue_bind()
        return QueueState(answer[1], answer[2])

    def arguments(self, queue: Any) -> dict[str, Any] | None:
        """The arguments with which a queue is declared at this broker."""
        return queue.queue_arguments or None

    def inspect(self, name: str) -> QueueState | None:
        """The state of a queue; None: it does not exist."""
        try:
            answer = self._declaring_channel().queue_declare(name, passive=True)
        except self._connection.channel_errors as exc:
            if str(exc.reply_code) != "404" or not is_missing_queue(exc):
                raise
            return None
        return QueueState(answer[1], answer[2])

    def publish(self, publishings: Sequence[Publishing], queues: Sequence[Any], window: Window) -> None:
        """Publish messages, after some queues were declared.

        Args:
            window: keeps the messages until they are confirmed, if the broker confirms.
        """
        for queue in queues:
            self.declare(queue)
        if self._publishing is None or not is_open(self._publishing):
            self._publishing = self.channel()
        for message, exchange, routing_key, *_ in publishings:
            properties = message._asdict()
            Producer(self._publishing, auto_declare=False).publish(
                properties.pop("body"), exchange=exchange, routing_key=routing_key, **properties
            )

    def wait_for_confirms(self, window: Window, enough: Callable[[], bool]) -> None:
        """Read confirms until there are enough."""

    def purge(self, name: str) -> None:
        """Delete all messages of a queue."""
        self._declaring_channel().queue_purge(name)

    def drop(self, name: str) -> None:
        """Delete a queue with its messages."""
        if self.inspect(name) is not None:
            channel = self._declaring_channel()
            channel.queue_purge(name)
            channel.queue_delete(name)

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
        prefetch: int = 0,
    ) -> list[QueueState] | None:
        """Declare queues, and consume from each with its consumer tag.

        Args:
            prefetch: unacknowledged messages for each consumer; 0: no limit.

        Returns: their states. None: the broker has closed the channel; the caller consumes from each queue separately.
        """
        if prefetch:
            self.prefetch(channel, prefetch)
        states = []
        for queue, tag in consumers:
            states.append(self.declare(queue))
            self.consume(channel, queue.name, tag, receiver, on_cancel)
        return states

    def acknowledge(self, channel: Any, tags: Sequence[Any], all_up_to: int | None) -> None:
        for tag in tags:
            channel.basic_ack(tag)

    def watch(self, channel: Any, on_close: Callable[[Exception], None]) -> None:
        """Register a callback for when the broker closes a channel, called before the exception is raised."""

    def with_timeout(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """A context in which each wait for the broker is limited to ``seconds``: ``socket.timeout``."""
        return contextlib.nullcontext()

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """The same, unless the limit in force is lower."""
        return contextlib.nullcontext()

    def give_up(self, channel: Any) -> None:
        """Leave channels on which the broker does not answer, without waiting, if it answers on others.

        These are the channels for declarations and looks, and ``channel`` with its consumers, if given.

        Raises: socket.timeout: the broker does not answer at all.
        """
        raise socket.timeout("the broker does not answer")

    def limit(self, seconds: float) -> None:
        """Limit each read and write from now on to ``seconds``."""

    def poll(self) -> None:
        """Read frames that have arrived: a closed channel, confirms, Connection.Blocked."""

    def beat(self) -> None:
        """Send a heartbeat."""

    def unlimit(self, channel: Any, tags: Sequence[str], prefetch: int = 0) -> None:
        for tag in tags:
            channel.basic_cancel(tag)
        channel.basic_qos(0, prefetch, False)

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Collection[Any]) -> None:
        if getattr(channel, "closed", False):
            return
        for tag in tags:
            channel.basic_cancel(tag)
        for tag in reversed(list(unacknowledged)):
            channel.basic_reject(tag, requeue=True)
        channel.close()

    def browse(self, asked: Sequence[tuple[str, int]]) -> list[Browsed | None]:
        """Read the states of queues and their first messages, and leave the messages there.

        Args:
            asked: the name of each queue, and the number of messages to read.

        Returns: None for a queue that does not exist.
        """
        browsed: list[Browsed | None] = []
        for name, count in asked:
            state = self.inspect(name)
            if state is None:
                browsed.append(None)
                continue
            deliveries: list[DeliveryProtocol] = []
            if count:
                self._take(name, count, partial(_keep, deliveries), delete=False)
            browsed.append(Browsed(state, deliveries))
        return browsed

    def take(
        self,
        address: Address,
        count: int,
        choose: Callable[[list[DeliveryProtocol]], list[Any]],
        delete: bool = False,
    ) -> int:
        """Take some of the first ``count`` messages of a queue, and requeue the others.

        Args:
            choose: returns the delivery tags of the messages to take.
            delete: delete the queue if it is then empty and has no consumers.

        Returns: the number of taken messages.
        """
        return self._take(address.name, count, choose, delete)

    def _take(
        self, name: str, count: int, choose: Callable[[list[DeliveryProtocol]], list[Any]], delete: bool
    ) -> int:
        channel = self.channel()
        try:
            messages: list[Any] = []
            while len(messages) < count:
                message = channel.basic_get(name)
                if message is None:
                    break
                messages.append(message)
            taken = set(choose([_delivery(message) for message in messages]))
            # A requeued message goes to the front.
            for message in reversed(messages):
                if message.delivery_tag in taken:
                    channel.basic_ack(message.delivery_tag)
                else:
                    channel.basic_reject(message.delivery_tag, requeue=True)
            if delete and len(taken) == len(messages) < count:
                channel.queue_delete(name)
            return len(taken)
        finally:
            channel.close()

    def delete(
        self, channel: Any, addresses: Sequence[Address], tags: Sequence[str] = (), full: Sequence[Address] = ()
    ) -> None:
        """Delete empty queues without consumers, up to the first one that is in use.

        Does not wait for the reply. The channel cannot be used afterwards.

        Args:
            tags: the consumer tags of the channel, which are cancelled.
            full: queues that are deleted with their messages.
        """
        for address in addresses:
            state = self.inspect(address.name)
            if state is not None:
                if state.messages:
                    return
                channel.queue_delete(address.name)
        for address in full:
            self.drop(address.name)


def _keep(deliveries: list[DeliveryProtocol], got: list[DeliveryProtocol]) -> list[Any]:
    """Take none of them."""
    deliveries += got
    return []


def all_up_to(tags: Sequence[Any], waiting: Iterable[Any]) -> Any:
    """The highest of these delivery tags up to which one frame can acknowledge all messages.

    Args:
        waiting: the other delivery tags that are not acknowledged, in order.
    """
    lowest, highest = next(iter(waiting), None), max(tags)
    if lowest is None or highest < lowest:
        return highest
    return max((tag for tag in tags if tag < lowest), default=None)


def is_missing_queue(exc: Any) -> bool:
    """Whether a 404 means that the queue does not exist; otherwise its node is down."""
    return MISSING.search(str(exc.reply_text)) is not None


class ReplyTimer:
    """A limit on the wait for a reply, in seconds from now; None: no limit.

    The timeout of a socket starts again with all that arrives, including heartbeats.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._end = time.monotonic() + self._seconds

    def check(self) -> None:
        """Called when other frames have arrived. Raises: socket.timeout: the limit has passed."""
        if time.monotonic() > self._end:
            raise socket.timeout(f"no answer for {self._seconds:.1f} seconds")


def is_open(channel: Any) -> bool:
    """Whether a channel of any transport is open."""
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
    """A message of kombu as a delivery. kombu has decompressed the body if it could."""
    properties = {
        **message.properties,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
    }
    compression = message.headers.get(COMPRESSION) if message.errors else None
    return make_delivery(message, properties, message.headers, compression, consumer_tag)
