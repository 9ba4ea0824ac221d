"""Passing a header's results to the body by reference, for results that are too large for one message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import current_app
from celery.canvas import maybe_signature
from kombu.utils.json import register_type

from fastres.read.stream import in_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ("HeaderResults", "lazy", "mark_of", "wants_reference")

#: The header of a body's signature that asks for results by reference.
LAZY = "fastres-lazy"


class HeaderResults:
    """The results of a chord's header, as the body gets them with :func:`lazy`: read when they are iterated over.

    Iterating yields the results one by one, in the order in which the broker delivers them, in constant memory, and
    takes them from their queue. :meth:`in_order` yields them in the order of the header.

    Args:
        group_id: the id of the header's group, which names the queue of the results.
        size: the number of results.
        elsewhere: ids of header tasks whose results are in other queues: ids that the user chose.
    """

    def __init__(self, group_id: str, size: int, elsewhere: Sequence[str] = ()) -> None:
        self.id = group_id
        self._size = size
        self._elsewhere = list(elsewhere)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        """Raises: fastres.ResultsGone: some results were read before, or have expired."""
        return (meta["result"] for meta in self._metas())

    def in_order(self) -> Iterator[Any]:
        """Yield the results in the order of the header. Results that arrive before their turn are kept in memory.

        Raises:
            fastres.ResultsGone: some results were read before, or have expired.
        """
        return (meta["result"] for meta in in_order(self._metas(), lambda meta: meta.get("group_index")))

    def _metas(self) -> Iterator[Any]:
        backend = current_app.backend
        yield from backend.iter_header(self.id, self._size - len(self._elsewhere))
        for _, meta in backend.get_many(self._elsewhere):
            yield meta

    def __repr__(self) -> str:
        return f"<results of chord {self.id}: {self._size}>"


register_type(
    HeaderResults,
    "fastres.results",
    lambda it: [it.id, it._size, it._elsewhere],
    lambda known: HeaderResults(*known),
)


def lazy(body: Any) -> Any:
    """Return a signature of a chord's body that gets the header's results as a :class:`HeaderResults`.

    ``chord(header)(fastres.lazy(body))`` joins headers whose results together exceed the broker's limit for a
    message. It needs the option ``keep_chord_results``, which is on by default.

    Args:
        body: the signature of a task.
    """
    body = maybe_signature(body).clone()
    return body.set(headers={**(body.options.get("headers") or {}), LAZY: True})


def wants_reference(body: Any) -> bool:
    """Whether this body was made by :func:`lazy`."""
    return bool(mark_of(body, LAZY))


def mark_of(body: Mapping[str, Any], name: str) -> Any:
    """A header of the signature of a body, or of the first task of one that is a chain: None if it has none."""
    headers = (body.get("options") or {}).get("headers") or {}
    if name not in headers and body.get("task") == "celery.chain":
        tasks = body["kwargs"]["tasks"]
        return mark_of(tasks[0], name) if tasks else None
    return headers.get(name)
