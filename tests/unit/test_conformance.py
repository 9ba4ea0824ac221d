"""The verdict on two runs of Celery's integration suite, against known.toml."""

from __future__ import annotations

from celery_suite import GUARD, Outcome
from verdicts import Verdict, read_known, report

PASSED, FAILED, SKIPPED = Outcome("passed"), Outcome("failed", "a | b"), Outcome("skipped", "no")


def verdict(redis: Outcome, fastres: Outcome, **known: str) -> Verdict:
    return Verdict({"f::t": redis}, {"f::t": fastres}, {f"f::{test}": why for test, why in known.items()})


def test_both_pass() -> None:
    assert verdict(PASSED, PASSED).faults == []


def test_a_test_that_differs_needs_a_reason() -> None:
    for outcome in (FAILED, SKIPPED):
        assert verdict(PASSED, outcome).faults == ["f::t passes with Redis, not with fastres"]
        assert verdict(PASSED, outcome, t="so it is").faults == []


def test_a_reason_for_a_test_that_passes_or_is_missing() -> None:
    assert verdict(PASSED, PASSED, t="no").faults == ["f::t passes: known.toml has it for nothing"]
    assert verdict(FAILED, PASSED, t="no").faults == ["f::t passes: known.toml has it for nothing"]
    assert verdict(PASSED, PASSED, u="no").nameless == ["f::u is in known.toml, and not in the suite"]


def test_a_test_that_fails_with_redis_too_is_no_fault() -> None:
    both = verdict(FAILED, FAILED)
    assert (both.faults, both.failing) == ([], ["f::t"])


def test_the_report() -> None:
    text = report(verdict(PASSED, FAILED), "Introduction.")
    assert "| f | Redis | 1 | 0 | 0 | 0 |" in text
    assert "| f::t | **not in known.toml**: failed, a \\| b |" in text
    assert "| f::t | because |" in report(verdict(PASSED, FAILED, t="because"), "")
    assert "| f::t | failed: a \\| b | failed: a \\| b |" in report(verdict(FAILED, FAILED), "")
    again = Outcome("passed", "was late", again=True)
    assert "| f::t | passed | passed in a second try: was late |" in report(verdict(PASSED, again), "")


def test_the_guards_of_the_suite() -> None:
    for guard in (
        "if not manager.app.conf.result_backend.startswith('redis'):",
        "if not app.conf.result_backend.startswith(('redis', 'rpc')):",
        "if not isinstance(manager.app.backend, BaseKeyValueStoreBackend):",
    ):
        assert GUARD.fullmatch(guard)
    assert not GUARD.search("if manager.app.conf.result_backend.startswith('redis'):")


def test_known_toml_can_be_read() -> None:
    assert all(reason for reason in read_known().values())
