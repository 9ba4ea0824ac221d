"""The same bytes, cut anywhere, give the same deliveries, frames, errors and leftovers in both implementations."""

from __future__ import annotations

import wire
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.outcomes import PYTHON, C, read

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


def test_cut_at_every_position() -> None:
    whole = read(PYTHON, [STREAM])
    assert len(whole[0]) == 3
    assert len(whole[1]) == 5
    for position in range(len(STREAM) + 1):
        chunks = [STREAM[:position], STREAM[position:]]
        assert read(PYTHON, chunks) == read(C, chunks) == whole, position


def test_ended_at_every_position() -> None:
    for position in range(len(STREAM)):
        assert read(PYTHON, [STREAM[:position]]) == read(C, [STREAM[:position]]), position


def test_every_octet_changed() -> None:
    for position in range(len(STREAM)):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(STREAM)
            broken[position] ^= flip
            assert read(PYTHON, [bytes(broken)]) == read(C, [bytes(broken)]), (position, flip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes(chunks: list[bytes]) -> None:
    assert read(PYTHON, chunks) == read(C, chunks)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([0, 1, 2]), st.binary(max_size=40))))
def test_any_frames(frames: list[tuple[int, int, bytes]]) -> None:
    begun = wire.delivery(1, b"xx")[0]
    stream = begun + b"".join(wire.frame(*frame) for frame in frames)
    assert read(PYTHON, [stream]) == read(C, [stream])
