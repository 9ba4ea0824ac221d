"""The private broker of the demo, the tests and the benchmarks (ci/rabbitmq_node.py)."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import amqp
import pytest
import rabbitmq_node
from backend_kit import until
from rabbitmq_node import Node, Redis, StartError


def test_it_starts_empty_and_knows_its_queues(own_node: Node) -> None:
    assert own_node.queues() == {}
    _publish(own_node, "a queue", 3)
    _publish(own_node, "another", 1)
    until(lambda: own_node.queues() == {"a queue": 3, "another": 1})


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_a_persistent_message_survives_a_kill_of_the_node(own_node: Node, end: str) -> None:
    _publish(own_node, end, 1)
    url = own_node.url
    if end == "restart":
        own_node.restart()
    else:
        time.sleep(2.5)  # until the declaration is on disk: see Node
        own_node.kill()
        with pytest.raises(OSError, match=r"refused|reset"):
            _connect(own_node.port)
        own_node.start()
    assert own_node.url == url
    with _connect(own_node.port) as connection:
        assert connection.channel().basic_get(end, no_ack=True).body == f"{end} 0"


def test_it_starts_again_after_a_crash() -> None:
    with Redis() as redis:
        assert redis.start().process is redis.process, "it is running"
        assert redis.process
        os.kill(redis.process.pid, signal.SIGKILL)
        redis.process.wait()
        redis.start()
        assert redis.running()


def test_nothing_is_left_when_it_stops() -> None:
    with Node() as node:
        folder = node.folder
        assert folder
        assert len(_processes(folder)) >= 2, "the node and its port mapper"
    _wait_until_gone(folder)
    assert node.log_tail() == ""


@pytest.mark.parametrize(
    ("kind", "sig"), [("Node", signal.SIGKILL), ("Redis", signal.SIGKILL), ("Redis", signal.SIGTERM)]
)
def test_nothing_is_left_when_its_python_process_is_killed(kind: str, sig: signal.Signals) -> None:
    code = (
        "import rabbitmq_node, time\n"
        f"started = rabbitmq_node.{kind}().start()\n"
        "print(started.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    ci = Path(rabbitmq_node.__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=ci, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        before = _processes(folder)
        process.send_signal(sig)
    assert before
    _wait_until_gone(folder)


def test_a_bad_line_of_configuration_is_named() -> None:
    node = Node({"consumer_timeout": "never"})
    with pytest.raises(StartError, match='"never" cannot be converted'):
        node.start()
    assert node.folder is None
    assert not node.running()


def test_configuration_reaches_the_node() -> None:
    with Node({"channel_max": "7"}) as node, _connect(node.port) as connection:
        assert connection.channel_max == 7


def test_tls() -> None:
    with Node(tls=True) as node:
        for host in "localhost", "127.0.0.1":
            options = {"ca_certs": node.ca_file, "cert_reqs": ssl.CERT_REQUIRED, "server_hostname": host}
            with _connect(node.tls_port, ssl=options) as connection:
                assert connection.connected
        with pytest.raises(ssl.SSLCertVerificationError):
            _connect(node.tls_port, ssl={"cert_reqs": ssl.CERT_REQUIRED})


def test_a_forked_child_does_not_end_it() -> None:
    code = (
        "import os, rabbitmq_node\n"
        "with rabbitmq_node.Redis() as redis:\n"
        "    child = os.fork()\n"
        "    if child == 0: raise SystemExit(0)  # through the context manager\n"
        "    os.waitpid(child, 0); print(redis.running() and redis.folder.exists())\n"
    )
    ci = Path(rabbitmq_node.__file__).parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ci, text=True) == "True\n"


def test_redis() -> None:
    redis = pytest.importorskip("redis")
    with Redis() as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()


def _connect(port: int, **options: object) -> amqp.Connection:
    connection = amqp.Connection(f"127.0.0.1:{port}", **options)
    connection.connect()
    return connection


def _publish(node: Node, queue: str, count: int) -> None:
    """Declare a durable queue and publish persistent messages to it, confirmed."""
    with _connect(node.port, confirm_publish=True) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True, auto_delete=False)
        for i in range(count):
            channel.basic_publish(amqp.Message(f"{queue} {i}", delivery_mode=2), routing_key=queue)


def _processes(folder: Path) -> list[int]:
    """The pids of the processes with this working folder, even if it was deleted."""
    return [int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/cwd") if _link(path).startswith(str(folder))]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # ended since it was listed, or of another user
        return ""


def _wait_until_gone(folder: Path) -> None:
    until(lambda: not folder.exists() and not _processes(folder), 10, so=f"{folder} is gone, with its processes")
