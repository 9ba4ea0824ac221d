"""A chord's results by reference: for headers whose results are too large for one message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.canvas import maybe_signature
from celery.result import GroupResult
from kombu.utils.json import register_type

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("HeaderResults", "lazy", "wants_reference")

#: The header of a body's signature that asks for it.
LAZY = "fastres-lazy"


class HeaderResults:
    """What the body of a chord gets in the place of its header's results: they are read when they are asked for.

    Iterating yields the results one by one, as they come from the broker and not in the order of the header,
    without holding them all, and takes them out of their queue. ``group`` is the header's ``GroupResult``.
    """

    def __init__(self, group_id: str, size: int) -> None:
        self.id = group_id
        self._size = size

    @property
    def group(self) -> GroupResult:
        """The header's results.

        Raises: LookupError: they are not there any more.
        """
        group = GroupResult.restore(self.id)
        if group is None:
            raise LookupError(
                f"the results of chord {self.id} are not there: they have expired (result_expires) or were deleted"
            )
        return group

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for _, meta in self.group.iter_native():
            yield meta["result"]

    def __repr__(self) -> str:
        return f"<results of chord {self.id}: {self._size}>"


register_type(HeaderResults, "fastres.results", lambda it: [it.id, it._size], lambda known: HeaderResults(*known))


def lazy(body: Any) -> Any:
    """A chord's body that gets its header's results by reference, as :class:`HeaderResults`.

    ``chord(header)(fastres.lazy(body))`` joins headers whose results together are over the broker's limit for a
    message. Chord results have to be kept (``keep_chord_results``, the default).

    Args:
        body: the signature of a task.
    """
    body = maybe_signature(body).clone()
    return body.set(headers={**(body.options.get("headers") or {}), LAZY: True})


def wants_reference(body: Any) -> bool:
    """Whether this body was made by :func:`lazy`."""
    return bool(((body.get("options") or {}).get("headers") or {}).get(LAZY))
