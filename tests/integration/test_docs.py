"""The code of README and docs/ runs unchanged: the blocks of a page in order, with a worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rabbitmq_node import Leashed, Node

ROOT = Path(__file__).parents[2]
START = (ROOT / "docs" / "start.md").read_text()
#: The broker's URL on the pages.
BROKER = "amqp://guest:guest@localhost//"
BLOCK = re.compile(r"(<!-- (?:file|not run): .*? -->\n\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


def file_of(page: str, name: str) -> str:
    """The block that a reader saves as this file."""
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


def code_of(page: Path) -> str:
    """The blocks of a page as one program, without those that are marked as not run, with a reason."""
    return "\n".join(code for note, code in BLOCK.findall(page.read_text()) if not note.startswith("<!-- not run"))


class Project(Leashed):
    """The folder of a newcomer: ``proj.py`` of the page *Start*, and its worker."""

    name = "worker"
    hint = "The log above says why."

    def __init__(self, node: Node, source: Path) -> None:
        self.source = source
        (source / "proj.py").write_text(file_of(START, "proj.py").replace(BROKER, node.url))
        super().__init__(envvars={"PYTHONPATH": str(source), "C_FORCE_ROOT": "1"})

    def shell_line(self, folder: Path) -> str:
        return f"exec {sys.executable} -m celery -A proj worker --loglevel INFO"

    def pre_start_check(self) -> bool:
        return False

    def after_start_check(self) -> bool:
        return self.folder is not None and " ready." in (self.folder / "output.log").read_text()

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.source)}
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.source,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )


@pytest.fixture(scope="module")
def project(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with Project(node, tmp_path_factory.mktemp("project")) as project:
        yield project


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_blocks_run(page: Path, project: Project, node: Node) -> None:
    done = project.run(code_of(page).replace(BROKER, node.url))
    assert done.returncode == 0, done.stderr


def test_the_commands_of_start_print_what_the_page_says(project: Project) -> None:
    done = project.run(file_of(START, "client.py"))
    printed = re.search(r"^```text\n(.*?)^```", START, re.MULTILINE | re.DOTALL)
    assert printed is not None
    assert done.stdout == printed[1], done.stderr


def test_readme(node: Node, project: Project) -> None:
    """The tasks of its program have the same names as the worker's."""
    program, others = (code for _, code in BLOCK.findall((ROOT / "README.md").read_text()))
    for code in (program.replace(BROKER, node.url), others):
        done = project.run(code)
        assert done.returncode == 0, done.stderr
