"""The benchmark gate: compares the figures of a run with floors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gate import judge, main, read_floors
from records import Records

OURS = {"peer": "fastres", "how": "get"}
OTHERS = {"peer": "Celery rpc", "how": "get"}

ROW = {"name": "CPU", "measure": "cpu", "of": OTHERS, "to": OURS, "results": 1000, "bound": "least", "floor": 10}

#: A figure without a comparison.
SMALL = {"peer": "fastres", "how": "small"}
QUEUES = {"name": "queues", "measure": "queues", "of": SMALL, "results": 100, "bound": "most", "floor": 0}


def taken(peer: str, cpu: float = 1.0, count: int = 1000, how: str = "get", **others: Any) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it; `cpu` is in microseconds per result."""
    info = {"peer": peer, "how": how, "workload": "dict", "serializer": "json", "traced": False, **others}
    return {"extra_info": {**info, "count": count, "cpu": cpu * count / 1e6, "wall": 1.0}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(*benchmarks: dict[str, Any]) -> Path:
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"machine_info": {}, "datetime": "2026-01-01", "benchmarks": benchmarks}))
        return path

    return write


def value_of(path: Path, **changes: Any) -> Any:
    (verdict,) = judge(Records(path), [{**ROW, **changes}])
    return verdict


def test_ratio_of_medians(write: Any) -> None:
    theirs = [taken("Celery rpc", cpu) for cpu in (100, 120, 900)]
    verdict = value_of(write(*theirs, taken("fastres", 6), taken("fastres", 4)))
    assert verdict.value == pytest.approx(120 / 5)
    assert verdict.passed


@pytest.mark.parametrize(
    ("bound", "floor", "passed"),
    [("least", 10, True), ("least", 10.1, False), ("most", 10, True), ("most", 9.9, False)],
)
def test_bounds(write: Any, bound: str, floor: float, passed: bool) -> None:
    path = write(taken("Celery rpc", 20), taken("fastres", 2))
    assert value_of(path, bound=bound, floor=floor).passed is passed


def test_unknown_bound(write: Any) -> None:
    with pytest.raises(ValueError, match="expected 'least' or 'most'"):
        value_of(write(), bound="about")


def test_a_missing_measurement_fails(write: Any) -> None:
    verdict = value_of(write(taken("fastres")))
    assert verdict.value is None
    assert not verdict.passed


def test_a_figure_of_too_few_results_is_ignored(write: Any) -> None:
    path = write(taken("Celery rpc", 99, 100), taken("fastres", 1, 100))
    assert value_of(path).value is None


def test_the_smallest_common_number_of_results(write: Any) -> None:
    ours = [taken("fastres", cpu, count) for cpu, count in ((1, 1000), (2, 5000), (4, 9000))]
    verdict = value_of(write(*ours, taken("Celery rpc", 40, 9000), taken("Celery rpc", 30, 5000)))
    assert (verdict.count, verdict.value) == (5000, pytest.approx(15))


def test_other_workloads_and_traced_runs_do_not_count(write: Any) -> None:
    ours = [taken("fastres", 2), taken("fastres", 500, traced=True), taken("fastres", 500, workload="bytes")]
    assert value_of(write(*ours, taken("Celery rpc", 30))).value == pytest.approx(15)


def test_a_ratio_of_many_results_to_few(write: Any) -> None:
    path = write(taken("fastres", 2, 100), taken("fastres", 3, 1000), taken("fastres", 9, 10))
    assert value_of(path, of=OURS, to=OURS).value == pytest.approx(3 / 9)


def test_growth_is_between_two_numbers_of_results(write: Any) -> None:
    path = write(taken("fastres", count=100, growth=5), taken("fastres", count=1100, growth=7))
    verdict = value_of(path, measure="growth", of=OURS, to=OURS, grown=[0, 10_000])
    assert verdict.value == pytest.approx(20)


@pytest.mark.parametrize(("made", "passed"), [(0, True), (1, False)])
def test_a_single_number(write: Any, made: int, passed: bool) -> None:
    path = write(taken("fastres", queues=made, how="small"))
    (verdict,) = judge(Records(path), [QUEUES])
    assert (verdict.value, verdict.passed) == (made, passed)


def test_a_missing_single_number_fails(write: Any) -> None:
    (verdict,) = judge(Records(write()), [QUEUES])
    assert not verdict.passed


def test_growth_needs_two_numbers_of_results(write: Any) -> None:
    assert value_of(write(taken("fastres")), of=OURS, to=OURS).value is None


@pytest.mark.parametrize(("floor", "code", "word"), [(10, 0, "keep"), (20, 1, "FAILED")])
def test_command(write: Any, tmp_path: Path, floor: float, code: int, word: str) -> None:
    floors = tmp_path / "floors.toml"
    floors.write_text(
        f'[[ratio]]\nname = "CPU"\nmeasure = "cpu"\nof = {{ peer = "Celery rpc", how = "get" }}\n'
        f'to = {{ peer = "fastres", how = "get" }}\nresults = 1\nbound = "least"\ntarget = 30\nfloor = {floor}\n'
    )
    path = write(taken("Celery rpc", 30), taken("fastres", 2))
    done = CliRunner().invoke(main, [str(path), "--floors", str(floors)])
    assert done.exit_code == code
    assert word in done.output
    assert "15.00" in done.output


def test_floors_are_no_stricter_than_their_targets() -> None:
    for row in read_floors():
        if "target" in row:
            kept = row["floor"] <= row["target"] if row["bound"] == "least" else row["floor"] >= row["target"]
            assert kept, row["name"]


def test_no_floor_limits_a_time() -> None:
    """Differences are of memory; single numbers are of queues or memory."""
    numbers = {"queues", "queues each", "growth", "joiner"}
    for row in read_floors():
        assert "to" in row or row["measure"] in numbers
        if "to" in row:
            assert ("grown" in row) == (row["measure"] in ("growth", "held"))
