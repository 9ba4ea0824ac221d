"""docs/errors.md describes every exception and every log message."""

from __future__ import annotations

import ast
from pathlib import Path

from fastres import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text()
LEVELS = {"warning", "error", "exception"}


def logged() -> set[str]:
    """The log messages in the package's sources, each up to the end of its line."""
    found = set()
    for path in (ROOT / "fastres").rglob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "logger"
            ):
                message = ast.get_source_segment(source, node.args[0])
                assert message is not None
                found.add(ast.literal_eval(message.splitlines()[0]))
    return found


def test_every_exception_is_described() -> None:
    for name in errors.__all__:
        if isinstance(kind := getattr(errors, name), type) and kind is not errors.Error:
            assert f"| `{name}` |" in PAGE, name


def test_every_log_message_is_described() -> None:
    messages = logged()
    assert len(messages) > 20
    assert {message for message in messages if f"`{message}`" not in PAGE} == set()
    # And describes no other.
    told = {
        line.split("`")[1] for line in PAGE.partition("## Log messages")[2].splitlines() if line.startswith("| `")
    }
    assert told == messages
