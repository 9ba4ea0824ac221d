"""Runs a process that sends tasks in bulk, with a queue that no worker reads."""

from __future__ import annotations

import struct
import tempfile
from typing import Any

from celery import group
from peers import LIMIT
from runs import Process, Run, Unavailable, environment
from sends import SEND_PEERS, pairs


class SendRun(Run):
    """One process that sends."""

    def prepare(self) -> Process:
        self.peer = SEND_PEERS[self.case.peer](self.job)
        self.queues.update(self.peer.queues())
        self._sample = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by close()
        if self.case.peer == LIMIT:
            if self.bench.limit is None:
                raise Unavailable("bench/limit.c is not built: gcc or librabbitmq-dev is missing")
            self._write_sample()
            port, count = str(self.bench.node.port), str(self.case.count)
            command = [str(self.bench.limit), port, self.peer.tasks, count, "publish", self._sample.name]
        else:
            command = self.command()
        return Process(command, environment(self.case.peer))

    def _write_sample(self) -> None:
        """A task as the other peers send it: its encoded properties and its body."""
        channel = self.peer.channel
        # The message of apply_many, sent over a connection that is closed afterwards.
        group(self.peer.pair.s(*pair) for pair in pairs(1)).apply_async(connection=channel.connection.client)
        self.peer.await_tasks(1)
        message: Any = channel.basic_get(self.peer.tasks, no_ack=True)
        properties = message._serialize_properties()
        body = message.body.encode() if isinstance(message.body, str) else message.body
        self._sample.write(struct.pack(">I", len(properties)) + properties + body)
        self._sample.flush()

    def close(self) -> None:
        self._sample.close()
        if self.peer._connection is not None:
            self.peer._connection.close()
        super().close()
