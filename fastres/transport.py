"""What differs between RabbitMQ through py-amqp and kombu's other transports, in one place."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union

from amqp import spec
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed
from amqp.serialization import dumps

from fastres._impl import Delivery, Frames
from fastres._protocols import COMPRESSION, KEEP
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastres._protocols import Delivery as DeliveryProtocol

__all__ = ("Busy", "Dialect", "Generic", "Native", "QueueState", "dialect")


#: Called with deliveries, in order.
Receiver = Callable[[list["DeliveryProtocol"]], object]

#: Bytes to read in one system call.
CHUNK = 1 << 18
#: Seconds without a message after which a queue is taken to be read to its end.
STALLED = 1.0


class QueueState(NamedTuple):
    """What a declaration answers with."""

    messages: int
    consumers: int


class Busy(Exception):
    """Another process reads this queue, and it takes one reader at a time."""


class Native:
    """RabbitMQ, through py-amqp: one instance per connection."""

    #: The broker confirms what it has stored, and returns what it could not route.
    confirms = True

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._declaring: Any = None
        self._foreign: set[str] = set()
        self._frames = Frames(connection.connection.frame_max)
        self._receivers: dict[tuple[int, str], Receiver] = {}

    @property
    def buffered(self) -> bool:
        """Whether there are bytes to read that the socket does not know of."""
        transport = self._connection.connection.transport
        return bool(transport._read_buffer) or (
            hasattr(transport.sock, "pending") and transport.sock.pending() > 0
        )

    @property
    def socket(self) -> Any:
        sock = self._connection.connection.transport.sock
        if sock is None:
            raise ConnectionResetError("the connection was closed")
        return sock

    def drain(self, timeout: float) -> None:
        """Read as much as has come, after waiting for it for ``timeout`` seconds, and give it to its receivers.

        Raises: socket.timeout: nothing came.
        """
        connection = self._connection.connection
        transport = connection.transport
        # What py-amqp has read ahead comes first.
        data, transport._read_buffer = transport._read_buffer, b""
        if not data:
            with transport.having_timeout(timeout):
                data = self.socket.recv(CHUNK)
            if not data:
                raise ConnectionResetError("the broker closed the connection")
        before = self._frames.consumed
        deliveries, others = self._frames.feed(data)
        connection.bytes_recv += self._frames.consumed - before
        start = 0
        for stop in range(1, len(deliveries) + 1):
            first = deliveries[start]
            if (
                stop == len(deliveries)
                or deliveries[stop].consumer_tag != first.consumer_tag
                or deliveries[stop].channel_id != first.channel_id
            ):
                receiver = self._receivers.get((first.channel_id, first.consumer_tag))
                # Without one it was cancelled: the messages go back when its channel is closed.
                if receiver is not None:
                    receiver(deliveries[start:stop])
                start = stop
        if others:
            # What they set off may read from the socket.
            self.hand_back()
            for frame in others:
                connection.on_inbound_frame(frame)

    def hand_back(self) -> None:
        """Let py-amqp read on from here."""
        unused = self._frames.unused()
        if unused:
            transport = self._connection.connection.transport
            transport._read_buffer = unused + transport._read_buffer

    def channel(self) -> Any:
        channel = self._connection.channel()
        # A body that looks like text would come back as str, compressed ones included.
        channel.auto_decode = False
        return channel

    def _declaring_channel(self) -> Any:
        """The channel for declarations: a refused one closes it, and nothing else suffers."""
        if self._declaring is None or not self._declaring.is_open:
            self._declaring = self.channel()
        return self._declaring

    def declare(self, queue: Any) -> QueueState:
        """Declare a queue, or take the one that is there with other arguments."""
        if queue.name not in self._foreign:
            channel = self._declaring_channel()
            try:
                if queue.exchange.name:
                    queue.exchange(channel).declare()
                answer = channel.queue_declare(
                    queue.name, durable=True, auto_delete=False, arguments=queue.queue_arguments or None
                )
                if queue.exchange.name:
                    queue(channel).queue_bind()
                return QueueState(answer.message_count, answer.consumer_count)
            except PreconditionFailed as exc:
                logger.warning(
                    "Queue %r is there with other arguments, and is used as it is: %s. "
                    "Give result_expires and the options of fastres the same values in every process.",
                    queue.name, exc.reply_text,
                )  # fmt: skip
                self._foreign.add(queue.name)
        state = self.inspect(queue.name)
        if state is None:
            self._foreign.discard(queue.name)
            return self.declare(queue)
        return state

    def inspect(self, name: str) -> QueueState | None:
        """The state of a queue, None where there is none."""
        try:
            answer = self._declaring_channel().queue_declare(name, passive=True)
        except NotFound:
            return None
        return QueueState(answer.message_count, answer.consumer_count)

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
        """Have a queue's messages sent to ``receiver``, by whoever reads them: this class or py-amqp.

        Raises: Busy: the queue has a consumer, and this one or that one is exclusive.
        """
        self._frames.own(channel.channel_id)
        self._receivers[channel.channel_id, tag] = receiver
        try:
            channel.basic_consume(
                name, tag, exclusive=exclusive, on_cancel=on_cancel,
                callback=lambda raw: receiver([_delivery(raw, tag)]),
            )  # fmt: skip
        except AccessRefused as exc:
            raise Busy(exc.reply_text) from exc

    def acknowledge(self, channel: Any, tags: Sequence[int], all_up_to: int | None) -> None:
        """Acknowledge ``tags``, and everything up to and including ``all_up_to``."""
        if all_up_to is not None:
            channel.basic_ack(all_up_to, multiple=True)
        for tag in tags:
            if all_up_to is None or tag > all_up_to:
                channel.basic_ack(tag)

    def unlimit(self, channel: Any, tags: Sequence[str]) -> None:
        """Stop consuming, before consuming again without a prefetch limit: it holds for new consumers only."""
        for tag in tags:
            channel.basic_cancel(tag)
        channel.basic_qos(0, 0, False)

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Sequence[Any]) -> None:
        """Stop consuming; what was not acknowledged goes back to where it was in its queue.

        Only if there is such is the broker's answer waited for: whoever ends a wait has no need of it.
        """
        if not channel.is_open:
            return
        for tag in tags:
            self._receivers.pop((channel.channel_id, tag), None)
        self._frames.disown(channel.channel_id)
        channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
        if unacknowledged:
            channel.wait(spec.Channel.CloseOk)

    def _give_back(self, channel: Any) -> None:
        channel.send_method(spec.Basic.Nack, "Lbb", (0, True, True))

    def peek(self, channel: Any, name: str) -> tuple[Any | None, int]:
        """The first message of a queue and how many stand behind it, in one round trip.

        The request to put it back is in the same write, so it is out of the queue only for the moment between two
        frames in the broker.
        """
        get = _method(channel, spec.Basic.Get, "Bsb", (0, name, False))
        channel.connection.transport.write(get + _method(channel, spec.Basic.Nack, "Lbb", (0, True, True)))
        channel.connection.bytes_sent += 2
        answer = channel.wait([spec.Basic.GetOk, spec.Basic.GetEmpty], returns_tuple=True)
        if len(answer) < 2:
            return None, 0
        delivery_tag, redelivered, exchange, routing_key, behind, message = answer
        message.delivery_info = {
            "delivery_tag": delivery_tag,
            "redelivered": redelivered,
            "exchange": exchange,
            "routing_key": routing_key,
        }
        return _delivery(message), behind

    def glance(self, channel: Any, name: str, seconds: float) -> Any | None:
        """The first message of a queue, waiting for it as a consumer: what another process has just taken out to
        look at comes here when that puts it back. The channel's prefetch is 1.
        """
        found: list[Any] = []
        tag = channel.basic_consume(name, callback=found.append, on_cancel=lambda tag: None)
        end = time.monotonic() + seconds
        with contextlib.suppress(socket.timeout):
            while not found:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._connection.drain_events(timeout=left)
        channel.basic_cancel(tag)
        self._give_back(channel)
        return _delivery(found[0]) if found else None

    def history(self, channel: Any, name: str, count: int) -> list[Any]:
        """The first ``count`` messages of a queue, which stay there."""
        raw = [channel.basic_get(name) for _ in range(count)]
        self._give_back(channel)
        return [_delivery(message) for message in raw if message is not None]

    def read_all(self, name: str, count: int) -> list[Any]:
        """The first ``count`` messages of a queue, which go back where they were.

        Raises: Busy: somebody else consumes from it.
        """
        found: list[Any] = []
        channel = self.channel()
        try:
            self.consume(channel, name, "fastres-scan", found.extend, lambda tag: None, exclusive=True)
            with contextlib.suppress(socket.timeout):
                while len(found) < count:
                    self.drain(STALLED)
        finally:
            self.leave(channel, ["fastres-scan"], found)
        return found[:count]

    def delete(self, channel: Any, name: str) -> None:
        channel.queue_delete(name, nowait=True)


class Generic:
    """Any other transport of kombu: slower, and with what its virtual channels offer."""

    confirms = False

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._declaring: Any = None

    def hand_back(self) -> None:
        """There is nothing to: kombu is the only one to read."""

    def channel(self) -> Any:
        return self._connection.channel()

    def _declaring_channel(self) -> Any:
        if self._declaring is None or getattr(self._declaring, "closed", False):
            self._declaring = self.channel()
        return self._declaring

    def declare(self, queue: Any) -> QueueState:
        channel = self._declaring_channel()
        if queue.exchange.name:
            queue.exchange(channel).declare()
        answer = channel.queue_declare(
            queue.name, durable=True, auto_delete=False, arguments=queue.queue_arguments or None
        )
        if queue.exchange.name:
            queue(channel).queue_bind()
        return QueueState(answer[1], 0)

    def inspect(self, name: str) -> QueueState | None:
        try:
            answer = self._declaring_channel().queue_declare(name, passive=True)
        except self._connection.channel_errors:
            return None
        return QueueState(answer[1], 0)

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
            callback=lambda raw: receiver([_generic_delivery(channel.message_to_python(raw), tag)]),
            consumer_tag=tag,
        )

    def acknowledge(self, channel: Any, tags: Sequence[Any], all_up_to: int | None) -> None:
        for tag in tags:
            channel.basic_ack(tag)

    def unlimit(self, channel: Any, tags: Sequence[str]) -> None:
        for tag in tags:
            channel.basic_cancel(tag)
        channel.basic_qos(0, 0, False)

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Sequence[Any]) -> None:
        if getattr(channel, "closed", False):
            return
        for tag in tags:
            channel.basic_cancel(tag)
        for tag in reversed(unacknowledged):
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
        return (None if latest is None else _generic_delivery(latest)), 0

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
        return [_generic_delivery(message) for message in messages]

    def read_all(self, name: str, count: int) -> list[Any]:
        channel = self.channel()
        try:
            return self.history(channel, name, count)
        finally:
            channel.close()

    def delete(self, channel: Any, name: str) -> None:
        # Virtual channels delete what is bound; the default exchange binds nothing.
        channel.queue_purge(name)
        channel.queue_delete(name)


Dialect = Union[Native, Generic]


def dialect(connection: Any) -> Dialect:
    """How to speak to the broker of an established kombu connection."""
    return Native(connection) if connection.transport.driver_name == "py-amqp" else Generic(connection)


def _method(channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a method."""
    payload: bytes = struct.pack(">HH", *signature) + dumps(types, arguments)
    header = struct.pack(">BHI", 1, channel.channel_id, len(payload))
    return header + payload + b"\xce"


def _delivery(message: Any, consumer_tag: str = "") -> DeliveryProtocol:
    """A message of py-amqp as a delivery."""
    properties = message.properties
    headers = properties.get("application_headers") or {}
    delivery: DeliveryProtocol = Delivery(
        0,
        consumer_tag,
        message.delivery_tag,
        bool(message.delivery_info.get("redelivered")),
        message.body,
        properties.get("content_type"),
        properties.get("content_encoding"),
        properties.get("correlation_id"),
        headers.get(COMPRESSION),
        bool(headers.get(KEEP)),
    )
    return delivery


def _generic_delivery(message: Any, consumer_tag: str = "") -> DeliveryProtocol:
    """A message of kombu, which has decompressed the body already if it could, as a delivery."""
    delivery: DeliveryProtocol = Delivery(
        0,
        consumer_tag,
        message.delivery_tag,
        bool(message.delivery_info.get("redelivered")),
        message.body,
        message.content_type,
        message.content_encoding,
        message.properties.get("correlation_id"),
        message.headers.get(COMPRESSION) if message.errors else None,
        bool(message.headers.get(KEEP)),
    )
    return delivery
