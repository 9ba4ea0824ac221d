"""Stores results before a join, without the measured code."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Any

import kombu
import redis
from amqp.basic_message import Message
from amqp.serialization import dumps
from kombu.utils.json import dumps as to_json
from wire import frame, method
from workloads import ANY_ID, Body, part_of, task_ids

from fastres.chords.events import CONTENT_TYPE, PERSISTENT, REFERENCE, Event, Part, pack_part, write_event

#: Bytes to write at once; commands of Redis to send at once.
CHUNK = 1 << 18
PIPELINED = 1_000
#: Bytes of a message's body in one frame, and the frame-end octet.
PART = 131_064
FRAME_END = b"\xce"
#: The usual context in a part.
WORKER = {"hostname": "celery@worker-1.example.com"}
#: Seconds in which the broker handles all published messages.
TIMEOUT = 300
#: Celery's default for result_expires, in seconds.
DAY = 86_400


class Broker:
    """Publishes results to the broker, as workers do."""

    def __init__(self, url: str) -> None:
        # py-amqp gives up on a socket that accepts nothing for a second, which happens while the broker catches up.
        options = {"socket_settings": {socket.TCP_USER_TIMEOUT: TIMEOUT * 1000}}
        self._connection = kombu.Connection(url, transport_options=options)

    def close(self) -> None:
        self._connection.release()

    @property
    def channel(self) -> Any:
        return self._connection.default_channel

    def version(self) -> str:
        self._connection.ensure_connection()
        return str(self._connection.connection.server_properties["version"])

    def fill(self, queue: kombu.Queue, task_ids: Iterable[str], body: Body) -> None:
        """Declare a queue and its bindings, and send it these results."""
        queue(self.channel).declare()
        expected = self.messages(queue.name)
        template = publication(self.channel.channel_id, queue.name, body)
        transport = self._connection.connection.transport
        waiting: list[bytes] = []
        size = 0
        for task_id in task_ids:
            message = template.replace(ANY_ID.encode(), task_id.encode())
            waiting.append(message)
            expected += 1
            size += len(message)
            if size > CHUNK:
                transport.write(b"".join(waiting))
                waiting, size = [], 0
        transport.write(b"".join(waiting))
        self.wait_for(queue.name, expected)

    def fill_log(self, queue: kombu.Queue, group_id: str, count: int, by_reference: bool = False) -> None:
        """Publish the parts of a chord to the log, as workers do. A joiner may be consuming."""

        def events() -> Iterator[tuple[str, bytes]]:
            for index, task_id in enumerate(task_ids(group_id, count)):
                packed = REFERENCE if by_reference else packed_part(index)
                event = Event(group_id, at=time.time(), part=task_id, context=WORKER)
                yield task_id, write_event(event, parts=(packed,))

        self._send_events(queue, events())

    def fill_chords(self, queue: kombu.Queue, group_id: str, count: int, size: int) -> None:
        """Publish all parts of many chords to the log: the first of each chord, the second of each, and so on."""

        def events() -> Iterator[tuple[str, bytes]]:
            chord_ids = task_ids(group_id, count)
            for index, task_id in enumerate(task_ids(group_id, size)):
                packed = packed_part(index)
                for chord_id in chord_ids:
                    yield (
                        task_id,
                        write_event(
                            Event(chord_id, at=time.time(), part=task_id, context=WORKER), parts=(packed,)
                        ),
                    )

        self._send_events(queue, events())

    def _send_events(self, queue: kombu.Queue, events: Iterable[tuple[str, bytes]]) -> None:
        self._send(queue, CONTENT_TYPE, "binary", events, PERSISTENT)
        # The broker answers after it has read all of them.
        self.messages(queue.name)

    def fill_header(self, queue: kombu.Queue, group_id: str, count: int, body: Body) -> None:
        """Send the results of a header, each with its place, to their queue."""
        results = (
            (task_id, b'{"group_index": %d, ' % index + body.of(task_id)[1:])
            for index, task_id in enumerate(task_ids(group_id, count))
        )
        self._send(queue, body.content_type, body.content_encoding, results)
        self.wait_for(queue.name, count)

    def _send(
        self, queue: kombu.Queue, content_type: str, encoding: str, bodies: Iterable[tuple[str, bytes]],
        delivery_mode: int = 1,
    ) -> None:  # fmt: skip
        """Declare a queue, and send it messages with the ids of their tasks, each body in one frame."""
        queue(self.channel).declare()
        transport = self._connection.connection.transport
        #: The content header, by the length of the body.
        heads: dict[int, bytes] = {}
        waiting = bytearray()
        for task_id, data in bodies:
            length = len(data)
            if length not in heads:
                body = Body(content_type, encoding, data)
                whole = publication(self.channel.channel_id, queue.name, body, delivery_mode)
                heads[length] = whole[: -length - 1]
            waiting += heads[length].replace(ANY_ID.encode(), task_id.encode()) + data + FRAME_END
            if len(waiting) > CHUNK:
                transport.write(bytes(waiting))
                waiting.clear()
        transport.write(bytes(waiting))

    def wait_for(self, name: str, count: int) -> None:
        """Wait until a queue has so many messages: it replies before it has handled earlier messages."""
        end = time.monotonic() + TIMEOUT
        while (there := self.messages(name)) != count:
            assert time.monotonic() < end, f"{name} holds {there} messages instead of {count}"
            time.sleep(0.02)

    def messages(self, name: str) -> int:
        return int(self.channel.queue_declare(name, passive=True).message_count)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.channel.queue_delete(name)


def packed_part(index: int) -> bytes:
    """The part of a task that has succeeded."""
    return pack_part(Part(index, "SUCCESS", "application/json", "utf-8", to_json(part_of(index)).encode()))


def publication(channel_id: int, queue: str, body: Body, delivery_mode: int = 1) -> bytes:
    """The frames of a message to a queue by its name, with the properties that Celery's worker sets."""
    properties = Message(
        b"", content_type=body.content_type, content_encoding=body.content_encoding, application_headers={},
        delivery_mode=delivery_mode, priority=0, correlation_id=ANY_ID,
    )._serialize_properties()  # fmt: skip
    parts = (body.data[start : start + PART] for start in range(0, len(body.data), PART))
    return b"".join(
        [
            method(channel_id, 60, 40, dumps("Bssbb", (0, "", queue, False, False))),
            frame(2, channel_id, struct.pack(">HHQ", 60, 0, len(body.data)) + properties),
            *(frame(3, channel_id, part) for part in parts),
        ]
    )


def fill_redis(url: str, task_ids: Iterable[str], body: Body) -> None:
    """Set the keys that Celery's redis backend reads."""
    with redis.Redis.from_url(url) as client:
        pipeline = client.pipeline(transaction=False)
        for task_id in task_ids:
            pipeline.set(f"celery-task-meta-{task_id}", body.of(task_id), ex=DAY)
            if len(pipeline) >= PIPELINED:
                pipeline.execute()
        pipeline.execute()


def fill_redis_chord(backend: Any, group_id: str, count: int) -> None:
    """Record parts of a chord as the script of Celery's redis backend does."""
    ordered, seen = (backend.get_key_for_group(group_id, suffix) for suffix in (".j", ".d"))
    ids = task_ids(group_id, count)
    for start in range(0, count, PIPELINED):
        some = list(enumerate(ids[start : start + PIPELINED], start))
        parts = {backend.encode([1, task_id, "SUCCESS", part_of(index)]): index for index, task_id in some}
        backend.client.zadd(ordered, parts)
        backend.client.sadd(seen, *(f"{task_id}:{index}" for index, task_id in some))


def empty_redis(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


def redis_version(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        return str(client.info("server")["redis_version"])
