"""Sessions that read and write AMQP frames on py-amqp's socket, beside py-amqp."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqp import spec
from amqp.exceptions import ChannelError, error_for_code
from amqp.serialization import dumps
from kombu.utils.compat import detect_environment

from fastres._impl import Frames
from fastres._protocols import COMPRESSION
from fastres.amqp.session import QueueState, ReplyTimer, Session, is_open, make_delivery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastres._protocols import Delivery, Frame
    from fastres.amqp.session import Receiver
    from fastres.amqp.window import Window

__all__ = ("FramedSession", "confirm_close", "method_frame")

#: Bytes to read in one system call.
CHUNK = 1 << 18
#: Seconds that the rest of a TLS record may take to arrive.
RECORD_TIMEOUT = 1.0
#: The type of a method's frame, and the octets of a frame around its payload.
METHOD, FRAME_OVERHEAD = 1, 8
#: The octet that ends it, and the frame of an acknowledgement.
FRAME_END, ACKNOWLEDGEMENT = 0xCE, struct.Struct(">BHIHHQBB")
#: The class and method ids of awaited replies.
OPEN_OK, CLOSE_OK, DECLARE_OK, CONSUME_OK, ACK, COMMIT_OK, QOS_OK = (
    struct.pack(">HH", *method)
    for method in (
        spec.Channel.OpenOk, spec.Channel.CloseOk, spec.Queue.DeclareOk, spec.Basic.ConsumeOk, spec.Basic.Ack,
        spec.Tx.CommitOk, spec.Basic.QosOk,
    )
)  # fmt: skip


class FramedSession(Session):
    """A session that reads deliveries and replies in bulk, and passes all other frames to py-amqp."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.heartbeat = connection.connection.heartbeat
        connection.connection.on_blocked = self._on_blocked
        connection.connection.on_unblocked = self._on_unblocked
        #: The publishing channel, the number of the last message on it, and its unconfirmed messages.
        self._publishing_channel: Any = None
        self._published = 0
        self._window: Window | None = None
        #: The exception with which the broker has closed it.
        self._closed_with: Exception | None = None
        self._frames = Frames(connection.connection.frame_max)
        self._receivers: dict[tuple[int, str], Receiver] = {}
        #: The numbers of the channels over which deliveries come.
        self._owned: set[int] = set()
        self._poller: Any = None

    def _on_blocked(self, reason: str) -> None:
        self.is_blocked = True

    def _on_unblocked(self) -> None:
        self.is_blocked = False

    @property
    def buffered(self) -> bool:
        """Whether there are bytes to read that were taken from the socket before."""
        return _has_read_ahead(self._connection.connection.transport)

    @property
    def socket(self) -> Any:
        sock = self._connection.connection.transport.sock
        if sock is None:
            raise ConnectionResetError("the connection was closed")
        return sock

    def drain(self, timeout: float) -> None:
        """Wait for ``timeout`` seconds, read all bytes that have arrived, and pass deliveries to their receivers.

        Raises: socket.timeout: nothing arrived.
        """
        connection = self._connection.connection
        transport = connection.transport
        # Bytes that py-amqp has read ahead come first.
        data, transport._read_buffer = transport._read_buffer, b""
        if not data:
            with transport.having_timeout(timeout):
                data = self.socket.recv(CHUNK)
            if not data:
                raise ConnectionResetError("the broker closed the connection")
        others = self._receive(data)
        if others:
            self.pass_on(others)

    def _receive(self, data: bytes) -> list[Frame]:
        """Pass the deliveries in these bytes to their receivers. Returns: the frames for py-amqp."""
        before = self._frames.consumed
        others: list[Frame]
        deliveries, others = self._frames.feed(data)
        self._connection.connection.bytes_recv += self._frames.consumed - before
        if len(self._receivers) == len(self._owned) == 1 and deliveries:
            # Only one receiver: deliveries on a channel that is being closed are dropped.
            (receiver,) = self._receivers.values()
            receiver(deliveries)
            return others
        # Consecutive deliveries for one receiver are passed together, for whichever of its consumers.
        before_it: tuple[int, str] | None = None
        its: Receiver | None = None
        together: list[Delivery] = []
        for delivery in deliveries:
            consumer = delivery.channel_id, delivery.consumer_tag
            if consumer != before_it:
                other = self._receivers.get(consumer)
                if other != its:
                    if its is not None:
                        its(together)
                    its, together = other, []
                before_it = consumer
            together.append(delivery)
        # Without a receiver, the consumer was cancelled: the messages are requeued when its channel is closed.
        if its is not None:
            its(together)
        return others

    def _own(self, channel_id: int) -> None:
        self._frames.own(channel_id)
        self._owned.add(channel_id)

    def _disown(self, channel_id: int) -> None:
        self._frames.disown(channel_id)
        self._owned.discard(channel_id)

    def pass_on(self, frames: list[Frame]) -> None:
        """Let py-amqp handle frames. Its callbacks may read from the socket, or raise."""
        self.hand_back()
        connection = self._connection.connection
        # A frame may close the connection, which then has no transport.
        transport = connection.transport
        left = deque(frames)
        try:
            while left:
                frame = left.popleft()
                # Deliveries may come after the end of a channel that both sides have closed at the same time.
                if not frame[1] or connection.channels is None or frame[1] in connection.channels:
                    connection.on_inbound_frame(frame)
        finally:
            if left:
                transport._read_buffer = b"".join(frame_of(*frame) for frame in left) + transport._read_buffer

    def _declaring_channel(self) -> Any:
        # py-amqp reads the replies, perhaps in the middle of deliveries.
        self.hand_back()
        return super()._declaring_channel()

    def hand_back(self) -> None:
        """Let py-amqp continue to read at this position."""
        unused = self._frames.unused()
        if unused:
            transport = self._connection.connection.transport
            transport._read_buffer = unused + transport._read_buffer

    def unopened_channel(self) -> Any:
        """A channel of py-amqp that is opened by a frame that the caller writes."""
        connection = self._connection.connection
        return connection.Channel(connection, auto_decode=False)

    def receive(self, channel: Any, receiver: Receiver) -> None:
        """Pass the messages of ``Basic.Get`` on a channel to a receiver."""
        self._own(channel.channel_id)
        self._receivers[channel.channel_id, ""] = receiver

    def restart(self, channel: Any) -> None:
        """The broker has closed a channel: drop an incomplete message."""
        self._disown(channel.channel_id)
        self._own(channel.channel_id)

    def write(self, data: bytes) -> None:
        self._connection.connection.transport.write(data)
        self._connection.connection.bytes_sent += 1

    @staticmethod
    def method(channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
        """The frame of a method."""
        return method_frame(channel, signature, types, arguments)

    def next_frames(self) -> list[Frame]:
        """Wait for the next frames: deliveries go to their receivers, other frames are returned."""
        connection = self._connection.connection
        transport = connection.transport
        data, transport._read_buffer = transport._read_buffer, b""
        frames = self._receive(data) if data else []
        if not frames:
            data = self.socket.recv(CHUNK)
            if not data:
                raise ConnectionResetError("the broker closed the connection")
            frames = self._receive(data)
        return frames

    def channel(self) -> Any:
        # The answer is read by py-amqp.
        self.hand_back()
        channel = self._connection.channel()
        # py-amqp would return any body that looks like text as str, compressed bodies too.
        channel.auto_decode = False
        return channel

    def wait_for_confirms(self, window: Window, enough: Callable[[], bool]) -> None:
        """As in ``Session``.

        Raises:
            amqp.exceptions.ChannelError: the broker has closed the channel.
        """
        channel = self._publishing_channel
        if channel is None:
            return
        self._await(channel, {}, enough)
        closed_with, self._closed_with = self._closed_with, None
        if closed_with is not None:
            raise closed_with

    def _publishing_channel_for(self, window: Window) -> Any:
        if self._publishing_channel is None or not is_open(self._publishing_channel):
            window.lose()
            self._publishing_channel = channel = self.channel()
            self._window, self._published, self._closed_with = window, 0, None
            channel.confirm_select()
            channel.events["basic_return"].add(
                lambda exc, exchange, routing_key, message: window.give_back(routing_key)
            )
            channel.events["basic_ack"].add(window.confirm)
            channel.events["basic_nack"].add(window.refuse)
            # Raised to the thread that waits for a reply on this channel, not to the thread that happens to read it.
            channel._callbacks[spec.Channel.Close] = partial(self._on_publishing_closed, channel, window)
        return self._publishing_channel

    def _on_publishing_closed(self, channel: Any, window: Window, code: int, text: str, *method: int) -> None:
        if channel.is_open:
            confirm_close(channel)
            self._closed_with = error_for_code(code, text, method, ChannelError)
            window.lose(suspects=True)

    @contextlib.contextmanager
    def with_timeout(self, seconds: float) -> Iterator[None]:
        sock = self.socket
        before = sock.gettimeout()
        sock.settimeout(seconds)
        try:
            yield
        finally:
            # It may have been closed meanwhile.
            with contextlib.suppress(OSError):
                sock.settimeout(before)

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        return self.with_timeout(min(seconds, self.socket.gettimeout() or seconds))

    def _is_closed(self, channel: Any, channel_id: int) -> None:
        """The broker has closed a channel that was given up: its number can be used again."""
        self._disown(channel_id)
        channel.collect()

    def limit(self, seconds: float) -> None:
        self.socket.settimeout(seconds)

    def poll(self) -> None:
        if detect_environment() != "default":
            with contextlib.suppress(socket.timeout):
                self._connection.connection.drain_events(timeout=0)
            return
        if self._poller is None:
            self._poller = select.poll()
            self._poller.register(self.socket, select.POLLIN)
        while self.buffered or self._poller.poll(0):
            self.drain(RECORD_TIMEOUT)

    def beat(self) -> None:
        self._connection.connection.send_heartbeat()

    def _await(
        self,
        channel: Any,
        awaited: dict[bytes, int],
        enough: Callable[[], bool] = lambda: True,
        declared: list[QueueState] | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read until the broker has sent this number of these methods. Counts down ``awaited``.

        Args:
            enough: a further condition for the end.
            over: whether to stop waiting.
            declared: the states of queues that were declared are added to it.
        """
        connection = self._connection.connection
        publishes_on = 0 if self._publishing_channel is None else self._publishing_channel.channel_id
        timer: ReplyTimer | None = None
        while (any(awaited.values()) or not enough()) and not over():
            before = self._frames.consumed
            if channel is self._publishing_channel and not channel.is_open:
                raise self._closed_with or ConnectionResetError("the channel was closed")
            frames = self.next_frames()
            left: list[Frame] = []
            for number, (kind, channel_id, payload) in enumerate(frames):
                method = payload[:4] if kind == METHOD else b""
                if channel_id == channel.channel_id and awaited.get(method):
                    connection.bytes_recv += 1
                    awaited[method] -= 1
                    if method == DECLARE_OK and declared is not None:
                        declared.append(QueueState(*struct.unpack_from(">II", payload, 5 + payload[4])))
                elif method == ACK and channel_id == publishes_on and not left and self._window is not None:
                    # Frames for py-amqp go first: a returned message arrives before its confirm.
                    connection.bytes_recv += 1
                    self._window.confirm(*struct.unpack_from(">QB", payload, 4))
                else:
                    left.append(frames[number])
            # Confirms that py-amqp handles are answers too; heartbeats, which are on no channel, are none.
            answered = len(left) < len(frames) or any(
                channel_id == channel.channel_id for _, channel_id, _ in left
            )
            if left:
                self.pass_on(left)
            if answered or self._frames.consumed > before:
                timer = None
            elif timer is None:
                timer = ReplyTimer(self.socket.gettimeout())
            else:
                timer.check()

    def _register(self, channel: Any, tag: str, receiver: Receiver, on_cancel: Callable[[str], None]) -> None:
        self._receivers[channel.channel_id, tag] = receiver
        channel.callbacks[tag] = lambda raw: receiver([delivery_of(raw, tag)])
        channel.cancel_callbacks[tag] = on_cancel

    def wait_on(self, channel: Any, enough: Callable[[], bool]) -> None:
        """Read, confirms included, until ``enough()``."""
        self._await(channel, {}, enough=enough)


def _has_read_ahead(transport: Any) -> bool:
    """Whether there are bytes to read that were taken from the socket before."""
    return bool(transport._read_buffer) or (hasattr(transport.sock, "pending") and transport.sock.pending() > 0)


def confirm_close(channel: Any, *why: Any) -> None:
    """Confirm that the broker has closed a channel.

    The channel number is not used again: RabbitMQ 3.10 repeats Channel.Close once a minute until it has read the
    confirmation, and takes a second confirmation for a protocol error.
    """
    if channel.is_open:
        channel.send_method(spec.Channel.CloseOk)
        # The broker also replies to our own Channel.Close, if it was sent.
        channel.is_open = False


def method_frame(channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a method."""
    return frame_of(METHOD, channel.channel_id, struct.pack(">HH", *signature) + dumps(types, arguments))


def frame_of(kind: int, channel_id: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel_id, len(payload)) + payload + bytes((FRAME_END,))


def delivery_of(message: Any, consumer_tag: str = "") -> Delivery:
    """A message of py-amqp as a delivery."""
    headers = message.properties.get("application_headers") or {}
    return make_delivery(message, message.properties, headers, headers.get(COMPRESSION), consumer_tag)
