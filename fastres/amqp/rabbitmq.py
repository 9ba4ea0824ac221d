"""RabbitMQ through py-amqp: its connection and channels, and bulk reads and writes past them on its socket."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import amqp
from amqp import spec
from amqp.exceptions import AccessRefused, ChannelError, PreconditionFailed, error_for_code
from amqp.serialization import dumps
from kombu.utils.compat import detect_environment
from kombu.utils.functional import LRUCache

from fastres._impl import Frames, publication
from fastres._protocols import COMPRESSION
from fastres.amqp.browse import Browser
from fastres.amqp.session import Busy, Patience, QueueState, Session, is_open, make_delivery
from fastres.amqp.window import Window
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from fastres._protocols import Delivery, Frame
    from fastres.addresses import Address
    from fastres.amqp.publishing import Publishing
    from fastres.amqp.session import Browsed, Receiver

__all__ = ("RabbitMQ", "session_of")

#: Bytes to read in one system call.
CHUNK = 1 << 18
#: Queues that are declared and consumed from in one write: there must be room for the answers.
PIPELINED = 200
#: Queues with other arguments that are remembered: each is found out again at the cost of a channel.
FOREIGN = 10_000
#: Seconds within which a broker that is there opens a channel, and agrees to the end of one.
ANSWERS, AGREES = 1.0, 6.0
#: Seconds that the rest of a TLS record may take to come.
RECORD_TIMEOUT = 1.0
#: The type of a method's frame, and the octets of a frame around its payload.
METHOD, FRAME_OVERHEAD = 1, 8
#: The octet that ends it, and the frame of an acknowledgement.
FRAME_END, ACKNOWLEDGEMENT = 0xCE, struct.Struct(">BHIHHQBB")
#: How the methods begin that answers are awaited with.
OPEN_OK, CLOSE_OK, DECLARE_OK, CONSUME_OK, ACK, COMMIT_OK, QOS_OK = (
    struct.pack(">HH", *method)
    for method in (
        spec.Channel.OpenOk, spec.Channel.CloseOk, spec.Queue.DeclareOk, spec.Basic.ConsumeOk, spec.Basic.Ack,
        spec.Tx.CommitOk, spec.Basic.QosOk,
    )
)  # fmt: skip
#: How RabbitMQ words that a queue has a reader who wants to be the only one; permissions have the same code.
IN_USE = "in exclusive use"
#: The first RabbitMQ that has single active consumers.
SINGLE_ACTIVE = (3, 8)
#: The first RabbitMQ that drops what a quorum queue has delivered 21 times, unless it is told not to; the ones
#: before take the word for it for "at once".
LIMITED = (4, 0)
#: Seconds before each look whether a quorum queue is empty: what was acknowledged is counted for a while.
SETTLES = (0.0, 0.005, 0.01, 0.02, 0.05)


class RabbitMQ(Session):
    """RabbitMQ, through py-amqp."""

    confirms = True

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.heartbeat = connection.connection.heartbeat
        connection.connection.on_blocked = self._on_blocked
        connection.connection.on_unblocked = self._on_unblocked
        #: Queues that are there with other arguments than ours.
        self._foreign = LRUCache(limit=FOREIGN)
        #: The channel to publish on, the number of the last message on it, and what is not confirmed.
        self._publishing_channel: Any = None
        self._published = 0
        self._window: Window | None = None
        #: What the broker has closed it with.
        self._closed_with: Exception | None = None
        self._frames = Frames(connection.connection.frame_max)
        self._receivers: dict[tuple[int, str], Receiver] = {}
        #: The numbers of the channels over which deliveries come.
        self._owned: set[int] = set()
        #: The channel of post_confirmed(), how many messages went over it, and which are not confirmed.
        self._posting_channel: Any = None
        self._posted = 0
        self._posts = Window(0, 0)
        self._poller: Any = None
        self._browser: Browser | None = None

    @property
    def single_active_consumer(self) -> bool:  # type: ignore[override]
        return self._is_from(*SINGLE_ACTIVE) or self.acknowledges_first

    @property
    def acknowledges_first(self) -> bool:
        """Whether a commit acknowledges before it publishes: what is between the two is lost with the broker."""
        # LavinMQ 2: its documentation on transactions says so.
        return bool(self._connection.connection.server_properties.get("product") == "LavinMQ")

    def _is_from(self, *version: int) -> bool:
        """Whether this is RabbitMQ of a version, or of a later one."""
        properties = self._connection.connection.server_properties
        ours = tuple(int(number) for number in re.findall(r"\d+", str(properties.get("version")))[:2])
        return properties.get("product") == "RabbitMQ" and ours >= version

    def arguments(self, queue: Any) -> dict[str, Any] | None:
        arguments = super().arguments(queue)
        if arguments is not None and arguments.get("x-queue-type") == "quorum" and self._is_from(*LIMITED):
            # A look gives back what it got: it must not be lost for having been looked at often.
            return {**arguments, "x-delivery-limit": -1}
        return arguments

    def _on_blocked(self, reason: str) -> None:
        self.is_blocked = True

    def _on_unblocked(self) -> None:
        self.is_blocked = False

    @property
    def buffered(self) -> bool:
        """Whether there are bytes to read that the socket does not know of."""
        return _has_read_ahead(self._connection.connection.transport)

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
        others = self._receive(data)
        if others:
            self.pass_on(others)

    def _receive(self, data: bytes) -> list[Frame]:
        """Give the deliveries in these bytes to their receivers: what is left are py-amqp's frames."""
        before = self._frames.consumed
        others: list[Frame]
        deliveries, others = self._frames.feed(data)
        self._connection.connection.bytes_recv += self._frames.consumed - before
        if len(self._receivers) == len(self._owned) == 1 and deliveries:
            # Nobody else's: what still comes over a channel that is being left is for nobody.
            (receiver,) = self._receivers.values()
            receiver(deliveries)
            return others
        # What comes for one receiver is given to it together, whichever of its consumers it came for.
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
        # Without one it was cancelled: the messages go back when its channel is closed.
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
        """Let py-amqp handle frames; what that sets off may read from the socket, or raise."""
        self.hand_back()
        connection = self._connection.connection
        # A frame may close the connection, which then has none.
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
                transport._read_buffer = b"".join(_frame(*frame) for frame in left) + transport._read_buffer

    def _declaring_channel(self) -> Any:
        # py-amqp reads the answers, perhaps in the middle of what is being delivered.
        self.hand_back()
        return super()._declaring_channel()

    def hand_back(self) -> None:
        """Let py-amqp read on from here."""
        unused = self._frames.unused()
        if unused:
            transport = self._connection.connection.transport
            transport._read_buffer = unused + transport._read_buffer

    # -- for the browser

    @property
    def browser(self) -> Browser:
        if self._browser is None:
            self._browser = Browser(self)
        return self._browser

    def unopened_channel(self) -> Any:
        """A channel of py-amqp that is opened by whoever writes the frame."""
        connection = self._connection.connection
        return connection.Channel(connection, auto_decode=False)

    def receive(self, channel: Any, receiver: Receiver) -> None:
        """Give what is got on a channel to a receiver."""
        self._own(channel.channel_id)
        self._receivers[channel.channel_id, ""] = receiver

    def restart(self, channel: Any) -> None:
        """The broker has closed a channel: what had come of a message is dropped."""
        self._disown(channel.channel_id)
        self._own(channel.channel_id)

    def write(self, data: bytes) -> None:
        self._connection.connection.transport.write(data)
        self._connection.connection.bytes_sent += 1

    @staticmethod
    def method(channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
        """The frame of a method."""
        return _method(channel, signature, types, arguments)

    def next_frames(self) -> list[Frame]:
        """Wait for what the broker says next: deliveries go to their receivers, the other frames are returned."""
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

    def browse(self, asked: Sequence[tuple[str, int]]) -> list[Browsed | None]:
        return self.browser.browse(asked)

    def take(
        self, address: Address, count: int, choose: Callable[[list[Delivery]], list[Any]], delete: bool = False
    ) -> int:
        taken = self.browser.take(address.name, count, choose, delete and not address.is_quorum)
        if delete and taken and address.is_quorum:
            self._delete_unconditionally(address.name)
        return taken

    def channel(self) -> Any:
        # The answer is read by py-amqp.
        self.hand_back()
        channel = self._connection.channel()
        # A body that looks like text would come back as str, compressed ones included.
        channel.auto_decode = False
        return channel

    def declare(self, queue: Any) -> QueueState:
        """Declare a queue, or take the one that is there with other arguments."""
        if queue.name not in self._foreign:
            try:
                return super().declare(queue)
            except PreconditionFailed as exc:
                logger.warning(
                    "Queue %r is there with other arguments, and is used as it is: %s. "
                    "Give result_expires and the options of fastres the same values in every process.",
                    queue.name, exc.reply_text,
                )  # fmt: skip
                self._foreign[queue.name] = True
        state = self.inspect(queue.name)
        if state is None:
            self._foreign.pop(queue.name, None)
            return self.declare(queue)
        return state

    def has_other_arguments(self, name: str) -> bool:
        """Whether a queue that was declared is there with other arguments."""
        return name in self._foreign

    def is_there_as(self, queue: Any) -> bool:
        """Whether a queue is there with just these arguments."""
        try:
            super().declare(queue)
        except PreconditionFailed:
            return False
        return True

    def publish(self, publishings: Sequence[Publishing], queues: Sequence[Any], window: Window) -> None:
        """As in ``Session``: messages and declarations are one write, the answers to the latter are waited for.

        Raises:
            amqp.exceptions.ChannelError: the broker has closed the channel.
        """
        connection = self._connection.connection
        channel = self._publishing_channel_for(window)
        frames: list[bytes] = []
        for queue in queues:
            if queue.exchange.name or queue.name in self._foreign:
                self.declare(queue)
            else:
                frames.append(self._declaration(channel, queue))
        declared = len(frames)
        for message, exchange, routing_key, address, _ in publishings:
            headers = dumps("F", (message.headers,)) if message.headers else b""
            frames.append(
                publication(
                    channel.channel_id, connection.frame_max, exchange, routing_key, address is not None,
                    message.body, message.content_type, message.content_encoding, headers, message.delivery_mode,
                    message.correlation_id,
                )
            )  # fmt: skip
            connection.bytes_sent += 2 - (-len(message.body) // (connection.frame_max - FRAME_OVERHEAD))
        connection.transport.write(b"".join(frames) if len(frames) > 1 else frames[0])
        connection.bytes_sent += declared
        window.add(self._published + 1, publishings)
        self._published += len(publishings)
        if not declared:
            return
        awaited = {DECLARE_OK: declared}
        try:
            self._await(channel, awaited)
        except PreconditionFailed:
            if not awaited[DECLARE_OK]:
                raise
            # A queue is there with other arguments: the messages went down with the channel.
            window.withdraw(publishings)
            for queue in queues:
                self.declare(queue)
            self.publish(publishings, (), window)

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
            # Not an error of who happens to read it: whoever waits for an answer on this channel is told.
            channel._callbacks[spec.Channel.Close] = partial(self._on_publishing_closed, channel, window)
        return self._publishing_channel

    def _on_publishing_closed(self, channel: Any, window: Window, code: int, text: str, *method: int) -> None:
        if channel.is_open:
            _let_close(channel)
            self._closed_with = error_for_code(code, text, method, ChannelError)
            window.lose(doubtful=True)

    @contextlib.contextmanager
    def patiently(self, seconds: float) -> Iterator[None]:
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
        return self.patiently(min(seconds, self.socket.gettimeout() or seconds))

    def give_up(self, channel: Any) -> None:
        given_up = [] if self._browser is None else self._browser.give_up()
        declaring, self._declaring = self._declaring, None
        given_up += [each for each in (declaring, channel) if each is not None and each.connection is not None]
        for each in given_up:
            for consumer in [consumer for consumer in self._receivers if consumer[0] == each.channel_id]:
                del self._receivers[consumer]
            each._callbacks[spec.Channel.Close] = partial(_agree, each)
            each._callbacks[spec.Channel.CloseOk] = partial(self._is_closed, each, each.channel_id)
            if each.is_open:
                each.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
                each.is_open = False
        # What the broker does without asking the node of any queue.
        with self.within(ANSWERS):
            self._declaring_channel()

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
        """Read until the broker has answered with so many of these methods; what has come is counted down.

        Args:
            enough: whether what has come besides is enough.
            over: whether nothing more is to be awaited.
            declared: the states of queues that were declared are added to it.
        """
        connection = self._connection.connection
        publishes_on = 0 if self._publishing_channel is None else self._publishing_channel.channel_id
        patience: Patience | None = None
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
                    # Behind what py-amqp is to handle it has to wait: a message comes back before its confirm.
                    connection.bytes_recv += 1
                    self._window.confirm(*struct.unpack_from(">QB", payload, 4))
                else:
                    left.append(frames[number])
            # Confirms that py-amqp handles are answers too; heartbeats, which are on no channel, are none.
            heard = len(left) < len(frames) or any(channel_id == channel.channel_id for _, channel_id, _ in left)
            if left:
                self.pass_on(left)
            if heard or self._frames.consumed > before:
                patience = None
            elif patience is None:
                patience = Patience(self.socket.gettimeout())
            else:
                patience.check()

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
        self._own(channel.channel_id)
        self._register(channel, tag, receiver, on_cancel)
        try:
            channel.basic_consume(
                name, tag, exclusive=exclusive, on_cancel=on_cancel, callback=channel.callbacks[tag]
            )
        except AccessRefused as exc:
            if IN_USE not in exc.reply_text:
                raise
            raise Busy(exc.reply_text) from exc

    def subscribe(
        self,
        channel: Any,
        consumers: Sequence[tuple[Any, str]],
        receiver: Receiver,
        on_cancel: Callable[[str], None],
        prefetch: int = 0,
    ) -> list[QueueState] | None:
        """As in ``Session``, in as many round trips as there are ``PIPELINED`` queues in it."""
        if any(queue.exchange.name or queue.name in self._foreign for queue, _ in consumers):
            channel.open()
            return super().subscribe(channel, consumers, receiver, on_cancel, prefetch)
        connection = self._connection.connection
        self._own(channel.channel_id)
        states: list[QueueState] = []
        for start in range(0, len(consumers), PIPELINED):
            part = consumers[start : start + PIPELINED]
            awaited = {DECLARE_OK: len(part), CONSUME_OK: len(part)}
            frames = []
            if not channel.is_open:
                frames.append(_method(channel, spec.Channel.Open, "s", ("",)))
                awaited[OPEN_OK] = 1
                channel.is_open = True
            if prefetch and not start:
                frames.append(_method(channel, spec.Basic.Qos, "lBb", (0, prefetch, False)))
                awaited[QOS_OK] = 1
            for queue, tag in part:
                self._register(channel, tag, receiver, on_cancel)
                arguments = (0, queue.name, tag, False, False, False, False, None)
                frames += [
                    self._declaration(channel, queue),
                    _method(channel, spec.Basic.Consume, "BssbbbbF", arguments),
                ]
            connection.transport.write(b"".join(frames))
            connection.bytes_sent += len(frames)
            try:
                self._await(channel, awaited, declared=states)
            except self._connection.channel_errors:
                # One of the queues is there with other arguments, or taken, which ends the channel for all.
                self.leave(channel, [tag for _, tag in consumers], ())
                return None
        return states

    def _declaration(self, channel: Any, queue: Any) -> bytes:
        """The frame of a declaration."""
        arguments = (0, queue.name, False, True, False, False, False, self.arguments(queue))
        return _method(channel, spec.Queue.Declare, "BsbbbbbF", arguments)

    def watch(self, channel: Any, on_close: Callable[[Exception], None]) -> None:
        channel._callbacks[spec.Channel.Close] = partial(self._on_close, channel, on_close)

    def _on_close(
        self, channel: Any, on_close: Callable[[Exception], None], code: int, text: str, *method: int
    ) -> None:
        if not channel.is_open:
            return
        _let_close(channel)
        number = channel.channel_id
        for consumer in [consumer for consumer in self._receivers if consumer[0] == number]:
            del self._receivers[consumer]
        self._disown(number)
        closed = error_for_code(code, text, method, ChannelError)
        on_close(closed)
        # To whoever waits for an answer on it.
        raise closed

    def _register(self, channel: Any, tag: str, receiver: Receiver, on_cancel: Callable[[str], None]) -> None:
        self._receivers[channel.channel_id, tag] = receiver
        channel.callbacks[tag] = lambda raw: receiver([_delivery(raw, tag)])
        channel.cancel_callbacks[tag] = on_cancel

    def acknowledge(self, channel: Any, tags: Sequence[int], all_up_to: int | None) -> None:
        """Acknowledge ``tags``, and everything up to and including ``all_up_to``."""
        acks = [] if all_up_to is None else [(all_up_to, True)]
        if all_up_to is None or all_up_to < max(tags):
            acks += [(tag, False) for tag in tags if all_up_to is None or tag > all_up_to]
        # One message that stays makes those behind it be acknowledged one by one, but not written one by one.
        connection = self._connection.connection
        pack, channel_id = ACKNOWLEDGEMENT.pack, channel.channel_id
        connection.transport.write(
            b"".join(
                [pack(METHOD, channel_id, 13, *spec.Basic.Ack, tag, several, FRAME_END) for tag, several in acks]
            )
        )
        connection.bytes_sent += len(acks)

    def answer(self, reply_to: str, body: bytes) -> None:
        """Send JSON to the queue of somebody who has asked for it, if that is still there."""
        self._declaring_channel().basic_publish(
            amqp.Message(body, content_type="application/json"), routing_key=reply_to
        )

    def post(self, channel: Any, message: Any, exchange: str, routing_key: str) -> None:
        """Publish a message of py-amqp on a transactional channel: nobody sees it before the commit.

        It comes back with the commit (``basic_return``) if there is no queue for it.
        """
        channel.send_method(spec.Basic.Publish, "Bssbb", (0, exchange, routing_key, True, False), message)

    def post_confirmed(self, publishings: Sequence[Publishing]) -> tuple[list[Publishing], list[Publishing]]:
        """Publish messages of py-amqp, and wait for the broker's confirms.

        Returns: those for which there is no queue, and those that their queue has refused.

        Raises:
            amqp.exceptions.ChannelError: the broker has closed the channel over one of them.
        """
        posts = self._posts
        if self._posting_channel is None or not is_open(self._posting_channel):
            self._posts = posts = Window(0, 0)
            self._posting_channel, self._posted = self.channel(), 0
            self._posting_channel.confirm_select()
            for event, handle in (
                ("basic_return", lambda exc, exchange, routing_key, message: posts.give_back(routing_key)),
                ("basic_ack", posts.confirm),
                ("basic_nack", posts.refuse),
            ):
                self._posting_channel.events[event].add(handle)
        for publishing in publishings:
            self.post(self._posting_channel, publishing.message, publishing.exchange, publishing.routing_key)
        posts.add(self._posted + 1, publishings)
        self._posted += len(publishings)
        self._await(self._posting_channel, {}, enough=lambda: not posts.unconfirmed)
        unrouted, refused = list(posts.again), list(posts.doubtful)
        posts.withdraw(publishings)
        posts.taken_again(publishings)
        return unrouted, refused

    def wait_on(self, channel: Any, enough: Callable[[], bool]) -> None:
        """Read, with confirms among it, until what has come is enough."""
        self._await(channel, {}, enough=enough)

    def is_classic(self, queue: Any) -> bool:
        """Whether a queue that is there is a classic one, for sure."""
        arguments = queue.queue_arguments or {}
        if "x-queue-type" in arguments or queue.no_declare:
            return bool(arguments.get("x-queue-type") == "classic")
        # Only the broker knows the default type of the virtual host.
        explicit = queue(self._declaring_channel())
        explicit.queue_arguments = {**arguments, "x-queue-type": "classic"}
        try:
            if self.inspect(queue.name) is not None:
                explicit.queue_declare()
                return True
        except ChannelError:
            pass
        return False

    def commit(self, channel: Any) -> None:
        """Have all that was published and acknowledged on a transactional channel happen, or nothing of it."""
        channel.send_method(spec.Tx.Commit)
        self._await(channel, {COMMIT_OK: 1})

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Collection[Any]) -> None:
        """Stop consuming; what was not acknowledged goes back to where it was in its queue.

        The broker's answer is always waited for. It sends messages ahead: those that nobody reads would stay
        unacknowledged for as long as they fill the socket.
        """
        if not channel.is_open:
            return
        for tag in tags:
            self._receivers.pop((channel.channel_id, tag), None)
        # The broker may be closing it too, and answers all the same.
        channel._callbacks[spec.Channel.Close] = partial(_let_close, channel)
        channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
        # What still comes is read and dropped here: nobody else has a use for it.
        # Of two who close a channel at the same time RabbitMQ may answer neither: its own word is enough.
        try:
            with self.within(AGREES):
                self._await(channel, {CLOSE_OK: 1}, over=lambda: not channel.is_open)
        except socket.timeout:
            # A node with a queue that was consumed from stands still.
            channel.is_open = False
            self.give_up(channel)
            return
        self._disown(channel.channel_id)
        if channel.is_open:
            channel.collect()

    def delete(
        self, channel: Any, addresses: Sequence[Address], tags: Sequence[str] = (), full: Sequence[Address] = ()
    ) -> None:
        frames = [_method(channel, spec.Basic.Cancel, "sb", (tag, True)) for tag in tags]
        for empty, those in ((True, addresses), (False, full)):
            frames += [
                _method(channel, spec.Queue.Delete, "Bsbbb", (0, address.name, True, empty, True))
                for address in those
                if not address.is_quorum
            ]
        # The broker may close the channel over a queue that is in use: whoever deletes has no further use for it.
        channel._callbacks[spec.Channel.Close] = partial(_let_close, channel)
        if frames:
            channel.connection.transport.write(b"".join(frames))
            channel.connection.bytes_sent += len(frames)
        for address in (*addresses, *full):
            if address.is_quorum and not self._delete_unconditionally(address.name, address in full):
                return

    def _delete_unconditionally(self, name: str, full: bool = False) -> bool:
        """Delete a quorum queue, which takes no condition, if it seems to be empty and unused; whether it is gone.

        What is sent to it between the last look and the deletion goes with it.
        """
        for pause in SETTLES:
            if pause:
                time.sleep(pause)
            state = self.inspect(name)
            if state is None:
                return True
            if not state.consumers and (full or not state.messages):
                self._declaring_channel().queue_delete(name)
                return True
        return False


def session_of(connection: Any) -> Session:
    """A session over an established kombu connection."""
    return RabbitMQ(connection) if connection.transport.driver_name == "py-amqp" else Session(connection)


def _has_read_ahead(transport: Any) -> bool:
    """Whether there are bytes to read that the socket does not know of."""
    return bool(transport._read_buffer) or (hasattr(transport.sock, "pending") and transport.sock.pending() > 0)


def _let_close(channel: Any, *why: Any) -> None:
    """Agree to the end of a channel.

    Its number is not used again: RabbitMQ 3.10 repeats itself, once a minute, until it has read our answer, and
    takes a second answer for an error of the protocol.
    """
    if channel.is_open:
        channel.send_method(spec.Channel.CloseOk)
        # What we said to end it is answered too, or we have not said it yet.
        channel.is_open = False


def _agree(channel: Any, *why: Any) -> None:
    """Answer the broker, which has closed a channel that we have given up."""
    channel.send_method(spec.Channel.CloseOk)


def _method(channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
    """The frame of a method."""
    return _frame(METHOD, channel.channel_id, struct.pack(">HH", *signature) + dumps(types, arguments))


def _frame(kind: int, channel_id: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel_id, len(payload)) + payload + bytes((FRAME_END,))


def _delivery(message: Any, consumer_tag: str = "") -> Delivery:
    """A message of py-amqp as a delivery."""
    headers = message.properties.get("application_headers") or {}
    return make_delivery(message, message.properties, headers, headers.get(COMPRESSION), consumer_tag)
