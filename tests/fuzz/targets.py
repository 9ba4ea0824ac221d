"""The fuzz targets: each turns bytes into an input, and raises if the two implementations differ on it.

They need no fuzzer: tests/fuzz/test_corpus.py replays the corpus with them, ci/fuzz looks for more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import wire
from parity.outcomes import JSON, MSGPACK, PICKLE, PYTHON, YAML, C, Step, decode, outcome, read

__all__ = ("TARGETS",)

#: With 64 and 300, some frames are too large. The reader owns channels 1 and 3.
FRAME_MAXES = (64, 300, 4096, 131_072)
CHANNELS = (1, 1, 3, 2, 0)

DELIVER = struct.pack(">HH", 60, 60)
NAMES = (b"compression", b"fastres-keep", b"compressio", b"fastres-keeq", b"")
KINDS = b"VtbBsuIifDlLdTSAFxZ\0"

CONTENT_TYPES = (JSON, MSGPACK, YAML, PICKLE, "text/plain", "application/data", "application/x-other", "", None)
ENCODINGS = ("utf-8", "binary", "latin-1", "utf-16", "ascii", "utf-99", "", None)
COMPRESSIONS = ("application/x-gzip", "application/x-bz2", "application/x-lzma", "gzip", "other", "", None)
#: Never pickle: unpickling arbitrary bytes may run code.
ACCEPTS = ((JSON, MSGPACK, YAML), (JSON,), (), None)


class Input:
    """The bytes of a fuzzer, read from the front; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def integer(self, size: int = 1) -> int:
        return int.from_bytes(self.bytes(size).ljust(size, b"\0"), "big")

    def bytes(self, size: int) -> bytes:
        start = self._position
        self._position = min(start + size, len(self._data))
        return self._data[start : self._position]

    def some(self) -> bytes:
        """As many bytes as the next octet says."""
        return self.bytes(self.integer())

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

    def one_of(self, choices: Any) -> Any:
        return choices[self.integer() % len(choices)]


def same(function: Callable[..., Any], *args: Any) -> Any:
    """The reference's outcome, after a check that the compiled implementation has the same."""
    python, c = function(PYTHON, *args), function(C, *args)
    assert c == python, f"the compiled one: {c}\nthe reference: {python}"
    return python


# -- frames: a stream of frames, whole, cut and damaged, with other calls in between


def frames(data: bytes) -> None:
    source = Input(data)
    frame_max = source.one_of(FRAME_MAXES)
    steps = as_steps(source) if source.integer() % 4 else in_pieces(source.rest())
    told = same(read, steps, frame_max)
    # Without calls in between, nothing depends on where a stream was cut.
    if all(isinstance(step, bytes) for step in steps):
        whole = read(C, [b"".join(steps)], frame_max)  # type: ignore[arg-type]
        assert whole[2:] == told[2:], f"whole: {whole}\nin pieces: {told}"
        # Deliveries before an error are returned only if they were fed in an earlier call.
        assert told[2] or whole[:2] == told[:2], f"whole: {whole}\nin pieces: {told}"


def in_pieces(stream: bytes) -> list[Step]:
    """Raw bytes; the first byte decides where they are cut."""
    size = stream[0] if stream else 0
    stream = stream[1:]
    return [stream[start : start + size] for start in range(0, len(stream), size)] if size else [stream]


def as_steps(source: Input) -> list[Step]:
    steps: list[Step] = []
    pending = b""
    while source:
        action = source.integer() % 16
        if action < 11:
            pending += a_frame(source, action)
        elif action == 11 and pending:
            # The beginning now, the rest with the next piece.
            at = source.integer(2) % (len(pending) + 1)
            steps.append(pending[:at])
            pending = pending[at:]
        elif action == 12 and pending:
            at = source.integer(2) % len(pending)
            pending = pending[:at] + bytes([source.integer()]) + pending[at + 1 :]
        elif action == 13:
            steps += [pending, ("unused",)]
            pending = b""
        elif action >= 14:
            steps += [pending, ("own" if action == 14 else "disown", source.one_of(CHANNELS))]
            pending = b""
    return [*steps, pending]


def a_frame(source: Input, action: int) -> bytes:
    channel = source.one_of(CHANNELS)
    if action < 4:
        body = source.some()
        properties = {
            "content_type": source.one_of((JSON, "text/plain")),
            "content_encoding": source.one_of(("utf-8", "binary")),
            "correlation_id": source.some().hex()[:255],
        }
        part = source.integer() or 1
        return b"".join(wire.delivery(channel, body, part=part, redelivered=action == 1, **properties))
    if action < 6:
        tail = source.some() if action == 5 else b"\1t" + bytes(8) + b"\0\0\0"
        return wire.frame(1, channel, DELIVER + tail)
    if action < 8:
        size = source.integer() if action == 6 else source.integer(8)
        return wire.frame(2, channel, struct.pack(">HHQH", 60, 0, size, source.integer(2)) + source.some())
    if action == 8:
        return wire.frame(3, channel, source.some())
    if action == 9:
        return wire.frame(source.integer(), channel, source.some(), end=0xCE if source.integer() < 250 else 0)
    return source.some()


# -- properties: the header frame of a delivery, its properties and their table


def properties(data: bytes) -> None:
    source = Input(data)
    body = b"x" * (source.integer() % 3)
    flags = source.integer(2)
    size = len(body) if source.integer() % 8 else source.integer(8)
    payload = struct.pack(">HHQH", 60, 0, size, flags)
    payload += source.rest() if source.integer() % 4 == 0 else as_properties(source, flags)
    if source.integer() % 16 == 1:
        payload = payload[: source.integer()]
    one = [wire.delivery(1, b"")[0], wire.frame(2, 1, payload), *([wire.frame(3, 1, body)] if body else [])]
    # In one piece, and frame by frame: the compiled implementation has a path for each. The remembered properties of
    # the first message must not leak into the second.
    another = wire.delivery(1, b"y", content_type=JSON, content_encoding="utf-8", correlation_id="id")
    same(read, [b"".join([*one, *another])], 131_072)
    same(read, [*one, *another, *one], 131_072)


def as_properties(source: Input, flags: int) -> bytes:
    payload = b""
    for flag in (0x8000, 0x4000):
        payload += short(source.some()) if flags & flag else b""
    if flags & 0x2000:
        table = b""
        fields = source.integer() % 8
        for _ in range(fields):
            table += a_field(source)
        # Sometimes the table is longer or shorter than its length field.
        off = source.integer()
        payload += struct.pack(">I", max(0, len(table) + (off - 252 if off > 248 else 0))) + table
    for flag in (0x1000, 0x0800):
        payload += bytes([source.integer()]) if flags & flag else b""
    payload += short(source.some()) if flags & 0x0400 else b""
    return payload + source.some()


def a_field(source: Input) -> bytes:
    name = source.one_of((*NAMES, None))
    if name is None:
        name = source.some()
    kind = source.one_of(KINDS)
    size = PYTHON["frames"].VALUE_SIZES.get(kind, 0)
    value = source.some() if size is None else source.bytes(size).ljust(size, b"\0")
    return short(name) + bytes([kind]) + (struct.pack(">I", len(value)) if size is None else b"") + value


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


# -- decode: a body with the properties of its message


def decoding(data: bytes) -> None:
    source = Input(data)
    content_type = source.one_of(CONTENT_TYPES)
    encoding = source.one_of(ENCODINGS)
    compression = source.one_of((None, *COMPRESSIONS))
    accept = source.one_of(ACCEPTS)
    correlation_id = source.one_of(("an-id", "", None))
    max_size = source.one_of((1 << 16, 100, 1))
    form = source.integer()
    body: Any = source.rest()
    if form & 1:
        # As a JSON result whose value is fuzzed.
        body = b'{"task_id": "t", "status": "SUCCESS", "result": %b}' % body
    if form & 2 and compression == "application/x-gzip":
        body = zlib.compress(body, 1)
    kind: Callable[[bytes], Any] | None = (None, None, bytearray, memoryview)[form >> 2 & 3]
    body = kind(body) if kind else body
    properties = (content_type, encoding, compression, correlation_id)
    python, c = (outcome(decode, impl, accept, max_size, body, *properties) for impl in (PYTHON, C))
    # The possible depth of a value depends on the reader's own stack depth, which differs.
    if "recursion" not in str(python) + str(c):
        assert c == python, f"the compiled one: {c}\nthe reference: {python}"


# -- publication: frames whose sizes were computed before


def publication(data: bytes) -> None:
    source = Input(data)
    frame_max = source.one_of((0, 8, 9, 20, 64, 4096, 2**32 - 1, 2**64 - 1))
    channel, mandatory, mode = source.integer(2), bool(source.integer() & 1), source.integer()
    names = [source.some().decode("utf-8", "surrogateescape") * (source.integer() % 4) for _ in range(5)]
    exchange, key, content_type, encoding, task_id = names
    headers = source.some()
    args = (exchange, key, mandatory, source.rest(), content_type, encoding, headers, mode, task_id)
    same(lambda impl: outcome(impl["publications"].publication, channel, frame_max, *args))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "properties": properties,
    "decode": decoding,
    "publication": publication,
}
