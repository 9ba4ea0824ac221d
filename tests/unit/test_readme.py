"""README says what is so: its commands are there, and are what CI runs; its Python compiles; its options exist."""

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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What is typed behind a prompt, without its comment."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [line[2:].split("  #")[0].strip() for line in lines if line.startswith("$ ")]


def test_there_is_something_to_test() -> None:
    assert len(commands(README)) >= 4
    assert len(blocks(README, "python")) >= 3


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_scripts_that_are_named_are_there(text: str) -> None:
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


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_every_option_is_described_and_no_other() -> None:
    table = README[README.index("## Options") : README.index("Celery's own settings:")]
    described = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(described) == sorted(option.name for option in fields(Options))
