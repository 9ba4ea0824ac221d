"""Aggregation: the task ids that a join waits for, the result objects of the tasks that have ended, and the results
of a chord's header in order."""

from vine import barrier

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy

__all__ = ("Aggregate", "fulfil", "in_order", "listed")

#: Of a number that may be a place.
cdef enum:
    DIGITS = 18


cdef class Aggregate:
    """See :class:`fastres._protocols.Aggregate`."""

    # Threads may share one: whatever reads or changes it holds its critical section, which a GIL makes free.
    # One table answers "awaited?" and "came before?": a million ids are held once.
    cdef dict _came
    cdef Py_ssize_t _left
    cdef frozenset _ready_states

    def __init__(self, task_ids, ready_states):
        self._came = dict.fromkeys(task_ids, False)
        self._left = len(self._came)
        self._ready_states = frozenset(ready_states)

    @cython.critical_section
    def __len__(self):
        return self._left

    @cython.critical_section
    def __contains__(self, task_id):
        return self._came.get(task_id) is False

    @cython.critical_section
    def missing(self):
        return [task_id for task_id, came in self._came.items() if not came]

    @cython.critical_section
    def feed(self, arrivals):
        cdef dict came = self._came
        cdef list ready = []
        cdef list states = []
        cdef list repeated = []
        cdef list foreign = []
        for arrival in arrivals:
            _, task_id, meta = arrival
            before = came.get(task_id)
            if before is None:
                foreign.append(arrival)
            elif before is True:
                repeated.append(arrival)
            elif meta["status"] in self._ready_states:
                came[task_id] = True
                self._left -= 1
                ready.append(arrival)
            else:
                states.append(arrival)
        return ready, states, repeated, foreign


def fulfil(result, dict meta not None):
    """See :class:`fastres._protocols.Fulfil`."""
    if result._cache is not None:
        return
    if meta.get("children"):
        result._set_cache(meta)
    else:
        result._cache = meta
    ready = result.on_ready
    listener = ready._svpending
    # Most members of a group have one listener, the barrier of the group: it is called directly. The promise
    # between them is kept for later calls of ``then``.
    if isinstance(listener, barrier) and not ready._lvpending:
        ready._svpending = None
        listener()
    else:
        ready(result)


def in_order(parts):
    """See :class:`fastres._protocols.InOrder`."""
    cdef list given = list(parts)
    cdef Py_ssize_t count = len(given)
    cdef list ordered = [None] * count
    cdef const char* text
    cdef Py_ssize_t at, place, length
    cdef bytes part
    for part in given:
        text = part
        length = len(part)
        place = at = 0
        while at < length and at < DIGITS and c"0" <= text[at] <= c"9":
            place = place * 10 + (text[at] - c"0")
            if place >= count:
                return None
            at += 1
        # Not a number: there is none, or the part has more fields than a plain result.
        if at == 0 or at == length or text[at] != c"\n" or ordered[place] is not None:
            return None
        ordered[place] = part
    return ordered


def listed(parts):
    """See :class:`fastres._protocols.Listed`."""
    cdef list given = list(parts)
    cdef Py_ssize_t size = 0
    cdef Py_ssize_t length
    cdef const char* result
    cdef bytes part
    for part in given:
        size += result_of(part, &result) + 1
    if size == 0:
        return b""
    # A comma behind each but the last.
    cdef bytes joined = PyBytes_FromStringAndSize(NULL, size - 1)
    cdef char* out = PyBytes_AS_STRING(joined)
    cdef const char* end = out + size - 1
    for part in given:
        length = result_of(part, &result)
        memcpy(out, result, length)
        out += length
        if out < end:
            out[0] = c","
            out += 1
    return joined


cdef Py_ssize_t result_of(bytes part, const char** result):
    """The position and the length of a part's result, which follows its first line."""
    cdef const char* text = part
    cdef const char* newline = <const char*>memchr(text, c"\n", PyBytes_GET_SIZE(part))
    if newline == NULL:
        result[0] = text
        return 0
    result[0] = newline + 1
    return PyBytes_GET_SIZE(part) - (newline + 1 - text)
