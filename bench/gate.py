"""The gate: compares ratios and figures of one run with the floors in floors.toml."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from records import Key, Records

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLOORS = Path(__file__).with_name("floors.toml")


@dataclass(frozen=True)
class Verdict:
    """A ratio of a run beside its floor."""

    name: str
    bound: str
    target: float | None
    floor: float
    #: None: the run did not measure it.
    value: float | None
    #: The number of results that were measured.
    count: int | None

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.floor if self.bound == "least" else self.value <= self.floor


def judge(records: Records, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The ratio of each row of floors.toml."""
    return [_judge(records, **row) for row in rows]


def read_floors(path: Path = FLOORS) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tomllib.loads(path.read_text("utf-8"))["ratio"]
    return rows


def _judge(
    records: Records,
    *,
    name: str,
    measure: str,
    of: dict[str, Any],
    bound: str,
    floor: float,
    results: int,
    to: dict[str, Any] | None = None,
    target: float | None = None,
    grown: Sequence[int] = (),
) -> Verdict:
    if bound not in ("least", "most"):
        raise ValueError(f"{name}: bound = {bound!r}, expected 'least' or 'most'")
    value = count = None
    if to is None:
        counts = [count for count in records.counts(**of) if count >= results]
        if counts:
            count = counts[0]
            value = records.median(measure, Key(count=count, **of))
    elif of == to:
        # A ratio of many results to few.
        counts = records.counts(**of)
        if len(counts) > 1 and counts[-1] >= results:
            small, count = counts[0], counts[-1]
            few = records.median(measure, Key(count=small, **to))
            many = records.median(measure, Key(count=count, **of))
            if few is not None and many is not None:
                # A difference is between two measured numbers of results.
                value = (many - few) * (grown[1] - grown[0]) / (count - small) if grown else many / few
    else:
        common = [count for count in records.counts(**of) if count >= results and count in records.counts(**to)]
        if common:
            count = common[0]
            top = records.median(measure, Key(count=count, **of))
            bottom = records.median(measure, Key(count=count, **to))
            if top is not None and bottom:
                value = top / bottom
    return Verdict(name, bound, target, floor, value, count)


def table(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Rows of text: name, target, floor, measured value, verdict."""
    rows = []
    for verdict in verdicts:
        sign = "≥" if verdict.bound == "least" else "≤"
        measured = "not measured" if verdict.value is None else f"{verdict.value:.2f}"
        target = "" if verdict.target is None else f"{sign} {verdict.target:g}"
        word = "ok" if verdict.passed else "FAILED"
        count = "" if verdict.count is None else f"{verdict.count:,}"
        rows.append((verdict.name, count, target, f"{sign} {verdict.floor:g}", measured, word))
    return rows


HEAD = ("ratio", "results", "target", "floor", "measured", "")


@click.command(help=__doc__)
@click.argument("json", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--floors", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=FLOORS)
def main(json: Path, floors: Path) -> None:
    verdicts = judge(Records(json), read_floors(floors))
    rows = [HEAD, *table(verdicts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        first, *others = (
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        click.echo("  ".join([first, *others]).rstrip())
    failed = [verdict.name for verdict in verdicts if not verdict.passed]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(verdicts)} ratios crossed their floor, or were not measured."
        )
    click.echo(f"All {len(verdicts)} ratios keep their floors.")


if __name__ == "__main__":
    main()
