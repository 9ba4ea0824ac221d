"""kombu decodes the output of either implementation to the same values; both refuse the same input."""

from __future__ import annotations

import enum
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kombu.serialization import loads
from kombu.utils import json as kombu_json

from fastres import _impl

PYTHON, C = (_impl.load(name)["decode"].encode for name in ("python", "c"))


class Colour(enum.IntEnum):
    RED = 1


class Shout(str):
    __slots__ = ()


def outcome(encode: Any, value: Any, serializer: str) -> tuple[Any, ...]:
    """The decoded values in a form where 1, 1.0 and True differ, and two NaNs do not."""
    try:
        content_type, encoding, body = encode({"result": value}, serializer)
    except Exception as exc:
        return "refused", type(exc)
    assert type(body) is bytes
    return content_type, encoding, repr(loads(body, content_type, encoding, accept=[content_type]))


atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.datetimes(), st.decimals(), st.uuids(),
    st.text(st.characters()), st.sampled_from([Colour.RED, Shout("x"), {1}, object(), float("nan"), -0.0]),
)  # fmt: skip
keys = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.floats(), st.just((1,)), st.just(Shout("k"))
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=10,
)


@settings(max_examples=600, deadline=None)
@given(values)
@example("\ud800")
@example({"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000001"}})
@example([math.inf, -math.inf, 1e22, 5e-324, 2**64, -(2**200)])
def test_json(value: Any) -> None:
    assert outcome(C, value, "json") == outcome(PYTHON, value, "json")


@pytest.mark.parametrize("depth", [1, 63, 64, 65, 300])
def test_deep_nesting(depth: int) -> None:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    assert outcome(C, value, "json") == outcome(PYTHON, value, "json")


@pytest.mark.parametrize("serializer", ["msgpack", "pickle", "yaml"])
def test_other_serializers(serializer: str) -> None:
    value = {"a": [1, 2.5, None, True, "é"]}
    got = outcome(C, value, serializer)
    assert got == outcome(PYTHON, value, serializer)
    assert got[2] == repr({"result": value})


def test_an_unknown_serializer() -> None:
    assert outcome(C, 1, "none") == outcome(PYTHON, 1, "none")
    assert outcome(C, 1, "none")[0] == "refused"


def test_a_type_that_the_user_registered() -> None:
    class Money:
        pass

    kombu_json.register_type(Money, "money", lambda money: "5", lambda amount: f"money {amount}")
    try:
        assert outcome(C, [Money()], "json")[2] == repr({"result": ["money 5"]})
    finally:
        del kombu_json._encoders[Money], kombu_json._decoders["money"]
