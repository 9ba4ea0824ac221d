"""``celery -A proj fastres ...``: the reports of the commands, and their exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import port_for
import pytest
from backend_kit import ENOUGH, MakeApp, held_by, until
from celery import chord, group
from proj import add, tsum
from rabbitmq_node import HOST, Node
from workers import Worker, client

import fastres


def doctor(
    folder: Path, broker: str, backend: str = "fastres://", conf: str = "{}", command: str = "doctor"
) -> tuple[int, str]:
    (folder / "patient.py").write_text(
        "from celery import Celery\n"
        f"app = Celery(broker={broker!r}, backend={backend!r})\n"
        f"app.conf.update({conf})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "patient", "--no-color", "fastres", *command.split()],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def vhost(node: Node) -> Iterator[str]:
    """The URL of a virtual host without queues."""
    name = f"vhost-{uuid4()}"
    node.ctl("add_vhost", name)
    node.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    yield f"{node.url.rstrip('/')}/{name}"
    node.ctl("delete_vhost", name)


def test_a_backend_that_works(vhost: str, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, vhost)
    assert code == 0, said
    assert f"implementation   {fastres.__impl__}" in said
    for line in (
        "ok backend          AMQPBackend at fastres://",
        "ok broker           RabbitMQ",
        "ok store",
        "ok look",
        "ok join             2 results",
        "ok policies         20 results are there after 2 s",
        "ok chords           0 workers or joiners at fastres.chords.0",
        "The result backend works.",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("backend", "conf"),
    [("fastres://", "{'result_backend_transport_options': {'confirm': False}}"), ("fastres-rpc://", "{}")],
)
def test_other_backends_that_work(vhost: str, tmp_path: Path, backend: str, conf: str) -> None:
    code, said = doctor(tmp_path, vhost, backend, conf)
    assert code == 0, said
    assert "ok join" in said


@pytest.mark.parametrize(
    "conf",
    [{}, {"result_exchange": "results"}, {"result_backend_transport_options": {"namespace": "shop"}}],
    ids=str,
)
def test_the_printed_permissions_are_enough(
    vhost: str, node: Node, tmp_path: Path, make_app: MakeApp, conf: dict[str, Any]
) -> None:
    """They are enough for a worker with remote control and events, and for a client."""
    conf = {**conf, "task_default_queue": "jobs"}
    code, said = doctor(tmp_path, vhost, conf=str(conf))
    assert code == 0, said
    urls = {}
    for who in ("client", "worker"):
        node.ctl("add_user", f"{who}-{vhost[-8:]}", "secret")
        (line,) = [line for line in said.splitlines() if f"{who} needs" in line]
        _, _, arguments = line.partition("rabbitmqctl ")
        node.ctl(*shlex.split(arguments.replace("USER", f"{who}-{vhost[-8:]}")))
        urls[who] = vhost.replace("guest:guest", f"{who}-{vhost[-8:]}:secret")
    with Worker(urls["worker"], **conf), client(urls["worker"], **conf) as app:
        # The client sends tasks with the worker's permissions; fastres itself needs none for that.
        reading = make_app(urls["client"], **conf)
        lone, held = add.delay(1, 2), group(add.s(number, 1) for number in range(3))()
        joined = chord([add.s(1, 1), add.s(2, 2)])(tsum.s())
        assert reading.AsyncResult(lone.id).get(timeout=ENOUGH) == 3
        assert reading.AsyncResult(lone.id).state == "SUCCESS"
        assert held_by(reading, held).get(timeout=ENOUGH) == [1, 2, 3]
        assert reading.AsyncResult(joined.id).get(timeout=ENOUGH) == 6
        assert app.control.inspect(timeout=2).ping()


@pytest.mark.parametrize(
    ("backend", "conf", "text"),
    [
        ("rpc://", "{}", "is 'rpc://', not one of fastres"),
        ("fastres://", "{'result_backend_transport_options': {'confrim': 1}}", "Did you mean 'confirm'?"),
    ],
)
def test_a_backend_that_is_not_configured(node: Node, tmp_path: Path, backend: str, conf: str, text: str) -> None:
    code, said = doctor(tmp_path, node.url, backend, conf)
    assert code == 1
    assert "FAIL backend" in said
    assert text in said


def test_an_unreachable_broker(tmp_path: Path) -> None:
    code, said = doctor(tmp_path, f"amqp://127.0.0.1:{port_for.select_random()}//")
    assert code == 1
    assert "FAIL broker" in said
    assert "Connection refused" in said
    assert "is a broker running at" in said


def test_a_user_who_may_not_log_in(node: Node, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, f"amqp://guest:wrong@127.0.0.1:{node.port}//")
    assert code == 1
    assert "ACCESS_REFUSED" in said
    assert "wrong" not in said.replace("what is wrong", "")


def test_a_warning_about_results_that_never_expire(node: Node, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, node.url, conf="{'result_expires': None}")
    assert code == 0
    assert "warn result_expires" in said


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ({"max-length": 5}, "of 20 results 5 are left"),
        ({"message-ttl": 500}, "of 20 results 0 are left"),
        ({"max-length": 5, "overflow": "reject-publish"}, "has refused a message"),
    ],
)
def test_policies_that_eat_results(node: Node, vhost: str, tmp_path: Path, policy: Any, text: str) -> None:
    node.ctl("set_policy", "-p", vhost.rpartition("/")[2], "all", ".*", json.dumps(policy))
    code, said = doctor(tmp_path, vhost)
    assert code == 1
    assert "FAIL policies" in said
    assert text in said
    assert "docs/brokers.md" in said


@pytest.fixture(scope="module")
def managed() -> Iterator[Node]:
    with Node(management=True) as node:
        until(lambda: _answers(node), 30)
        yield node


def _answers(node: Node) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, node.management_port), timeout=1):
        return True
    return False


@pytest.mark.parametrize("kind", ["policy", "operator_policy"])
def test_policies_that_only_the_management_api_shows(managed: Node, tmp_path: Path, kind: str) -> None:
    """Policies that take effect after more than some seconds are not seen otherwise."""
    command = f"doctor --management http://guest:guest@{HOST}:{managed.management_port}"
    managed.ctl(f"set_{kind}", "theirs", "^tasks", json.dumps({"max-length": 5}))
    code, said = doctor(tmp_path, managed.url, command=command)
    assert code == 0, said
    assert "ok management API   no policy drops or refuses results" in said
    managed.ctl(f"set_{kind}", "--apply-to", "queues", "lower", ".*", json.dumps({"max-length": 1}))
    managed.ctl(f"set_{kind}", "--priority", "2", "all", "^fastres", json.dumps({"message-ttl": 600_000}))
    code, said = doctor(tmp_path, managed.url, command=command)
    assert code == 0, said
    assert (
        f"warn policy           the {kind.replace('_', ' ')} 'all' (message-ttl: 600000) acts on fastres." in said
    )
    assert "'lower'" not in said
    for name in ("theirs", "lower", "all"):
        managed.ctl(f"clear_{kind}", name)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"http://guest:wrong@{HOST}:PORT", "401"),
        (f"http://{HOST}:1", "refused"),
        ("somewhere", "'somewhere' is not the URL of a management API"),
    ],
)
def test_a_management_api_that_does_not_answer(managed: Node, tmp_path: Path, url: str, text: str) -> None:
    url = url.replace("PORT", str(managed.management_port))
    code, said = doctor(tmp_path, managed.url, command=f"doctor --management {url}")
    assert code == 1
    assert "FAIL management API" in said
    assert text in said
    assert "Traceback" not in said


def test_as_json(vhost: str, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, vhost, command="doctor --json")
    told = json.loads(said)
    assert (code, told["works"]) == (0, True)
    assert {check["check"] for check in told["checks"] if check["outcome"] == "ok"} >= {
        "broker",
        "store",
        "chords",
    }
    code, said = doctor(tmp_path, "amqp://guest@127.0.0.1:1//", command="doctor --json")
    (failed,) = [check for check in json.loads(said)["checks"] if check["outcome"] == "fail"]
    assert (code, failed["check"]) == (1, "broker")
    assert "is a broker running" in failed["advice"]
    code, said = doctor(tmp_path, vhost, command="status --json")
    (shard,) = json.loads(said)
    assert (code, shard["queue"], shard["joiners"], shard["open"]) == (1, "fastres.chords.0", 0, None)


@pytest.mark.parametrize("command", ["doctor", "joiner", "status", "watch ID", "exporter"])
def test_every_command_has_an_example_and_names_a_misspelt_option(tmp_path: Path, command: str) -> None:
    code, said = doctor(tmp_path, "amqp://", command=f"{command} --help")
    assert code == 0
    assert f"Example: celery -A proj fastres {command.split()[0]}" in said
    assert "exit code" in " ".join(said.split())
    conf = "{'result_backend_transport_options': {'takes': 'joins'}}"
    code, said = doctor(tmp_path, "amqp://", conf=conf, command=command)
    assert code == 1
    assert "fastres has no option 'takes'. Did you mean 'take'?" in said
    assert "Traceback" not in said
    assert "set result_backend =" not in said


@pytest.mark.parametrize("command", ["status", "joiner"])
@pytest.mark.parametrize(
    ("broker", "text"),
    [
        ("amqp://guest:secret@127.0.0.1:1//", "Connection refused"),
        ("amqp://guest:secret@127.0.0.1:{port}//", "ACCESS_REFUSED"),
        ("amqp://guest:guest@127.0.0.1:{port}/nowhere", "vhost nowhere not found"),
    ],
)
def test_errors_are_one_line(node: Node, tmp_path: Path, command: str, broker: str, text: str) -> None:
    code, said = doctor(tmp_path, broker.format(port=node.port), command=command)
    assert code == 1
    *_, last = said.splitlines()
    assert last.startswith("Error: ")
    assert text in last
    assert "guest:**@127.0.0.1" in last
    assert "Traceback" not in said
    assert "secret" not in said
