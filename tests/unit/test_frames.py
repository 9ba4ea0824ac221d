"""Parsing frames from a stream of bytes, in both implementations."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import wire
from amqp.exceptions import FrameSyntaxError

FRAME_MAX = 131_072


@pytest.fixture
def frames(impl: dict[str, Any]) -> Any:
    frames = impl["frames"].Frames(FRAME_MAX)
    frames.own(1)
    frames.own(3)
    return frames


def seen(delivery: Any) -> tuple[Any, ...]:
    return (
        delivery.channel_id, delivery.consumer_tag, delivery.delivery_tag, delivery.redelivered, delivery.body,
        delivery.content_type, delivery.content_encoding, delivery.correlation_id, delivery.compression,
        delivery.keep,
    )  # fmt: skip


def test_a_delivery_has_its_properties(frames: Any) -> None:
    stream = wire.delivery(
        1, b'{"a": 1}', tag="fastres-7", delivery_tag=2**40, redelivered=True, content_type="application/json",
        content_encoding="utf-8", correlation_id="an-id", delivery_mode=2, priority=3, reply_to="x",
        application_headers={"compression": "application/x-gzip", "fastres-keep": True, "other": 12, "n": None},
    )  # fmt: skip
    deliveries, others = frames.feed(b"".join(stream))
    assert [seen(d) for d in deliveries] == [
        (1, "fastres-7", 2**40, True, b'{"a": 1}', "application/json", "utf-8", "an-id",
         "application/x-gzip", True)
    ]  # fmt: skip
    assert others == []
    assert frames.unused() == b""


def test_a_delivery_without_properties(frames: Any) -> None:
    (delivery,), _ = frames.feed(b"".join(wire.delivery(3, b"x")))
    assert seen(delivery) == (3, "fastres-1", 1, False, b"x", None, None, None, None, False)


def test_headers_of_every_type_are_skipped(frames: Any) -> None:
    values = {
        b"V": b"", b"t": b"\1", b"b": b"\1", b"B": b"\1", b"s": b"\0\1", b"u": b"\0\1", b"I": b"\0" * 4,
        b"i": b"\0" * 4, b"f": b"\0" * 4, b"D": b"\0" * 5, b"l": b"\0" * 8, b"L": b"\0" * 8, b"d": b"\0" * 8,
        b"T": b"\0" * 8, b"S": b"\0\0\0\2hi", b"x": b"\0\0\0\2hi", b"A": b"\0\0\0\2t\1", b"F": b"\0\0\0\3\1at",
    }  # fmt: skip
    fields = b"".join(b"\1" + kind + kind + value for kind, value in values.items())
    fields += b"\x0bcompressionS\0\0\0\4gzip"
    table = struct.pack(">I", len(fields)) + fields
    header = struct.pack(">HHQH", 60, 0, 1, 0x2400) + table + b"\2id"
    first, _, body = wire.delivery(1, b"x")
    (delivery,), _ = frames.feed(first + wire.frame(2, 1, header) + body)
    assert (delivery.compression, delivery.correlation_id) == ("gzip", "id")


def test_an_empty_body_needs_no_body_frame(frames: Any) -> None:
    stream = wire.delivery(1, b"")
    assert len(stream) == 2
    (delivery,), _ = frames.feed(b"".join(stream))
    assert delivery.body == b""


def test_a_body_of_several_frames(frames: Any) -> None:
    body = bytes(range(256)) * 40
    (delivery,), _ = frames.feed(b"".join(wire.delivery(1, body, part=1000)))
    assert delivery.body == body


def test_messages_of_several_channels_interleave(frames: Any) -> None:
    one = wire.delivery(1, b"a" * 300, part=100, correlation_id="one")
    three = wire.delivery(3, b"b" * 300, part=150, correlation_id="three")
    stream = [one[0], three[0], three[1], one[1], one[2], wire.HEARTBEAT, three[2], one[3], three[3], one[4]]
    deliveries, others = frames.feed(b"".join(stream))
    assert [(d.correlation_id, d.body) for d in deliveries] == [("three", b"b" * 300), ("one", b"a" * 300)]
    assert others == [(8, 0, b"")]


def test_frames_of_other_channels_are_returned_in_order(frames: Any) -> None:
    theirs = wire.delivery(2, b"theirs")
    ack = wire.method(1, 60, 80, b"\0" * 9)
    deliveries, others = frames.feed(ack + theirs[0] + b"".join(wire.delivery(1, b"ours")) + b"".join(theirs[1:]))
    assert [d.body for d in deliveries] == [b"ours"]
    assert [(kind, channel) for kind, channel, _ in others] == [(1, 1), (1, 2), (2, 2), (3, 2)]
    assert b"".join(wire.frame(*other) for other in others) == ack + b"".join(theirs)


def test_py_amqp_finishes_a_message_that_it_has_begun(frames: Any) -> None:
    rest = wire.delivery(1, b"begun elsewhere")[1:]
    deliveries, others = frames.feed(b"".join(rest))
    assert deliveries == []
    assert [kind for kind, _, _ in others] == [2, 3]


def test_frames_of_a_disowned_channel_go_to_py_amqp(frames: Any) -> None:
    frames.feed(wire.delivery(1, b"x")[0])
    frames.disown(1)
    assert frames.unused() == b""
    deliveries, others = frames.feed(b"".join(wire.delivery(1, b"x")))
    assert deliveries == []
    assert len(others) == 3


def test_unused_bytes_can_be_read_again(frames: Any, impl: dict[str, Any]) -> None:
    one, three = wire.delivery(1, b"a" * 20, part=10), wire.delivery(3, b"b")
    stream = one[0] + three[0] + one[1] + one[2] + three[1] + three[2] + one[3][:4]
    deliveries, _ = frames.feed(stream)
    assert [d.body for d in deliveries] == [b"b"]
    unused = frames.unused()
    assert unused == one[0] + one[1] + one[2] + one[3][:4]
    assert frames.unused() == b""
    again = impl["frames"].Frames(FRAME_MAX)
    again.own(1)
    (delivery,), _ = again.feed(unused + one[3][4:])
    assert delivery.body == b"a" * 20


def test_consumed_counts_the_frames_that_py_amqp_does_not_see(frames: Any) -> None:
    frames.feed(b"".join(wire.delivery(1, b"abc", part=1)) + wire.HEARTBEAT + wire.delivery(3, b"x")[0])
    assert frames.consumed == 6
    frames.unused()
    assert frames.consumed == 5


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (struct.pack(">BHI", 3, 1, FRAME_MAX), "131080 bytes, 131072 were negotiated"),
        (struct.pack(">BHI", 1, 1, 2**32 - 1), "4294967303 bytes"),
        (wire.frame(8, 0, b"", end=0xCD), "ends with 0xcd"),
        (wire.method(1, 60, 60, b"\xff"), "shorter than its contents"),
        (wire.method(1, 60, 60, b""), "shorter than its contents"),
        (wire.delivery(1, b"x")[0] * 2, "inside of another"),
        (wire.delivery(1, b"x")[0] + wire.frame(2, 1, b"\0" * 13), "shorter than its contents"),
        (wire.delivery(1, b"x")[0] + wire.frame(2, 1, struct.pack(">HHQH", 60, 0, 1, 1)), "continued"),
        (wire.delivery(1, b"x")[0] + wire.frame(2, 1, struct.pack(">HHQH", 60, 0, 2**63, 0)), "a body of"),
        (
            wire.delivery(1, b"x")[0] + wire.frame(2, 1, struct.pack(">HHQH", 60, 0, 1, 0x2000) + b"\0\0\0\3\1aZ"),
            "unknown type 0x5a",
        ),
        (
            wire.delivery(1, b"x")[0] + wire.frame(2, 1, struct.pack(">HHQH", 60, 0, 1, 0x2000) + b"\0\0\1\0"),
            "shorter than its contents",
        ),
        (b"".join(wire.delivery(1, b"x")[:2]) + wire.frame(3, 1, b"xy"), "longer than its header says"),
    ],
)
def test_a_broken_stream_is_refused(frames: Any, stream: bytes, text: str) -> None:
    with pytest.raises(FrameSyntaxError, match=text):
        frames.feed(stream)
