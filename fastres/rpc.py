"""``RPCBackend``: results in the reply queue of the client that sent the task, as Celery's ``rpc`` has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery._state import get_current_task, task_join_will_block

from fastres.backend import AMQPBackend

if TYPE_CHECKING:
    from fastres._protocols import Meta
    from fastres.addresses import Address
    from fastres.read.join import Join

__all__ = ("RPCBackend",)

E_NO_RPC_CHORDS = """\
fastres-rpc:// has no chords: the results of a chord's header go to the client that sent it, and the worker that \
joins them cannot read them there. Use fastres://, where any process reads a group's results.\
"""


class RPCBackend(AMQPBackend):
    """Results in the reply queue of the client that sent the task: nobody else can read them.

    Compatible with Celery's ``rpc`` backend: the one reads what the workers of the other write.
    """

    persistent = False

    _scheme = "fastres-rpc"
    _declares = False
    _joins = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader.mailbox.on_final = self._on_final

    def _on_final(self, task_id: str, meta: Meta) -> None:
        self._pending.fulfil(task_id, self._to_python(meta))

    def _after_fork(self) -> None:
        super()._after_fork()
        self._reader.mailbox.on_final = self._on_final

    @property
    def oid(self) -> str:
        """The name of this thread's reply queue."""
        return str(self.app.thread_oid)

    @property
    def binding(self) -> Any:
        """This thread's reply queue."""
        return self.addresses.queue(self.addresses.mailbox(self.oid))

    def ensure_chords_allowed(self) -> None:
        raise NotImplementedError(E_NO_RPC_CHORDS)

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        # It may have run before: what is known of that is about to change.
        self._cache.pop(task_id, None)
        # A task that sends tasks does not wait for them.
        if not task_join_will_block():
            self._reader.mailbox.expect(task_id)
            self._reader.mailbox.add(self.addresses.mailbox(self.oid))
        return {}

    def destination_for(self, task_id: str, request: Any) -> tuple[str, str]:
        """Reply queue and correlation id of a task's result.

        Raises:
            RuntimeError: it is not known who sent the task.
        """
        request = request or getattr(get_current_task(), "request", None)
        if request is None:
            raise RuntimeError(
                f"fastres-rpc: the request of task {task_id} says where its result goes; it is missing"
            )
        return request.reply_to, request.correlation_id or task_id

    def on_reply_declare(self, task_id: str) -> list[Any]:
        """Nothing: the client has declared its reply queue."""
        return []

    def _outbox(self, task_id: str, state: str, request: Any) -> Address | None:
        reply_to, _ = self.destination_for(task_id, request)
        return self.addresses.mailbox(reply_to) if reply_to else None

    def _takes(self, no_ack: bool, alone: bool = False) -> bool:
        # Nobody else reads a client's mailbox.
        return no_ack

    def _open_inboxes(self, join: Join, take: bool, with_states: bool) -> None:
        self._reader.mailbox.add(self.addresses.mailbox(self.oid), join.deadline)
        self._reader.mail(join)

    def _look(self, task_id: str, backlog_limit: int) -> Meta | None:
        mailbox = self._reader.mailbox
        mailbox.add(self.addresses.mailbox(self.oid))
        # One question to the broker: when it has answered, what came before has been read too.
        self._link.call(lambda session: session.inspect(self.oid))
        self._link.read(0, lambda: False, None)
        return mailbox.peek(task_id)

    def group_progress(self, group_id: str) -> int:
        """How many results of a group have come to this client."""
        self._look("", 0)
        return self._reader.mailbox.in_group(group_id)

    def _forget(self, task_id: str) -> None:
        self._reader.mailbox.drop(task_id)

    def remove_pending_result(self, result: Any) -> Any:
        self._reader.mailbox.forget(result.id)
        return super().remove_pending_result(result)
