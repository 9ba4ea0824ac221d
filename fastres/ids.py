"""Task ids and the queue that each one names: pure functions, the same in every process.

A *kin id* is a UUIDv8 (RFC 9562, section 5.8) that shares 60 bits, its *kin*, with the ids that live in the same
queue::

    custom_a  48 bits  the upper bits of the kin
    version    4 bits  8
    custom_b  12 bits  the lower bits of the kin
    variant    2 bits  2
    custom_c  62 bits  2 bits of kind | 60 random bits

Every other id (Celery's uuid4, a string of the user's) has a queue of its own.

| id                      | queue of its result                | states before the result  |
| ----------------------- | ---------------------------------- | ------------------------- |
| kin id: member, page    | ``fastres.<kin>``                  | ``fastres.<kin>.states``  |
| kin id: step            | ``fastres.<kin>.steps``            | ``....steps.states``      |
| any other id            | ``fastres.task.<quoted id>``       | ``fastres.task.<quoted id>.states`` |
| ... of a longer name    | ``fastres.hash.<SHA-256>``         | ``fastres.hash.<SHA-256>.states``   |

A namespace replaces ``fastres``.
"""

from __future__ import annotations

import os
from enum import IntEnum
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import quote

__all__ = (
    "PREFIX",
    "STATES",
    "Kin",
    "Kind",
    "by_queue",
    "is_uuid",
    "kin_of",
    "new_id",
    "new_kin",
    "parse",
    "queue_name",
    "quoted_name",
)

#: The first part of every queue's name, where no namespace is set.
PREFIX = "fastres"
#: The last part of the name of a queue for states that are not final.
STATES = ".states"
#: The longest queue name, in bytes (AMQP 0-9-1, a shortstr).
LONGEST_NAME = 255

_VERSION = 8
_VARIANTS = "89ab"
_HEX = frozenset("0123456789abcdef")
_ID_CHARACTERS = b"0123456789abcdef-"
#: How many ids are looked at together.
PORTION = 10_000
_RANDOM = (1 << 60) - 1


class Kind(IntEnum):
    """The role of a kin id among the ids of its kin."""

    #: A member of a group: its results are read together.
    MEMBER = 0
    #: A task inside a member's chain, whose result no join reads.
    STEP = 1
    #: A lone task, or a task of a small chord, of a process that sent several one after the other.
    PAGE = 2


class Kin(NamedTuple):
    """The parts of a kin id."""

    #: 60 bits.
    kin: int
    #: A :class:`Kind`, or 3, which has no meaning yet and is treated as a page.
    kind: int


def new_kin() -> int:
    """60 random bits."""
    return int.from_bytes(os.urandom(8), "big") >> 4


def kin_of(id_: str) -> int:
    """The kin of the ids that belong to this one: 60 bits, of any string.

    Of a UUID they are its first 64 bits without the version, so that a group's own id, which Celery may have
    generated, names the queue of its members' results.
    """
    if is_uuid(id_):
        return int(id_[:8] + id_[9:13] + id_[15:18], 16)
    return int.from_bytes(sha256(_encode(id_)).digest()[:8], "big") >> 4


def new_id(kin: int, kind: int) -> str:
    """A new kin id.

    Args:
        kin: 60 bits.
        kind: a :class:`Kind`.
    """
    high = f"{kin:015x}"
    low = f"{(kind << 60) | (int.from_bytes(os.urandom(8), 'big') & _RANDOM) | (2 << 62):016x}"
    return f"{high[:8]}-{high[8:12]}-8{high[12:]}-{low[:4]}-{low[4:]}"


def parse(id_: str) -> Kin | None:
    """The parts of a kin id; None: it is not a kin id. Only the canonical lower-case form is one."""
    if not is_uuid(id_) or id_[14] != "8":
        return None
    return Kin(int(id_[:8] + id_[9:13] + id_[15:18], 16), (int(id_[19], 16) & 3))


def queue_name(task_id: str, prefix: str = PREFIX) -> str:
    """The name of the queue that a task's result is in: any string has one, and it begins with the prefix."""
    kin = parse(task_id)
    if kin is None:
        return quoted_name("task", task_id, prefix)
    return f"{prefix}.{kin.kin:015x}.steps" if kin.kind == Kind.STEP else f"{prefix}.{kin.kin:015x}"


def by_queue(task_ids: list[str], prefix: str = PREFIX) -> dict[str, list[str]]:
    """Task ids by the name of the queue that their results are in."""
    if task_ids and _are_of_one_queue(task_ids):
        # As a rule they are all of one group, and there may be a million of them.
        return {queue_name(task_ids[0], prefix): task_ids}
    found: dict[str, list[str]] = {}
    for task_id in task_ids:
        name = queue_name(task_id, prefix)
        if name in found:
            found[name].append(task_id)
        else:
            found[name] = [task_id]
    return found


def quoted_name(family: str, id_: str, prefix: str = PREFIX) -> str:
    """A name for an id that may hold anything: two ids never share one.

    A dot in an id is quoted too: the text after a dot in a name is fastres's own.
    """
    quoted = quote(_encode(id_), safe="").replace(".", "%2E")
    name = f"{prefix}.{family}.{quoted}"
    if len(name) + len(STATES) <= LONGEST_NAME and quoted:
        return name
    family = "hash" if family == "task" else f"{family}.hash"
    return f"{prefix}.{family}.{sha256(_encode(id_)).hexdigest()}"


def is_uuid(id_: str) -> bool:
    """Whether this is a UUID of the variant of RFC 9562, in its canonical form."""
    return (
        len(id_) == 36
        and id_[8] == id_[13] == id_[18] == id_[23] == "-"
        and id_[19] in _VARIANTS
        and _HEX.issuperset(id_.replace("-", ""))
        and id_.count("-") == 4
    )


def _are_of_one_queue(task_ids: list[str]) -> bool:
    """Whether these are all kin ids of one kin and kind, checked without parsing each; False: perhaps not."""
    first = task_ids[0]
    # In portions: the joined text of a million ids would be most of the memory of their join.
    return parse(first) is not None and all(
        _have_start(task_ids[start : start + PORTION], first[:20]) for start in range(0, len(task_ids), PORTION)
    )


def _have_start(task_ids: list[str], start: str) -> bool:
    """Whether each is an id that begins with the 20 characters that hold kin and kind."""
    count, together = len(task_ids), "".join(task_ids)
    return (
        set(map(len, task_ids)) == {36}
        # Three dashes in the start keep any other place from looking so.
        and together.count(start) == count
        and together[23::36] == "-" * count
        and together.count("-") == 4 * count
        and not together.encode("ascii", "replace").translate(None, _ID_CHARACTERS)
    )


def _encode(id_: str) -> bytes:
    return id_.encode("utf-8", "surrogatepass")
