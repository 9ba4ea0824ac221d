"""The unconfirmed messages of a connection: kept in order to publish them again when the connection breaks."""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from fastres.amqp.publishing import Publishing

__all__ = ("Window",)


class Window:
    """Unconfirmed publishings, in the order in which they were sent.

    Args:
        depth: how many there may be.
        size: how many bytes their bodies may have together.
    """

    def __init__(self, depth: int, size: int) -> None:
        self._depth = depth
        self._size = size
        self._bytes = 0
        #: By their number on the channel that they were sent on.
        self._sent: dict[int, Publishing] = {}
        #: The routing keys of messages that were returned since the last time that some were published again.
        self._returned: set[str] = set()
        #: To be sent again: over another channel, or after their queue was declared.
        self.again: deque[Publishing] = deque()
        #: Messages of a closed channel, to be published again one by one in order to find the refused one.
        self.suspects: deque[Publishing] = deque()

    def __len__(self) -> int:
        return len(self._sent) + len(self.again) + len(self.suspects)

    @property
    def unconfirmed(self) -> int:
        """How many confirms are awaited on the present channel."""
        return len(self._sent)

    def is_full(self) -> bool:
        return len(self._sent) >= self._depth or self._bytes >= self._size

    def has_room(self) -> bool:
        """Whether at least half of the window is free. Confirms arrive many at a time, so a wait ends there."""
        return 2 * len(self._sent) <= self._depth and 2 * self._bytes <= self._size

    def add(self, first: int, publishings: Collection[Publishing]) -> None:
        """These were sent, with the numbers from ``first`` on."""
        for number, publishing in enumerate(publishings, first):
            self._sent[number] = publishing
            self._bytes += len(publishing.message.body)

    def confirm(self, number: int, multiple: bool) -> None:
        """The broker is done with a number, or with all up to it: it has them, or could not route them."""
        for publishing in self._remove(number, multiple):
            if publishing.routing_key in self._returned:
                self.again.append(publishing)

    def refuse(self, number: int, multiple: bool) -> None:
        """The broker has not taken a number, or all up to it."""
        self.suspects.extend(self._remove(number, multiple))

    def give_back(self, routing_key: str) -> None:
        """There was no queue for a message: its confirm comes next."""
        self._returned.add(routing_key)

    def republished(self, publishings: Collection[Publishing]) -> None:
        """Note messages that were published again: later returns for their queues are new."""
        self._returned.difference_update([publishing.routing_key for publishing in publishings])

    def lose(self, suspects: bool = False) -> None:
        """The channel is gone: unconfirmed messages are to be published again.

        Args:
            suspects: the broker closed the channel because of one of them.
        """
        lost = self._remove(max(self._sent), True) if self._sent else []
        (self.suspects if suspects else self.again).extendleft(reversed(lost))
        self._returned.clear()

    def adopt(self, other: Window) -> None:
        """Take over the unconfirmed messages of another window."""
        other.lose()
        for ours, theirs in ((self.again, other.again), (self.suspects, other.suspects)):
            ours.extend(theirs)
            theirs.clear()

    def withdraw(self, publishings: Collection[Publishing]) -> list[Publishing]:
        """Those of these that are not confirmed, of which nothing is known any more."""
        ours = set(map(id, publishings))
        left = []
        for number, publishing in list(self._sent.items()):
            if id(publishing) in ours:
                left += self._remove(number, False)
        for place in (self.again, self.suspects):
            if place:
                left += [publishing for publishing in place if id(publishing) in ours]
                kept = [publishing for publishing in place if id(publishing) not in ours]
                place.clear()
                place.extend(kept)
        return left

    def _remove(self, number: int, multiple: bool) -> list[Publishing]:
        numbers = list(takewhile(number.__ge__, self._sent)) if multiple else [number]
        removed = [self._sent.pop(each) for each in numbers if each in self._sent]
        self._bytes -= sum(len(publishing.message.body) for publishing in removed)
        return removed
