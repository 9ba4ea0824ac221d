"""The interfaces of both implementations, ``fastres._py`` and ``fastres_ext``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: A result as Celery writes it: ``status``, ``result``, ``task_id``, ``traceback``, ``children`` and more.
Meta = dict[str, Any]

#: A result that arrived: its mark (whatever the caller wants back), the task's id, the result.
Arrival = tuple[Any, str, Meta]

#: Arrivals by outcome, as :meth:`Aggregate.feed` returns them: ready, states, repeated, foreign.
Sorted = tuple[list[Arrival], list[Arrival], list[Arrival], list[Arrival]]

#: Header of a compressed message, as kombu sets it.
COMPRESSION = "compression"
#: Header of a result that stays in its queue when it is read: a chord's part, wanted by the join and by users.
KEEP = "fastres-keep"
#: When a state on the way was sent, in its meta: seconds since the epoch, where queues get out of order.
SENT_AT = "fastres-sent-at"
#: In the meta of a notice of cancellation: the ids of the cancelled tasks, or True: all tasks whose results are in its
#: queue. Its message has the header ``KEEP``.
CANCELLED = "fastres-cancelled"

#: A frame that is not for fastres: type, channel, payload.
Frame = tuple[int, int, bytes]

Body = bytes | bytearray | memoryview | str


class Delivery(Protocol):
    """A delivered message, with those of its properties that results use."""

    channel_id: int
    consumer_tag: str
    delivery_tag: Any
    redelivered: bool
    body: Body
    content_type: str | None
    content_encoding: str | None
    correlation_id: str | None
    compression: str | None
    keep: bool

    def __init__(
        self,
        channel_id: int,
        consumer_tag: str,
        delivery_tag: Any,
        redelivered: bool,
        body: Body,
        content_type: str | None = None,
        content_encoding: str | None = None,
        correlation_id: str | None = None,
        compression: str | None = None,
        keep: bool = False,
    ) -> None: ...


class Frames(Protocol):
    """Cuts a stream of bytes into frames, and assembles deliveries."""

    #: How many frames were put together to deliveries.
    consumed: int

    def __init__(self, frame_max: int) -> None:
        """``frame_max``: the largest frame that was negotiated, in bytes."""

    def own(self, channel_id: int) -> None:
        """Take the deliveries of this channel from now on."""

    def disown(self, channel_id: int) -> None:
        """Leave the deliveries of this channel to others; one that has not come whole is dropped."""

    def feed(self, data: bytes | bytearray | memoryview) -> tuple[list[Delivery], list[Frame]]:
        """The deliveries that are whole with these bytes, and the frames that are not for fastres, in order.

        Raises:
            amqp.exceptions.FrameSyntaxError: a frame is larger than negotiated, does not end where it should, or
                does not hold what it says. Nothing can be read from this connection any more.
        """

    def unused(self) -> bytes:
        """The fed bytes that are not part of a complete frame or delivery. The next reader starts with them."""


class Publication(Protocol):
    """Encodes a message as the frames of ``Basic.Publish``, content header and body, in one ``bytes``."""

    def __call__(
        self,
        channel_id: int,
        frame_max: int,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: bytes,
        delivery_mode: int,
        correlation_id: str,
        expiration: str = "",
    ) -> bytes:
        """``headers``: a field table as it goes over the wire; ``expiration``: milliseconds. Empty: none.

        Raises:
            amqp.exceptions.FrameSyntaxError: a name has more than 255 bytes, or no frame can be as small as this.
        """


class MessageTemplate(Protocol):
    """Encodes messages that differ in the task's id, its place in a group, a text and the body only, as frames.

    Args:
        channel_id: of the channel that they are published on.
        frame_max: the size of a frame, in bytes, at most.
        exchange, routing_key, mandatory: as of ``Basic.Publish``.
        properties: the flags and the property list of a message's header, cut where they differ.
        slots: the values between two pieces of the properties: ``ID``, 36 octets; ``PLACE``, a long; ``TEXT``, a
            longstr; ``TABLE``, a long: the size of the table that has the texts in it.
        table: the octets of that table without the texts.

    Raises:
        amqp.exceptions.FrameSyntaxError: a name has more than 255 bytes, or no frame can be as small as this.
    """

    def __init__(
        self,
        channel_id: int,
        frame_max: int,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        properties: Sequence[bytes],
        slots: bytes,
        table: int,
    ) -> None: ...

    def add(self, id_: bytes, place: int, text: bytes, body: bytes) -> None:
        """Add a message.

        Raises: amqp.exceptions.FrameSyntaxError: its header does not fit into a frame.
        """

    def __len__(self) -> int:
        """How many bytes were added since they were taken."""

    def take(self) -> bytes:
        """The frames that were added."""


#: The slots of a :class:`MessageTemplate`.
ID, PLACE, TEXT, TABLE = 0, 1, 2, 3


class Encode(Protocol):
    """Serializes a meta as the body of a message."""

    def __call__(self, meta: Meta, serializer: str) -> tuple[str, str, bytes]:
        """Content type, content encoding and body. Decoding it gives the same as kombu's serializer.

        Raises:
            kombu.exceptions.EncodeError: the serializer does not take a value.
        """


class Decoder(Protocol):
    """Decodes messages to results. Refuses content types that are not accepted, and messages that are not results."""

    def __init__(self, accept: Iterable[str] | None, max_size: int) -> None:
        """Accept these content types (None: kombu's enabled ones), and bodies of up to ``max_size`` bytes."""

    def decode_all(self, deliveries: Sequence[Delivery]) -> tuple[list[Arrival], list[tuple[Delivery, Exception]]]:
        """The results in deliveries, each marked with its delivery, and those that :meth:`decode` refused."""

    def decode(self, delivery: Delivery) -> Meta:
        """The result in a delivery, with ``task_id`` filled in from the correlation id where it is missing.

        Raises:
            kombu.exceptions.ContentDisallowed: the content type is not accepted.
            kombu.exceptions.DecodeError: the body cannot be decoded.
            fastres.errors.OversizedResult: it unpacks to more than ``max_size`` bytes.
            fastres.errors.MalformedResult: it is no result.
        """


class Aggregate(Protocol):
    """The task ids that a join waits for, and those of them whose results have arrived."""

    def __init__(self, task_ids: Iterable[str], ready_states: Iterable[str]) -> None: ...

    def __len__(self) -> int:
        """How many are still to come."""

    def __contains__(self, task_id: object) -> bool:
        """Whether this id is still to come."""

    def missing(self) -> list[str]:
        """The ids still to come, in the order they were given."""

    def feed(self, arrivals: Sequence[Arrival]) -> Sorted:
        """Sort arrivals into ``(ready, states, repeated, foreign)``, each in order of arrival.

        ``ready`` are final results that were still to come, and are not any more; ``states`` are not final;
        ``repeated`` are of ids that came before; ``foreign`` of ids that this join never waited for.
        """


class Fulfil(Protocol):
    """Sets the final meta of a result object, as ``AsyncResult._maybe_set_cache`` does."""

    def __call__(self, result: Any, meta: Meta) -> None: ...


class InOrder(Protocol):
    """Sorts the parts of a chord by their places in the header."""

    def __call__(self, parts: Sequence[bytes]) -> list[bytes] | None:
        """Sort packed parts whose first line is their place. Returns None if a first line is not a place, or if a place
        is missing, too large, or repeated.
        """


class Listed(Protocol):
    """Joins the serialized results of packed parts, without decoding them."""

    def __call__(self, parts: Sequence[bytes]) -> bytes:
        """The results of the parts, which follow their first lines, joined by commas.

        Raises:
            TypeError: there is something else than parts.
        """


class Compact(Protocol):
    """Makes an id ready to be kept a million times."""

    def __call__(self, id_: str, /) -> int | str:
        """A UUID in its canonical form as a number, any other id as it is."""


class Expand(Protocol):
    """Reverses :class:`Compact`."""

    def __call__(self, key: int | str, /) -> str:
        """The id that was made compact."""
