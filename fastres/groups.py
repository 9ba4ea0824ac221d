"""Saving and restoring groups, each in a queue of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from celery.result import GroupResult, ResultBase, ResultSet
from kombu.utils.uuid import uuid

from fastres.errors import MalformedResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres._protocols import Decoder
    from fastres.addresses import Addresses
    from fastres.logs import Reports
    from fastres.read.look import Looks
    from fastres.write.messages import Encoder
    from fastres.write.publisher import Publisher

__all__ = ("Groups", "Saved", "leaves", "pack", "unpack")

#: Results in one message of a saved group: some 2.6 MB, under every broker's limit.
SAVED_PER_MESSAGE = 50_000


class Saved(NamedTuple):
    """A saved group: the two parts of Celery's ``as_tuple``."""

    identity: Any
    children: list[Any]


class Groups:
    """Saves groups, each in a queue of its own. Any process can restore them.

    Args:
        publisher: publishes saved groups.
        encoder: makes messages of it.
        looks: reads saved groups.
        addresses: the backend's addresses.
        decoder: decodes saved groups.
        reports: where unusable messages are reported.
    """

    def __init__(
        self,
        publisher: Publisher,
        encoder: Encoder,
        looks: Looks,
        addresses: Addresses,
        decoder: Decoder,
        reports: Reports,
    ) -> None:
        self._publisher = publisher
        self._encoder = encoder
        self._looks = looks
        self._addresses = addresses
        self._decoder = decoder
        self._reports = reports

    def save(self, group_id: str, result: GroupResult) -> GroupResult:
        """Save a group. Replaces the group that was saved under the same id before."""
        address = self._addresses.saved(group_id)
        self._publisher.run(lambda writer: writer.clear(address))
        for message in pack(group_id, result):
            self._publisher.publish(address, self._encoder.encode(message, group_id), declare=True)
        return result

    def restore(self, group_id: str) -> Saved | None:
        """The group that was saved under an id; None: there is none.

        Raises:
            kombu.exceptions.ContentDisallowed, kombu.exceptions.DecodeError: something was, and cannot be read.
        """
        address = self._addresses.saved(group_id)
        arrivals, refused = self._decoder.decode_all(self._looks.read(address))
        for delivery, _, meta in arrivals:
            if "save_id" not in meta:
                refused.append((delivery, MalformedResult("a result where a saved group should be")))
        for delivery, exc in refused:
            self._reports.unreadable(delivery, address.name, exc)
        saved = unpack(meta for _, _, meta in arrivals if "save_id" in meta)
        if saved is None and refused:
            raise refused[0][1]
        return saved

    def delete(self, group_id: str) -> None:
        """Delete the group that was saved under an id."""
        address = self._addresses.saved(group_id)

        self._publisher.run(lambda writer: writer.connect().drop(address.name))


def pack(group_id: str, result: GroupResult) -> list[dict[str, Any]]:
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
            "save_id": save_id,
            "portion": number,
            "portions": len(portions),
        }
        for number, portion in enumerate(portions)
    ]


def unpack(messages: Iterable[dict[str, Any]]) -> Saved | None:
    """The group in the messages of :func:`pack`: the newest save that is complete; None: there is none."""
    saves: dict[str, dict[int, dict[str, Any]]] = {}
    for message in messages:
        saves.setdefault(message["save_id"], {})[message["portion"]] = message
    for portions in reversed(list(saves.values())):
        first = next(iter(portions.values()))
        if len(portions) == first["portions"]:
            children = [child for number in sorted(portions) for child in portions[number]["result"][1]]
            return Saved(first["result"][0], children)
    return None


def leaves(results: Iterable[ResultBase]) -> Iterator[Any]:
    """The task results among results and nested groups of results."""
    for result in results:
        if isinstance(result, ResultSet):
            yield from leaves(result.results)
        else:
            yield result
