"""Both implementations give the same results, and raise the same exceptions with the same messages."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.compression import compress
from kombu.serialization import dumps
from parity.outcomes import JSON, MSGPACK, PICKLE, PYTHON, YAML, C, decode, outcome

ALL = (JSON, PICKLE, MSGPACK, YAML)
META = {"task_id": "a", "status": "SUCCESS", "result": [1, "é"]}
BODY = '{"task_id": "a", "status": "SUCCESS", "result": [1, "é"]}'.encode()


def same_decode(*args: Any, accept: Any = ALL, max_size: int = 1 << 16) -> Any:
    outcomes = [outcome(decode, impl, accept, max_size, *args) for impl in (C, PYTHON)]
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def packed(meta: Any, serializer: str) -> Any:
    return dumps(meta, serializer=serializer)[2]


GZIPPED, GZIP = compress(BODY, "gzip")

#: body, content type, content encoding, compression, correlation id
MESSAGES: dict[str, tuple[Any, ...]] = {
    "json": (BODY, JSON, "utf-8", None, "a"),
    "text": (BODY.decode(), JSON, "utf-8", None, "a"),
    "bytearray": (bytearray(BODY), JSON, "utf-8", None, "a"),
    "memoryview": (memoryview(BODY), JSON, "utf-8", None, "a"),
    "latin-1": (BODY, JSON, "latin-1", None, "a"),
    "no encoding": (BODY, JSON, None, None, "a"),
    "unknown encoding": (BODY, "application/x-other", "utf-99", None, "a"),
    "not UTF-8": (BODY[:-5] + b"\xff" + BODY[-4:], JSON, "utf-8", None, "a"),
    "msgpack": (packed(META, "msgpack"), MSGPACK, "binary", None, "a"),
    "pickle": (packed(META, "pickle"), PICKLE, "binary", None, "a"),
    "yaml": (packed(META, "yaml"), YAML, "utf-8", None, "a"),
    "NaN": (b'{"task_id": "a", "status": "SUCCESS", "result": NaN}', JSON, "utf-8", None, "a"),
    "big integer": (b'{"task_id": "a", "status": "S", "result": 1%s}' % (b"0" * 60), JSON, "utf-8", None, "a"),
    "huge integer": (b'{"task_id": "a", "status": "S", "result": 1%s}' % (b"0" * 5000), JSON, "utf-8", None, "a"),
    "surrogate": (b'{"task_id": "a", "status": "S", "result": "\\ud800"}', JSON, "utf-8", None, "a"),
    "duplicate keys": (b'{"task_id": "a", "status": "S", "result": 1, "result": 2}', JSON, "utf-8", None, "a"),
    "__type__": (
        b'{"task_id": "a", "status": "S", "result": {"__type__": "uuid", "__value__": {"hex": "zz"}}}',
        JSON, "utf-8", None, "a",
    ),
    "empty": (b"", JSON, "utf-8", None, "a"),
    "no bytes": (None, JSON, "utf-8", None, "a"),
    "truncated": (BODY[:20], JSON, "utf-8", None, "a"),
    "trailing": (BODY + b"x", JSON, "utf-8", None, "a"),
    "byte order mark": (b"\xef\xbb\xbf" + BODY, JSON, "utf-8", None, "a"),
    "truncated msgpack": (packed(META, "msgpack")[:-1], MSGPACK, "binary", None, "a"),
    "truncated pickle": (packed(META, "pickle")[:-1], PICKLE, "binary", None, "a"),
    "yaml of another kind": (b"!!python/object:os.system {}", YAML, "utf-8", None, "a"),
    "unknown content type": (BODY, "application/x-other", "utf-8", None, "a"),
    "no content type": (BODY, None, None, None, "a"),
    "plain text": (BODY, "text/plain", "utf-8", None, "a"),
    "list": (b"[]", JSON, "utf-8", None, "a"),
    "null": (b"null", JSON, "utf-8", None, "a"),
    "no task id": (b'{"status": "SUCCESS", "result": 1}', JSON, "utf-8", None, "b"),
    "no task id at all": (b'{"status": "SUCCESS", "result": 1}', JSON, "utf-8", None, None),
    "task id is a number": (b'{"task_id": 1, "status": "SUCCESS", "result": 1}', JSON, "utf-8", None, "b"),
    "no status": (b'{"task_id": "a", "result": 1}', JSON, "utf-8", None, "a"),
    "status is a number": (b'{"task_id": "a", "result": 1, "status": 1}', JSON, "utf-8", None, "a"),
    "no result": (b'{"task_id": "a", "status": "SUCCESS"}', JSON, "utf-8", None, "a"),
    "nothing": (b"{}", JSON, "utf-8", None, "a"),
    "gzip": (GZIPPED, JSON, "utf-8", GZIP, "a"),
    "gzip in text": (BODY.decode(), JSON, "utf-8", GZIP, "a"),
    "gzip truncated": (GZIPPED[:-1], JSON, "utf-8", GZIP, "a"),
    "gzip with a tail": (GZIPPED + b"x", JSON, "utf-8", GZIP, "a"),
    "gzip broken": (GZIPPED[:5] + b"xx" + GZIPPED[7:], JSON, "utf-8", GZIP, "a"),
    "gzip empty": (b"", JSON, "utf-8", GZIP, "a"),
    "gzip bomb": (zlib.compress(bytes(1 << 17)), JSON, "utf-8", GZIP, "a"),
    "gzip of what is too large": (zlib.compress(bytes(65537)), JSON, "utf-8", GZIP, "a"),
    "gzip of the limit": (zlib.compress(b" " * (65536 - len(BODY)) + BODY), JSON, "utf-8", GZIP, "a"),
    "bzip2": (compress(BODY, "bzip2")[0], JSON, "utf-8", "application/x-bz2", "a"),
    "bzip2 broken": (compress(BODY, "bzip2")[0][:-3], JSON, "utf-8", "application/x-bz2", "a"),
    "lzma": (compress(BODY, "lzma")[0], JSON, "utf-8", "application/x-lzma", "a"),
    "unknown compression": (BODY, JSON, "utf-8", "application/x-other", "a"),
}  # fmt: skip


@pytest.mark.parametrize("accept", [ALL, (JSON,), (), None], ids=["all", "json", "none", "unset"])
@pytest.mark.parametrize("name", MESSAGES)
def test_decode(name: str, accept: Any) -> None:
    same_decode(*MESSAGES[name], accept=accept)


@pytest.mark.parametrize("name", ["json", "text", "bytearray", "memoryview", "msgpack", "pickle", "gzip", "lzma"])
def test_the_table_has_accepted_bodies_too(name: str) -> None:
    assert same_decode(*MESSAGES[name]) == ("value", repr(META))


@pytest.mark.parametrize("method", ["decode", "decode_all"])
def test_none_instead_of_a_delivery(method: str) -> None:
    def call(impl: dict[str, Any]) -> Any:
        return getattr(impl["decode"].Decoder(ALL, 100), method)(None if method == "decode" else [None])

    assert outcome(call, C) == outcome(call, PYTHON)


@settings(deadline=None, max_examples=300)
@given(
    body=st.binary(max_size=80) | st.sampled_from([BODY, GZIPPED]),
    cut=st.integers(0, 80),
    content_type=st.sampled_from([JSON, MSGPACK, YAML, "text/plain", "", None]),
    content_encoding=st.sampled_from(["utf-8", "binary", "latin-1", "utf-16", None]),
    compression=st.sampled_from([None, "", GZIP, "application/x-bz2", "application/x-lzma", "other"]),
    correlation_id=st.none() | st.text(max_size=3),
)
def test_decode_any_bytes(body: bytes, cut: int, **properties: Any) -> None:
    same_decode(
        body[: len(body) - cut] if cut < len(body) else body,
        properties["content_type"],
        properties["content_encoding"],
        properties["compression"],
        properties["correlation_id"],
        accept=(JSON, MSGPACK, YAML),
    )


@pytest.mark.parametrize("max_size", [1, 1 << 30, sys.maxsize - 1, sys.maxsize], ids=repr)
@pytest.mark.parametrize("compression", [GZIP, "application/x-bz2", "application/x-lzma"])
def test_limits(max_size: int, compression: str) -> None:
    same_decode(compress(BODY, compression)[0], JSON, "utf-8", compression, "a", max_size=max_size)


def drive(impl: dict[str, Any], ids: Any, ready: Any, batches: Any) -> list[Any]:
    aggregate = impl["aggregate"].Aggregate(ids, ready)
    told: list[Any] = []
    for batch in batches:
        told.append(outcome(aggregate.feed, batch))
        told.append((len(aggregate), aggregate.missing(), [one in aggregate for one in ("a", "b", None)]))
    return told


@settings(deadline=None)
@given(
    ids=st.lists(st.sampled_from("abcd")),
    batches=st.lists(
        st.lists(
            st.tuples(
                st.integers(),
                st.sampled_from("abcdez"),
                st.fixed_dictionaries({}, optional={"status": st.sampled_from(["SUCCESS", "FAILURE", "STARTED"])}),
            )
        )
    ),
)
def test_aggregate(ids: list[str], batches: list[Any]) -> None:
    ready = {"SUCCESS", "FAILURE"}
    assert drive(C, ids, ready, batches) == drive(PYTHON, ids, ready, batches)


@pytest.mark.parametrize(
    "batch",
    [None, 5, [None], [()], [(1, 2)], [(1, 2, 3, 4)], [(1, "a", None)], [(1, "a", {"status": []})], [(1, [], {})]],
    ids=repr,
)
def test_aggregate_of_other_types_than_a_batch(batch: Any) -> None:
    """The interpreter's messages may differ; the exception's type and the remaining ids may not."""
    (c, c_left), (python, python_left) = (drive(impl, ["a"], {"SUCCESS"}, [batch]) for impl in (C, PYTHON))
    assert c[:2] == python[:2]
    assert c_left == python_left


@pytest.mark.parametrize("args", [(None, ()), ((), None), ([[]], ()), ((), [[]]), (5, ()), ("ab", "a")], ids=repr)
def test_making_an_aggregate(args: tuple[Any, ...]) -> None:
    assert outcome(lambda: C["aggregate"].Aggregate(*args).missing()) == outcome(
        lambda: PYTHON["aggregate"].Aggregate(*args).missing()
    )
