"""The outcome of a call in a comparable form, for the parity tests and the fuzzers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastres import _impl

PYTHON, C = _impl.load("python"), _impl.load("c")

FIELDS = (
    "channel_id", "consumer_tag", "delivery_tag", "redelivered", "body", "content_type", "content_encoding",
    "correlation_id", "compression", "keep",
)  # fmt: skip

JSON, PICKLE, MSGPACK, YAML = (
    "application/json",
    "application/x-python-serialize",
    "application/x-msgpack",
    "application/x-yaml",
)

#: Bytes to feed, or the name of another method of ``Frames`` with its arguments.
Step = bytes | tuple[Any, ...]


def outcome(function: Any, *args: Any) -> tuple[Any, ...]:
    """The outcome of a call: its value, or the type, message and cause of its exception.

    As text, so that 1, 1.0 and True differ, and two NaNs do not.
    """
    try:
        return "value", repr(function(*args))
    except Exception as exc:
        return "raised", type(exc), str(exc), repr(exc.__cause__), exc.__suppress_context__


def decode(impl: dict[str, Any], accept: Any, max_size: int, body: Any, *properties: Any) -> Any:
    kind, encoding, compression, correlation_id = properties
    delivery = impl["frames"].Delivery(1, "tag", 1, False, body, kind, encoding, correlation_id, compression)
    return impl["decode"].Decoder(accept, max_size).decode(delivery)


def read(
    impl: dict[str, Any], steps: Iterable[Step], frame_max: int = 4096, own: Iterable[int] = (1, 3)
) -> tuple[Any, ...]:
    """The outcome of a reader: deliveries, frames for py-amqp, the error, the counters and the unused bytes."""
    frames = impl["frames"].Frames(frame_max)
    for channel in own:
        frames.own(channel)
    deliveries: list[str] = []
    others: list[Any] = []
    for step in steps:
        try:
            if isinstance(step, bytes):
                came, passed = frames.feed(step)
                deliveries += [repr([getattr(delivery, field) for field in FIELDS]) for delivery in came]
                others += passed
            else:
                others.append(getattr(frames, step[0])(*step[1:]))
        except Exception as exc:
            # Nothing can be read from this connection any more, so the reader's unused bytes do not matter.
            return deliveries, others, (type(exc), str(exc)), None
    return deliveries, others, None, (frames.consumed, frames.unused(), frames.consumed)
