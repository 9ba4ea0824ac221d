"""A rolling upgrade: workers of fastres 0.1.0 and of this version share a queue, and their joiners the log."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from backend_kit import QUORUM, until
from celery import chord, uuid
from proj import add, noted
from rabbitmq_node import Node
from workers import Worker, client

ROOT = Path(__file__).parents[2]
#: The commit of 0.1.0.
RELEASE = "0989c78"
CHORDS, SIZE = 40, 5

pytestmark = pytest.mark.skipif(QUORUM, reason="0.1.0 has no quorum queues")


@pytest.fixture(scope="module")
def old_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python modules of 0.1.0."""
    command = ["git", "-C", str(ROOT), "archive", RELEASE, "fastres"]
    try:
        archive = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the sources of 0.1.0 are not here: no clone, or no git")
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as sources:
        sources.extractall(folder, filter="data")
    return folder


class OldWorker(Worker):
    """A worker of 0.1.0."""

    def __init__(self, sources: Path, broker: str, **conf: str) -> None:
        super().__init__(broker, **conf)
        self._envvars["PYTHONPATH"] = os.pathsep.join([str(sources), self._envvars["PYTHONPATH"]])
        self._envvars["FASTRES_IMPL"] = "python"


@pytest.mark.parametrize("first", ["old", "new"])
def test_workers_of_both_join_chords(node: Node, old_sources: Path, tmp_path: Path, first: str) -> None:
    """Each body runs once, whichever version joins it, also after the old worker is stopped."""
    conf = {"task_default_queue": f"fleet-{uuid()}", "result_backend_transport_options": {"namespace": uuid()}}
    old, new = OldWorker(old_sources, node.url, **conf), Worker(node.url, **conf)
    workers = [old, new] if first == "old" else [new, old]
    notes = tmp_path / "notes"

    def bodies() -> list[str]:
        return sorted(notes.read_text().split()) if notes.exists() else []

    with client(node.url, **conf):
        for worker in workers:
            worker.start()
        try:
            for number in range(CHORDS):
                chord([add.si(number, part) for part in range(SIZE)])(noted.s(str(notes), str(number)))
            until(lambda: len(bodies()) == CHORDS)
            old.stop()
            for number in range(CHORDS, CHORDS + 10):
                chord([add.si(number, part) for part in range(SIZE)])(noted.s(str(notes), str(number)))
            until(lambda: len(bodies()) == CHORDS + 10)
        finally:
            for worker in workers:
                worker.stop()
    expected = [f"{number}:{sum(number + part for part in range(SIZE))}" for number in range(CHORDS + 10)]
    assert bodies() == sorted(expected)
