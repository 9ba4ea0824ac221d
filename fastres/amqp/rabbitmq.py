"""Sessions with RabbitMQ: declare, publish, consume, acknowledge, commit and delete, in few round trips."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import amqp
from amqp import spec
from amqp.exceptions import AccessRefused, ChannelError, PreconditionFailed, error_for_code
from amqp.serialization import dumps
from kombu.utils.functional import LRUCache

from fastres._impl import publication
from fastres.amqp.browse import Browser
from fastres.amqp.framed import (
    ACKNOWLEDGEMENT,
    CLOSE_OK,
    COMMIT_OK,
    CONSUME_OK,
    DECLARE_OK,
    FRAME_END,
    FRAME_OVERHEAD,
    METHOD,
    OPEN_OK,
    QOS_OK,
    FramedSession,
    confirm_close,
    method_frame,
)
from fastres.amqp.publishing import milliseconds
from fastres.amqp.session import Busy, QueueState, Session, is_open
from fastres.amqp.window import Window
from fastres.logs import logger

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from fastres._protocols import Delivery
    from fastres.addresses import Address
    from fastres.amqp.publishing import Publishing
    from fastres.amqp.session import Browsed, Receiver

__all__ = ("RabbitMQ", "session_of")

#: The number of queues that are declared and consumed from in one write: the socket must hold the answers.
PIPELINED = 200
#: The number of remembered queues with other arguments: finding out costs a channel each time.
MAX_FOREIGN = 10_000
#: Seconds that the broker may take to open and to close a channel.
OPEN_TIMEOUT, CLOSE_TIMEOUT = 1.0, 6.0
#: RabbitMQ's words for a queue with an exclusive consumer; a missing permission has the same reply code.
IN_USE = "in exclusive use"
#: The first RabbitMQ that has single active consumers.
SINGLE_ACTIVE_SINCE = (3, 8)
#: The first RabbitMQ whose quorum queues drop a message at its 21st delivery, unless the argument x-delivery-limit
#: is -1; earlier versions drop messages at once with that value.
DELIVERY_LIMIT_SINCE = (4, 0)
#: Seconds before each check that a quorum queue is empty: it counts acknowledged messages for a while.
EMPTY_CHECKS = (0.0, 0.005, 0.01, 0.02, 0.05)


class RabbitMQ(FramedSession):
    """A session with RabbitMQ through py-amqp."""

    confirms = True

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        #: Queues that exist with other arguments.
        self._foreign = LRUCache(limit=MAX_FOREIGN)
        #: The channel of post_confirmed(), how many messages went over it, and which are not confirmed.
        self._posting_channel: Any = None
        self._posted = 0
        self._posts = Window(0, 0)
        self._browser: Browser | None = None

    @property
    def single_active_consumer(self) -> bool:  # type: ignore[override]
        return self._is_from(*SINGLE_ACTIVE_SINCE) or self.acknowledges_first

    @property
    def acknowledges_first(self) -> bool:
        """Whether a commit acknowledges before it publishes, so that a crash between the two loses messages."""
        # LavinMQ 2, according to its documentation on transactions.
        return bool(self._connection.connection.server_properties.get("product") == "LavinMQ")

    def _is_from(self, *version: int) -> bool:
        """Whether this is RabbitMQ of a version, or of a later one."""
        properties = self._connection.connection.server_properties
        ours = tuple(int(number) for number in re.findall(r"\d+", str(properties.get("version")))[:2])
        return properties.get("product") == "RabbitMQ" and ours >= version

    def arguments(self, queue: Any) -> dict[str, Any] | None:
        arguments = super().arguments(queue)
        if (
            arguments is not None
            and arguments.get("x-queue-type") == "quorum"
            and self._is_from(*DELIVERY_LIMIT_SINCE)
        ):
            # Looks requeue messages: a message must not be dropped because it was read often.
            return {**arguments, "x-delivery-limit": -1}
        return arguments

    # -- for the browser

    @property
    def browser(self) -> Browser:
        if self._browser is None:
            self._browser = Browser(self)
        return self._browser

    def browse(self, asked: Sequence[tuple[str, int]]) -> list[Browsed | None]:
        return self.browser.browse(asked)

    def take(
        self, address: Address, count: int, choose: Callable[[list[Delivery]], list[Any]], delete: bool = False
    ) -> int:
        taken = self.browser.take(address.name, count, choose, delete and not address.is_quorum)
        if delete and taken and address.is_quorum:
            self._delete_unconditionally(address.name)
        return taken

    def declare(self, queue: Any) -> QueueState:
        """Declare a queue, or use the existing one that has other arguments."""
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
        """Whether a declared queue exists with other arguments."""
        return name in self._foreign

    def is_there_as(self, queue: Any) -> bool:
        """Whether a queue exists with exactly these arguments."""
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
            expiration = "" if message.expiration is None else str(milliseconds(message.expiration))
            frames.append(
                publication(
                    channel.channel_id, connection.frame_max, exchange, routing_key, address is not None,
                    message.body, message.content_type, message.content_encoding, headers, message.delivery_mode,
                    message.correlation_id, expiration,
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
            # A queue exists with other arguments. The messages were lost with the channel.
            window.withdraw(publishings)
            for queue in queues:
                self.declare(queue)
            self.publish(publishings, (), window)

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
        # For this operation the broker needs no answer from a queue's node.
        with self.within(OPEN_TIMEOUT):
            self._declaring_channel()

    def consume(
        self,
        channel: Any,
        name: str,
        tag: str,
        receiver: Receiver,
        on_cancel: Callable[[str], None],
        exclusive: bool = False,
    ) -> None:
        """Consume a queue; messages go to ``receiver``, whether this class or py-amqp reads them.

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
                frames.append(method_frame(channel, spec.Channel.Open, "s", ("",)))
                awaited[OPEN_OK] = 1
                channel.is_open = True
            if prefetch and not start:
                frames.append(method_frame(channel, spec.Basic.Qos, "lBb", (0, prefetch, False)))
                awaited[QOS_OK] = 1
            for queue, tag in part:
                self._register(channel, tag, receiver, on_cancel)
                arguments = (0, queue.name, tag, False, False, False, False, None)
                frames += [
                    self._declaration(channel, queue),
                    method_frame(channel, spec.Basic.Consume, "BssbbbbF", arguments),
                ]
            connection.transport.write(b"".join(frames))
            connection.bytes_sent += len(frames)
            try:
                self._await(channel, awaited, declared=states)
            except self._connection.channel_errors:
                # One of the queues has other arguments or an exclusive consumer: the broker has closed the channel.
                self.leave(channel, [tag for _, tag in consumers], ())
                return None
        return states

    def _declaration(self, channel: Any, queue: Any) -> bytes:
        """The frame of a declaration."""
        arguments = (0, queue.name, False, True, False, False, False, self.arguments(queue))
        return method_frame(channel, spec.Queue.Declare, "BsbbbbbF", arguments)

    def watch(self, channel: Any, on_close: Callable[[Exception], None]) -> None:
        channel._callbacks[spec.Channel.Close] = partial(self._on_close, channel, on_close)

    def _on_close(
        self, channel: Any, on_close: Callable[[Exception], None], code: int, text: str, *method: int
    ) -> None:
        if not channel.is_open:
            return
        confirm_close(channel)
        number = channel.channel_id
        for consumer in [consumer for consumer in self._receivers if consumer[0] == number]:
            del self._receivers[consumer]
        self._disown(number)
        closed = error_for_code(code, text, method, ChannelError)
        on_close(closed)
        # Raised to the thread that waits for a reply on the channel.
        raise closed

    def acknowledge(self, channel: Any, tags: Sequence[int], all_up_to: int | None) -> None:
        """Acknowledge ``tags``, and everything up to and including ``all_up_to``."""
        acks = [] if all_up_to is None else [(all_up_to, True)]
        if all_up_to is None or all_up_to < max(tags):
            acks += [(tag, False) for tag in tags if all_up_to is None or tag > all_up_to]
        # Behind a message that stays, each is acknowledged with a frame of its own; all frames are one write.
        connection = self._connection.connection
        pack, channel_id = ACKNOWLEDGEMENT.pack, channel.channel_id
        connection.transport.write(
            b"".join(
                [pack(METHOD, channel_id, 13, *spec.Basic.Ack, tag, several, FRAME_END) for tag, several in acks]
            )
        )
        connection.bytes_sent += len(acks)

    def answer(self, reply_to: str, body: bytes) -> None:
        """Publish JSON to a reply queue, which may be gone."""
        self._declaring_channel().basic_publish(
            amqp.Message(body, content_type="application/json"), routing_key=reply_to
        )

    def post(self, channel: Any, message: Any, exchange: str, routing_key: str) -> None:
        """Publish a message of py-amqp on a transactional channel: it is not visible before the commit.

        If there is no queue for it, the broker returns it with the commit (``basic_return``).
        """
        channel.send_method(spec.Basic.Publish, "Bssbb", (0, exchange, routing_key, True, False), message)

    def open_posting_channel(self) -> Window:
        """Open the channel of ``post_confirmed``, unless it is open: amid deliveries it would take longer.

        Returns: its unconfirmed messages.
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
        return posts

    def post_confirmed(self, publishings: Sequence[Publishing]) -> tuple[list[Publishing], list[Publishing]]:
        """Publish messages of py-amqp, and wait for the broker's confirms.

        Returns: the messages without a queue, and those that a queue has refused.

        Raises:
            amqp.exceptions.ChannelError: the broker has closed the channel over one of them.
        """
        posts = self.open_posting_channel()
        for publishing in publishings:
            self.post(self._posting_channel, publishing.message, publishing.exchange, publishing.routing_key)
        posts.add(self._posted + 1, publishings)
        self._posted += len(publishings)
        self._await(self._posting_channel, {}, enough=lambda: not posts.unconfirmed)
        unrouted, refused = list(posts.again), list(posts.suspects)
        posts.withdraw(publishings)
        posts.republished(publishings)
        return unrouted, refused

    def is_classic(self, queue: Any) -> bool:
        """Whether a queue exists and is certainly a classic one."""
        arguments = queue.queue_arguments or {}
        if "x-queue-type" in arguments or queue.no_declare:
            return bool(arguments.get("x-queue-type") == "classic")
        # The default type of the virtual host is known to the broker only.
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
        """Commit the publishings and acknowledgements of a transactional channel."""
        channel.send_method(spec.Tx.Commit)
        self._await(channel, {COMMIT_OK: 1})

    def leave(self, channel: Any, tags: Sequence[str], unacknowledged: Collection[Any]) -> None:
        """Close a consuming channel. Unacknowledged messages return to their places in the queue.

        Always waits for the broker's reply: unread messages that were sent ahead would stay unacknowledged as long as
        they fill the socket.
        """
        if not channel.is_open:
            return
        for tag in tags:
            self._receivers.pop((channel.channel_id, tag), None)
        # The broker may be closing the channel too, and still answers.
        channel._callbacks[spec.Channel.Close] = partial(confirm_close, channel)
        channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))
        # Messages that still arrive are read and dropped here.
        # If both sides close a channel at the same time, RabbitMQ may not reply: its own Close is enough.
        try:
            with self.within(CLOSE_TIMEOUT):
                self._await(channel, {CLOSE_OK: 1}, over=lambda: not channel.is_open)
        except socket.timeout:
            # The node of a consumed queue does not respond.
            channel.is_open = False
            self.give_up(channel)
            return
        self._disown(channel.channel_id)
        if channel.is_open:
            channel.collect()

    def delete(
        self, channel: Any, addresses: Sequence[Address], tags: Sequence[str] = (), full: Sequence[Address] = ()
    ) -> None:
        frames = [method_frame(channel, spec.Basic.Cancel, "sb", (tag, True)) for tag in tags]
        for empty, those in ((True, addresses), (False, full)):
            frames += [
                method_frame(channel, spec.Queue.Delete, "Bsbbb", (0, address.name, True, empty, True))
                for address in those
                if not address.is_quorum
            ]
        # The broker may close the channel because of a queue in use. The caller does not use the channel any more.
        channel._callbacks[spec.Channel.Close] = partial(confirm_close, channel)
        if frames:
            channel.connection.transport.write(b"".join(frames))
            channel.connection.bytes_sent += len(frames)
        for address in (*addresses, *full):
            if address.is_quorum and not self._delete_unconditionally(address.name, address in full):
                return

    def _delete_unconditionally(self, name: str, full: bool = False) -> bool:
        """Delete a quorum queue if it seems to be empty and unused. Returns: whether it is gone.

        The broker takes no condition: messages that arrive between the last check and the deletion are lost.
        """
        for pause in EMPTY_CHECKS:
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


def _agree(channel: Any, *why: Any) -> None:
    """Confirm that the broker has closed a channel that was given up."""
    channel.send_method(spec.Channel.CloseOk)
