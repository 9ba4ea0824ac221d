"""What both implementations, ``fastres._py`` and ``fastres_ext``, satisfy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Union

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: A result as Celery writes it: ``status``, ``result``, ``task_id``, ``traceback``, ``children`` and more.
Meta = dict[str, Any]

#: A result that arrived: its mark (whatever the caller wants back), the task's id, the result.
Arrival = tuple[Any, str, Meta]

Body = Union[bytes, bytearray, memoryview, str]


class Decoder(Protocol):
    """Message to result, refusing what is not accepted and what is no result."""

    def __init__(self, accept: Iterable[str] | None, max_size: int) -> None:
        """Accept these content types (None: kombu's enabled ones), and bodies of up to ``max_size`` bytes."""

    def decode(
        self,
        body: Body,
        content_type: str | None,
        content_encoding: str | None,
        compression: str | None,
        correlation_id: str | None,
    ) -> Meta:
        """The result in a message, with ``task_id`` filled in from the correlation id where it is missing.

        Raises:
            kombu.exceptions.ContentDisallowed: the content type is not accepted.
            kombu.exceptions.DecodeError: the body cannot be decoded.
            fastres.errors.OversizedResult: it unpacks to more than ``max_size`` bytes.
            fastres.errors.MalformedResult: it is no result.
        """


class Aggregate(Protocol):
    """The task ids that a join waits for, and which of them have come."""

    def __init__(self, task_ids: Iterable[str], ready_states: Iterable[str]) -> None: ...

    def __len__(self) -> int:
        """How many are still to come."""

    def __contains__(self, task_id: object) -> bool:
        """Whether this id is still to come."""

    def missing(self) -> list[str]:
        """The ids still to come, in the order they were given."""

    def feed(
        self, arrivals: Sequence[Arrival]
    ) -> tuple[list[Arrival], list[Arrival], list[Arrival], list[Arrival]]:
        """Sort arrivals into ``(ready, states, repeated, foreign)``, each in order of arrival.

        ``ready`` are final results that were still to come, and are not any more; ``states`` are not final;
        ``repeated`` are of ids that came before; ``foreign`` of ids that this join never waited for.
        """
