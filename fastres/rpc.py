"""``RPCBackend``: results in the reply queue of the client, as with Celery's ``rpc``."""

from __future__ import annotations

from typing import Any

from fastres.backend import AMQPBackend
from fastres.layout import Mailbox

__all__ = ("RPCBackend",)

E_NO_RPC_CHORDS = """\
fastres-rpc:// has no chords: the results of a chord's header go to the client that sent it, and the worker that \
joins them cannot read them there. Use fastres://, where any process reads a group's results.\
"""


class RPCBackend(AMQPBackend):
    """A result backend that keeps results in the reply queue of the client that sent the task.

    No other process can read them. Compatible with Celery's ``rpc`` backend: either reads the results of the other's
    workers.
    """

    persistent = False
    supports_failure_expires = False

    layout: Mailbox
    _scheme = "fastres-rpc"
    _layout_class = Mailbox

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout.on_final = self._on_final

    def _on_final(self, task_id: str, meta: Any) -> None:
        self._pending.fulfil(task_id, self._waits.to_python(meta))

    @property
    def oid(self) -> str:
        """The name of this thread's reply queue."""
        return str(self.app.thread_oid)

    @property
    def binding(self) -> Any:
        """This thread's reply queue."""
        return self.addresses.queue(self.layout.address)

    def ensure_chords_allowed(self) -> None:
        raise NotImplementedError(E_NO_RPC_CHORDS)

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        # The task may have run before: its cached result becomes stale.
        self._cache.pop(task_id, None)
        return super().on_task_call(producer, task_id)
