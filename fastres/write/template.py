"""Makes the messages of many tasks from one message of Celery, which differs from the others in known places."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.utils.saferepr import saferepr
from kombu.compression import compress
from kombu.exceptions import EncodeError
from kombu.serialization import dumps
from kombu.utils.json import JSONEncoder

from fastres._impl import MessageTemplate
from fastres._protocols import ID, PLACE, TABLE, TEXT
from fastres._py.frames import BODY, HEADER
from fastres._py.publications import LEAD, frame
from fastres.chords.producer import BodyProducer, is_kombus_json

if TYPE_CHECKING:
    from fastres.amqp.publishing import Publishing
    from fastres.write.bulk import Bulk

__all__ = ("Sample", "Sampler", "Template")

#: Headers and properties with times.
MADE_AT = ("eta", "expires", "expiration")


#: Arguments whose representation has up to so many characters are shown without Celery's ``saferepr``.
SHORT = 256


class Sample:
    """A message that Celery has made for a task."""

    def __init__(self, publishing: Publishing, call: Any, how: tuple[Any, ...], args: Any, place: int) -> None:
        self.message = publishing.message
        self.exchange, self.routing_key = publishing.exchange, publishing.routing_key
        #: Arguments, keyword arguments, and callbacks and the like; how they were serialized.
        self.call, self.how = call, how
        self.args, self.place = args, place
        self.id: str = self.message.properties["correlation_id"]
        self.headers: dict[str, Any] = self.message.properties["application_headers"]
        body = self.message.body
        encoding = self.message.properties.setdefault("content_encoding", "utf-8")
        self.body: bytes = body.encode(encoding) if isinstance(body, str) else bytes(body)


class Sampler(BodyProducer):
    """A producer that keeps messages instead of publishing them. It declares queues."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel, [])
        self._call: Any = None
        self._how: tuple[Any, ...] = ()

    def _prepare(
        self, body: Any, serializer: Any = None, content_type: Any = None, content_encoding: Any = None,
        compression: Any = None, headers: Any = None,
    ) -> Any:  # fmt: skip
        self._call, self._how = body, (serializer, content_type, content_encoding, compression)
        return super()._prepare(body, serializer, content_type, content_encoding, compression, headers)

    def take(self, args: Any, place: int) -> Sample:
        assert self.publishings is not None
        (publishing,) = self.publishings
        self.publishings.clear()
        return Sample(publishing, self._call, self._how, args, place)


class Template:
    """Makes messages that differ from a sample in ids, places and arguments."""

    def __init__(self, app: Any, bulk: Bulk, signature: Any, sample: Sample, confirm: bool) -> None:
        self._channel_id = bulk.channel.channel_id
        self._frame_max = bulk.frame_max
        self._sample = sample
        self._to = sample.exchange, sample.routing_key
        self._mandatory = confirm
        self._own = () if signature.immutable else None
        self._more = tuple(signature.args)
        self._show = _Shown(app, None if signature.options.get("argsrepr") is None else "")
        self._check = _check_of(app, signature)
        self._kwargs = dict(signature.kwargs)
        self._encode = _encoder(sample, self._all(sample.args))
        shown = self._show(self._all(sample.args))
        pieces, slots, table = _cut(sample, shown)
        self._messages = MessageTemplate(
            self._channel_id, self._frame_max, *self._to, self._mandatory, pieces, slots, table
        )
        self.size = self._messages.__len__
        self.take = self._messages.take

    def _all(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments with those of the signature."""
        return args + self._more if self._own is None else self._more

    def add(self, id_: bytes, place: int, args: tuple[Any, ...]) -> None:
        """Add a task's message.

        Raises:
            TypeError: the task does not take these arguments.
            kombu.exceptions.EncodeError: the arguments cannot be serialized.
        """
        every = self._all(args)
        try:
            if self._check is not None:
                self._check(*every, **self._kwargs)
            body = self._encode(every)
        except TypeError as exc:
            raise TypeError(f"task {place}: {exc}") from exc
        except EncodeError as exc:
            raise EncodeError(f"task {place}: {exc}") from exc
        self._messages.add(id_, place, self._show(every), body)

    def makes(self, sample: Sample) -> bool:
        """Whether the template makes the same message as Celery made, except for times."""
        for values, own in (
            (sample.headers, self._sample.headers),
            (sample.message.properties, self._sample.message.properties),
        ):
            values.update({name: own[name] for name in MADE_AT if own.get(name) and values.get(name)})
        if (sample.exchange, sample.routing_key) != self._to:
            return False
        self.add(sample.id.encode(), sample.place, sample.args)
        made = self.take()
        (method,) = struct.unpack_from(">I", made, 3)
        return bytes(made[method + 8 :]) == _frames(sample, self._channel_id, self._frame_max)


def _frames(sample: Sample, channel_id: int, frame_max: int) -> bytes:
    """The frames of a message behind that of the method, as py-amqp would write them."""
    header = LEAD.pack(60, 0, len(sample.body)) + sample.message._serialize_properties()
    most = frame_max - 8
    parts = [sample.body[start : start + most] for start in range(0, len(sample.body), most)]
    return frame(HEADER, channel_id, header) + b"".join([frame(BODY, channel_id, part) for part in parts])


def _cut(sample: Sample, shown: bytes) -> tuple[list[bytes], bytes, int]:
    """The properties of a message, cut where those of others differ: pieces, slots, and the size of the table."""
    properties: bytes = sample.message._serialize_properties()
    id_ = sample.id.encode()
    found: list[tuple[int, int, int]] = []
    start = properties.find(id_)
    while start >= 0:
        found.append((start, len(id_), ID))
        start = properties.find(id_, start + len(id_))
    place = _field("group_index", b"I") + struct.pack(">i", sample.place)
    start = properties.find(place)
    if start >= 0:
        found.append((start + len(place) - 4, 4, PLACE))
    text = _field("argsrepr", b"S") + struct.pack(">I", len(shown)) + shown
    start = properties.find(text)
    texts = 0
    if start >= 0 and shown:
        found.append((start + len(text) - len(shown) - 4, 4 + len(shown), TEXT))
        texts = len(shown)
    # Flags, content type and content encoding are before the table.
    start = 2
    for name in ("content_type", "content_encoding"):
        start += 1 + len(sample.message.properties[name].encode())
    (size,) = struct.unpack_from(">I", properties, start)
    found.append((start, 4, TABLE))
    pieces, slots, end = [], [], 0
    for start, length, slot in sorted(found):
        pieces.append(properties[end:start])
        slots.append(slot)
        end = start + length
    return [*pieces, properties[end:]], bytes(slots), size - texts


def _field(name: str, kind: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + kind


def _encoder(sample: Sample, args: tuple[Any, ...]) -> Callable[[Any], bytes]:
    """Serializes the arguments of tasks.

    Args:
        args: the positional arguments of the sample.
    """
    serializer, content_type, _, compression = sample.how
    _, kwargs, rest = sample.call
    if serializer == "json" and not compression and not content_type and is_kombus_json():
        encode = JSONEncoder().encode
        begin = b"[" + str(encode(args)).encode()
        if sample.body.startswith(begin):
            end = sample.body[len(begin) :]

            def as_json(args: Any) -> bytes:
                try:
                    return b"[" + str(encode(args)).encode() + end
                except Exception as exc:
                    raise EncodeError(str(exc)) from exc

            return as_json

    def serialize(args: Any) -> bytes:
        _, encoding, body = dumps((args, kwargs, rest), serializer=serializer)
        if compression:
            body, _ = compress(body, compression)
        return body.encode(encoding) if isinstance(body, str) else bytes(body)

    return serialize


class _Shown:
    """Shows arguments as Celery does in a task's headers.

    Args:
        app: the application.
        given: the text to show; None: the arguments.
    """

    def __init__(self, app: Any, given: str | None) -> None:
        self._given = None if given is None else given.encode()
        self._longest = app.amqp.argsrepr_maxsize
        levels = app.conf.get("task_repr_maxlevels")
        self._levels = {} if levels is None else {"maxlevels": levels}
        self._short = min(SHORT, self._longest // 2)

    def __call__(self, args: tuple[Any, ...]) -> bytes:
        if self._given is not None:
            return self._given
        left, shown = self._short, []
        for value in args:
            kind = type(value)
            if kind is int or kind is float or kind is bool or value is None:
                text = str(value)
            elif kind is str and len(value) < left:
                text = "'" + value.replace("'", "\\'") + "'"
            else:
                left = 0
                break
            left -= len(text)
            shown.append(text)
        if left <= 0:
            return str(saferepr(args, self._longest, **self._levels)).encode("utf-8", "surrogatepass")
        return ("(" + ", ".join(shown) + (",)" if len(shown) == 1 else ")")).encode("utf-8", "surrogatepass")


def _check_of(app: Any, signature: Any) -> Callable[..., object] | None:
    """The function with which Celery checks the arguments of a task; None: Celery does not check them."""
    task = app.tasks.get(signature.task)
    return getattr(task, "__header__", None) if task is not None and task.typing else None
