"""The state of the open chords, and the messages in the broker that contain it.

The reducer accepts events in any order, and repeatedly: the state of a chord is the sum of its events. All of it is in
delivered, unacknowledged messages, so that it outlives the process. A message that
waits for its acknowledgement is dear in the broker's memory (6 kB), so those of a chord are merged: ``MERGED_EVENTS``
parts into one batch, ``MERGE_FACTOR`` batches into a larger one, up to ``MAX_MERGED`` bytes.
"""

from __future__ import annotations

import math
from itertools import count, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from kombu.utils.uuid import uuid

from fastres.chords.events import REFERENCE, WITH_TERMS, Event, is_success, place_of, read_event, write_event
from fastres.errors import NewerEvent
from fastres.ids import compact, expand

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres._protocols import Delivery
    from fastres.chords.events import Terms

__all__ = ("Chord", "Held", "Merge", "Reducer", "id_of")

#: How many single events are merged into a batch, and how many batches into a larger one.
MERGED_EVENTS, MERGE_FACTOR = 1000, 10
#: Bytes from which a message is not merged any more.
MAX_MERGED = 1 << 19
#: Chords that have fired and are remembered, and for how many seconds a part of one that comes late is kept: the
#: same chord may have been sent again, which is known only when its size comes.
MAX_FIRED, LATE_PARTS_KEPT = 100_000, 60.0
#: Open chords up to which it is found out which of them lacks the fewest parts.
MAX_COMPARED = 100
#: In the place of when a chord has fired that has not.
_NEVER = math.inf, ""
#: In the key of a part, before its place: there is another part of the same id.
ANOTHER = "\0"


def id_of(key: int | str) -> str:
    """The task id of a part's key."""
    return expand(key).partition(ANOTHER)[0]


class Held(NamedTuple):
    """A delivered, unacknowledged message."""

    tag: int
    #: When it was delivered, on the monotonic clock.
    since: float
    #: In bytes.
    size: int
    #: The parts that it holds, by their compact task id.
    parts: tuple[int | str, ...]
    #: Whether there is more than parts in it.
    more: bool


class Chord:
    """The state of a chord."""

    __slots__ = (
        "added", "at", "born", "closed", "context", "counted", "failed", "first", "held", "id", "last", "needed",
        "notified", "parts", "plan", "root", "run", "since", "size", "succeeded", "terms", "under_way",
    )  # fmt: skip

    def __init__(self, id: str, born: float) -> None:
        self.id = id
        #: When this joiner first heard of it, on the monotonic clock.
        self.born = born
        #: Wall clock, in seconds: when its first and its last known event were sent.
        self.since, self.at = math.inf, 0.0
        self.size: int | None = None
        #: Names this time that it was sent.
        self.run = ""
        #: How many parts make it complete.
        self.needed = math.inf
        self.added: set[str] = set()
        #: Errbacks that know already that a part has failed.
        self.notified: set[str] = set()
        #: Packed; empty: not known yet.
        self.plan = b""
        #: Packed parts by compact task id: there may be a million.
        self.parts: dict[int | str, bytes] = {}
        #: The last part that arrived, its root task, and the context of its request.
        self.last = self.root = ""
        self.context: dict[str, Any] = {}
        #: On which terms it ends, how many tasks are to succeed and have, and whether its deadline has passed.
        self.terms: Terms | None = None
        self.first, self.succeeded = 0, 0
        self.closed = False
        #: Why it cannot go on; empty: it can, as far as is known.
        self.failed = ""
        #: By level: single events, batches, batches of batches.
        self.held: list[list[Held]] = [[]]
        #: How many merged events have not come back yet.
        self.under_way = 0
        #: How many parts were counted that have failed or were revoked, among how many: see ``status``.
        self.counted = (0, 0, 0)

    @property
    def total(self) -> int | None:
        """How many parts it takes."""
        return None if self.size is None else self.size + len(self.added)

    @property
    def whole(self) -> bool:
        """Whether all that it takes is known."""
        return len(self.parts) >= self.needed

    def update_needed(self) -> None:
        """Find out how many parts it takes."""
        if self.size is None or not self.plan:
            return
        over = self.closed or self.failed or (self.first and self.succeeded >= self.first)
        self.needed = 0 if over else self.size + len(self.added)

    def set_terms(self, terms: Terms) -> None:
        """Learn on which terms it ends."""
        self.terms, self.first = terms, terms.first or 0
        self.succeeded = sum(map(is_success, self.parts.values())) if self.first else 0

    def results(self) -> dict[str, bytes]:
        """Packed parts by task id; of several with one id, all but the first have ``ANOTHER`` and a place."""
        return {expand(key): part for key, part in self.parts.items()}

    def add(self, task_id: str, packed: bytes, event: Event) -> int | str:
        """Learn of a part: the key that it has in ``parts``."""
        key: int | str = compact(task_id)
        parts = self.parts
        before = parts.get(key)
        if before is not None:
            if before == packed or place_of(before) == place_of(packed):
                # The first one counts.
                return key
            # Two tasks of the header have one id, which the user chose.
            key = f"{task_id}{ANOTHER}{place_of(packed).decode(errors='replace')}"
            if key in parts:
                return key
        # There may be a million that say the same.
        parts[key] = REFERENCE if packed == REFERENCE else packed
        if self.first and is_success(packed):
            self.succeeded += 1
            self.update_needed()
        self.last, self.root, self.context = task_id, event.root, event.context
        return key

    def messages(self) -> Iterator[Held]:
        for level in self.held:
            yield from level


class Merge(NamedTuple):
    """Messages that are to be replaced by merged ones with the same content."""

    chord: Chord
    bodies: list[bytes]
    tags: list[int]


class Reducer:
    """The state of the open chords: see the module.

    Args:
        largest: bytes from which a message is not merged any more.
    """

    def __init__(self, largest: int = MAX_MERGED) -> None:
        self._largest = largest
        self.chords: dict[str, Chord] = {}
        #: Complete chords with no merge in flight. Firing during a merge would leave an orphan message: the merged
        #: event would be all that the next joiner knows of the chord.
        self.complete: dict[str, Chord] = {}
        #: Events of no chord, with their delivery tags.
        self.others: list[tuple[int, Event]] = []
        #: Delivery tags of events that are not needed any more.
        self.spent: list[int] = []
        #: Messages that are no events, and why.
        self.refused: list[tuple[Delivery, Exception]] = []
        #: The number of held messages.
        self.count = 0
        #: Chords with enough single events to merge.
        self._crowded: dict[str, Chord] = {}
        #: Fired chords: the time, on the monotonic clock, and the name of the run.
        self._fired: dict[str, tuple[float, str]] = {}
        #: Merged events that were not delivered yet, by their mark: the chord, and the parts in the event.
        self._under_way: dict[str, tuple[Chord, tuple[int | str, ...]]] = {}
        self._marks = map("{}.{}".format, repeat(uuid()), count())

    def feed(self, deliveries: Iterable[Delivery], now: float) -> None:
        """Add the events of messages to the state; ``now`` is the monotonic clock.

        Raises: fastres.errors.NewerEvent: an event needs a newer joiner.
        """
        chords = self.chords
        for delivery in deliveries:
            try:
                event, rest = read_event(delivery.body)
            except NewerEvent:
                raise
            except Exception as exc:
                self.refused.append((delivery, exc))
                continue
            if not event.chord:
                self.others.append((delivery.delivery_tag, event))
                continue
            merged = self._under_way.pop(event.mark, None) if event.mark else None
            chord = chords.get(event.chord)
            if merged is not None:
                merged[0].under_way -= 1
                if merged[0] is not chord:
                    # It has expired.
                    self.spent.append(delivery.delivery_tag)
                    continue
            if chord is None:
                if event.run and self._fired.get(event.chord, _NEVER)[1] == event.run:
                    # Its sender was not sure that this had come.
                    self.spent.append(delivery.delivery_tag)
                    continue
                chord = chords[event.chord] = Chord(event.chord, now)
            more = event.size is not None or bool(
                event.added or event.plan or event.notified or event.failed or event.terms
            )
            if more:
                self._learn(chord, event, rest)
            at = event.at
            if at > chord.at:
                chord.at = at
            since = event.since or at
            if since < chord.since:
                chord.since = since
            task_id = event.part
            if task_id:
                keys: tuple[int | str, ...] = (chord.add(task_id, rest, event),)
            elif merged is None:
                start = event.plan
                learnt = []
                for task_id, length in event.parts:
                    learnt.append(chord.add(task_id, rest[start : start + length], event))
                    start += length
                keys = tuple(learnt)
            else:
                # All this is known: the same numbers need not be there twice.
                keys = merged[1]
            self._hold(chord, Held(delivery.delivery_tag, now, len(delivery.body), keys, more))
            if len(chord.parts) >= chord.needed and not chord.under_way:
                self.complete[chord.id] = chord
            elif self.complete:
                # One more task was added to it.
                self.complete.pop(chord.id, None)

    def _learn(self, chord: Chord, event: Event, rest: bytes) -> None:
        """Add the fields of an event that are not parts."""
        if event.size is not None:
            chord.size, chord.run = event.size, event.run
            # It was sent again.
            self._fired.pop(chord.id, None)
        chord.added.update(event.added)
        chord.notified.update(event.notified)
        chord.failed = chord.failed or event.failed
        if event.plan:
            chord.plan = rest[: event.plan]
        if event.terms is not None and chord.terms is None:
            chord.set_terms(event.terms)
        chord.update_needed()

    def _hold(self, chord: Chord, held: Held) -> None:
        self.count += 1
        level, parts = 0, len(held.parts)
        if parts < MERGED_EVENTS:
            messages = chord.held[0]
            messages.append(held)
            if len(messages) >= MERGED_EVENTS:
                self._crowded[chord.id] = chord
            return
        while parts >= MERGED_EVENTS:
            level, parts = level + 1, parts // MERGE_FACTOR
        while len(chord.held) <= level:
            chord.held.append([])
        messages = chord.held[level]
        messages.append(held)
        if len(messages) >= MERGE_FACTOR and self._is_crowded(messages, level):
            self._crowded[chord.id] = chord

    # -- merging held messages

    def merges(self) -> Iterator[Merge]:
        """Merge the messages of chords that have too many."""
        while self._crowded:
            _, chord = self._crowded.popitem()
            if chord.whole:
                continue
            for level, messages in enumerate(chord.held):
                if self._is_crowded(messages, level) and (merge := self._merge(chord, messages)):
                    yield merge

    def tighten(self) -> Iterator[Merge]:
        """Merge all messages of each chord."""
        for chord in self.chords.values():
            if sum(map(len, chord.held)) > 1 and (merge := self._merge(chord, list(chord.messages()))):
                yield merge

    def renew(self, before: float) -> Iterator[Merge]:
        """Replace messages that were delivered before a time on the monotonic clock."""
        for chord in self.chords.values():
            old = [held for held in chord.messages() if held.since < before]
            if old:
                yield self._replace(chord, old)

    def _is_crowded(self, messages: list[Held], level: int) -> bool:
        if not level:
            return len(messages) >= MERGED_EVENTS
        return (
            len(messages) >= MERGE_FACTOR and sum(held.size < self._largest for held in messages) >= MERGE_FACTOR
        )

    def _merge(self, chord: Chord, messages: list[Held]) -> Merge | None:
        mergeable = [held for held in messages if held.size < self._largest]
        return self._replace(chord, mergeable) if len(mergeable) > 1 else None

    def snapshot(self, chord: Chord) -> list[bytes]:
        """All that is known of a chord as new events, for when its messages are gone."""
        bodies: list[bytes] = []
        keys: list[int | str] = []
        size, more = len(chord.plan), True
        for key, part in chord.parts.items():
            keys.append(key)
            size += len(part)
            if size >= self._largest:
                bodies.append(self._batch(chord, keys, more, ""))
                keys, size, more = [], 0, False
        if keys or more:
            bodies.append(self._batch(chord, keys, more, ""))
        return bodies

    def _replace(self, chord: Chord, messages: list[Held]) -> Merge:
        self.complete.pop(chord.id, None)
        bodies: list[bytes] = []
        more = any(held.more for held in messages)
        keys: list[int | str] = []
        size = len(chord.plan) if more else 0

        def close() -> None:
            nonlocal keys, size, more
            mark = next(self._marks)
            self._under_way[mark] = chord, tuple(keys)
            chord.under_way += 1
            bodies.append(self._batch(chord, keys, more, mark))
            keys, size, more = [], 0, False

        for key in dict.fromkeys(key for held in messages for key in held.parts):
            keys.append(key)
            size += len(chord.parts[key])
            if size >= self._largest:
                close()
        if keys or more or not bodies:
            close()
        return Merge(chord, bodies, [held.tag for held in messages])

    @staticmethod
    def _batch(chord: Chord, keys: list[int | str], more: bool, mark: str) -> bytes:
        packed = [chord.parts[key] for key in keys]
        event = Event(
            chord.id, chord.since, chord.at, parts=[(id_of(key), len(part)) for key, part in zip(keys, packed)],
            root=chord.root, context=chord.context, mark=mark,
        )  # fmt: skip
        if more:
            event.size, event.run, event.plan = chord.size, chord.run, len(chord.plan)
            event.added, event.notified = sorted(chord.added), sorted(chord.notified)
            event.failed, event.terms = chord.failed, chord.terms
            event.version = 1 if chord.terms is None else WITH_TERMS
        return write_event(event, chord.plan if more else b"", packed)

    # -- after a commit

    def release(self, chord: Chord, tags: Iterable[int]) -> None:
        """Messages of a chord were acknowledged."""
        gone = set(tags)
        self.count -= len(gone)
        chord.held = [[held for held in level if held.tag not in gone] for level in chord.held]

    def forget(self, chord: Chord, now: float, over: bool = True) -> None:
        """A chord has fired, or has expired: its messages were acknowledged.

        Args:
            over: False: it is written into the log again.
        """
        self.count -= sum(map(len, chord.held))
        self.complete.pop(chord.id, None)
        self.chords.pop(chord.id, None)
        self._crowded.pop(chord.id, None)
        self._fired.pop(chord.id, None)
        if over:
            self._fired[chord.id] = now, chord.run
        if len(self._fired) > MAX_FIRED:
            del self._fired[next(iter(self._fired))]

    def nearest(self) -> float:
        """The least number of parts that any open chord lacks; 0 if there are many open chords.

        A chord of unknown size counts with the number of its parts: its size event may arrive at any moment, and the
        more parts have arrived before, the longer the joiner can wait between two reads.
        """
        if len(self.chords) > MAX_COMPARED:
            return 0
        return min(
            (len(c.parts) if c.needed == math.inf else c.needed - len(c.parts) for c in self.chords.values()),
            default=0,
        )

    def open(self) -> list[Chord]:
        """The open chords, the oldest first, without those that consist of late parts only."""
        chords = [chord for chord in self.chords.values() if chord.size is not None or not self._is_late(chord)]
        return sorted(chords, key=lambda chord: chord.since)

    def _is_late(self, chord: Chord) -> bool:
        """Whether a chord of unknown size consists of late events only: parts or a cancellation after it was fired."""
        return chord.id in self._fired or (bool(chord.failed) and not chord.parts)

    # -- deadlines and expiry

    def close_overdue(self, wall: float) -> None:
        """Close chords whose deadline has passed; ``wall`` is the time, in seconds since the epoch."""
        for chord in self.chords.values():
            terms = chord.terms
            if terms is not None and terms.deadline is not None and terms.deadline <= wall and not chord.closed:
                chord.closed = True
                chord.update_needed()
                if chord.whole and not chord.under_way:
                    self.complete[chord.id] = chord

    def expired(self, seconds: float | None, now: float, wall: float) -> list[Chord]:
        """Chords without a new event for so many seconds (None: no limit), and late parts of fired chords.

        Args:
            now: the monotonic clock.
            wall: the time, in seconds.
        """
        return [
            chord for chord in self.chords.values()
            if (seconds and chord.at < wall - seconds)
            or (chord.size is None and self._is_late(chord) and chord.born < now - LATE_PARTS_KEPT)
        ]  # fmt: skip
