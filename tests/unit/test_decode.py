"""``Decoder``: messages to results, in both implementations, and the messages that it refuses."""

from __future__ import annotations

import bz2
import datetime
import decimal
import json
import lzma
import sys
import tracemalloc
import uuid
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.compression import compress
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import dumps, loads

from fastres.errors import MalformedResult, OversizedResult

SERIALIZERS = ["json", "msgpack", "pickle", "yaml"]
CONTENT_TYPES = {
    "json": "application/json",
    "msgpack": "application/x-msgpack",
    "pickle": "application/x-python-serialize",
    "yaml": "application/x-yaml",
}
METHODS = ["gzip", "bzip2", "lzma"]
ALL = tuple(CONTENT_TYPES.values())
ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
META = {"task_id": ID, "status": "SUCCESS", "result": {"x": [1, 2.5, None, "é"]}, "children": []}
MAX = 1 << 20

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


class Decoding:
    """Calls a decoder with the fields of a delivery."""

    def __init__(self, impl: dict[str, Any], accept: Any, max_size: int) -> None:
        self.decoder = impl["decode"].Decoder(accept, max_size)
        self.delivery_class = impl["frames"].Delivery

    def delivery(
        self, body: Any, content_type: Any, content_encoding: Any, compression: Any, correlation_id: Any
    ) -> Any:
        return self.delivery_class(
            1, "tag", 1, False, body,
            content_type=content_type, content_encoding=content_encoding,
            compression=compression, correlation_id=correlation_id,
        )  # fmt: skip

    def decode(self, *parts: Any) -> Any:
        return self.decoder.decode(self.delivery(*parts))


@pytest.fixture
def make(impl: dict[str, Any]) -> Any:
    return lambda accept=ALL, max_size=MAX: Decoding(impl, accept, max_size)


def encoded(meta: Any, serializer: str = "json") -> tuple[Any, str, str]:
    content_type, content_encoding, body = dumps(meta, serializer=serializer)
    return (body.encode() if isinstance(body, str) else body), content_type, content_encoding


# -- serializers


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_serializer(make: Any, serializer: str, kind: Any) -> None:
    body, content_type, content_encoding = encoded(META, serializer)
    assert make().decode(kind(body), content_type, content_encoding, None, ID) == META


@pytest.mark.parametrize("serializer", ["json", "yaml"])
def test_body_that_is_text_already(make: Any, serializer: str) -> None:
    body, content_type, content_encoding = encoded(META, serializer)
    assert make().decode(body.decode(), content_type, content_encoding, None, ID) == META


def test_values_come_back_as_kombu_brings_them(make: Any) -> None:
    value = {
        "day": datetime.date(2024, 2, 29),
        "moment": datetime.datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=datetime.timezone.utc),
        "price": decimal.Decimal("1.10"),
        "id": uuid.UUID(ID),
        "big": 2**80,
        "infinite": float("inf"),
        "surrogate": "\ud800",
    }
    body, content_type, content_encoding = encoded({**META, "result": value})
    got = make().decode(body, content_type, content_encoding, None, ID)["result"]
    assert got == loads(body, content_type, content_encoding)["result"]
    assert got == value
    assert {key: type(one) for key, one in got.items()} == {key: type(one) for key, one in value.items()}


def test_the_last_of_duplicate_keys_counts(make: Any) -> None:
    body = b'{"task_id": "a", "status": "STARTED", "result": 1, "status": "SUCCESS", "result": 2}'
    meta = make().decode(body, "application/json", "utf-8", None, None)
    assert (meta["status"], meta["result"]) == ("SUCCESS", 2)


@fuzz
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    serializer=st.sampled_from(["json", "msgpack", "pickle"]),
)
def test_any_value(make: Any, value: Any, serializer: str) -> None:
    body, content_type, content_encoding = encoded({**META, "result": value}, serializer)
    meta = make().decode(body, content_type, content_encoding, None, None)
    assert meta == loads(body, content_type, content_encoding, accept=set(ALL))


# -- accepted content


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_only_what_is_accepted(make: Any, serializer: str) -> None:
    others = [CONTENT_TYPES[other] for other in SERIALIZERS if other != serializer]
    body, content_type, content_encoding = encoded(META, serializer)
    with pytest.raises(ContentDisallowed):
        make(accept=others).decode(body, content_type, content_encoding, None, ID)
    with pytest.raises(ContentDisallowed):
        make(accept=()).decode(body, content_type, content_encoding, None, ID)


def test_a_refused_pickle_is_not_loaded(make: Any, tmp_path: Any) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "touched"), "w")

    body, content_type, content_encoding = encoded(Touch(), "pickle")
    with pytest.raises(ContentDisallowed):
        make(accept=["application/json"]).decode(body, content_type, content_encoding, None, ID)
    assert list(tmp_path.iterdir()) == []


def test_without_a_list_kombus_default_is_used(make: Any) -> None:
    assert make(accept=None).decode(*encoded(META), None, ID) == META
    with pytest.raises(ContentDisallowed):
        make(accept=None).decode(*encoded(META, "pickle"), None, ID)


@pytest.mark.parametrize("content_type", ["application/x-unheard-of", "", None])
def test_unknown_content_types_are_refused(make: Any, content_type: str | None) -> None:
    with pytest.raises((ContentDisallowed, DecodeError)):
        make().decode(encoded(META)[0], content_type, "utf-8", None, ID)


def test_plain_text_is_accepted_but_is_not_a_result(make: Any) -> None:
    with pytest.raises(MalformedResult, match="holds str"):
        make(accept=()).decode(b"done", "application/text", "utf-8", None, ID)


# -- what counts as a result


def test_a_missing_task_id_is_taken_from_the_correlation_id(make: Any) -> None:
    body = encoded({"status": "SUCCESS", "result": 1})
    assert make().decode(*body, None, ID) == {"status": "SUCCESS", "result": 1, "task_id": ID}
    body = encoded({"status": "SUCCESS", "result": 1, "task_id": None})
    assert make().decode(*body, None, ID)["task_id"] == ID


def test_the_task_id_in_the_body_precedes_the_correlation_id(make: Any) -> None:
    assert make().decode(*encoded(META), None, "another")["task_id"] == ID


@pytest.mark.parametrize(
    ("meta", "correlation_id", "message"),
    [
        ({"status": "SUCCESS", "result": 1}, None, "without task_id, in a message without correlation id"),
        ({"status": "SUCCESS", "result": 1}, "", "without task_id, in a message without correlation id"),
        ({"status": "SUCCESS", "result": 1, "task_id": 5}, None, "without task_id"),
        ({"task_id": ID, "result": 1}, ID, "without status"),
        ({"task_id": ID, "result": 1, "status": None}, ID, "without status"),
        ({"task_id": ID, "result": 1, "status": ["SUCCESS"]}, ID, "without status"),
        ({"task_id": ID, "status": "SUCCESS"}, ID, "without result"),
        ({}, ID, "without status"),
        ([META], ID, "a result is a mapping, this message holds list"),
        ("SUCCESS", ID, "holds str"),
        (None, ID, "holds NoneType"),
        (1, ID, "holds int"),
    ],
)
def test_malformed(make: Any, meta: Any, correlation_id: str | None, message: str) -> None:
    with pytest.raises(MalformedResult, match=message):
        make().decode(*encoded(meta), None, correlation_id)


def test_an_empty_body_is_not_a_result(make: Any) -> None:
    with pytest.raises(DecodeError):
        make().decode(b"", "application/json", "utf-8", None, ID)


@pytest.mark.parametrize("serializer", ["json", "msgpack", "pickle"])
def test_truncated_anywhere(make: Any, serializer: str) -> None:
    body, content_type, content_encoding = encoded(META, serializer)
    decoder = make()
    for length in range(len(body)):
        with pytest.raises(DecodeError):
            decoder.decode(body[:length], content_type, content_encoding, None, ID)


def test_nesting_deeper_than_the_stack(make: Any) -> None:
    deep = b'{"task_id": "a", "status": "SUCCESS", "result": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(DecodeError):
        make().decode(deep, "application/json", "utf-8", None, None)


@fuzz
@given(body=st.binary(max_size=200), serializer=st.sampled_from(["json", "msgpack", "pickle", "yaml"]))
def test_any_bytes_give_a_result_or_a_decode_error(make: Any, body: bytes, serializer: str) -> None:
    if serializer == "pickle":
        # Unpickling arbitrary bytes may run code, so no opcodes are fuzzed.
        body = b"\x80\x04" + bytes(byte for byte in body if byte < 0x20)
    try:
        meta = make().decode(body, CONTENT_TYPES[serializer], "binary", None, ID)
    except DecodeError:
        return
    assert isinstance(meta["task_id"], str)
    assert isinstance(meta["status"], str)
    assert "result" in meta


# -- compression


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_compression(make: Any, method: str, serializer: str, kind: Any) -> None:
    body, content_type, content_encoding = encoded(META, serializer)
    packed, compression = compress(body, method)
    assert make().decode(kind(packed), content_type, content_encoding, compression, ID) == META


def test_an_empty_header_means_no_compression(make: Any) -> None:
    assert make().decode(*encoded(META), "", ID) == META


@pytest.mark.parametrize("method", METHODS)
def test_truncated_compressed_body(make: Any, method: str) -> None:
    body, content_type, content_encoding = encoded(META)
    packed, compression = compress(body, method)
    decoder = make()
    for length in range(len(packed)):
        with pytest.raises(DecodeError):
            decoder.decode(packed[:length], content_type, content_encoding, compression, ID)


@pytest.mark.parametrize("method", METHODS)
def test_uncompressed_bytes_with_a_compression_header(make: Any, method: str) -> None:
    body, content_type, content_encoding = encoded(META)
    _, compression = compress(body, method)
    with pytest.raises(DecodeError, match=f"cannot unpack a {compression} body"):
        make().decode(body, content_type, content_encoding, compression, ID)


@pytest.mark.parametrize("compression", ["application/x-unheard-of", "x", "gzip\0"])
def test_unknown_compression(make: Any, compression: str) -> None:
    with pytest.raises(DecodeError, match="cannot unpack"):
        make().decode(*encoded(META), compression, ID)


@pytest.mark.parametrize("method", METHODS)
def test_size_limit_is_exact(make: Any, method: str) -> None:
    body, content_type, content_encoding = encoded(META)
    packed, compression = compress(body, method)
    assert make(max_size=len(body)).decode(packed, content_type, content_encoding, compression, ID) == META
    with pytest.raises(OversizedResult, match=f"more than {len(body) - 1} bytes"):
        make(max_size=len(body) - 1).decode(packed, content_type, content_encoding, compression, ID)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_limit(make: Any, method: str) -> None:
    body, content_type, content_encoding = encoded(META)
    packed, compression = compress(body, method)
    assert make(max_size=sys.maxsize).decode(packed, content_type, content_encoding, compression, ID) == META


@pytest.mark.parametrize(
    ("bomb", "compression"),
    [
        (zlib.compress(bytes(64 << 20)), "application/x-gzip"),
        (bz2.compress(bytes(64 << 20), 1), "application/x-bz2"),
        (lzma.compress(bytes(64 << 20), preset=0), "application/x-lzma"),
    ],
    ids=METHODS,
)
def test_a_bomb_is_refused_before_it_takes_memory(make: Any, bomb: bytes, compression: str) -> None:
    decoder = make(max_size=1 << 16)
    tracemalloc.start()
    try:
        with pytest.raises(OversizedResult, match="more than 65536 bytes"):
            decoder.decode(bomb, "application/json", "utf-8", compression, ID)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


def test_compression_does_not_lift_the_refusal_of_a_content_type(make: Any) -> None:
    body, content_type, content_encoding = encoded(META, "pickle")
    packed, compression = compress(body, "gzip")
    with pytest.raises(ContentDisallowed):
        make(accept=["application/json"]).decode(packed, content_type, content_encoding, compression, ID)


def test_celerys_own_meta(make: Any) -> None:
    """All fields of Celery's result meta are kept, known or not."""
    meta = {**META, "name": "add", "args": [1], "kwargs": {}, "worker": "w@h", "retries": 0, "queue": "celery",
            "date_done": "2024-01-01T00:00:00+00:00", "group_id": "g", "parent_id": "p", "new": 1}  # fmt: skip
    assert make().decode(json.dumps(meta).encode(), "application/json", "utf-8", None, ID) == meta


def test_decode_all(make: Any) -> None:
    """A refused body does not stop the others, and each delivery is returned with its outcome."""
    decoding = make()
    first, second = (
        decoding.delivery(*encoded({**META, "task_id": task_id}), None, task_id) for task_id in ("a", "b")
    )
    broken = decoding.delivery(b"{", "application/json", "utf-8", None, "c")
    refused_type = decoding.delivery(b"{}", "application/x-unheard-of", "utf-8", None, "d")
    arrivals, refused = decoding.decoder.decode_all([first, broken, refused_type, second])
    assert [(delivery is first, task_id, meta["task_id"]) for delivery, task_id, meta in arrivals] == [
        (True, "a", "a"),
        (False, "b", "b"),
    ]
    assert [(delivery.correlation_id, type(exc)) for delivery, exc in refused] == [
        ("c", DecodeError),
        ("d", ContentDisallowed),
    ]
    assert decoding.decoder.decode_all([]) == ([], [])


def test_lzma_that_asks_for_all_memory(impl: dict[str, Any]) -> None:
    """Found by ci/fuzz: the header of an LZMA body sets the memory for unpacking it, up to 4 GB."""
    body = b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + b"\x00" * 20
    delivery = impl["frames"].Delivery(
        1, "tag", 1, False, body, "application/json", "utf-8", "an-id", "application/x-lzma"
    )
    with pytest.raises(DecodeError, match=r"cannot unpack a application/x-lzma body.*[Mm]emory"):
        impl["decode"].Decoder(None, 1 << 20).decode(delivery)
