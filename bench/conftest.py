"""Servers and options of the benchmarks. Without --size they measure very little, to check that they work."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chord_runs import run_of
from filler import redis_version
from machine import describe
from rabbitmq_node import Node, Redis
from runs import Bench, Case, Run, Unavailable
from workloads import SIZES

#: The description of the machine for the report.
MACHINE = pytest.StashKey[dict[str, Any]]()

#: RabbitMQ 4's version of classic queues on disk, its only one.
AS_IN_4 = {"classic_queue.default_version": "2"}

Measure = Callable[[Case], dict[str, Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=SIZES, default="tiny", help="how much the benchmarks measure")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Without --size, print no table.
    if config.getoption("size") == "tiny" and not config.getoption("benchmark_json"):
        config.option.benchmark_disable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test for each of its module's cases, the repetitions of one apart from each other."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(SIZES[metafunc.config.getoption("size")])
        rounds = range(max(case.repetitions for case in cases))
        turns = [(case, turn) for turn in rounds for case in cases if turn < case.repetitions]
        metafunc.parametrize("case", [pytest.param(case, id=f"{turn + 1}-{case.name}") for case, turn in turns])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastres"] = config.stash.get(MACHINE, {})


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Node(AS_IN_4) as node, Redis() as redis:
        bench = Bench(node, redis, build_limit(tmp_path_factory.mktemp("limit") / "limit"))
        request.config.stash[MACHINE] = describe(bench.broker.version(), redis_version(redis.url))
        yield bench
        bench.close()


@pytest.fixture
def measure(benchmark: Any, bench: Bench) -> Measure:
    """Measure a case once. Only the join is timed, in a prepared process."""

    def measure(case: Case) -> dict[str, Any]:
        runs: list[Run] = []

        def setup() -> None:
            runs.append(run_of(bench, case))

        try:
            taken = benchmark.pedantic(lambda: runs[-1].go(), setup=setup, rounds=1)
        except Unavailable as reason:
            pytest.skip(str(reason))
        finally:
            for run in runs:
                run.close()
        benchmark.group = f"{case.how} {case.workload} {case.serializer} {case.count}"
        benchmark.extra_info.update(
            peer=case.peer, how=case.how, workload=case.workload, serializer=case.serializer, traced=case.traced,
            **taken,
        )  # fmt: skip
        return taken

    return measure


def build_limit(target: Path) -> Path | None:
    source = Path(__file__).with_name("limit.c")
    try:
        command = ["cc", "-O2", "-o", str(target), str(source), "-lrabbitmq"]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return target
