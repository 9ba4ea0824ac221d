"""Both implementations write the same frames for a message, and py-amqp can read them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from amqp import Message
from amqp.exceptions import FrameSyntaxError
from amqp.serialization import dumps, loads
from hypothesis import given
from hypothesis import strategies as st

from fastres import _impl
from fastres._protocols import ID, PLACE, TABLE, TEXT

BOTH = [_impl.load(name)["publications"].publication for name in ("python", "c")]

names = st.text(max_size=60)
headers = st.dictionaries(st.sampled_from(["compression", "fastres-keep"]), st.text(max_size=5) | st.booleans())


def frames_in(stream: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while stream:
        kind, channel, size = struct.unpack_from(">BHI", stream)
        assert stream[7 + size] == 0xCE
        found.append((kind, channel, stream[7 : 7 + size]))
        stream = stream[8 + size :]
    return found


@given(
    st.integers(1, 65535), names, names, st.booleans(), st.binary(max_size=300), names, names, headers,
    st.sampled_from([1, 2]), names, st.sampled_from(["", "1", "4294967295"]), st.integers(9, 128),
)  # fmt: skip
def test_frames(
    channel: int, exchange: str, key: str, mandatory: bool, body: bytes, content_type: str, encoding: str,
    table: dict[str, Any], mode: int, task_id: str, expiration: str,
    frame_max: int,
) -> None:  # fmt: skip
    encoded = dumps("F", (table,)) if table else b""
    arguments = (
        channel,
        frame_max,
        exchange,
        key,
        mandatory,
        body,
        content_type,
        encoding,
        encoded,
        mode,
        task_id,
        expiration,
    )
    python, c = (publication(*arguments) for publication in BOTH)
    assert c == python
    method, header, *bodies = frames_in(c)
    assert method[:2] == (1, channel)
    assert loads("BBBssb", method[2], 0)[0] == [60, 40, 0, exchange, key, mandatory]
    assert header[:2] == (2, channel)
    message = Message()
    message.inbound_header(header[2])
    assert message.body_size == len(body)
    assert message.properties == {
        "content_type": content_type,
        "content_encoding": encoding,
        "delivery_mode": mode,
        "correlation_id": task_id,
        **({"application_headers": table} if table else {}),
        **({"expiration": expiration} if expiration else {}),
    }
    assert all(kind == 3 and number == channel and len(part) <= frame_max - 8 for kind, number, part in bodies)
    assert b"".join(part for _, _, part in bodies) == body


@pytest.mark.parametrize("publication", BOTH, ids=["python", "c"])
def test_a_name_that_is_too_long(publication: Any) -> None:
    for place in (2, 3, 6, 7, 10):
        arguments: list[Any] = [1, 4096, "", "queue", True, b"x", "application/json", "utf-8", b"", 1, "an-id"]
        arguments[place] = "é" * 128
        with pytest.raises(FrameSyntaxError, match="a name of 256 bytes, 255 are the most"):
            publication(*arguments)
        arguments[place] = "x" * 255
        assert publication(*arguments)


@pytest.mark.parametrize("publication", BOTH, ids=["python", "c"])
@pytest.mark.parametrize("frame_max", [0, 1, 7, 8])
def test_a_frame_size_without_room_for_content(publication: Any, frame_max: int) -> None:
    with pytest.raises(FrameSyntaxError, match=f"frames of {frame_max} bytes at most hold nothing"):
        publication(1, frame_max, "", "queue", True, b"x" * 100, "application/json", "utf-8", b"", 1, "an-id")


def test_the_largest_frames() -> None:
    """The sum of such a limit and a size overflows."""
    for frame_max in (2**32 - 1, 2**63, 2**64 - 1):
        python, c = (
            publication(1, frame_max, "", "queue", True, b"x" * 100, "text", "utf-8", b"", 1, "an-id")
            for publication in BOTH
        )
        assert c == python


@pytest.mark.parametrize("publication", BOTH, ids=["python", "c"])
@pytest.mark.parametrize("place", [5, 8])
def test_none_instead_of_a_body(publication: Any, place: int) -> None:
    arguments: list[Any] = [1, 4096, "", "queue", True, b"x", "application/json", "utf-8", b"", 1, "an-id"]
    arguments[place] = None
    with pytest.raises(TypeError):
        publication(*arguments)


TEMPLATES = [_impl.load(name)["publications"].MessageTemplate for name in ("python", "c")]


@given(
    st.integers(1, 65535), names, names, st.booleans(),
    st.lists(st.sampled_from([ID, PLACE, TEXT, TABLE]), max_size=6),
    st.data(), st.integers(9, 4096),
)  # fmt: skip
def test_templates(
    channel: int, exchange: str, key: str, mandatory: bool, slots: list[int], data: Any, frame_max: int
) -> None:
    """Both implementations write the same frames from pieces and values, and raise the same errors."""
    pieces = data.draw(
        st.lists(st.binary(max_size=30), min_size=len(slots) + 1, max_size=len(slots) + 1), "pieces"
    )
    table = data.draw(st.integers(0, 2**31), "table")
    python, c = (
        template(channel, frame_max, exchange, key, mandatory, pieces, bytes(slots), table)
        for template in TEMPLATES
    )
    for _ in range(3):
        id_ = data.draw(st.binary(min_size=36, max_size=36), "id")
        place = data.draw(st.integers(0, 2**31), "place")
        text, body = data.draw(st.binary(max_size=300), "text"), data.draw(st.binary(max_size=3000), "body")
        header = pieces[0]
        for slot, piece in zip(slots, pieces[1:]):
            header += {
                ID: id_,
                PLACE: struct.pack(">I", place),
                TEXT: struct.pack(">I", len(text)) + text,
                TABLE: struct.pack(">I", table + slots.count(TEXT) * len(text)),
            }[slot] + piece
        if 12 + len(header) > frame_max - 8:
            for template in (python, c):
                with pytest.raises(FrameSyntaxError):
                    template.add(id_, place, text, body)
            continue
        before = len(python)
        for template in (python, c):
            template.add(id_, place, text, body)
        assert len(python) == len(c) > before
        if data.draw(st.booleans(), "take"):
            taken = c.take()
            assert taken == python.take()
            assert len(python) == len(c) == 0
            method, content, *bodies = frames_in(taken)[-2 - -(-len(body) // (frame_max - 8)) :]
            assert loads("BBBssb", method[2], 0)[0] == [60, 40, 0, exchange, key, mandatory]
            assert content == (2, channel, struct.pack(">HHQ", 60, 0, len(body)) + header)
            assert b"".join([part for _, _, part in bodies]) == body
    assert c.take() == python.take()


@pytest.mark.parametrize("template", TEMPLATES)
def test_invalid_templates(template: Any) -> None:
    with pytest.raises(FrameSyntaxError):
        template(1, 8, "", "", False, [b""], b"", 0)
    with pytest.raises(FrameSyntaxError):
        template(1, 4096, "x" * 256, "", False, [b""], b"", 0)
    for pieces, slots in (([b"", b""], b""), ([b""], bytes([ID])), ([b"", b""], bytes([9]))):
        with pytest.raises(ValueError, match="do not go with slots"):
            template(1, 4096, "", "", False, pieces, slots, 0)
    with pytest.raises(ValueError, match="36 bytes"):
        template(1, 4096, "", "", False, [b""], b"", 0).add(b"short", 0, b"", b"")
