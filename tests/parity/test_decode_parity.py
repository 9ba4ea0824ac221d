"""The compiled decoder decodes like kombu: same values, same types, same refusals."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kombu.serialization import dumps, registry
from kombu.utils import json as kombu_json
from parity.outcomes import JSON, MSGPACK, PYTHON, C, decode, outcome

ACCEPT = (JSON, MSGPACK)


def decoded(impl: dict[str, Any], body: Any, content_type: str, encoding: str) -> tuple[Any, ...]:
    return outcome(decode, impl, ACCEPT, 1 << 20, body, content_type, encoding, None, "an-id")


def same(body: Any, content_type: str = JSON, encoding: str = "utf-8") -> tuple[Any, ...]:
    c, python = (decoded(impl, body, content_type, encoding) for impl in (C, PYTHON))
    assert c == python, body
    return c


# JSON as text, which includes forms that no encoder writes.
numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "-0", "1e400", "01", "1.", ".5", "+1", "0x1", "1_0"]),
)
characters = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters='"\\'),
    st.sampled_from(
        ['\\"', "\\\\", "\\/", "\\n", "\\u0041", "\\u005f", "\\u00e9", "\\ud83d\\ude00", "\\ud800", "\\x"]
    ),
)
strings = st.lists(characters, max_size=8).map(lambda parts: '"' + "".join(parts) + '"')
keys = strings | st.sampled_from(['"__type__"', '"__value__"', '"\\u005f_type__"', '"_\\u005Ftype__"', '"a"'])
space = st.sampled_from(["", " ", "\n\t", "\r"])
literals = st.sampled_from(["true", "false", "null", "True", "nul", ""])


def arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(values, max_size=4).map(lambda parts: "[" + ", ".join(parts) + "]")


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(keys, space, values).map(lambda pair: f"{pair[0]}{pair[1]}:{pair[2]}")
    typed = st.tuples(
        st.sampled_from(["bytes", "base64", "datetime", "date", "time", "decimal", "uuid", "none of these"]),
        values,
    ).map(lambda pair: f'{{"__type__": "{pair[0]}", "__value__": {pair[1]}}}')
    return st.lists(pairs, max_size=4).map(lambda parts: "{" + ",".join(parts) + "}") | typed


text = st.recursive(
    st.one_of(numbers, strings, literals), lambda values: arrays(values) | objects(values), max_leaves=12
)


@settings(max_examples=800, deadline=None)
@given(text)
@example('{"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000001"}}')
@example('{"\\u005f_type__": "decimal", "__value__": "1.50"}')
@example('{"a": 1, "a": 2}')
def test_json_text(result: str) -> None:
    same(f'{{"status": "SUCCESS", "task_id": "t", "result": {result}}}'.encode())


@settings(max_examples=300, deadline=None)
@given(text, st.binary(max_size=3), st.integers(0, 400))
def test_json_that_was_damaged(result: str, put: bytes, at: int) -> None:
    body = f'{{"status": "SUCCESS", "task_id": "t", "result": {result}}}'.encode()
    same(body[:at] + put + body[at + 1 :])


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.datetimes(), st.dates(),
    st.times(), st.decimals(), st.uuids(),
)  # fmt: skip
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_values_that_celery_encodes_as_json(value: Any) -> None:
    content_type, encoding, body = dumps({"status": "SUCCESS", "task_id": "t", "result": value}, "json")
    assert same(body.encode(), content_type, encoding)[0] == "value"
    # Transports other than RabbitMQ's may return text.
    same(body, content_type, encoding)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=10,
    )
)
def test_msgpack(value: Any) -> None:
    content_type, encoding, body = dumps({"status": "SUCCESS", "task_id": "t", "result": value}, "msgpack")
    assert same(body, content_type, encoding)[0] == "value"
    same(body[:-1], content_type, encoding)


@pytest.mark.parametrize("depth", [1, 100, 500, 100_000])
def test_deep_nesting(depth: int) -> None:
    """The recursion limit depends on the caller's depth; at these depths both implementations agree."""
    same(b'{"status": "SUCCESS", "task_id": "t", "result": ' + b"[" * depth + b"]" * depth + b"}")


def test_a_decoder_that_the_user_registered() -> None:
    """The registry decides: the fast path is for kombu's own JSON only."""
    before = registry._decoders["application/json"], registry._encoders["json"]
    registry.register(
        "json", kombu_json.dumps, lambda body: {"status": "OURS", "result": body}, "application/json"
    )
    try:
        assert same(b'{"status": "SUCCESS", "result": 1}')[0] == "value"
        assert "OURS" in decoded(C, b"{}", JSON, "utf-8")[1]
    finally:
        registry._decoders["application/json"], registry._encoders["json"] = before


def test_a_type_that_the_user_registered() -> None:
    class Money:
        def __init__(self, amount: str) -> None:
            self.amount = amount

        def __repr__(self) -> str:
            return f"Money({self.amount})"

    kombu_json.register_type(Money, "money", lambda money: money.amount, Money)
    try:
        _, _, body = dumps({"status": "SUCCESS", "task_id": "t", "result": Money("1.5")}, "json")
        assert "'result': Money(1.5)" in same(body.encode())[1]
    finally:
        del kombu_json._encoders[Money], kombu_json._decoders["money"]


def test_the_examples_that_celery_documents() -> None:
    value = {
        "when": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone.utc),
        "id": uuid.UUID(int=7),
        "price": decimal.Decimal("1.50"),
        "big": 2**80,
        "blob": b"\x00\xff",
    }
    _, _, body = dumps({"status": "SUCCESS", "task_id": "t", "result": value}, "json")
    assert same(body.encode()) == ("value", repr({"status": "SUCCESS", "task_id": "t", "result": value}))
