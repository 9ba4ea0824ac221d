"""What ``GroupResult.save`` keeps: a group's ids in a queue of their own, for any process to restore it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from kombu.utils.uuid import uuid

from fastres.errors import MalformedResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery.result import GroupResult

    from fastres._protocols import Meta
    from fastres.addresses import Address
    from fastres.join import Reader
    from fastres.peek import Peek
    from fastres.store import Store

__all__ = ("Saved", "SavedGroups", "pack", "unpack")

#: Results in one message of a saved group: some 2.6 MB, under every broker's limit.
SAVED_PER_MESSAGE = 50_000


class Saved(NamedTuple):
    """A group that was saved: Celery's ``as_tuple`` in two parts."""

    identity: Any
    children: list[Any]
    #: Task ids among the children that are no members of a group.
    alone: list[str]
    #: Task ids among the children that are members of another group than the result they are in, by that group.
    elsewhere: dict[str, list[str]]


class SavedGroups:
    """Saves groups and restores them.

    Args:
        store: writes what is saved.
        send: encodes a message and publishes it to an address, with a correlation id.
        reader: decodes what is restored.
        peek: reads it without taking it.
    """

    def __init__(
        self, store: Store, send: Callable[[Address, Meta, str], None], reader: Reader, peek: Peek
    ) -> None:
        self._store = store
        self._send = send
        self._reader = reader
        self._peek = peek

    def save(self, group_id: str, result: GroupResult, alone: list[str], elsewhere: dict[str, list[str]]) -> None:
        """Keep a group in the place of what was saved under its id before."""
        address = self._reader.addresses.saved(group_id)
        self._store.run(lambda writer: writer.clear(address))
        for message in pack(group_id, result, alone, elsewhere):
            self._send(address, message, group_id)

    def restore(self, group_id: str) -> Saved | None:
        """What was saved under an id, None if nothing was.

        Raises:
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: something was, and cannot be read.
        """
        address = self._reader.addresses.saved(group_id)

        def read(speak: Any) -> list[Any]:
            state = speak.inspect(address.name)
            return self._peek.read_all(speak, address, state.messages) or [] if state is not None else []

        arrivals, refused = self._reader.decoder.decode_all(self._reader.link.call(read))
        for delivery, _, meta in arrivals:
            if "save_id" not in meta:
                refused.append((delivery, MalformedResult("a result where a saved group should be")))
        for delivery, exc in refused:
            self._reader.report_unreadable(delivery, address.name, exc)
        saved = unpack(meta for _, _, meta in arrivals if "save_id" in meta)
        if saved is None and refused:
            raise refused[0][1]
        return saved


def pack(
    group_id: str, result: GroupResult, alone: list[str], elsewhere: dict[str, list[str]] | None = None
) -> list[dict[str, Any]]:
    """A group as the messages that keep it, its members in portions."""
    identity, children = result.as_tuple()
    portions = [
        children[start : start + SAVED_PER_MESSAGE] for start in range(0, len(children), SAVED_PER_MESSAGE)
    ] or [[]]
    save_id = uuid()
    return [
        {
            "task_id": group_id,
            "status": "SUCCESS",
            "result": (identity, portion),
            "alone": alone if number == 0 else [],
            "elsewhere": elsewhere or {} if number == 0 else {},
            "save_id": save_id,
            "portion": number,
            "portions": len(portions),
        }
        for number, portion in enumerate(portions)
    ]


def unpack(messages: Iterable[dict[str, Any]]) -> Saved | None:
    """What :func:`pack` made messages of: the newest save of which every portion is there; None without one."""
    saves: dict[str, dict[int, dict[str, Any]]] = {}
    for message in messages:
        saves.setdefault(message["save_id"], {})[message["portion"]] = message
    for portions in reversed(list(saves.values())):
        first = next(iter(portions.values()))
        if len(portions) == first["portions"]:
            children = [child for number in sorted(portions) for child in portions[number]["result"][1]]
            return Saved(first["result"][0], children, portions[0]["alone"], portions[0].get("elsewhere", {}))
    return None
