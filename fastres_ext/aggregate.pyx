# cython: freethreading_compatible=True
"""The task ids that a join waits for, and which of them have come; and the result objects that are told."""

from vine import barrier

cimport cython

__all__ = ("Aggregate", "fulfil")


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
    # Most members of a group have one listener, the barrier of the group: it is told without the promise between
    # them, which is kept for whoever comes later with ``then``.
    if isinstance(listener, barrier) and not ready._lvpending:
        ready._svpending = None
        listener()
    else:
        ready(result)
