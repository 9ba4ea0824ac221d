"""Ids and the names of their queues: any string is an id, and every process computes the same queue."""

from __future__ import annotations

import json
import uuid

import pytest
from backend_kit import in_another_process
from hypothesis import assume, given
from hypothesis import strategies as st

from fastres.ids import (
    PREFIX,
    STATES,
    Kin,
    Kind,
    by_queue,
    kin_of,
    new_id,
    new_kin,
    parse,
    queue_name,
    quoted_name,
)

kins = st.integers(0, 2**60 - 1)
kinds = st.sampled_from(Kind)
kin_ids = st.builds(new_id, kins, kinds)
ODD = (
    "", "x" * 10_000, "a/b/../c", "\0", "a\nb", "a\rb", "\u00e4\u4e2d\U0001f600", "\ud800", "celery", "amq.gen-x",
    "amq.x", "---", "job-1-11", "job-11-1", "#", "*", ".", "..", "x.states", "x.steps", "%2E", "0" * 15, "a" * 245,
    "a" * 240, "00000000-0000-0000-0000-000000000001", "0f8fad5b-d9cb-469f-a165-70867728950e",
    "0F8FAD5B-D9CB-469F-A165-70867728950E", "0F8FAD5B-D9CB-869F-A165-70867728950E",
    "0f8fad5bd9cb869fa16570867728950e",
)  # fmt: skip
strings = st.one_of(st.text(), st.sampled_from(ODD), kin_ids, st.uuids().map(str))


@given(kins, kinds)
def test_kin_ids_round_trip(kin: int, kind: Kind) -> None:
    made = new_id(kin, kind)
    assert parse(made) == Kin(kin, kind)
    assert kin_of(made) == kin
    assert str(uuid.UUID(made)) == made
    assert (uuid.UUID(made).version, uuid.UUID(made).variant) == (8, uuid.RFC_4122)
    assert new_id(kin, kind) != made


def test_kins_have_60_bits() -> None:
    found = [new_kin() for _ in range(1000)]
    assert len(set(found)) == 1000
    assert all(0 <= kin < 2**60 for kin in found)
    assert any(kin >= 2**59 for kin in found)


@given(strings)
def test_every_string_has_a_queue(id_: str) -> None:
    for name in (queue_name(id_), queue_name(id_, "shop"), quoted_name("saved", id_)):
        prefix = "shop" if name.startswith("shop") else PREFIX
        assert name.startswith(f"{prefix}.")
        assert name.isascii()
        assert name.isprintable()
        assert len(name) + len(STATES) <= 255
        assert len(name) > len(prefix) + 1
    assert 0 <= kin_of(id_) < 2**60


@given(strings, strings)
def test_two_ids_share_a_queue_only_with_one_kin(one: str, other: str) -> None:
    assume(one != other)
    first, second = parse(one), parse(other)
    names = {queue_name(one) + suffix for suffix in ("", STATES)}
    shared = names & {queue_name(other) + suffix for suffix in ("", STATES)}
    if first is None or second is None or first.kin != second.kin:
        assert not shared


@pytest.mark.parametrize("id_", ODD)
def test_odd_ids_have_queues_of_their_own(id_: str) -> None:
    assert parse(id_) is None
    assert queue_name(id_).startswith(("fastres.task.", "fastres.hash."))
    assert sum(queue_name(other) == queue_name(id_) for other in ODD) == 1


def test_long_names_are_hashed() -> None:
    longest = "a" * (255 - len("fastres.task.") - len(STATES))
    assert queue_name(longest) == f"fastres.task.{longest}"
    assert queue_name(longest + "a").startswith("fastres.hash.")
    assert queue_name(longest, "a-longer-namespace").startswith("a-longer-namespace.hash.")


@given(kins)
def test_members_and_pages_share_the_queue_of_their_kin_but_steps_do_not(kin: int) -> None:
    member, step, page = (queue_name(new_id(kin, kind)) for kind in Kind)
    assert member == page == f"fastres.{kin:015x}"
    assert step == f"{member}.steps"
    assert queue_name(new_id(kin, 3)) == page


@given(st.uuids(version=4))
def test_the_kin_of_a_uuid_is_its_first_bits(id_: uuid.UUID) -> None:

    assert f"{kin_of(str(id_)):015x}" == id_.hex[:12] + id_.hex[13:16]


@given(st.lists(strings, max_size=20), kins, st.integers(0, 20))
def test_ids_by_queue(others: list[str], kin: int, count: int) -> None:
    ids = [*(new_id(kin, Kind.MEMBER) for _ in range(count)), *others]
    found = by_queue(ids)
    assert {name: [id_ for id_ in ids if queue_name(id_) == name] for name in map(queue_name, ids)} == found


@given(kins, st.text("0123456789abcdef-ABCDEF ", min_size=16, max_size=16))
def test_ids_that_begin_like_kin_ids(kin: int, end: str) -> None:
    member = new_id(kin, Kind.MEMBER)
    other = member[:20] + end
    ids = [member, other, member]
    assert by_queue(ids) == (
        {queue_name(member): ids}
        if queue_name(other) == queue_name(member)
        else {queue_name(member): [member, member], queue_name(other): [other]}
    )


NAMES = """
import json, sys
from fastres.ids import kin_of, queue_name
print(json.dumps([[queue_name(id_), kin_of(id_)] for id_ in json.loads(sys.argv[1])]))
"""


def test_two_processes_compute_the_same_queues() -> None:
    ids = [*ODD, new_id(new_kin(), Kind.PAGE)]
    assert in_another_process(NAMES, json.dumps(ids)) == [[queue_name(id_), kin_of(id_)] for id_ in ids]
