"""Reads the messages of a queue without taking them: one write fetches and requeues them.

A message is missing from its queue only between two frames that the broker handles. The channels are fastres's own,
on py-amqp's socket. If a queue does not exist, the broker closes the channel; the next write that needs the channel
opens it again, without an extra round trip.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from amqp import spec
from amqp.exceptions import ChannelError, error_for_code

from fastres.amqp.session import Browsed, QueueState, ReplyTimer, is_missing_queue
from fastres.errors import BrokerUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastres._protocols import Delivery, Frame
    from fastres.amqp.session import Receiver

__all__ = ("Browser",)

#: The number of messages that one write fetches: the socket must hold the answers, and other threads wait meanwhile.
AT_ONCE = 200
#: Seconds after which a broker that does not answer is considered unreachable.
REPLY_TIMEOUT = 30.0
NOT_FOUND, PRECONDITION_FAILED = 404, 406

DECLARE_OK, DELETE_OK, GET_EMPTY, QOS_OK, CLOSE, OPEN_OK = (
    struct.pack(">HH", *method)
    for method in (
        spec.Queue.DeclareOk, spec.Queue.DeleteOk, spec.Basic.GetEmpty, spec.Basic.QosOk, spec.Channel.Close,
        spec.Channel.OpenOk,
    )
)  # fmt: skip


class Native(Protocol):
    """The part of the session ``RabbitMQ`` that a browser uses."""

    @property
    def uri(self) -> str: ...

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]: ...

    @property
    def socket(self) -> Any: ...

    def unopened_channel(self) -> Any: ...

    def receive(self, channel: Any, receiver: Receiver) -> None:
        """Pass the messages of ``Basic.Get`` on a channel to a receiver."""

    def restart(self, channel: Any) -> None:
        """The broker has closed a channel: drop an incomplete message."""

    def write(self, data: bytes) -> None: ...

    def method(self, channel: Any, signature: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> bytes:
        """The frame of a method."""

    def next_frames(self) -> list[Frame]:
        """Wait for the next frames: deliveries go to their receivers, other frames are returned."""

    def pass_on(self, frames: list[Frame]) -> None:
        """Let py-amqp handle frames."""


class Browser:
    """Reads queues over a connection without taking messages.

    Args:
        native: the session over it.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self._slots: list[Slot] = []

    def browse(self, asked: Sequence[tuple[str, int]]) -> list[Browsed | None]:
        """Read the states of queues and their first messages, in one round trip for each ``AT_ONCE``.

        Args:
            asked: the name of each queue, and the number of messages to read.

        Returns: None for a queue that does not exist.

        Raises: amqp.exceptions.ChannelError: the broker refuses (``AccessRefused``: no permission to read).
        """
        slots = self._slots_for(len(asked))
        with self._with_timeout():
            self._begin(slots, asked)
            for slot in slots:
                if slot.has_asked_for_all():
                    slot.give_back()
            self._write(slots)
            self._read(slots)
            for slot in slots:
                self._go_on(slot)
                slot.give_back()
            self._write(slots)
            self._read(slots)
        return [slot.outcome() for slot in slots]

    def take(self, name: str, count: int, choose: Callable[[list[Delivery]], list[int]], delete: bool) -> int:
        """Take some of the first ``count`` messages of a queue, and requeue the others.

        Args:
            choose: returns the delivery tags of the messages to take.
            delete: delete the queue if it is then empty and has no consumers.

        Returns: the number of taken messages.

        Raises: amqp.exceptions.ChannelError: the broker refuses it.
        """
        (slot,) = slots = self._slots_for(1)
        with self._with_timeout():
            self._begin(slots, [(name, count)])
            self._write(slots)
            self._read(slots)
            self._go_on(slot)
            tags = choose(slot.deliveries) if slot.outcome() is not None else []
            for tag in tags:
                slot.acknowledge(tag)
            if delete and len(tags) == len(slot.deliveries) < count:
                slot.delete()
            else:
                slot.give_back()
            self._write(slots)
            self._read(slots)
        return len(tags)

    def _slots_for(self, count: int) -> list[Slot]:
        while len(self._slots) < count:
            self._slots.append(Slot(self._native))
        return self._slots[:count]

    def _begin(self, slots: list[Slot], asked: Sequence[tuple[str, int]]) -> None:
        for slot, (name, count) in zip(slots, asked):
            slot.begin(name, count)

    def _go_on(self, slot: Slot) -> None:
        """Get the messages that did not fit into the first write."""
        while slot.wants_more():
            slot.get_more()
            self._write([slot])
            self._read([slot])

    def _write(self, slots: list[Slot]) -> None:
        data = b"".join([frame for slot in slots for frame in slot.frames])
        for slot in slots:
            slot.frames.clear()
        if data:
            self._native.write(data)

    def _read(self, slots: list[Slot]) -> None:
        by_channel = {slot.channel.channel_id: slot for slot in slots}
        timer: ReplyTimer | None = None
        while any(not slot.is_answered() for slot in slots):
            others: list[Frame] = []
            answered, got = False, sum(len(slot.deliveries) for slot in slots)
            for kind, channel_id, payload in self._native.next_frames():
                slot = by_channel.get(channel_id)
                if slot is None or not slot.answer(payload):
                    others.append((kind, channel_id, payload))
                else:
                    answered = True
            if answered or sum(len(slot.deliveries) for slot in slots) > got:
                timer = None
            elif timer is None:
                timer = ReplyTimer(self._native.socket.gettimeout())
            else:
                timer.check()
            if others:
                self._native.pass_on(others)
            # The reply on a refused channel.
            self._write(slots)

    @contextlib.contextmanager
    def _with_timeout(self) -> Iterator[None]:
        try:
            with self._native.within(REPLY_TIMEOUT):
                yield
        except socket.timeout as exc:
            raise BrokerUnreachable(
                f"the broker {self._native.uri} has not answered a look: it, or the node of a queue, is down or "
                f"stands still, or more than {REPLY_TIMEOUT:.0f} seconds behind"
            ) from exc

    def give_up(self) -> list[Any]:
        """Drop the channels with outstanding answers. Returns: these channels."""
        waiting = [slot for slot in self._slots if not slot.is_answered()]
        self._slots = [slot for slot in self._slots if slot not in waiting]
        for slot in waiting:
            # py-amqp does not know that it is open.
            slot.channel.is_open = True
        return [slot.channel for slot in waiting]


class Slot:
    """A channel on which one queue at a time is read."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self.channel = native.unopened_channel()
        self._is_open = False
        #: To be written.
        self.frames: list[bytes] = []
        self.deliveries: list[Delivery] = []
        native.receive(self.channel, self._receive)

    def begin(self, name: str, count: int) -> None:
        self.frames.clear()
        self.deliveries = []
        self._name = name
        self._state: QueueState | None = None
        self._refused: ChannelError | None = None
        self._left = count
        self._asked = 0
        self._empty = 0
        self._holds = False
        self._deleted = self._given_back = True
        if not self._is_open:
            self._add(spec.Channel.Open, "s", ("",))
            self._is_open = True
        self._add(spec.Queue.Declare, "BsbbbbbF", (0, name, True, False, False, False, False, None))
        self.get_more()

    def has_asked_for_all(self) -> bool:
        return not self._left

    def wants_more(self) -> bool:
        """Whether there may be more of the messages asked for."""
        return bool(self._left) and self._is_open and not self._empty

    def get_more(self) -> None:
        count = min(self._left, AT_ONCE)
        self._left -= count
        self._asked += count
        self._holds = self._holds or count > 0
        for _ in range(count):
            self._add(spec.Basic.Get, "Bsb", (0, self._name, False))

    def give_back(self) -> None:
        """Requeue unacknowledged messages.

        The broker does not answer a nack. The answer to the next method shows that it was handled, so that later
        readers find the messages in their queue.
        """
        if self._is_open and self._holds:
            self._holds = self._given_back = False
            self._add(spec.Basic.Nack, "Lbb", (0, True, True))
            self._add(spec.Basic.Qos, "lBb", (0, 0, False))

    def acknowledge(self, tag: int) -> None:
        self._add(spec.Basic.Ack, "Lb", (tag, False))

    def delete(self) -> None:
        """Delete the queue if it is empty, on the channel of the acknowledgements, so that they are handled before."""
        if self._is_open:
            self._deleted = False
            self._add(spec.Queue.Delete, "Bsbbb", (0, self._name, True, True, False))

    def is_answered(self) -> bool:
        if not self._is_open:
            return True
        has_all = len(self.deliveries) + self._empty >= self._asked
        return self._state is not None and has_all and self._deleted and self._given_back

    def answer(self, payload: bytes) -> bool:
        """Handle a reply of the broker. Returns: whether it is for the browser."""
        method = payload[:4]
        if method == GET_EMPTY:
            self._empty += 1
        elif method == DECLARE_OK:
            self._state = QueueState(*struct.unpack_from(">II", payload, 5 + payload[4]))
        elif method == DELETE_OK:
            self._deleted = True
        elif method == QOS_OK:
            self._given_back = True
        elif method == CLOSE:
            (code,) = struct.unpack_from(">H", payload, 4)
            text = payload[7 : 7 + payload[6]].decode(errors="replace")
            cause = struct.unpack_from(">HH", payload, 7 + payload[6])
            # A message or a consumer has arrived since the queue was found empty: it stays.
            kept = not self._deleted and code == PRECONDITION_FAILED
            refused = error_for_code(code, text, cause, ChannelError)
            if not kept and not (code == NOT_FOUND and is_missing_queue(refused)):
                self._refused = refused
            self._native.restart(self.channel)
            self._is_open = False
            self.frames.clear()
            self._add(spec.Channel.CloseOk, "", ())
        elif method != OPEN_OK:
            return False
        return True

    def outcome(self) -> Browsed | None:
        if self._refused is not None:
            raise self._refused
        if self._state is None or not self._is_open:
            return None
        return Browsed(self._state, self.deliveries)

    def _receive(self, deliveries: list[Delivery]) -> None:
        self.deliveries += deliveries

    def _add(self, method: tuple[int, int], types: str, arguments: tuple[Any, ...]) -> None:
        self.frames.append(self._native.method(self.channel, method, types, arguments))
