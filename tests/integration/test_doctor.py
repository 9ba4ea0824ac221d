"""``celery -A proj fastres ...``: what the commands say of a broker, and their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import port_for
import pytest
from rabbitmq_node import Node

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
        [sys.executable, "-m", "celery", "-A", "patient", "--no-color", "fastres", command],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_backend_that_works(node: Node, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, node.url)
    assert code == 0, said
    assert f"implementation   {fastres.__impl__}" in said
    for line in (
        "ok backend          AMQPBackend at fastres://",
        "ok broker           RabbitMQ",
        "ok declare",
        "ok publish          confirmed",
        "ok consume          read back",
        "The result backend works.",
    ):
        assert line in said
    assert not [name for name in node.queues() if ".probe." in name]


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


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
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


def test_results_that_never_expire_are_warned_of(node: Node, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, node.url, conf="{'result_expires': None}")
    assert code == 0
    assert "warn result_expires" in said


@pytest.mark.parametrize("command", ["status", "joiner"])
@pytest.mark.parametrize(
    ("broker", "text"),
    [
        ("amqp://guest:secret@127.0.0.1:1//", "Connection refused"),
        ("amqp://guest:secret@127.0.0.1:{port}//", "ACCESS_REFUSED"),
        ("amqp://guest:guest@127.0.0.1:{port}/nowhere", "vhost nowhere not found"),
    ],
)
def test_what_is_wrong_is_one_line(node: Node, tmp_path: Path, command: str, broker: str, text: str) -> None:
    code, said = doctor(tmp_path, broker.format(port=node.port), command=command)
    assert code == 1
    *_, last = said.splitlines()
    assert last.startswith("Error: ")
    assert text in last
    assert "guest:**@127.0.0.1" in last
    assert "Traceback" not in said
    assert "secret" not in said
