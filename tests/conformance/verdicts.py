"""The verdict on two runs of the suite: tests that differ, and whether known.toml has their reasons."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from celery_suite import Outcomes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KNOWN = Path(__file__).with_name("known.toml")

#: Columns of the counts: the words of `Outcome`, and how they are shown.
WORDS = {"passed": "passed", "failed": "failed", "skipped": "skipped", "xfailed": "failed as expected"}


@dataclass(frozen=True)
class Verdict:
    """A run of the same tests with each backend, compared with known.toml."""

    redis: Outcomes
    fastres: Outcomes
    #: Reasons by test.
    known: Mapping[str, str]

    @property
    def differing(self) -> list[str]:
        """Tests that pass with Redis and not with fastres."""
        return [test for test in self.redis if self.redis[test].passed and not self.fastres[test].passed]

    @property
    def failing(self) -> list[str]:
        """Tests that fail with Redis too."""
        return [test for test in self.redis if self.redis[test].word == "failed"]

    @property
    def retried(self) -> list[str]:
        """Tests that passed in a second attempt, with one backend or both."""
        runs = self.redis, self.fastres
        return [test for test in self.redis if any(run[test].passed and run[test].again for run in runs)]

    @property
    def faults(self) -> list[str]:
        """Why the run has failed: tests that are not in known.toml, and entries that do not apply any more."""
        return [
            *(f"{test} passes with Redis, not with fastres" for test in self.differing if test not in self.known),
            *(f"{test} passes: known.toml has it for nothing" for test in self.known if self._passes(test)),
        ]

    @property
    def nameless(self) -> list[str]:
        """Names in known.toml that do not exist in a complete run."""
        return [
            f"{test} is in known.toml, and not in the suite" for test in self.known if test not in self.fastres
        ]

    def _passes(self, test: str) -> bool:
        return test in self.fastres and self.fastres[test].passed


def read_known(path: Path = KNOWN) -> dict[str, str]:
    known: dict[str, str] = tomllib.loads(path.read_text("utf-8"))["known"]
    return known


def report(verdict: Verdict, introduction: str) -> str:
    """The report, in Markdown."""
    runs = {"Redis": verdict.redis, "fastres": verdict.fastres}
    parts = ["# Conformance", introduction, _counts(runs)]
    if verdict.differing:
        reasons = [(test, _why(verdict.known.get(test) or _unnamed(verdict, test))) for test in verdict.differing]
        parts += ["## Passed with Redis, not with fastres", _table(("test", "why"), reasons)]
    if verdict.failing:
        rows = [(test, *(_cell(run, test) for run in runs.values())) for test in verdict.failing]
        parts += ["## Failed with Redis too", _table(("test", *runs), rows)]
    if verdict.retried:
        rows = [(test, *(_cell(run, test) for run in runs.values())) for test in verdict.retried]
        parts += ["## Passed in a second try, alone", _table(("test", *runs), rows)]
    return "\n\n".join(parts) + "\n"


def _counts(runs: Mapping[str, Outcomes]) -> str:
    rows = []
    files = dict.fromkeys(test.partition("::")[0] for run in runs.values() for test in run)
    for file in [*files, "all"]:
        for backend, run in runs.items():
            counts = Counter(
                outcome.word for test, outcome in run.items() if file in ("all", test.partition("::")[0])
            )
            rows.append((file, backend, *(str(counts[word]) for word in WORDS)))
    return _table(("file", "result backend", *WORDS.values()), rows)


def _unnamed(verdict: Verdict, test: str) -> str:
    outcome = verdict.fastres[test]
    return f"**not in known.toml**: {WORDS[outcome.word]}, {outcome.reason}"


def _cell(run: Outcomes, test: str) -> str:
    outcome = run[test]
    word = f"{WORDS[outcome.word]}{' in a second try' if outcome.again and outcome.passed else ''}"
    return _why(f"{word}: {outcome.reason}" if outcome.reason else word)


def _why(text: str) -> str:
    """A text that fits into a cell."""
    return " ".join(text.replace("|", "\\|").split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
