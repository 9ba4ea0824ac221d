"""The same bytes, cut anywhere, give the same deliveries, frames, errors and leftovers in both implementations."""

from __future__ import annotations

from typing import Any

import wire
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres import _impl

BOTH = [_impl.load(name)["frames"].Frames for name in ("python", "c")]
FIELDS = (
    "channel_id", "consumer_tag", "delivery_tag", "redelivered", "body", "content_type", "content_encoding",
    "correlation_id", "compression", "keep",
)  # fmt: skip

STREAM = b"".join(
    [
        *wire.delivery(1, b"whole", correlation_id="a", content_type="application/json", content_encoding="utf-8"),
        wire.HEARTBEAT,
        *wire.delivery(2, b"not ours"),
        *wire.delivery(1, b"", tag="x", application_headers={"compression": "gzip", "a": {"b": [1, True]}}),
        wire.method(1, 20, 40, b"\0\1\0"),
        *wire.delivery(3, b"in parts", part=3, redelivered=True, application_headers={"fastres-keep": True}),
    ]
)


def outcome(frames_class: Any, chunks: list[bytes], frame_max: int = 4096) -> tuple[Any, ...]:
    frames = frames_class(frame_max)
    for channel in (1, 3):
        frames.own(channel)
    deliveries: list[Any] = []
    others: list[Any] = []
    error = None
    for chunk in chunks:
        try:
            came, passed = frames.feed(chunk)
        except Exception as exc:
            error = (type(exc), str(exc))
            break
        deliveries += came
        others += passed
    facts = [tuple(getattr(delivery, field) for field in FIELDS) for delivery in deliveries]
    return facts, others, error, None if error else (frames.consumed, frames.unused(), frames.consumed)


def test_cut_at_every_position() -> None:
    whole = outcome(BOTH[0], [STREAM])
    assert len(whole[0]) == 3
    assert len(whole[1]) == 5
    for position in range(len(STREAM) + 1):
        chunks = [STREAM[:position], STREAM[position:]]
        assert outcome(BOTH[0], chunks) == outcome(BOTH[1], chunks) == whole, position


def test_ended_at_every_position() -> None:
    for position in range(len(STREAM)):
        assert outcome(BOTH[0], [STREAM[:position]]) == outcome(BOTH[1], [STREAM[:position]]), position


def test_every_octet_changed() -> None:
    for position in range(len(STREAM)):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(STREAM)
            broken[position] ^= flip
            assert outcome(BOTH[0], [bytes(broken)]) == outcome(BOTH[1], [bytes(broken)]), (position, flip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes(chunks: list[bytes]) -> None:
    assert outcome(BOTH[0], chunks) == outcome(BOTH[1], chunks)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([0, 1, 2]), st.binary(max_size=40))))
def test_any_frames(frames: list[tuple[int, int, bytes]]) -> None:
    begun = wire.delivery(1, b"xx")[0]
    stream = begun + b"".join(wire.frame(*frame) for frame in frames)
    assert outcome(BOTH[0], [stream]) == outcome(BOTH[1], [stream])
