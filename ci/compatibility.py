"""Writes docs/compatibility.md, or prints it: the results of the suite on each broker, Python and Celery of ci/matrix.

Replaces the rows of the runs in the folder and keeps the others.

Fails when a test failed that `tests/compatibility.toml` has no reason for.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "compatibility.md"
KNOWN = ROOT / "tests" / "compatibility.toml"
HEAD = """\
# Compatibility

Results of the test suite (units, parity, integration, faults) on other brokers, Pythons and Celerys.
`ci/matrix --report` runs the suite there and writes this page. The brokers of `trixie` and `sid` declare quorum queues
by default; in the rows `-quorum` every application has `queue_type="quorum"` too.

| run | RabbitMQ | Python | Celery | kombu | py-amqp | passed | failed | skipped |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Run(NamedTuple):
    """A row of the matrix."""

    name: str
    versions: dict[str, str]
    passed: int
    skipped: int
    #: Names of tests.
    failed: list[str]
    #: Those that failed beside the others, and passed when they ran once more by themselves.
    again: list[str]


def read(place: Path) -> Run:
    versions = json.loads(place.read_text())
    first = outcomes(place.with_suffix(".xml"))
    again = place.with_suffix(".again.xml")
    both = first | outcomes(again) if again.exists() else first
    count = collections.Counter(both.values())
    failed = [name for name, outcome in both.items() if outcome == "failed"]
    recovered = [name for name, outcome in first.items() if outcome == "failed" != both[name]]
    return Run(place.stem, versions, count["passed"], count["skipped"], failed, recovered)


def outcomes(place: Path) -> dict[str, str]:
    """The outcome of each test: passed, failed or skipped."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(place).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = "failed"
        elif case.find("skipped") is not None:
            found[name] = "skipped"
        else:
            found.setdefault(name, "passed")
    return found


def reason_of(known: list[dict[str, Any]], run: Run, test: str) -> str | None:
    """Why a test may fail in a run, None: it may not."""
    for entry in known:
        if re.fullmatch(entry["run"], run.name) and re.fullmatch(entry["test"], test):
            return str(entry["reason"])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("place", type=Path, help="the folder with the runs")
    given = parser.parse_args()
    known = tomllib.loads(KNOWN.read_text())["known"]
    # The page keeps the rows of runs that were not repeated: they may have been made on other machines.
    rows, reasons = read_page(REPORT.read_text() if REPORT.exists() else "")
    unknown = 0
    for run in map(read, given.place.glob("*.json")):
        of = [run.versions[name] for name in ("rabbitmq", "python", "celery", "kombu", "amqp")]
        rows[run.name] = f"| {run.name} | {' | '.join(of)} | {run.passed} | {len(run.failed)} | {run.skipped} |\n"
        reasons[run.name] = ""
        for test in run.failed:
            reason = reason_of(known, run, test)
            unknown += reason is None
            reasons[run.name] += f"- {run.name}: `{test}`: {reason or '**not explained**'}\n"
        for test in run.again:
            reasons[run.name] += f"- {run.name}: `{test}`: beside the others only; passed by itself\n"
    names = sorted(rows)
    failed = "".join(reasons[name] for name in names) or "Nothing.\n"
    text = f"{HEAD}{''.join(rows[name] for name in names)}\n## What failed\n\n{failed}"
    print(text)
    if given.report:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(text)
    return 1 if unknown else 0


def read_page(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """The rows of a written page, and the lines on their failures, by the name of the run."""
    rows, reasons = {}, collections.defaultdict(str)
    for line in page.splitlines(keepends=True):
        if row := re.match(r"\| (\S+) \| \d", line):
            rows[row[1]] = line
        elif failure := re.match(r"- (\S+): ", line):
            reasons[failure[1]] += line
    return rows, reasons


if __name__ == "__main__":
    sys.exit(main())
