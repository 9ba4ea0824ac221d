"""Both implementations convert ids to numbers and back in the same way."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres import _impl
from fastres.ids import is_uuid

PYTHON, C = (_impl.load(name)["ids"] for name in ("python", "c"))

UUIDS = st.builds(str, st.uuids())
#: One character of a UUID replaced.
ALMOST = st.builds(
    lambda id_, index, character: id_[:index] + character + id_[index + 1 :],
    UUIDS,
    st.integers(0, 35),
    st.sampled_from([*"0123456789abcdefABF-_+ \0\n", "", "--", "\u0660", "\U0001f600", "\udc80"]),
)


@given(UUIDS | ALMOST | st.text())
def test_any_id(id_: str) -> None:
    key = C.compact(id_)
    assert key == PYTHON.compact(id_)
    assert isinstance(key, int) == is_uuid(id_)
    assert C.expand(key) == PYTHON.expand(key) == id_


@pytest.mark.parametrize(
    "id_",
    [
        "00000000-0000-0000-8000-000000000000",
        "ffffffff-ffff-ffff-bfff-ffffffffffff",
        "0f8fad5b-d9cb-469f-a165-70867728950e",
    ],
)
def test_a_uuid_is_a_number(id_: str) -> None:
    for implementation in (PYTHON, C):
        assert implementation.compact(id_) == UUID(id_).int
        assert implementation.expand(UUID(id_).int) == id_


@pytest.mark.parametrize(
    "id_",
    [
        "",
        "c",
        "0F8FAD5B-D9CB-469F-A165-70867728950E",
        "0f8fad5bd9cb469fa16570867728950e",
        "0f8fad5b-d9cb-469f-a165-7086772895_e",
        "0f8fad5b-d9cb-469f-a165- 0867728950e",
        "0f8fad5b-d9cb-469f-c165-70867728950e",
        "\u0660f8fad5b-d9cb-469f-a165-70867728950e",
    ],
)
def test_any_other_id_stays_as_it_is(id_: str) -> None:
    for implementation in (PYTHON, C):
        assert implementation.compact(id_) == id_
        assert implementation.expand(id_) == id_
