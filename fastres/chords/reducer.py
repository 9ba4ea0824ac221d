"""The state of the open chords, and the messages in the broker that contain it.

The reducer accepts events in any order, and repeatedly: the state of a chord is the sum of its events. All of it is in
delivered, unacknowledged messages, so that it outlives the process. Each takes 6 kB of the broker's memory, so those of
a chord are merged: ``MERGED_EVENTS`` parts into one batch, ``MERGE_FACTOR`` batches into a larger one, up to
``MAX_MERGED`` bytes.
"""

from __future__ import annotations

import math
from itertools import chain, count, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from kombu.utils.uuid import uuid

from fastres._impl import compact, expand
from fastres.chords.events import REFERENCE, WITH_TERMS, Event, is_success, place_of, read_event, write_event
from fastres.errors import NewerEvent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastres._protocols import Delivery
    from fastres.chords.events import Terms

__all__ = ("Chord", "Held", "Merge", "Reducer", "id_of")

#: How many single events are merged into a batch, and how many batches into a larger one.
MERGED_EVENTS, MERGE_FACTOR = 1000, 10
#: Messages of this size, in bytes, are not merged any further.
MAX_MERGED = 1 << 19
#: Chords that have fired and are remembered, and for how many seconds a part of one that comes late is kept: the
#: same chord may have been sent again, which is known only when its size comes.
MAX_FIRED, LATE_PARTS_KEPT = 100_000, 60.0
#: The largest number of open chords whose missing parts are compared: see ``fewest_missing``.
MAX_COMPARED = 100
#: Default for chords that have not fired.
_NOT_FIRED = math.inf, ""
#: Separates id and place in the key of a part whose id another part has too.
ANOTHER = "\0"


def id_of(key: int | str) -> str:
    """The task id of a part's key."""
    return expand(key) if isinstance(key, int) else key.partition(ANOTHER)[0]


class Held(msgspec.Struct, gc=False):
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
        "added", "at", "closed", "context", "counted", "failed", "first", "first_seen", "held", "id", "last",
        "needed", "notified", "parts", "pending_merges", "plan", "root", "run", "since", "size", "succeeded",
        "terms",
    )  # fmt: skip

    def __init__(self, id: str, first_seen: float) -> None:
        self.id = id
        #: When this joiner received its first event, on the monotonic clock.
        self.first_seen = first_seen
        #: Wall clock, in seconds: when its first and its last known event were sent.
        self.since, self.at = math.inf, 0.0
        self.size: int | None = None
        #: The id of this sending: a chord may be sent again.
        self.run = ""
        #: The number of parts that make it complete.
        self.needed = math.inf
        self.added: set[str] = set()
        #: Errbacks that were already called for a failed part.
        self.notified: set[str] = set()
        #: Packed; empty: not known yet.
        self.plan = b""
        #: Packed parts by compact task id: there may be a million.
        self.parts: dict[int | str, bytes] = {}
        #: The last part that arrived, its root task, and the context of its request.
        self.last = self.root = ""
        self.context: dict[str, Any] = {}
        #: Its terms (``fastres.settle``), how many tasks must succeed and have succeeded, and whether its deadline has
        #: passed.
        self.terms: Terms | None = None
        self.first, self.succeeded = 0, 0
        self.closed = False
        #: Why it has failed; empty: it has not.
        self.failed = ""
        #: By level: single events, batches, batches of batches.
        self.held: list[list[Held]] = [[]]
        #: The number of published merged events that were not delivered yet.
        self.pending_merges = 0
        #: For ``status``: how many parts were looked at, and of these, how many have failed and were revoked.
        self.counted = (0, 0, 0)

    @property
    def total(self) -> int | None:
        """The number of its parts; None: not known yet."""
        return None if self.size is None else self.size + len(self.added)

    @property
    def is_complete(self) -> bool:
        """Whether it has all parts that it needs."""
        return len(self.parts) >= self.needed

    def update_needed(self) -> None:
        """Compute how many parts it needs."""
        if self.size is None or not self.plan:
            return
        over = self.closed or self.failed or (self.first and self.succeeded >= self.first)
        self.needed = 0 if over else self.size + len(self.added)

    def set_terms(self, terms: Terms) -> None:
        """Set the terms on which it ends."""
        self.terms, self.first = terms, terms.first or 0
        self.succeeded = sum(map(is_success, self.parts.values())) if self.first else 0

    def results(self) -> dict[str, bytes]:
        """Packed parts by task id; of several with one id, all but the first have ``ANOTHER`` and a place."""
        return {expand(key): part for key, part in self.parts.items()}

    def add(self, task_id: str, packed: bytes, event: Event) -> int | str:
        """Add a part. Returns its key in ``parts``."""
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
        # There may be a million equal ones.
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
        self.obsolete: list[int] = []
        #: Messages that are no events, and why.
        self.refused: list[tuple[Delivery, Exception]] = []
        #: The number of held messages, without merged events that were not delivered yet.
        self.count = 0
        #: Chords with enough single events to merge.
        self._to_merge: dict[str, Chord] = {}
        #: Fired chords: the time, on the monotonic clock, and the name of the run.
        self._fired: dict[str, tuple[float, str]] = {}
        #: Merged events that were not delivered yet, by their mark: the chord, and the parts in the event.
        self._pending_merges: dict[str, tuple[Chord, tuple[int | str, ...]]] = {}
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
            merged = self._pending_merges.pop(event.mark, None) if event.mark else None
            chord = chords.get(event.chord)
            if merged is not None:
                merged[0].pending_merges -= 1
                if merged[0] is not chord:
                    # It has expired.
                    self.obsolete.append(delivery.delivery_tag)
                    continue
            if chord is None:
                if event.run and self._fired.get(event.chord, _NOT_FIRED)[1] == event.run:
                    # Its sender published it twice.
                    self.obsolete.append(delivery.delivery_tag)
                    continue
                chord = chords[event.chord] = Chord(event.chord, now)
            more = event.size is not None or bool(
                event.added or event.plan or event.notified or event.failed or event.terms
            )
            if more:
                self._update(chord, event, rest)
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
                new_keys = []
                for task_id, length in event.parts:
                    new_keys.append(chord.add(task_id, rest[start : start + length], event))
                    start += length
                keys = tuple(new_keys)
            else:
                # All parts are known: their keys are shared, to save memory.
                keys = merged[1]
            self._hold(chord, Held(delivery.delivery_tag, now, len(delivery.body), keys, more))
            if len(chord.parts) >= chord.needed and not chord.pending_merges:
                self.complete[chord.id] = chord
            elif self.complete:
                # One more task was added to it.
                self.complete.pop(chord.id, None)

    def _update(self, chord: Chord, event: Event, rest: bytes) -> None:
        """Add the fields of an event that are not parts."""
        if event.size is not None:
            chord.size, chord.run = event.size, event.run
            # The chord was sent again.
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
                self._to_merge[chord.id] = chord
            return
        while parts >= MERGED_EVENTS:
            level, parts = level + 1, parts // MERGE_FACTOR
        while len(chord.held) <= level:
            chord.held.append([])
        messages = chord.held[level]
        messages.append(held)
        if len(messages) >= MERGE_FACTOR and self._is_mergeable(messages, level):
            self._to_merge[chord.id] = chord

    @property
    def pending(self) -> int:
        """The number of published merged events that were not delivered yet."""
        return len(self._pending_merges)

    # -- merging held messages

    def merges(self) -> Iterator[Merge]:
        """Merge the messages of chords that have too many."""
        while self._to_merge:
            _, chord = self._to_merge.popitem()
            if chord.is_complete:
                continue
            for level, messages in enumerate(chord.held):
                if self._is_mergeable(messages, level) and (merge := self._merge(chord, messages)):
                    yield merge

    def gather(self, singles: bool = False) -> Iterator[Merge]:
        """Merge all messages of each chord.

        Args:
            singles: replace the only message of a chord too: it moves to the end of the queue.
        """
        for chord in self.chords.values():
            mergeable = [held for held in chord.messages() if held.size < self._largest]
            if len(mergeable) > 1 or (singles and mergeable):
                yield self._replace(chord, mergeable)

    def renew(self, before: float) -> Iterator[Merge]:
        """Replace messages that were delivered before a time on the monotonic clock."""
        for chord in self.chords.values():
            old = [held for held in chord.messages() if held.since < before]
            if old:
                yield self._replace(chord, old)

    def _is_mergeable(self, messages: list[Held], level: int) -> bool:
        if not level:
            return len(messages) >= MERGED_EVENTS
        return (
            len(messages) >= MERGE_FACTOR and sum(held.size < self._largest for held in messages) >= MERGE_FACTOR
        )

    def _merge(self, chord: Chord, messages: list[Held]) -> Merge | None:
        mergeable = [held for held in messages if held.size < self._largest]
        return self._replace(chord, mergeable) if len(mergeable) > 1 else None

    def snapshot(self, chord: Chord) -> list[bytes]:
        """The state of a chord as new events, for when its messages are gone."""
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
        keys = list(dict.fromkeys(chain.from_iterable(held.parts for held in messages)))
        # The end of each event among the keys.
        ends: list[int] = []
        size = len(chord.plan) if more else 0
        for end, part in enumerate(map(chord.parts.__getitem__, keys), 1):
            size += len(part)
            if size >= self._largest:
                ends.append(end)
                size = 0
        if not ends or ends[-1] < len(keys):
            ends.append(len(keys))
        start = 0
        for end in ends:
            mark = next(self._marks)
            of_event = keys[start:end]
            self._pending_merges[mark] = chord, tuple(of_event)
            chord.pending_merges += 1
            bodies.append(self._batch(chord, of_event, more and not start, mark))
            start = end
        return Merge(chord, bodies, [held.tag for held in messages])

    @staticmethod
    def _batch(chord: Chord, keys: list[int | str], more: bool, mark: str) -> bytes:
        packed = [chord.parts[key] for key in keys]
        event = Event(
            chord.id, chord.since, chord.at, parts=list(zip(map(id_of, keys), map(len, packed))),
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
        self._to_merge.pop(chord.id, None)
        self._fired.pop(chord.id, None)
        if over:
            self._fired[chord.id] = now, chord.run
        if len(self._fired) > MAX_FIRED:
            del self._fired[next(iter(self._fired))]

    def fewest_missing(self) -> float:
        """The least number of parts that an open chord lacks; 0 if there are many open chords.

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

    def close_at_deadline(self, wall: float) -> None:
        """Close chords whose deadline has passed; ``wall`` is the time, in seconds since the epoch."""
        for chord in self.chords.values():
            terms = chord.terms
            if terms is not None and terms.deadline is not None and terms.deadline <= wall and not chord.closed:
                chord.closed = True
                chord.update_needed()
                if chord.is_complete and not chord.pending_merges:
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
            or (chord.size is None and self._is_late(chord) and chord.first_seen < now - LATE_PARTS_KEPT)
        ]  # fmt: skip
