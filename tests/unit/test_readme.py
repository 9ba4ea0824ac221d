"""README and docs/ are correct: their commands exist and are those of CI, Python compiles, options exist."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastres.options import Options

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands behind a prompt, without comments."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [line[2:].split("  #")[0].strip() for line in lines if line.startswith("$ ")]


def test_there_is_something_to_test() -> None:
    assert len(commands(README)) >= 4
    assert len(blocks(README, "python")) >= 2


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_the_named_scripts_exist(text: str) -> None:
    words = [word for command in commands(text) for word in command.split()]
    scripts = [word.rstrip(";") for word in words if word.startswith(("ci/", ".ci/"))]
    assert scripts
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), script


def test_ci_runs_the_test_command_word_for_word() -> None:
    [test] = [command for command in commands(README) if command.startswith("ci/test")]
    run = (ROOT / ".ci" / "run").read_text()
    steps = re.search(r"^for check in (.*); do$", run, re.MULTILINE)
    assert steps is not None
    assert f'"{test}"' in steps.group(1).split()
    assert re.search(r"^ +\$check \|\|", run, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page: str) -> None:
    for block in blocks(PAGES[page], "python"):
        compile(block, page, "exec")


def test_every_option_is_described_and_no_other() -> None:
    settings = PAGES["settings.md"]
    table = settings[settings.index("## Options of fastres") : settings.index("## Settings of Celery")]
    described = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(described) == sorted(option.name for option in fields(Options))


def test_every_page_is_in_the_site() -> None:
    listed = {name for block in blocks(PAGES["index.md"], r"\{toctree\}") for name in block.split()}
    assert {name.removesuffix(".md") for name in PAGES} - {"README", "index"} <= listed


def test_readme_is_short() -> None:
    """A screen and a half."""
    assert len(README.splitlines()) < 100
